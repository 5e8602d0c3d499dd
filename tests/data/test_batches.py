"""Streams resume anywhere, processes partition each batch, evaluation sees each example once."""

import itertools
import threading
import time
from typing import Any

import numpy as np
import pytest

from paramshare.data import (
    ArraySource,
    DataError,
    Example,
    Subset,
    eval_batches,
    train_batches,
    train_indices,
)


def arrays(n: int) -> ArraySource:
    """Example i is an image of i's."""
    return ArraySource(
        np.broadcast_to(np.arange(n, dtype=np.uint8)[:, None, None, None], (n, 2, 2, 1)),
        np.arange(n),
    )


class Disk:
    """The same examples, read through grain instead of as arrays."""

    def __init__(self, n: int, bad: int | None = None):
        self.inner, self.bad = arrays(n), bad

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Example:
        if index == self.bad:
            raise OSError("bad sector\nand more")
        return self.inner[index]


SOURCES = [pytest.param(arrays, id="arrays"), pytest.param(Disk, id="disk")]


def first(stream, count: int) -> list:
    batches = list(itertools.islice(stream, count))
    stream.close()
    return batches


@pytest.mark.parametrize("make", SOURCES)
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_slices_of_processes_make_up_the_global_batch(make, processes):
    streams = [
        first(train_batches(make(21), 8, 5, 0, process_index=p, process_count=processes), 5)
        for p in range(processes)
    ]
    for step in range(5):
        parts = [stream[step] for stream in streams]
        whole = np.concatenate([part["label"] for part in parts])
        assert np.array_equal(whole, train_indices(21, 8, 5, step))
        assert {part["label"].shape for part in parts} == {(8 // processes,)}
        assert np.array_equal(np.concatenate([part["input"] for part in parts])[:, 0, 0, 0], whole)


@pytest.mark.parametrize("place", [(0, 1), (0, 2), (1, 2)], ids=str)
@pytest.mark.parametrize("make", SOURCES)
def test_resuming_at_every_step_continues_the_stream(make, place):
    def stream(start: int) -> Any:
        index, count = place
        options = {"process_index": index, "process_count": count}
        return train_batches(make(10), 4, 0, start, **options)

    whole = first(stream(0), 7)  # three epochs of two batches, and one more
    assert {batch["input"].dtype for batch in whole} == {np.dtype(np.uint8)}
    assert {batch["label"].dtype for batch in whole} == {np.dtype(np.int32)}
    for start in range(7):
        for resumed, batch in zip(first(stream(start), 7 - start), whole[start:], strict=True):
            assert np.array_equal(resumed["label"], batch["label"])
            assert np.array_equal(resumed["input"], batch["input"])


def test_far_steps_need_no_replay():
    (batch,) = first(train_batches(Disk(10), 4, 0, 10**9), 1)
    assert np.array_equal(batch["label"], train_indices(10, 4, 0, 10**9))


@pytest.mark.parametrize("make", SOURCES)
@pytest.mark.parametrize(
    ("n", "batch_size", "processes"),
    [(0, 4, 2), (1, 4, 4), (3, 8, 2), (8, 4, 1), (9, 4, 2), (10, 6, 3), (17, 4, 4)],
)
def test_evaluation_sees_every_example_once(make, n, batch_size, processes):
    shares = [
        list(eval_batches(make(n), batch_size, process_index=p, process_count=processes))
        for p in range(processes)
    ]
    assert {len(share) for share in shares} == {-(-n // batch_size)}
    labels = []
    for batch in itertools.chain(*shares):
        assert batch["input"].shape == (batch_size // processes, 2, 2, 1)
        assert batch["weight"].dtype == np.float32
        assert set(batch["weight"]) <= {0.0, 1.0}
        real = batch["label"][batch["weight"] == 1]
        assert np.array_equal(batch["input"][batch["weight"] == 1][:, 0, 0, 0], real)
        labels.extend(real)
    assert sorted(labels) == list(range(n))


def test_training_views_are_asked_for_by_seed_and_epoch():
    class Views(Disk):
        def training_view(self, index, seed, epoch):
            return {"input": np.array([[[index, seed, epoch]]], np.uint8), "label": np.int32(index)}

    batches = first(train_batches(Views(5), 2, 9, 3), 3)  # epochs of two steps: 1, 2, 2
    for step, batch in enumerate(batches, start=3):
        expected = [[index, 9, step // 2] for index in train_indices(5, 2, 9, step)]
        assert batch["input"].reshape(2, 3).tolist() == expected
    # Evaluation does not ask for them.
    assert next(iter(eval_batches(Views(5), 2)))["input"].shape == (2, 2, 2, 1)


@pytest.mark.parametrize("lazy", [False, True])
def test_labels_are_any_pytree(lazy):
    """Read through grain as from arrays, in their own dtypes."""
    label = {"box": np.arange(40, dtype=np.float32).reshape(5, 2, 4), "mask": np.eye(5, 2) > 0}
    source = ArraySource(np.zeros((5, 3), np.float32), (label, np.arange(5)))
    data = Subset(source, np.arange(5)) if lazy else source
    (batch,) = first(train_batches(data, 4, 0, 0), 1)
    rows = train_indices(5, 4, 0, 0)
    assert {k: v.dtype for k, v in batch["label"][0].items()} == {"box": np.float32, "mask": bool}
    for name, values in label.items():
        assert np.array_equal(batch["label"][0][name], values[rows])
    assert np.array_equal(batch["label"][1], rows)
    shapes = [b["label"][0]["box"].shape for b in eval_batches(data, 2)]
    assert shapes == [(2, 2, 4)] * 3


def test_an_unreadable_example_raises_one_line():
    with pytest.raises(
        DataError, match=r"cannot be read \(OSError: bad sector\); .* prepare them again$"
    ):
        first(train_batches(Disk(4, bad=2), 4, 0, 0), 1)


def reading_threads(seconds: float = 10) -> int:
    """The number of grain's living threads; waits until there are none, or for some seconds."""
    deadline = time.monotonic() + seconds
    while (
        alive := sum("grain" in thread.name for thread in threading.enumerate())
    ) and time.monotonic() < deadline:
        time.sleep(0.01)
    return alive


def test_leaving_a_stream_ends_its_threads():
    stream = train_batches(Disk(10), 4, 0, 0)
    next(stream)
    assert reading_threads(0) > 0
    stream.close()  # type: ignore[attr-defined]
    assert reading_threads() == 0


def test_a_failed_stream_ends_its_threads_while_the_error_is_held():
    with pytest.raises(DataError) as caught:
        next(train_batches(Disk(4, bad=2), 4, 0, 0))
    assert reading_threads() == 0
    # The traceback holds the frames that hold the reader.
    assert caught.value.__traceback__ is not None


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: train_batches(arrays(4), 5, 0, 0), "batch_size is 5; it must be from 1 to 4"),
        (
            lambda: train_batches(arrays(4), 3, 0, 0, process_count=2),
            "batch_size is 3, which 2 processes cannot share evenly",
        ),
        (lambda: train_batches(arrays(4), 2, 0, -1), "step is -1"),
        (
            lambda: train_batches(arrays(4), 2, 0, 0, process_index=2, process_count=2),
            "process_index is 2 of process_count 2",
        ),
        (lambda: eval_batches(arrays(4), 0), "batch_size is 0"),
    ],
)
def test_mistakes_raise_before_the_first_batch(call, words):
    with pytest.raises(DataError, match=words):
        call()
