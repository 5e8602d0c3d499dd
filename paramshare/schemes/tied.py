"""Whole kernels tied across layers: one for all, or one for each group, with or without a signed scale a layer."""

import dataclasses
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from paramshare.schemes.initial import Fan, check_variance, orthogonal, standard_deviation
from paramshare.schemes.interface import SchemeError, Site, bank_dtype, check_arrays, check_equal_shapes, check_flag


@dataclasses.dataclass(frozen=True)
class Tied:
    r"""One kernel for all sites, or one for each group of them.

    .. math:: W_l = c_l K_{g(l)}

    The bank is `{"kernels": (G, ...)}`, G kernels of the sites' shape. With `scaled`, the coefficients are one (L,) array, the signed
    scales c_l, which start at 1; without, there are none and c_l = 1. Trainable numbers: G P + L, or G P.

    A pattern of groups that repeats, (0, 1, 0, 1, ...), is a recurrent network: `paramshare.fold` finds such patterns in trained networks.

    Args:
      orthonormal: whether each kernel's filters (its last axis counts them) start as rows of one (semi-)orthogonal matrix, instead of
        normal with variance `scale / fan`.
      scale: of the initial variance: 2 is He's, 1 LeCun's (Flax's default).
      fan: "fan_out" or "fan_in".
      groups: the group of each site, numbered from 0 in the order of their first site; None is one group of all.
      scaled: whether every site has a signed scale of its own.

    Raises:
      SchemeError: if an argument is not a legal one.

    Example:
      >>> import jax
      >>> from paramshare import Site, Tied
      >>> sites = tuple(Site(f"block{i}/conv/kernel", (3, 3, 8, 8)) for i in range(4))
      >>> scheme = Tied(groups=(0, 1, 0, 1), scaled=True)
      >>> bank, coefficients = scheme.init(jax.random.key(0), sites)
      >>> bank["kernels"].shape, coefficients.shape
      ((2, 3, 3, 8, 8), (4,))
      >>> kernels = scheme.expand(bank, coefficients, sites)
      >>> bool((kernels[1] == kernels[3]).all())
      True

    References:
      Kang & Kim, NeurIPS 2021, arXiv:2006.05066: what ResNet50-Shared and MobileNetV2-Shared do with convolutions that they have already.
      Savarese & Maire, ICLR 2019, arXiv:1902.09701: groups, as what soft sharing folds into.
    """

    orthonormal: bool = False
    scale: float = 2.0
    fan: Fan = "fan_out"
    groups: tuple[int, ...] | None = None
    scaled: bool = False

    def __post_init__(self):
        check_variance("Tied", self.scale, self.fan)
        check_flag("Tied", "orthonormal", self.orthonormal)
        check_flag("Tied", "scaled", self.scaled)
        if self.groups is not None:
            object.__setattr__(self, "groups", _check_groups(self.groups))

    def __str__(self) -> str:
        shown = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        return f"Tied({', '.join(f'{name}={getattr(self, name)!r}' for name in shown)})"

    def groups_of(self, sites: tuple[Site, ...]) -> tuple[int, ...]:
        """The group of each site."""
        return (0,) * len(sites) if self.groups is None else self.groups

    def check(self, sites: tuple[Site, ...]) -> None:
        """Raises `SchemeError` unless all sites have one shape, and each has a group."""
        check_equal_shapes(sites, self)
        if self.groups is not None and len(self.groups) != len(sites):
            raise SchemeError(
                f"{self} gives groups to {len(self.groups)} sites, but there are {len(sites)}, the first {sites[0]}; give each one a group"
            )

    def init(self, key: jax.Array, sites: tuple[Site, ...]) -> tuple[dict[str, jax.Array], jax.Array | dict]:
        """Draws the kernels; the scales are 1."""
        self.check(sites)
        site, dtype, count = sites[0], bank_dtype(sites), max(self.groups_of(sites)) + 1

        def draw(key: jax.Array) -> jax.Array:
            if self.orthonormal:
                rows = orthogonal(key, site.shape[-1], site.fan_in, dtype)
                return jnp.moveaxis(rows.reshape(site.shape[-1], *site.shape[:-1]), 0, -1)
            return standard_deviation(site, self.scale, self.fan) * jax.random.normal(key, site.shape, dtype)

        # One kernel takes the key as it is, so that a tied network does not depend on whether its one group is spelled out.
        kernels = jnp.stack([draw(key if count == 1 else jax.random.fold_in(key, number)) for number in range(count)])
        return {"kernels": kernels}, jnp.ones(len(sites), dtype) if self.scaled else {}

    def expand(self, bank: dict[str, jax.Array], coefficients: jax.Array | dict, sites: tuple[Site, ...]) -> tuple[jax.Array, ...]:
        """The kernels of the sites; `SchemeError` if the arrays are not of the shapes that `init` gives."""
        groups = self.groups_of(sites)
        check_arrays(self, "a bank", bank, {"kernels": (max(groups) + 1, *sites[0].shape)})
        check_arrays(self, "coefficients", coefficients, (len(sites),) if self.scaled else {})
        kernels = [bank["kernels"][group] for group in groups]
        if self.scaled:
            kernels = [coefficients[i] * kernel for i, kernel in enumerate(kernels)]
        return tuple(kernel.astype(site.dtype) for kernel, site in zip(kernels, sites, strict=True))

    def from_dense(self, kernels: tuple[jax.Array, ...], sites: tuple[Site, ...]) -> tuple[dict[str, jax.Array], jax.Array | dict]:
        """The bank, and scales, whose kernels are nearest to the given ones in the sum of squares.

        Without scales the mean of each group; with scales its leading singular vector (`leading`).

        Args:
          kernels: L arrays, in the order of the sites.
          sites: the bank's sites.

        Raises:
          SchemeError: if the kernels do not have the sites' shapes.
        """
        self.check(sites)
        check_arrays(self, "kernels", tuple(kernels), tuple(site.shape for site in sites))
        dtype, groups = bank_dtype(sites), self.groups_of(sites)
        stack_LxP = jnp.stack([jnp.asarray(kernel, dtype).reshape(-1) for kernel in kernels])
        rows, scales = [], jnp.ones(len(sites), dtype)
        for group in range(max(groups) + 1):
            members = jnp.asarray([i for i, its in enumerate(groups) if its == group])
            if self.scaled:
                row, own = leading(stack_LxP[members])
                scales = scales.at[members].set(own)
            else:
                row = jnp.mean(stack_LxP[members], axis=0)
            rows.append(row.reshape(sites[0].shape))
        return {"kernels": jnp.stack(rows)}, scales if self.scaled else {}


def leading(rows_LxN: jax.Array) -> tuple[jax.Array, jax.Array]:
    r"""The vector r and signed scales c that minimise \sum_l |row_l - c_l r|^2: the leading singular vector (Eckart & Young 1936).

    r carries the length, |c| is 1 in the mean, and most of c (by sum) is positive. Rows of zeros throughout give r = 0 and c = 1.

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
        raise SchemeError(f"Tied(groups={groups!r}): groups are whole numbers, one for each site, such as (0, 1, 0, 1)") from None
    known = 0
    for number in numbers:
        if not 0 <= number <= known:
            raise SchemeError(
                f"Tied(groups={numbers}): groups are numbered from 0 in the order of their first site, but {number} comes early"
            )
        known = max(known, number + 1)
    if not numbers:
        raise SchemeError("Tied(groups=()): give each site a group, or None for one group of all")
    return numbers
