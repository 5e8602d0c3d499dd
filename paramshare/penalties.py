"""Penalties: pure functions of a shared model's variables, to be added to the loss."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from paramshare.schemes.interface import UNIQUE
from paramshare.schemes.soft import cosines


class PenaltyError(ValueError):
    """A penalty was asked of banks that are not there, or that it does not apply to."""


def orthogonality(variables: Mapping[str, Any], *pools: str, unique: bool = False) -> jax.Array:
    r"""How far shared filters are from orthonormal, as one mean over the banks of a pool.

    .. math:: \sum_g \|B_g B_g^T - I\|_F^2 / \sum_g n_g^2

    The n_g rows of B_g are the flattened filters of bank g, not normalised: of a `FilterBasis` the shared ones, of all its bases, stacked
    ("double"); of `Tied` those of all its kernels. Several pools give a mean each; these are added (the paper's "++" networks). The paper
    weighs the penalty by 10.

    Where filters outnumber their own numbers they cannot be orthonormal, and the penalty has a floor above zero.

    With `unique=True` (the reference's recipe for CIFAR-10) the rows are, for each bank, the shared filters and then the unique ones of
    every layer; the squares of (shared rows x all columns), and of every layer's own (unique x unique) block, are summed, and counted
    in the mean.

    Args:
      variables: `{"banks": ..., "params": ...}` of a `Shared`; other collections, and `Shared`s nested deeper, are not looked at.
      *pools: regular expressions that match whole bank names; none is one pool of all banks of filters.
      unique: whether unique filters are taken in.

    Returns:
      A scalar.

    Raises:
      PenaltyError: if a pool matches no bank, or a bank without filters.

    Example:
      >>> import jax.numpy as jnp, paramshare
      >>> banks = {"stage1": {"kernels": jnp.eye(4, 6)[None]}, "stage2": {"kernels": 2 * jnp.eye(3)[None]}}
      >>> float(paramshare.orthogonality({"banks": banks}))  # (2 + 27) / (36 + 9): a floor of 2; three squares of 4 - 1
      0.6444...

    References:
      Kang & Kim, NeurIPS 2021, arXiv:2006.05066
    """
    banks = variables.get("banks", {})
    names = [_members(pool, banks) for pool in pools] or [[name for name in banks if _rows(banks[name]) is not None]]
    if not pools and not names[0]:
        raise PenaltyError(
            f"orthogonality is asked of variables without banks of filters (FilterBasis, Tied); its banks are {sorted(banks)}"
        )
    if unique and "params" not in variables:
        raise PenaltyError("orthogonality(unique=True) needs variables['params'] too, where unique filters are; pass both collections")
    own = variables.get("params", {}).get("coefficients", {})
    total = 0.0
    for pool in names:
        squares, count = 0.0, 0
        for name in pool:
            for gram, diagonal in _products(_rows(banks[name]), _unique(own.get(name)) if unique else None):
                squares += jnp.sum((gram - jnp.eye(*gram.shape, dtype=gram.dtype) if diagonal else gram) ** 2)
                count += gram.size
        total += squares / count
    return jnp.asarray(total)


def recurrence(variables: Mapping[str, Any], *pools: str) -> jax.Array:
    r"""How far layers are from using the same kernels: what is missing from their similarity, over all pairs of layers of every bank.

    .. math:: \sum_{banks} \sum_{ij} (1 - S_{ij})

    with S the layer similarity matrix of soft sharing's coefficients (`paramshare.similarity`). Its gradient is that of -\sum S_ij,
    which the paper adds with weight .01 in its algorithmic task; it is 0 where all layers of a bank are one kernel up to signed scales.
    It acts on coefficients only. Rows of zeros, and pairs of orthogonal rows (the kink of |.|), have gradient 0.

    Args:
      variables: `{"banks": ..., "params": ...}` of a `Shared`; other collections, and `Shared`s nested deeper, are not looked at.
      *pools: regular expressions that match whole names of banks; none takes all banks of templates.

    Returns:
      A scalar.

    Raises:
      PenaltyError: if a pool matches no bank, or a bank without templates; or if there is no bank of templates at all.

    Example:
      >>> import jax.numpy as jnp, paramshare
      >>> rows = jnp.array([[1.0, 0.0], [-2.0, 0.0], [0.0, 1.0]])  # the first two layers use one kernel
      >>> banks = {"stage1": {"templates": jnp.ones((2, 9))}}
      >>> float(paramshare.recurrence({"banks": banks, "params": {"coefficients": {"stage1": rows}}}))  # 4 of 9 pairs are not alike
      4.0

    References:
      Savarese & Maire, ICLR 2019, arXiv:1902.09701
    """
    banks, own = variables.get("banks", {}), variables.get("params", {}).get("coefficients", {})

    def soft(name: str) -> bool:
        return isinstance(banks[name], Mapping) and "templates" in banks[name]

    names = [name for name in banks if soft(name)]
    if not pools and not names:
        raise PenaltyError(f"recurrence is asked of variables without banks of templates (Soft); its banks are {sorted(banks)}")
    if pools:
        names = list(dict.fromkeys(name for pool in pools for name in _matching("recurrence", pool, banks)))
    for name in names:
        if not soft(name):
            raise PenaltyError(f"recurrence: bank {name!r} holds {sorted(banks[name])}, no templates; leave it out of the pool")
        if name not in own:
            raise PenaltyError(f"recurrence needs the coefficients of bank {name!r}, in variables['params']; pass both collections")
    return jnp.asarray(sum(jnp.sum(1 - cosines(own[name])) for name in names))


def _matching(penalty: str, pool: str, banks: Mapping[str, Any]) -> list[str]:
    """The banks whose whole name a regular expression matches."""
    try:
        found = [name for name in banks if re.fullmatch(pool, name)]
    except (re.error, TypeError) as error:
        raise PenaltyError(f"{penalty}: pool {pool!r} is not a regular expression: {error}") from None
    if not found:
        raise PenaltyError(f"{penalty}: pool {pool!r} matches no bank; the banks are {sorted(banks)}")
    return found


def _members(pool: str, banks: Mapping[str, Any]) -> list[str]:
    found = _matching("orthogonality", pool, banks)
    for name in found:
        if _rows(banks[name]) is None:
            raise PenaltyError(f"orthogonality: bank {name!r} holds {sorted(banks[name])}, no filters; leave it out of the pool")
    return found


def _rows(bank: Any) -> jax.Array | None:
    """(n, P): a bank's filters, flattened; None if it has none."""
    if not isinstance(bank, Mapping):
        return None
    for name in ("filters", "kernels"):
        if name in bank:
            filters = jnp.moveaxis(bank[name], -1, 1)
            return filters.reshape(filters.shape[0] * filters.shape[1], -1)
    return None


def _unique(coefficients: Any) -> jax.Array | None:
    """(L, u, P): the unique filters of each layer, flattened; None if there are none."""
    if not isinstance(coefficients, Mapping) or UNIQUE not in coefficients:
        return None
    filters = jnp.moveaxis(coefficients[UNIQUE], -1, 1)
    return filters.reshape(*filters.shape[:2], -1)


def _products(shared_SxP: Any, unique_LxUxP: jax.Array | None) -> Iterator[tuple[jax.Array, bool]]:
    """Inner products of filters, in blocks, and whether a block has the diagonal."""

    def inner(a, b):
        return jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)

    yield inner(shared_SxP, shared_SxP), True
    if unique_LxUxP is not None:
        yield inner(shared_SxP, unique_LxUxP.reshape(-1, shared_SxP.shape[1])), False
        for filters_UxP in unique_LxUxP:
            yield inner(filters_UxP, filters_UxP), True
