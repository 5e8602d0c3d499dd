"""Evaluation: every example counts once, for any batch size and any number of devices."""

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import numpy as np

from paramshare.data import Source, eval_batches
from paramshare.errors import ParamshareError
from paramshare.tasks import TaskError
from paramshare.training.result import Evaluation
from paramshare.training.run import Run
from paramshare.training.step import make_eval_step

AHEAD = 8  # batches computed before the oldest one is fetched


class NonFinite(ParamshareError):
    """A loss, of training or of evaluation, or a gradient was not finite."""

    exit_code: ClassVar[int] = 1


def make_evaluate(run: Run) -> Callable[..., Evaluation]:
    """A function `(variables, source, *, curves=False) -> Evaluation` over a source's examples.

    The task reduces its statistics on the host over the whole source, so a measure need not be a
    mean over examples; with `curves`, it makes its charts, too. The step is compiled once for each
    shape of inputs. The function raises `NonFinite` if the loss of an example is not finite, and
    `TaskError` if the task reduces to other measures than it declares.
    """
    step = run.devices.map(make_eval_step(run), divided=run.divided(run.shapes.variables))
    names = {measure.name for measure in run.task.measures}
    batch_size = -(-run.config.batch_size // run.devices.count) * run.devices.count

    def evaluate(variables: Any, source: Source, *, curves: bool = False) -> Evaluation:
        # Replicated once; a mapped call would copy the variables for each batch.
        variables = run.place(variables)
        waiting: list[Any] = []
        fetched: list[Any] = []
        for batch in eval_batches(
            source, batch_size, process_index=jax.process_index(), process_count=jax.process_count()
        ):
            waiting.append(step(variables, None, run.devices.cut(batch)))
            if len(waiting) > AHEAD:  # a whole data set must not queue up on the devices
                fetched.append(_fetch(waiting.pop(0)))
        fetched += map(_fetch, waiting)
        if not fetched:
            return Evaluation(0.0, 0, dict.fromkeys(names, 0.0))
        losses_N, statistics_N = jax.tree.map(lambda *parts: np.concatenate(parts), *fetched)
        count = len(next(iter(losses_N.values())))
        wrong = np.sum(~np.isfinite(sum(losses_N.values())))
        if wrong:
            raise NonFinite(
                f"{run.config.model.name}: the loss of {wrong} of {count} evaluated examples is "
                "not finite; train with a lower learning rate, or with warm-up"
            )
        losses = {name: float(np.mean(x, dtype=np.float64)) for name, x in losses_N.items()}
        measures = {name: float(x) for name, x in run.task.reduce(statistics_N).items()}
        if measures.keys() != names:
            raise TaskError(
                f"reduce of the task {run.task.name!r} returns {sorted(measures)}; it must return "
                f"its measures, {sorted(names)}"
            )
        charts = run.task.curves(statistics_N) if curves else ()
        return Evaluation(sum(losses.values()), count, measures, losses, charts)

    return evaluate


def _fetch(values: dict[str, Any]) -> tuple[dict[str, np.ndarray], Any]:
    """Losses and statistics of a batch on the host, without the examples that fill it up."""
    values = jax.device_get(values)
    real = values["weight"] > 0
    return jax.tree.map(lambda x: x[real], (values["losses"], values["statistics"]))
