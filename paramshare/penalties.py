"""Penalties: pure functions of a shared model's variables, to be added to the loss."""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from paramshare.errors import ParamshareError
from paramshare.layout import Layout
from paramshare.schemes import Filters, cosines
from paramshare.shared import Shared, layout_of


class PenaltyError(ParamshareError):
    """A penalty on banks that do not exist, or to which it does not apply."""


def orthogonality(
    shared: Shared | Layout, variables: Mapping[str, Any], *pools: str, unique: bool = False
) -> jax.Array:
    r"""Distance of shared filters from orthonormal ones, as one mean over the banks of a pool.

    .. math:: \sum_g \|B_g B_g^T - I\|_F^2 / \sum_g n_g^2

    The n_g rows of B_g are the flattened filters of bank g, not normalised: for `FilterBasis` the
    shared ones of all bases, stacked ("double"), for `Tied` those of all kernels. Each pool gives
    one mean; the means are added (the paper's "++" networks). The paper's weight is 10.

    Filters that outnumber their entries cannot be orthonormal: the penalty then has a positive
    minimum.

    With `unique=True` (the reference's recipe for CIFAR-10) a bank's rows are the shared filters,
    followed by the unique ones of every layer. The mean is over the squares of (shared rows x all
    columns) and of each layer's (unique x unique) block.

    Args:
      shared: the shared model, or its layout.
      variables: its variables. `Shared`s nested deeper are ignored.
      *pools: regular expressions that match whole bank names; by default one pool of all banks with
        filters.
      unique: whether to include unique filters.

    Returns:
      A scalar.

    Raises:
      PenaltyError: if `shared` is not a `Shared`, or a pool matches no bank, or a bank without
        filters.
      PlanError: if the variables do not fit the model.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, paramshare
      >>> model, x = nn.Sequential([nn.Dense(8), nn.Dense(8)]), jnp.ones((1, 8))
      >>> tied = paramshare.Tied(orthonormal=True, initial="paper")
      >>> shared = paramshare.share(model, paramshare.Plan(paramshare.Rule(".*kernel", tied)), x)
      >>> variables = jax.jit(shared.init)(jax.random.key(0), x)
      >>> round(float(paramshare.orthogonality(shared, variables)), 6)
      0.0

    References:
      Kang & Kim, NeurIPS 2021, arXiv:2006.05066
    """
    layout = layout_of("orthogonality", shared, PenaltyError)
    filters = _of_banks(layout, variables, lambda scheme: scheme.filters)
    groups = [_match("orthogonality", "shared filters", pool, filters) for pool in pools] or [
        _all("orthogonality", "shared filters (FilterBasis, Tied)", filters)
    ]
    means = []
    for names in groups:
        squares, count = [], 0
        for gram, diagonal in (block for name in names for block in _grams(filters[name], unique)):
            error = gram - jnp.eye(*gram.shape, dtype=gram.dtype) if diagonal else gram
            squares.append(jnp.sum(error**2))
            count += gram.size
        means.append(sum(squares) / count)
    return jnp.asarray(sum(means))


def recurrence(shared: Shared | Layout, variables: Mapping[str, Any], *pools: str) -> jax.Array:
    r"""One minus the similarity of layers, summed over all pairs of layers of every bank.

    .. math:: \sum_{banks} \sum_{ij} (1 - S_{ij})

    with S the similarity matrix of soft sharing's coefficients (`paramshare.similarity`). The
    gradient is that of -\sum S_ij, which the paper adds with weight 0.01 in its algorithmic task.
    The penalty is 0 where all layers of a bank are one kernel up to signed scales. It acts only on
    coefficients. Rows of zeros and pairs of orthogonal rows (the kink of |.|) have gradient 0.

    Args:
      shared: the shared model, or its layout.
      variables: its variables. `Shared`s nested deeper are ignored.
      *pools: regular expressions that match whole bank names; by default all banks with
        coefficients to mix by.

    Returns:
      A scalar.

    Raises:
      PenaltyError: if `shared` is not a `Shared`, or a pool matches no bank, or a bank to which
        the penalty does not apply.
      PlanError: if the variables do not fit the model.

    Example:
      >>> import jax, paramshare
      >>> shared = paramshare.create_model("swrn-16-1-1", input_shape=(8, 8, 3))
      >>> variables = jax.jit(shared.init)(jax.random.key(0), jax.numpy.zeros((1, 8, 8, 3)))
      >>> float(paramshare.recurrence(shared, variables))  # one template: all layers are alike
      0.0

    References:
      Savarese & Maire, ICLR 2019, arXiv:1902.09701
    """
    layout = layout_of("recurrence", shared, PenaltyError)
    rows = _of_banks(layout, variables, lambda scheme: scheme.mixing)
    names = [
        name for pool in pools for name in _match("recurrence", "mixing coefficients", pool, rows)
    ] or _all("recurrence", "mixing coefficients (Soft)", rows)
    return jnp.asarray(sum(jnp.sum(1 - cosines(rows[name])) for name in dict.fromkeys(names)))


def _of_banks(
    layout: Layout, variables: Mapping[str, Any], ask: Callable[[Any], Callable]
) -> dict[str, Any]:
    """The answer of every bank's scheme, None where the penalty does not apply."""
    weights = layout.weights(variables)
    return {b.name: ask(b.scheme)(weights[b.name], b.sites) for b in layout.banks}


def _all(penalty: str, what: str, answers: Mapping[str, Any]) -> list[str]:
    names = [name for name, answer in answers.items() if answer is not None]
    if not names:
        raise PenaltyError(f"{penalty}: no bank has {what}; the banks are {sorted(answers)}")
    return names


def _match(penalty: str, what: str, pool: str, answers: Mapping[str, Any]) -> list[str]:
    try:
        names = [name for name in answers if re.fullmatch(pool, name)]
    except (re.error, TypeError) as error:
        raise PenaltyError(
            f"{penalty}: pool {pool!r} is not a regular expression: {error}"
        ) from None
    if not names:
        raise PenaltyError(
            f"{penalty}: pool {pool!r} matches no bank; the banks are {sorted(answers)}"
        )
    for name in names:
        if answers[name] is None:
            raise PenaltyError(f"{penalty}: bank {name!r} has no {what}; exclude it from the pool")
    return names


def _grams(filters: Filters, unique: bool) -> Iterator[tuple[jax.Array, bool]]:
    """Inner products of filters, in blocks, and whether a block has the diagonal."""

    def inner(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)

    yield inner(filters.shared, filters.shared), True
    if unique and filters.own:
        yield inner(filters.shared, jnp.concatenate(filters.own)), False
        for own_UxP in filters.own:
            yield inner(own_UxP, own_UxP), True
