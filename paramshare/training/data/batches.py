"""Batches of training and evaluation, by step.

Element s of a training stream is a pure function of (seed, s): resuming at a step replays nothing. Each process of several reads its own
slice of each global batch and nothing else.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from paramshare.training.data.error import DataError, one_line, require
from paramshare.training.data.image_set import ArraySource, Source
from paramshare.training.data.order import epoch_order, train_indices

__all__ = ["Batch", "epoch_order", "eval_batches", "train_batches", "train_indices"]

Batch = dict[str, np.ndarray]


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

    The global batch of step s holds the examples `train_indices(len(source), batch_size, seed, s)`; this process gets the
    contiguous slice number `process_index` of `process_count`. Arrays are indexed in place; any other source is read by grain's threads,
    and if it has a method `training_view(index, seed, epoch)`, that is what is batched in the place of `source[index]`.

    Args:
        source: N examples.
        batch_size: examples a global batch, B.
        seed: of the order, 0 <= seed < 2**64.
        start_step: the step of the first batch.
        process_index: which slice.
        process_count: how many slices; divides batch_size.
        threads: that read (not for arrays).
        prefetch: examples read ahead; None for two batches (not for arrays).

    Returns:
        Iterator of {"image": (b, H, W, C) uint8, "label": (b,) int32} with b = B / process_count.

    Raises:
        DataError: at once, if a size does not fit; while iterating, if an example cannot be read.

    Example:
        >>> source = ArraySource(np.zeros((10, 8, 8, 1), np.uint8), np.arange(10))
        >>> batch = next(train_batches(source, 4, seed=0, start_step=7))
        >>> (batch["label"] == train_indices(10, 4, seed=0, step=7)).all()
        np.True_
    """
    n = len(source)
    train_indices(n, batch_size, seed, start_step)  # speaks up now rather than at the first batch
    own = _slice(batch_size, process_index, process_count)
    if isinstance(source, ArraySource):
        return _array_batches(source, batch_size, seed, start_step, own)
    size = own.stop - own.start
    view = getattr(source, "training_view", None)

    def example(position: int) -> Mapping[str, Any]:
        ahead, row = divmod(position, size)
        step = start_step + ahead
        index = int(train_indices(n, batch_size, seed, step)[own.start + row])
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

    All processes get the same number of batches, ceil(N / batch_size), which a collective needs; what is missing at the end is filled with
    copies of the last example at weight 0.

    Args:
        source: N examples; N may be 0, which gives no batch.
        batch_size: examples a global batch, B; may be larger than N.
        process_index: which slice of each global batch.
        process_count: how many slices; divides batch_size.
        threads: that read (not for arrays).
        prefetch: examples read ahead; None for two batches (not for arrays).

    Returns:
        Iterator of {"image": (b, H, W, C) uint8, "label": (b,) int32, "weight": (b,) float32 of 0 and 1}.

    Raises:
        DataError: at once, if a size does not fit; while iterating, if an example cannot be read.

    Example:
        >>> source = ArraySource(np.zeros((3, 8, 8, 1), np.uint8), [5, 6, 7])
        >>> [(b["label"].tolist(), b["weight"].tolist()) for b in eval_batches(source, 2)]
        [([5, 6], [1.0, 1.0]), ([7, 7], [1.0, 0.0])]
    """
    n = len(source)
    own = _slice(batch_size, process_index, process_count)
    size, steps = own.stop - own.start, -(-n // batch_size)
    if isinstance(source, ArraySource):
        rows = (np.arange(own.start, own.stop) + step * batch_size for step in range(steps))
        return ({**_gather(source, np.minimum(row, n - 1)), "weight": (row < n).astype(np.float32)} for row in rows)

    def example(position: int) -> dict[str, Any]:
        step, row = divmod(position, size)
        index = step * batch_size + own.start + row
        return {**source[min(index, n - 1)], "weight": np.float32(index < n)}

    return _grain_batches(_Positions(example, steps * size), size, threads, prefetch) if steps else iter(())


def _slice(batch_size: int, process_index: int, process_count: int) -> slice:
    if batch_size < 1:
        raise DataError(f"batch_size={batch_size}: a batch holds at least one example; pass batch_size >= 1")
    if process_count < 1 or not 0 <= process_index < process_count:
        raise DataError(f"process_index={process_index} of process_count={process_count}: processes count from 0; pass 0 <= index < count")
    if batch_size % process_count:
        raise DataError(f"batch_size={batch_size} cannot be divided among {process_count} processes; pass a multiple of {process_count}")
    size = batch_size // process_count
    return slice(process_index * size, (process_index + 1) * size)


def _gather(source: ArraySource, indices: np.ndarray) -> Batch:
    return {"image": source.image[indices], "label": source.label[indices]}


def _array_batches(source: ArraySource, batch_size: int, seed: int, step: int, own: slice) -> Iterator[Batch]:
    while True:
        yield _gather(source, train_indices(len(source), batch_size, seed, step)[own])
        step += 1


@dataclasses.dataclass(frozen=True)
class _Positions:
    """Random access by position in a stream: what grain reads."""

    example: Callable[[int], Mapping[str, Any]]
    length: int

    def __len__(self) -> int:
        """The number of examples."""
        return self.length

    def __getitem__(self, position: int) -> dict[str, Any]:
        """The example at a position."""
        try:
            found = self.example(position)
        except DataError:
            raise
        except Exception as error:
            raise DataError(
                f"an example cannot be read ({one_line(error)}); the prepared set may be damaged: delete it and prepare it again"
            ) from error
        return {**found, "label": np.int32(found["label"])}


def _grain_batches(positions: _Positions, size: int, threads: int, prefetch: int | None) -> Iterator[Batch]:
    grain = require("grain", "grain", "a data set too large for memory")
    ahead = max(2 * size if prefetch is None else prefetch, 1)
    options = grain.ReadOptions(num_threads=min(threads, ahead), prefetch_buffer_size=ahead)
    stream = grain.MapDataset.source(positions).to_iter_dataset(options).batch(size)

    def batches() -> Iterator[Batch]:
        iterator = iter(stream)
        try:
            yield from iterator
        except DataError as error:  # grain adds lines of its own to whatever its threads raise
            raise DataError(str(error).splitlines()[0]) from error
        finally:
            iterator.close()  # its threads would outlive a loop that is left early

    return batches()
