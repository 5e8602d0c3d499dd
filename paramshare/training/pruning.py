"""Pruning while a network is trained: what is 0 stays 0, and more becomes 0 on a schedule."""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from paramshare.training.config import Compression

PRUNINGS = 100  # at most, on the way to the fraction


class PruningState(NamedTuple):
    """The number of updates so far."""

    count: jax.Array


def spare_zeros(settings: Compression) -> optax.GradientTransformation:
    """Sets gradients of pruned parameters to 0, before clipping, decay and momentum see them."""

    def update(gradient: Any, variables: Any) -> Any:
        return _map_banks(settings, _zero_where_zero, gradient, variables)

    return optax.stateless(update)


def keep_zeros(settings: Compression, steps: int) -> optax.GradientTransformation:
    """Keeps pruned parameters at 0, and prunes more; the last rule, after all that change updates.

    A parameter is pruned if it is exactly 0, so no mask is stored: its update is set to 0, whatever
    momentum it had before. After the first update `round(prune * size)` parameters of
    each array of a bank are 0; with `settings.gradual`, only after half of the steps, on the way
    there by the cubic schedule of `sparsity`, in at most `PRUNINGS` prunings.

    Args:
      settings: what is pruned.
      steps: of the whole run.
    """
    last = last_pruning(settings, steps)
    every = max(1, last // PRUNINGS)

    def init(params: Any) -> PruningState:
        return PruningState(jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, PruningState]:
        updates = _map_banks(settings, _zero_where_zero, updates, params)
        count = state.count + 1
        part = sparsity(count, last)

        def prune(change: jax.Array, values: jax.Array) -> jax.Array:
            final = round(settings.prune * values.size)
            number = jnp.where(
                count >= last, final, jnp.floor(part * final).astype(jnp.int32)
            ).astype(jnp.int32)
            order = jnp.argsort(jnp.abs(values + change).ravel(), stable=True)
            smallest = (
                jnp.zeros(values.size, bool)
                .at[order]
                .set(jnp.arange(values.size) < number, unique_indices=True)
            )
            return jnp.where(smallest.reshape(values.shape), -values, change)

        due = (count <= last) & ((count % every == 0) | (count == last))
        updates = jax.lax.cond(
            due,
            lambda tree: _map_banks(settings, prune, tree, params),
            lambda tree: tree,
            updates,
        )
        return updates, PruningState(count)

    return optax.GradientTransformation(init, update)


def prune_average(
    settings: Compression, average: dict[str, Any], variables: dict[str, Any]
) -> dict[str, Any]:
    """A moving average of variables, set to 0 where a parameter is pruned now.

    Args:
      settings: what is pruned.
      average: of `variables`, and of further collections.
      variables: the trainable ones.
    """
    trained = {name: average[name] for name in variables}
    return {**average, **_map_banks(settings, _zero_where_zero, trained, variables)}


def last_pruning(settings: Compression, steps: int) -> int:
    """The update of a run of so many steps after which all is pruned that is asked for."""
    return max(1, steps // 2) if settings.gradual else 1


def sparsity(count: Any, last: int) -> jax.Array:
    r"""The part of the final fraction that is pruned after `count` updates.

    .. math:: s_t / s_f = 1 - (1 - t / T)^3

    Zhu & Gupta, To prune, or not to prune, arXiv:1710.01878, from no zeros at the start.

    Example:
      >>> [round(float(sparsity(count, 4)), 3) for count in (0, 1, 2, 4, 9)]
      [0.0, 0.578, 0.875, 1.0, 1.0]
    """
    remaining = 1.0 - jnp.minimum(jnp.asarray(count, jnp.float32) / last, 1.0)
    return 1.0 - remaining**3


def _zero_where_zero(change: jax.Array, values: jax.Array) -> jax.Array:
    return jnp.where(values == 0, jnp.zeros_like(change), change)


def _map_banks(settings: Compression, function: Any, updates: Any, variables: Any) -> Any:
    """Applies a function of (update, values) to the arrays of the banks that are compressed."""
    if variables is None:
        raise ValueError("pruning needs the variables: rule.update(updates, state, variables)")

    def leaf(path: Any, change: jax.Array, values: jax.Array) -> jax.Array:
        names = [str(getattr(key, "key", key)) for key in path]
        return function(change, values) if is_compressed(settings, names) else change

    return jax.tree_util.tree_map_with_path(leaf, updates, variables)


def is_compressed(settings: Compression, names: list[str]) -> bool:
    """Whether an array, by its path in the variables, belongs to a bank that is compressed."""
    if names[0] != "banks" or len(names) < 2:
        return False
    return not settings.banks or any(re.fullmatch(bank, names[1]) for bank in settings.banks)
