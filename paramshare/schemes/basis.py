"""Shared filter bases: part of every kernel's filters are the same tensors in many layers."""

import dataclasses

import jax
import jax.numpy as jnp

from paramshare.schemes.initial import orthogonal, standard_deviation
from paramshare.schemes.interface import UNIQUE, SchemeError, Site, bank_dtype, check_arrays, check_count, check_equal_shapes, check_flag


@dataclasses.dataclass(frozen=True)
class FilterBasis:
    r"""Kernels whose filters are a layer's own u and, behind them, s that all layers share.

    For sites of one shape (..., C, u + s), the last axis counting filters. The bank is `{"filters": (bases, ..., C, s)}`, the
    coefficients are `{"unique": (L, ..., C, u)}`; they are weights, and decay and count as such. With several bases, site i takes basis
    i mod bases: `bases=2` is one for all first and one for all second convolutions of a stage's blocks (the paper's "double").

    In the paper these are the kernels of *factored* convolutions, which a batch norm and a 1x1 convolution follow: the zoo's
    `resnet34-s32u1` and its like.

    Shared filters start orthonormal, those of all bases of a bank jointly, or He-normal, fan-out (of the s filters); unique ones He-normal,
    fan-out (of the u filters). `paramshare.orthogonality` keeps shared ones near to orthonormal while training.

    Args:
      shared: s, at least 1.
      unique: u, 0 or more.
      bases: how many, at least 1.
      orthonormal: how shared filters start.

    Raises:
      SchemeError: if a number is not a legal one.

    Example:
      >>> import jax
      >>> from paramshare import FilterBasis, Site
      >>> sites = tuple(Site(f"block{i}/basis/kernel", (3, 3, 16, 9)) for i in range(4))
      >>> scheme = FilterBasis(shared=8, unique=1)
      >>> bank, coefficients = scheme.init(jax.random.key(0), sites)
      >>> bank["filters"].shape, coefficients["unique"].shape
      ((1, 3, 3, 16, 8), (4, 3, 3, 16, 1))
      >>> scheme.expand(bank, coefficients, sites)[3].shape
      (3, 3, 16, 9)

    References:
      Kang & Kim, Deeply Shared Filter Bases for Parameter-Efficient Convolutional Neural Networks, NeurIPS 2021, arXiv:2006.05066
    """

    shared: int
    unique: int = 0
    bases: int = 1
    orthonormal: bool = True

    def __post_init__(self):
        object.__setattr__(self, "shared", check_count("FilterBasis", "shared", self.shared, 1))
        object.__setattr__(self, "unique", check_count("FilterBasis", "unique", self.unique, 0))
        object.__setattr__(self, "bases", check_count("FilterBasis", "bases", self.bases, 1))
        check_flag("FilterBasis", "orthonormal", self.orthonormal)

    def check(self, sites: tuple[Site, ...]) -> None:
        """Raises `SchemeError` unless all sites have one shape, of u + s filters, and no more are shared than can be independent."""
        check_equal_shapes(sites, self)
        first, rank = sites[0], self.unique + self.shared
        if first.shape[-1] != rank:
            raise SchemeError(
                f"{self} makes kernels of {self.unique} + {self.shared} = {rank} filters, but {first} is {first.shape}, of "
                f"{first.shape[-1]}; make the ranks add up to that"
            )
        if self.bases * self.shared > first.fan_in or rank > first.fan_in:
            raise SchemeError(
                f"{self} shares {self.bases * self.shared} filters, but a filter of {first} has {first.fan_in} "
                "numbers, and no more than so many filters are independent; lower the rank"
            )
        if self.bases > len(sites):
            raise SchemeError(f"{self} has more bases than sites: {len(sites)}, the first of them {first}")

    def init(self, key: jax.Array, sites: tuple[Site, ...]) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """Draws orthonormal filters, and He-normal unique ones; with u = 0 there are no coefficients."""
        self.check(sites)
        shared_key, unique_key = jax.random.split(key)
        dtype, cell = bank_dtype(sites), sites[0].shape[:-1]
        if self.orthonormal:
            rows_SxP = orthogonal(shared_key, self.bases * self.shared, sites[0].fan_in, dtype)
            bank = {"filters": jnp.moveaxis(rows_SxP.reshape(self.bases, self.shared, *cell), 1, -1)}
        else:
            bank = {"filters": self._he(shared_key, (self.bases, *cell, self.shared), dtype)}
        if not self.unique:
            return bank, {}
        return bank, {UNIQUE: self._he(unique_key, (len(sites), *cell, self.unique), dtype)}

    def expand(self, bank: dict[str, jax.Array], coefficients: dict[str, jax.Array], sites: tuple[Site, ...]) -> tuple[jax.Array, ...]:
        """The kernels: unique filters first; `SchemeError` if the arrays are not of the shapes that `init` gives."""
        cell = sites[0].shape[:-1]
        check_arrays(self, "a bank", bank, {"filters": (self.bases, *cell, self.shared)})
        check_arrays(self, "coefficients", coefficients, {UNIQUE: (len(sites), *cell, self.unique)} if self.unique else {})
        kernels = []
        for i, site in enumerate(sites):
            kernel = bank["filters"][i % self.bases]
            if self.unique:
                kernel = jnp.concatenate([coefficients[UNIQUE][i], kernel], axis=-1)
            kernels.append(kernel.astype(site.dtype))
        return tuple(kernels)

    def from_dense(self, kernels: tuple[jax.Array, ...], sites: tuple[Site, ...]) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """The bank and unique filters whose kernels are nearest to the given ones, in the sum of squares.

        The first u filters are taken as they are, the others are means over a basis's sites.

        Args:
          kernels: L arrays, in the order of the sites.
          sites: the bank's sites.

        Raises:
          SchemeError: if the kernels do not have the sites' shapes.
        """
        self.check(sites)
        check_arrays(self, "kernels", tuple(kernels), tuple(site.shape for site in sites))
        stack = jnp.stack([jnp.asarray(kernel, bank_dtype(sites)) for kernel in kernels])
        means = [jnp.mean(stack[i :: self.bases, ..., self.unique :], axis=0) for i in range(self.bases)]
        return {"filters": jnp.stack(means)}, {UNIQUE: stack[..., : self.unique]} if self.unique else {}

    @staticmethod
    def _he(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
        """Filters, several kernels of them along the first axis, normal with variance 2 / fan_out of one kernel."""
        return standard_deviation(Site("", shape[1:]), 2.0, "fan_out") * jax.random.normal(key, shape, dtype)
