"""Batch statistics recomputed for weights that have changed other than by training."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from paramshare.errors import ParamshareError

COLLECTION = "batch_stats"


class StatisticsError(ParamshareError):
    """Batch statistics cannot be estimated."""


def reestimate(
    model: nn.Module, variables: Mapping[str, Any], batches: Iterable[Any], **options: Any
) -> dict[str, Any]:
    r"""Replaces running means and variances by the average over batches of the batch's own.

    For networks whose weights were folded, converted or averaged. No other variables change, and no
    gradient is taken. PyTorch's `update_bn` with `momentum=None` does the same.

    Works for any Flax model whose statistics are running averages, new = m old + (1 - m) batch. The
    momentum m is measured on the first batch, from the update of two different old values.
    Statistics that the model does not update stay as they are (a batch norm with
    `use_running_average=True`).

    Args:
      model: any Flax module, a `Shared` for example, without `axis_name`, which would need a mapped
        axis.
      variables: its variables.
      batches: the model's inputs: arrays, or tuples for several arguments. Each batch has the same
        weight, so use batches of one size: a few thousand images in all, normalised (and, if you
        like, augmented) as in training.
      **options: further arguments of `model.apply` in training; `train=True` if there are none.

    Returns:
      The variables with new statistics. If there are no statistics, the variables as they were.

    Raises:
      StatisticsError: if there are no batches, or if a statistic is not finite or not a running
        average.

    Example:
      >>> import flax.linen as nn, jax, numpy as np
      >>> from paramshare.transform.batch_statistics import reestimate
      >>> model = nn.BatchNorm(momentum=0.97)
      >>> # means 2 and 6, variances 1 and 4
      >>> batches = [np.array([[1.0], [3.0]]), np.array([[4.0], [8.0]])]
      >>> variables = model.init(jax.random.key(0), batches[0], use_running_average=False)
      >>> reestimate(model, variables, batches, use_running_average=False)["batch_stats"]
      {'mean': Array([4.], dtype=float32), 'var': Array([2.5], dtype=float32)}
    """
    statistics = variables.get(COLLECTION, {})
    if not jax.tree.leaves(statistics):
        return dict(variables)
    others = {name: value for name, value in variables.items() if name != COLLECTION}
    # Other collections may be written to; those updates are dropped.
    mutable = [COLLECTION, *(name for name in others if name not in ("params", "banks"))]
    options = options or {"train": True}

    @jax.jit
    def update(others: Any, statistics: Any, inputs: tuple[Any, ...]) -> Any:
        full = {**others, COLLECTION: statistics}
        return model.apply(full, *inputs, mutable=mutable, **options)[1][COLLECTION]

    total, constant, momentum, count = None, None, None, 0
    for batch in batches:
        inputs = batch if isinstance(batch, tuple) else (batch,)
        if count == 0:
            constant, start, momentum = _momenta(
                lambda statistics, inputs=inputs: update(others, statistics, inputs), statistics
            )
        part = update(others, start, inputs)
        total = part if total is None else jax.tree.map(jnp.add, total, part)
        count += 1
    if not count:
        raise StatisticsError("no batches to estimate batch statistics from; give at least one")

    def mean(path: Any, old: Any, constant: bool, m: Any, sum_: Any) -> Any:
        if constant:
            return old
        new = sum_ / ((1 - m) * count).astype(sum_.dtype)
        if not np.all(np.isfinite(new)):
            raise StatisticsError(
                f"{_name(path)} is not finite on these batches; check the batches and the weights "
                "for infinities and NaNs"
            )
        return new

    return {
        **variables,
        COLLECTION: jax.tree_util.tree_map_with_path(mean, statistics, constant, momentum, total),
    }


def _momenta(update: Callable[[Any], Any], statistics: Any) -> tuple[Any, Any, Any]:
    """Measures momenta on one batch.

    Returns:
      Three trees: whether the model leaves a statistic constant; the statistics to start from, 0
      except for constant ones; the momenta of all others.
    """
    probe = jax.tree.map(lambda old: 1 + 2 * jnp.abs(old), statistics)
    constant = jax.tree.map(lambda old, new: bool(jnp.all(old == new)), probe, update(probe))
    start = jax.tree.map(
        lambda old, constant: old if constant else jnp.zeros_like(old), statistics, constant
    )
    batch = update(start)

    def shifted(factor: int) -> Any:
        def shift(old: Any, constant: bool, part: Any) -> Any:
            return old if constant else 1 + factor * jnp.abs(part)

        return jax.tree.map(shift, statistics, constant, batch)

    # The high value is large beside the batch's part, so that the difference keeps all its digits.
    # The middle value tests that the update is linear.
    high, middle = shifted(1000), shifted(1)

    def momentum(path: Any, constant: bool, *parts: Any) -> Any:
        if constant:
            return np.float64(0)
        low, old, high, halfway, between = (np.asarray(part, np.float64) for part in parts)
        m = np.median((high - low) / old)
        error = np.abs(between - (m * halfway + low))
        linear = np.all(error < 1e-4 * (halfway + np.abs(low)))
        if np.all(np.isfinite(low)) and not (-1e-4 < m < 1 and linear):
            raise StatisticsError(
                f"{_name(path)} is not a running average, new = m old + (1 - m) batch; only those "
                "can be estimated from batches"
            )
        # Momenta usually have few digits. Unrounded, the float32 value of 0.97 would change 1 - m
        # by a relative 1e-6.
        return np.round(m, 5) if abs(np.round(m, 5) - m) < 2e-7 else m

    momenta = jax.tree_util.tree_map_with_path(
        momentum, constant, batch, high, update(high), middle, update(middle)
    )
    return constant, start, momenta


def _name(path: Any) -> str:
    return f"{COLLECTION}/{jax.tree_util.keystr(path, simple=True, separator='/')}"
