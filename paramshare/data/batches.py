"""Batches for training and evaluation, by step.

Batch s of a training stream is a pure function of (seed, s): resuming at a step replays nothing.
Each of several processes reads only its own slice of each global batch.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from paramshare.data.error import DataError, require
from paramshare.data.order import train_indices
from paramshare.data.sources import ArraySource, Source
from paramshare.errors import one_line

Batch = dict[str, Any]


def train_batches(
    source: Source,
    batch_size: int,
    seed: int,
    start_step: int,
    *,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 16,
    prefetch: int | None = None,
) -> Iterator[Batch]:
    """The endless stream of training batches from step `start_step` on.

    The global batch of step s holds the examples `train_indices(len(source), batch_size, seed, s)`;
    this process gets the contiguous slice number `process_index` of `process_count`. Arrays are
    indexed in place. Any other source is read by grain's threads, by its method
    `training_view(index, seed, epoch)` if it has one.

    Args:
      source: N examples.
      batch_size: examples in a global batch, B.
      seed: seed of the order, 0 <= seed < 2**64.
      start_step: the step of the first batch.
      process_index: which slice.
      process_count: number of slices; divides batch_size.
      threads: reading threads (not for arrays).
      prefetch: examples read ahead; None for two batches (not for arrays).

    Returns:
      Iterator of {"input": (b, ...), "label": pytree of (b, ...)} with b = B / process_count.

    Raises:
      DataError: at once, if a size does not fit; while iterating, if an example cannot be read.

    Example:
      >>> source = ArraySource(np.zeros((10, 8, 8, 1), np.uint8), np.arange(10))
      >>> batch = next(train_batches(source, 4, seed=0, start_step=7))
      >>> (batch["label"] == train_indices(10, 4, seed=0, step=7)).all()
      np.True_
    """
    n = len(source)
    train_indices(n, batch_size, seed, start_step)  # raises now rather than at the first batch
    rows = _rows(batch_size, process_index, process_count)
    if isinstance(source, ArraySource):
        return _array_batches(source, batch_size, seed, start_step, rows)
    size = rows.stop - rows.start
    view = getattr(source, "training_view", None)

    def example(position: int) -> Any:
        ahead, row = divmod(position, size)
        step = start_step + ahead
        index = int(train_indices(n, batch_size, seed, step)[rows.start + row])
        return view(index, seed, step // (n // batch_size)) if view else source[index]

    return _grain_batches(_Positions(example, 2**62), size, threads, prefetch)


def eval_batches(
    source: Source,
    batch_size: int,
    *,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 16,
    prefetch: int | None = None,
) -> Iterator[Batch]:
    """Every example exactly once over all processes, in order, in batches of one shape.

    All processes get the same number of batches, ceil(N / batch_size), as collectives need. The
    last batch is filled with copies of the last example at weight 0.

    Args:
      source: N examples; N may be 0, which gives no batch.
      batch_size: examples in a global batch, B; may be larger than N.
      process_index: which slice of each global batch.
      process_count: number of slices; divides batch_size.
      threads: reading threads (not for arrays).
      prefetch: examples read ahead; None for two batches (not for arrays).

    Returns:
      Iterator of {"input": (b, ...), "label": pytree of (b, ...), "weight": (b,) float32, 0 or 1}.

    Raises:
      DataError: at once, if a size does not fit; while iterating, if an example cannot be read.

    Example:
      >>> source = ArraySource(np.zeros((3, 8, 8, 1), np.uint8), [5, 6, 7])
      >>> [(b["label"].tolist(), b["weight"].tolist()) for b in eval_batches(source, 2)]
      [([5, 6], [1.0, 1.0]), ([7, 7], [1.0, 0.0])]
    """
    n = len(source)
    rows = _rows(batch_size, process_index, process_count)
    size, steps = rows.stop - rows.start, -(-n // batch_size)
    if isinstance(source, ArraySource):
        places = (np.arange(rows.start, rows.stop) + step * batch_size for step in range(steps))
        return (
            {**_gather(source, np.minimum(place, n - 1)), "weight": (place < n).astype(np.float32)}
            for place in places
        )

    def example(position: int) -> dict[str, Any]:
        step, row = divmod(position, size)
        index = step * batch_size + rows.start + row
        return {**source[min(index, n - 1)], "weight": np.float32(index < n)}

    return (
        _grain_batches(_Positions(example, steps * size), size, threads, prefetch)
        if steps
        else iter(())
    )


def _rows(batch_size: int, process_index: int, process_count: int) -> slice:
    if batch_size < 1:
        raise DataError(f"batch_size is {batch_size}; it must be 1 or more")
    if process_count < 1 or not 0 <= process_index < process_count:
        raise DataError(
            f"process_index is {process_index} of process_count {process_count}; it must be from 0 "
            "to process_count - 1"
        )
    if batch_size % process_count:
        raise DataError(
            f"batch_size is {batch_size}, which {process_count} processes cannot share evenly; it "
            f"must be a multiple of {process_count}"
        )
    size = batch_size // process_count
    return slice(process_index * size, (process_index + 1) * size)


def _gather(source: ArraySource, indices: np.ndarray) -> Batch:
    return jax.tree.map(lambda array: array[indices], source.arrays)


def _array_batches(
    source: ArraySource, batch_size: int, seed: int, step: int, rows: slice
) -> Iterator[Batch]:
    while True:
        yield _gather(source, train_indices(len(source), batch_size, seed, step)[rows])
        step += 1


@dataclasses.dataclass(frozen=True)
class _Positions:
    """Random access by position in a stream: what grain reads."""

    example: Callable[[int], Any]
    length: int

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, position: int) -> Any:
        try:
            return self.example(position)
        except DataError:
            raise
        except Exception as error:
            raise DataError(
                f"an example cannot be read ({one_line(error)}); the prepared data may be damaged: "
                "delete them and prepare them again"
            ) from error


def _grain_batches(
    positions: _Positions, size: int, threads: int, prefetch: int | None
) -> Iterator[Batch]:
    grain = require("grain", "grain", "a data set too large for memory")
    ahead = max(2 * size if prefetch is None else prefetch, 1)
    options = grain.ReadOptions(num_threads=min(threads, ahead), prefetch_buffer_size=ahead)
    stream = grain.MapDataset.source(positions).to_iter_dataset(options).batch(size)

    def batches() -> Iterator[Batch]:
        iterator = iter(stream)
        try:
            yield from iterator
        except DataError as error:  # grain adds lines to what its threads raise
            raise DataError(str(error).splitlines()[0]) from error
        finally:
            iterator.close()  # its threads would outlive a loop that is left early

    return batches()
