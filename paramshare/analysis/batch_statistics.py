"""Batch statistics fitted anew, for weights that have changed since they were gathered."""

from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

COLLECTION = "batch_stats"


class StatisticsError(ValueError):
    """Batch statistics cannot be estimated: there are no batches, or a statistic is no running average."""


def reestimate(model: nn.Module, variables: Mapping[str, Any], batches: Iterable[Any], **options: Any) -> dict[str, Any]:
    r"""Replaces every running mean and variance by the plain mean over batches of each batch's mean and variance.

    As torch's `update_bn` with `momentum=None`. For networks whose kernels have changed by other means than training: folded, converted,
    averaged ones. Nothing else of the variables changes, and no gradient is taken.

    Works for any Flax model whose statistics are running averages, new = m old + (1 - m) batch, without being told m: it is measured on the
    first batch, from what becomes of two different old values. Statistics that the model leaves as they are stay so
    (a batch norm with `use_running_average=True`).

    Args:
      model: a `Shared`, a plain model, any Flax module; built without `axis_name`, which would ask for a mapped axis.
      variables: its variables.
      batches: the model's inputs: arrays, or tuples where it takes several. Each counts the same, so let them be of one size: some
        thousands of images in all, normalised (and augmented, if at all) as in training.
      **options: further arguments of `model.apply` that have it train; `train=True` unless any are given.

    Returns:
      The variables, with new statistics. Where there are none (a network without batch norm), the variables as they were.

    Raises:
      StatisticsError: if there are no batches, or a statistic is not finite, or no running average.

    Example:
      >>> import flax.linen as nn, jax, numpy as np
      >>> from paramshare.analysis.batch_statistics import reestimate
      >>> model = nn.BatchNorm(momentum=0.97)
      >>> batches = [np.array([[1.0], [3.0]]), np.array([[4.0], [8.0]])]  # means 2 and 6, variances 1 and 4
      >>> variables = model.init(jax.random.key(0), batches[0], use_running_average=False)
      >>> reestimate(model, variables, batches, use_running_average=False)["batch_stats"]
      {'mean': Array([4.], dtype=float32), 'var': Array([2.5], dtype=float32)}
    """
    statistics = variables.get(COLLECTION, {})
    if not jax.tree.leaves(statistics):
        return dict(variables)
    rest = {name: value for name, value in variables.items() if name != COLLECTION}
    others = [name for name in rest if name not in ("params", "banks")]  # may be written to as well; that is dropped
    options = options or {"train": True}

    @jax.jit
    def update(rest: Any, statistics: Any, inputs: tuple[Any, ...]) -> Any:
        _, changed = model.apply({**rest, COLLECTION: statistics}, *inputs, mutable=[COLLECTION, *others], **options)
        return changed[COLLECTION]

    total, keep, momentum, number = None, None, None, 0
    for batch in batches:
        inputs = batch if isinstance(batch, tuple) else (batch,)
        if number == 0:
            keep, start, momentum = _momenta(lambda statistics, inputs=inputs: update(rest, statistics, inputs), statistics)
        part = update(rest, start, inputs)
        total = part if total is None else jax.tree.map(jnp.add, total, part)
        number += 1
    if not number:
        raise StatisticsError("there are no batches to estimate batch statistics from; give one or more")

    def mean(path: Any, old: Any, kept: bool, m: Any, sum_: Any) -> Any:
        if kept:
            return old
        fresh = sum_ / ((1 - m) * number).astype(sum_.dtype)
        if not np.all(np.isfinite(fresh)):
            raise StatisticsError(
                f"{_name(path)} is not finite on these batches; look for numbers that are not finite in them or the weights"
            )
        return fresh

    return {**variables, COLLECTION: jax.tree_util.tree_map_with_path(mean, statistics, keep, momentum, total)}


def _momenta(update: Any, statistics: Any) -> tuple[Any, Any, Any]:
    """(whether the model leaves each statistic as it is, statistics to start from: 0 but for those, the momenta of the others)."""
    probe = jax.tree.map(lambda old: 1 + 2 * jnp.abs(old), statistics)
    keep = jax.tree.map(lambda old, new: bool(jnp.all(old == new)), probe, update(probe))
    start = jax.tree.map(lambda old, kept: old if kept else jnp.zeros_like(old), statistics, keep)
    own = update(start)
    # Large beside what the batch adds, so that the difference has all its digits; and in between, where an average is linear.
    high, middle = (
        jax.tree.map(lambda old, kept, part, c=c: old if kept else 1 + c * jnp.abs(part), statistics, keep, own) for c in (1000, 1)
    )

    def momentum(path: Any, kept: bool, *parts: Any) -> Any:
        if kept:
            return np.float64(0)
        low, old, high, halfway, between = (np.asarray(part, np.float64) for part in parts)
        m = np.median((high - low) / old)
        if np.all(np.isfinite(low)) and not (
            -1e-4 < m < 1 and np.all(np.abs(between - (m * halfway + low)) < 1e-4 * (halfway + np.abs(low)))
        ):
            raise StatisticsError(f"{_name(path)} is no running average, new = m old + (1 - m) batch; it cannot be estimated from batches")
        # As float32 has 0.97, 1 - m would be off by some 1e-6 of itself; people write momenta in few digits.
        return np.round(m, 5) if abs(np.round(m, 5) - m) < 2e-7 else m

    return keep, start, jax.tree_util.tree_map_with_path(momentum, keep, own, high, update(high), middle, update(middle))


def _name(path: Any) -> str:
    return f"{COLLECTION}/{jax.tree_util.keystr(path, simple=True, separator='/')}"
