"""Evaluation: every example counted exactly once, whatever the batch size and the number of devices and processes."""

from collections.abc import Callable
from typing import Any

import jax

from paramshare.training.data import Source, eval_batches
from paramshare.training.run import Run
from paramshare.training.step import make_eval_step


def make_evaluate(run: Run) -> Callable[[Any, Source], dict[str, float]]:
    """A function `(variables, source) -> {"loss", "accuracy", "top5", "count"}`, means over the source's examples; compiled once."""
    step = run.devices.map(make_eval_step(run.model, run.data.mean, run.data.std))
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
        total = {name: sum(float(s[name]) for s in sums) for name in ("loss", "correct", "correct5", "count")}
        count = max(total["count"], 1.0)
        return {
            "loss": total["loss"] / count,
            "accuracy": total["correct"] / count,
            "top5": total["correct5"] / count,
            "count": total["count"],
        }

    return evaluate
