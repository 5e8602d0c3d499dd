"""Whole kernels tied across layers, with or without a signed scale for each layer."""

import dataclasses
import math
import operator
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from paramshare.schemes.initial import he_fan_out, orthogonal, rms_std
from paramshare.schemes.interface import (
    Filters,
    Initial,
    Scheme,
    SchemeError,
    Site,
    Weights,
    bank_dtype,
    check_choice,
    check_flag,
    path_order,
)


@dataclasses.dataclass(frozen=True)
class Tied(Scheme):
    r"""One kernel for all sites, or one for each group of sites.

    .. math:: W_l = c_l K_{g(l)}

    The bank is `{"kernels": (G, ...)}`, G kernels of the sites' shape. With `scaled`, each site has
    a signed scale c_l, (), that starts at 1; without, c_l = 1. Trainable parameters: G P + L, or
    G P.

    Groups that repeat, (0, 1, 0, 1, ...), make a recurrent network. `paramshare.fold` finds such
    patterns in trained networks.

    Initialization. The paper's is He-normal (fan-out), or orthonormal filters. With
    initial="model", a kernel starts with the mean and standard deviation of its group's sites
    (root mean square).

    Args:
      orthonormal: whether the filters of a kernel (its output axes count them) start as rows of one
        (semi-)orthogonal matrix, instead of normal.
      groups: the group of each site, in the order of the sites' paths ("layer2" before "layer10"),
        numbered from 0 in the order of their first site; None is one group for all sites.
      scaled: whether every site has a signed scale.
      initial: "model" or "paper", see above.

    Raises:
      SchemeError: if an argument is invalid.

    Example:
      >>> import jax
      >>> from paramshare import Site, Tied
      >>> sites = tuple(Site(f"block{i}/kernel", (3, 3, 8, 8), std=0.1) for i in range(4))
      >>> scheme = Tied(groups=(0, 1, 0, 1), scaled=True)
      >>> weights = scheme.init(jax.random.key(0), sites)
      >>> weights.bank["kernels"].shape, weights.coefficients["block3.kernel"].shape
      ((2, 3, 3, 8, 8), ())
      >>> kernels = scheme.expand(weights, sites)
      >>> bool((kernels[1] == kernels[3]).all())
      True

    References:
      Kang & Kim, NeurIPS 2021, arXiv:2006.05066: ResNet50-Shared and MobileNetV2-Shared tie
      existing convolutions.
      Savarese & Maire, ICLR 2019, arXiv:1902.09701: groups, the result of folding soft sharing.
    """

    orthonormal: bool = False
    groups: tuple[int, ...] | None = None
    scaled: bool = False
    initial: Initial = "model"
    one_shape: ClassVar[bool] = True
    keeps_mean: ClassVar[bool] = True

    def __post_init__(self):
        check_flag("Tied", "orthonormal", self.orthonormal)
        check_flag("Tied", "scaled", self.scaled)
        check_choice("Tied", "initial", self.initial, Initial)
        if self.groups is not None:
            object.__setattr__(self, "groups", _check_groups(self.groups))

    def _check(self, sites: tuple[Site, ...]) -> None:
        if self.groups is not None and len(self.groups) != len(sites):
            raise SchemeError(
                f"{self} has groups for {len(self.groups)} sites, but there are {len(sites)}, the "
                f"first is {sites[0]}; give one group for each site"
            )

    def _init(self, key: jax.Array, sites: tuple[Site, ...]) -> Weights:
        groups, dtype = self.groups_of(sites), bank_dtype(sites)
        members = [
            tuple(site for site, group in zip(sites, groups, strict=True) if group == number)
            for number in range(max(groups) + 1)
        ]
        # One kernel takes the key itself: the draw is the same whether or not groups=(0, ..., 0) is
        # spelled out.
        keys = (
            [key]
            if len(members) == 1
            else [jax.random.fold_in(key, i) for i in range(len(members))]
        )
        kernels = [self._draw(key, dtype, of) for key, of in zip(keys, members, strict=True)]
        return self.weights(jnp.stack(kernels), jnp.ones(len(sites), dtype), sites)

    def _draw(self, key: jax.Array, dtype: jnp.dtype, members: tuple[Site, ...]) -> jax.Array:
        """One kernel, for the sites of one group."""
        site, paper = members[0], self.initial == "paper"
        if self.orthonormal:
            P, N = site.fan_in, site.matrix_shape[-1]
            rows_NxP = orthogonal(key, N, P, dtype)
            matrix = jnp.moveaxis(rows_NxP.reshape(N, *site.matrix_shape[:-1]), 0, -1)
            kernel, std = site.from_matrix(matrix), math.sqrt(max(N, P))
            if paper:
                return kernel
            kernel = std * kernel  # entries of mean square 1
        else:
            kernel = jax.random.normal(key, site.shape, dtype)
            if paper:
                return he_fan_out(site) * kernel
        mean = sum(site.mean or 0.0 for site in members) / len(members)
        return mean + rms_std(members) * kernel

    def _expand(self, weights: Weights, sites: tuple[Site, ...]) -> tuple[jax.Array, ...]:
        kernels = [self.kernels(weights.bank)[group] for group in self.groups_of(sites)]
        if self.scaled:
            scales = [weights.coefficients[site.key] for site in sites]
            kernels = [scale * kernel for scale, kernel in zip(scales, kernels, strict=True)]
        return tuple(kernels)

    def _from_dense(self, kernels: tuple[jax.Array, ...], sites: tuple[Site, ...]) -> Weights:
        """Without scales the mean of each group, with scales its leading singular vector."""
        groups, stack_LxP = self.groups_of(sites), jnp.stack([kernel.ravel() for kernel in kernels])
        rows, scales_L = [], jnp.ones(len(sites), stack_LxP.dtype)
        for number in range(max(groups) + 1):
            members = jnp.asarray([i for i, group in enumerate(groups) if group == number])
            if self.scaled:
                row_P, scales = leading(stack_LxP[members])
                scales_L = scales_L.at[members].set(scales)
            else:
                row_P = jnp.mean(stack_LxP[members], axis=0)
            rows.append(row_P.reshape(sites[0].shape))
        return self.weights(jnp.stack(rows), scales_L, sites)

    def groups_of(self, sites: tuple[Site, ...]) -> tuple[int, ...]:
        """The group of each site, in the order of `sites`."""
        if self.groups is None:
            return (0,) * len(sites)
        group = dict(zip(path_order(sites), self.groups, strict=True))
        return tuple(group[i] for i in range(len(sites)))

    def filters(self, weights: Weights, sites: tuple[Site, ...]) -> Filters:
        """The filters of all kernels, stacked."""
        matrices = [sites[0].to_matrix(kernel) for kernel in self.kernels(weights.bank)]
        return Filters(jnp.concatenate([m.reshape(-1, m.shape[-1]).T for m in matrices]))

    def kernels(self, bank: Any) -> jax.Array:
        """(G, *shape): the kernel of each group."""
        return bank["kernels"]

    def scales(self, weights: Weights, sites: tuple[Site, ...]) -> jax.Array:
        """(L,): the scale of each site; ones where sites have none."""
        if not self.scaled:
            return jnp.ones(len(sites), bank_dtype(sites))
        return jnp.stack([weights.coefficients[site.key] for site in sites])

    def weights(
        self, kernels_Gx: jax.Array, scales_L: jax.Array | None, sites: tuple[Site, ...]
    ) -> Weights:
        """A bank of these kernels, (G, *shape), and scales, (L,), which count if `scaled`."""
        bank = {"kernels": kernels_Gx}
        if not self.scaled:
            return Weights(bank)
        assert scales_L is not None
        return Weights(bank, {site.key: c for site, c in zip(sites, scales_L, strict=True)})


