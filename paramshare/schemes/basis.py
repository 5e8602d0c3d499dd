"""Shared filter bases: part of every kernel's filters are the same tensors in many layers."""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from paramshare.schemes.initial import he_fan_out, model_std, orthogonal, rms_std
from paramshare.schemes.interface import (
    Filters,
    Initial,
    Scheme,
    SchemeError,
    Site,
    Weights,
    bank_dtype,
    check_choice,
    check_count,
    check_flag,
)


@dataclasses.dataclass(frozen=True)
class FilterBasis(Scheme):
    r"""Kernels of u filters that belong to the layer, followed by s filters that layers share.

    For sites of one shape, in matrix form (..., C, u + s): the last axis counts filters. The bank
    is `{"filters": (bases, ..., C, s)}`; each site's own filters are (..., C, u). With several
    bases, site i takes basis i mod bases: `bases=2` is one for all first and one for all second
    convolutions of a stage's blocks (the paper's "double").

    In the paper these are the kernels of *factored* convolutions, which are followed by a batch
    norm and a 1x1 convolution: `resnet34-s32u1` and similar networks of the zoo.

    Initialization. In the paper's, shared filters are orthonormal, across all bases of a bank
    jointly, or He-normal (fan-out of the s filters); unique filters are He-normal (fan-out of the u
    filters). With initial="model", shared filters are orthogonal (or normal) and unique filters
    normal: a basis has the root mean square of its sites' standard deviations, unique filters have
    the standard deviation of their site. `paramshare.orthogonality` keeps shared filters close to
    orthonormal during training; it asks for length 1, where only the paper's start.

    Args:
      shared: s, at least 1.
      unique: u, 0 or more.
      bases: the number of bases, at least 1.
      orthonormal: whether shared filters start orthogonal rather than normal.
      initial: "model" or "paper", see above.

    Raises:
      SchemeError: if an argument is invalid.

    Example:
      >>> import jax
      >>> from paramshare import FilterBasis, Site
      >>> sites = tuple(Site(f"block{i}/kernel", (3, 3, 16, 9), std=0.1) for i in range(4))
      >>> scheme = FilterBasis(shared=8, unique=1)
      >>> weights = scheme.init(jax.random.key(0), sites)
      >>> weights.bank["filters"].shape, weights.own["block3.kernel"].shape
      ((1, 3, 3, 16, 8), (3, 3, 16, 1))
      >>> scheme.expand(weights, sites)[3].shape
      (3, 3, 16, 9)

    References:
      Kang & Kim, Deeply Shared Filter Bases for Parameter-Efficient Convolutional Neural Networks,
      NeurIPS 2021, arXiv:2006.05066
    """

    shared: int
    unique: int = 0
    bases: int = 1
    orthonormal: bool = True
    initial: Initial = "model"
    one_shape: ClassVar[bool] = True

    def __post_init__(self):
        for name, least in (("shared", 1), ("unique", 0), ("bases", 1)):
            count = check_count("FilterBasis", name, getattr(self, name), least)
            object.__setattr__(self, name, count)
        check_flag("FilterBasis", "orthonormal", self.orthonormal)
        check_choice("FilterBasis", "initial", self.initial, Initial)

    def _check(self, sites: tuple[Site, ...]) -> None:
        first, rank = sites[0], self.unique + self.shared
        for site in sites:
            if site.matrix_shape != first.matrix_shape:
                raise SchemeError(
                    f"{self}: as a matrix {first} is {first.matrix_shape} and {site} is "
                    f"{site.matrix_shape}; give them different banks"
                )
        if first.matrix_shape[-1] != rank:
            raise SchemeError(
                f"{self} makes kernels of {self.unique} + {self.shared} = {rank} filters, but "
                f"{first} of shape {first.shape} has {first.matrix_shape[-1]}; make them add up"
            )
        if self.bases * self.shared > first.fan_in or rank > first.fan_in:
            raise SchemeError(
                f"{self} shares {self.bases * self.shared} filters, but a filter of {first} has "
                f"{first.fan_in} entries, so no more filters are independent; lower the rank"
            )
        if self.bases > len(sites):
            raise SchemeError(
                f"{self} has more bases than sites: {len(sites)}, the first is {first}"
            )

    def _init(self, key: jax.Array, sites: tuple[Site, ...]) -> Weights:
        shared_key, own_key = jax.random.split(key)
        dtype, cell = bank_dtype(sites), sites[0].matrix_shape[:-1]
        paper, P = self.initial == "paper", sites[0].fan_in
        shape = (self.bases, *cell, self.shared)
        if self.orthonormal:
            rows_SxP = orthogonal(shared_key, self.bases * self.shared, P, dtype)
            filters = jnp.moveaxis(rows_SxP.reshape(self.bases, self.shared, *cell), 1, -1)
            filters = filters if paper else math.sqrt(P) * filters
        else:
            filters = jax.random.normal(shared_key, shape, dtype)
            filters = he_fan_out(Site("", shape[1:])) * filters if paper else filters
        if not paper:
            stds = [rms_std(sites[i :: self.bases]) for i in range(self.bases)]
            filters = jnp.stack([std * basis for std, basis in zip(stds, filters, strict=True)])
        if not self.unique:
            return Weights({"filters": filters})
        shape = (*cell, self.unique)
        std = he_fan_out(Site("", shape)) if paper else 1.0
        own = std * jax.random.normal(own_key, (len(sites), *shape), dtype)
        if not paper:
            own = [model_std(site) * own[i] for i, site in enumerate(sites)]
        return self._weights(filters, own, sites)

    def _expand(self, weights: Weights, sites: tuple[Site, ...]) -> tuple[jax.Array, ...]:
        kernels = []
        for i, site in enumerate(sites):
            kernel = weights.bank["filters"][i % self.bases]
            if self.unique:
                kernel = jnp.concatenate([weights.own[site.key], kernel], axis=-1)
            kernels.append(site.from_matrix(kernel))
        return tuple(kernels)

    def _from_dense(self, kernels: tuple[jax.Array, ...], sites: tuple[Site, ...]) -> Weights:
        """The first u filters are taken as they are, the others are means over a basis's sites."""
        stack = jnp.stack([s.to_matrix(kernel) for s, kernel in zip(sites, kernels, strict=True)])
        means = [
            jnp.mean(stack[i :: self.bases, ..., self.unique :], axis=0) for i in range(self.bases)
        ]
        return self._weights(jnp.stack(means), stack[..., : self.unique], sites)

    def filters(self, weights: Weights, sites: tuple[Site, ...]) -> Filters:
        """The shared filters of all bases, stacked, and every site's own."""

        def rows(filters: jax.Array) -> jax.Array:
            return filters.reshape(-1, filters.shape[-1]).T

        shared = jnp.concatenate([rows(basis) for basis in weights.bank["filters"]])
        own = [rows(weights.own[site.key]) for site in sites] if self.unique else []
        return Filters(shared, tuple(own))

    def _weights(self, filters: jax.Array, own: Any, sites: tuple[Site, ...]) -> Weights:
        if not self.unique:
            return Weights({"filters": filters})
        return Weights(
            {"filters": filters}, own={s.key: k for s, k in zip(sites, own, strict=True)}
        )
