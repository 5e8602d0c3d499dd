"""The mapped step of one run, or of several that are trained together, and its batches."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from paramshare.data import ArraySource, train_batches, train_indices
from paramshare.training.run import Run
from paramshare.training.state import State
from paramshare.training.step import make_train_step


class Together:
    """States of several runs stacked along a first axis; the state of a single run unchanged."""

    def __init__(self, count: int):
        self.count = count

    def stack(self, trees: list[Any]) -> Any:
        """One tree of the trees of all runs."""
        if self.count == 1:
            return trees[0]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *map(jax.device_get, trees))

    def take(self, tree: Any, i: int) -> Any:
        """The tree of one run."""
        return tree if self.count == 1 else jax.tree.map(lambda leaf: leaf[i], tree)


def train_function(
    runs: list[Run], together: Together
) -> Callable[[State, Any], tuple[State, dict[str, jax.Array]]]:
    """`(state, inputs) -> (state, metrics)`, with the training set on the devices if it fits."""
    run, source = runs[0], runs[0].data.train

    def steps(state: State, data: Any, batch: Any) -> Any:
        seeds = np.array([each.config.seed for each in runs])
        return jax.vmap(
            lambda state, batch, seed: make_train_step(run, seed)(state, data, batch),
            in_axes=(0, 1, 0),
        )(state, batch, seeds)

    step = make_train_step(run, run.config.seed) if together.count == 1 else steps
    mapped = run.devices.map(step, donate=True, divided=run.divided(run.shapes))
    data = None
    if isinstance(source, ArraySource):
        data = run.devices.place(source.arrays)
    return lambda state, batch: mapped(state, data, run.devices.cut(batch))


def inputs(runs: list[Run], start: int) -> Iterator[dict[str, Any]]:
    """This process's batch of every step from `start` to the last.

    If the training set is on the device, a batch is its indices (b,), or (b, runs) for several
    runs, because each has its own order.
    """
    run, size = runs[0], runs[0].config.batch_size
    process, processes = jax.process_index(), jax.process_count()
    if not isinstance(run.data.train, ArraySource):
        batches = train_batches(
            run.data.train,
            size,
            run.config.seed,
            start,
            process_index=process,
            process_count=processes,
        )
        yield from (batch for _, batch in zip(range(start, run.steps), batches, strict=False))
        return
    mine = slice(process * size // processes, (process + 1) * size // processes)
    examples = run.data.phase_examples
    for step in range(start, run.steps):
        first = run.phase(step // run.steps_per_epoch) * examples
        orders = [
            (first + train_indices(examples, size, each.config.seed, step)[mine]).astype(np.int32)
            for each in runs
        ]
        yield {"index": orders[0] if len(runs) == 1 else np.stack(orders, axis=1)}
