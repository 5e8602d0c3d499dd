"""Evaluation: every example counted exactly once, whatever the batch size and the number of devices and processes."""

from collections.abc import Callable
from typing import Any

import jax

from paramshare.training.data import Source, eval_batches
from paramshare.training.run import Run
from paramshare.training.step import make_eval_step


def make_evaluate(run: Run) -> Callable[[Any, Source], dict[str, float]]:
    """A function `(variables, source) -> {"loss", ..., "count"}`: means over the source's examples.

    With the measures of the task: for classes `accuracy` and `top5`. Compiled once for each shape of images.
    """
    task = run.data.task
    step = run.devices.map(make_eval_step(run.model, run.data.mean, run.data.std, task=task))
    batch_size = -(-run.config.batch_size // run.devices.count) * run.devices.count

    def evaluate(variables: Any, source: Source) -> dict[str, float]:
        # Replicated once: a mapped call would otherwise move the variables anew for each batch.
        variables = run.devices.replicate(variables)
        sums = []
        batches = eval_batches(source, batch_size, process_index=jax.process_index(), process_count=jax.process_count())
        for batch in batches:
            sums.append(step(variables, None, run.devices.cut(batch)))
            if len(sums) > 8:  # do not queue up a whole data set on the devices
                jax.block_until_ready(sums[-8])
        sums = jax.device_get(sums)
        if not sums:
            return {"loss": 0.0, task.score: 0.0, "count": 0.0}
        total = {name: sum(float(s[name]) for s in sums) for name in sums[0]}
        means = {name: float(value) for name, value in task.means(total).items()}
        return {"loss": total["loss"] / total["count"], **means, "count": total["count"]}

    return evaluate