def leading(rows_LxN: jax.Array) -> tuple[jax.Array, jax.Array]:
    r"""The vector r and signed scales c that minimise \sum_l |row_l - c_l r|^2.

    The leading singular vector (Eckart & Young 1936). r carries the length, the mean of |c| is 1,
    and the sum of c is not negative. If all rows are zero, r = 0 and c = 1.

    Returns:
      r, (N,), and c, (L,).
    """
    left_LxL, singular_L, right_LxN = jnp.linalg.svd(rows_LxN, full_matrices=False)
    direction_N, scales_L = right_LxN[0], left_LxL[:, 0] * singular_L[0]
    mean = jnp.mean(jnp.abs(scales_L))
    sign = jnp.where(jnp.sum(scales_L) < 0, -1, 1).astype(rows_LxN.dtype)
    size = jnp.where(mean == 0, 1, mean) * sign
    return direction_N * jnp.where(mean == 0, 0, size), jnp.where(mean == 0, 1, scales_L / size)


def _check_groups(groups: Sequence[int]) -> tuple[int, ...]:
    try:
        numbers = tuple(operator.index(group) for group in groups)
    except TypeError:
        raise SchemeError(
            f"Tied(groups={groups!r}): groups must be integers, one for each site, such as "
            "(0, 1, 0, 1)"
        ) from None
    count = 0
    for number in numbers:
        if not 0 <= number <= count:
            raise SchemeError(
                f"Tied(groups={numbers}): groups must be numbered from 0 in the order of their "
                f"first site, but {number} comes before {count}"
            )
        count = max(count, number + 1)
    if not numbers:
        raise SchemeError("Tied(groups=()): give each site a group, or None for a single group")
    return numbers
