"""Streams resume anywhere, processes partition each batch, evaluation sees each example once."""

import itertools
import threading
import time

import numpy as np
import pytest

from paramshare.training.data import ArraySource, DataError, Example, eval_batches, train_batches, train_indices


def arrays(n: int) -> ArraySource:
    """Example i is an image of i's."""
    return ArraySource(np.broadcast_to(np.arange(n, dtype=np.uint8)[:, None, None, None], (n, 2, 2, 1)), np.arange(n))


class Disk:
    """The same examples, but not as arrays: read through grain."""

    def __init__(self, n: int, bad: int | None = None):
        self.inner, self.bad = arrays(n), bad

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Example:
        if index == self.bad:
            raise OSError("bad sector\nand more")
        return self.inner[index]


SOURCES = [pytest.param(arrays, id="arrays"), pytest.param(Disk, id="disk")]


def first(stream, count):
    found = list(itertools.islice(stream, count))
    stream.close()
    return found


@pytest.mark.parametrize("make", SOURCES)
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_slices_of_processes_make_up_the_global_batch(make, processes):
    streams = [first(train_batches(make(21), 8, 5, 0, process_index=p, process_count=processes), 5) for p in range(processes)]
    for step in range(5):
        parts = [stream[step] for stream in streams]
        whole = np.concatenate([part["label"] for part in parts])
        assert np.array_equal(whole, train_indices(21, 8, 5, step))
        assert {part["label"].shape for part in parts} == {(8 // processes,)}
        assert np.array_equal(np.concatenate([part["image"] for part in parts])[:, 0, 0, 0], whole)


@pytest.mark.parametrize("make", SOURCES)
def test_resuming_at_every_step_gives_the_rest(make):
    whole = first(train_batches(make(10), 4, 0, 0), 7)  # three epochs of two batches, and one more
    assert {batch["image"].dtype for batch in whole} == {np.dtype(np.uint8)}
    assert {batch["label"].dtype for batch in whole} == {np.dtype(np.int32)}
    for start in range(7):
        for resumed, batch in zip(first(train_batches(make(10), 4, 0, start), 7 - start), whole[start:], strict=True):
            assert np.array_equal(resumed["label"], batch["label"])
            assert np.array_equal(resumed["image"], batch["image"])


def test_far_steps_need_no_replay():
    (batch,) = first(train_batches(Disk(10), 4, 0, 10**9), 1)
    assert np.array_equal(batch["label"], train_indices(10, 4, 0, 10**9))


@pytest.mark.parametrize("make", SOURCES)
@pytest.mark.parametrize(("n", "batch_size", "processes"), [(0, 4, 2), (1, 4, 4), (3, 8, 2), (8, 4, 1), (9, 4, 2), (10, 6, 3), (17, 4, 4)])
def test_evaluation_sees_every_example_once(make, n, batch_size, processes):
    shares = [list(eval_batches(make(n), batch_size, process_index=p, process_count=processes)) for p in range(processes)]
    assert {len(share) for share in shares} == {-(-n // batch_size)}
    seen = []
    for batch in itertools.chain(*shares):
        assert batch["image"].shape == (batch_size // processes, 2, 2, 1)
        assert batch["weight"].dtype == np.float32
        assert set(batch["weight"]) <= {0.0, 1.0}
        real = batch["label"][batch["weight"] == 1]
        assert np.array_equal(batch["image"][batch["weight"] == 1][:, 0, 0, 0], real)
        seen.extend(real)
    assert sorted(seen) == list(range(n))


def test_training_views_are_asked_for_by_seed_and_epoch():
    class Views(Disk):
        def training_view(self, index, seed, epoch):
            return {"image": np.array([[[index, seed, epoch]]], np.uint8), "label": index}

    batches = first(train_batches(Views(5), 2, 9, 3), 3)  # epochs of two steps: 1, 2, 2
    for step, batch in enumerate(batches, start=3):
        expected = [[index, 9, step // 2] for index in train_indices(5, 2, 9, step)]
        assert batch["image"].reshape(2, 3).tolist() == expected
    assert next(iter(eval_batches(Views(5), 2)))["image"].shape == (2, 2, 2, 1)  # evaluation does not


def test_an_unreadable_example_is_told_in_one_line():
    with pytest.raises(DataError, match=r"cannot be read \(OSError: bad sector\); .* prepare it again$"):
        first(train_batches(Disk(4, bad=2), 4, 0, 0), 1)


def reading_threads(seconds: float = 10) -> int:
    """How many of grain's threads are alive, once none is or so much time has passed."""
    deadline = time.monotonic() + seconds
    while (alive := sum("grain" in thread.name for thread in threading.enumerate())) and time.monotonic() < deadline:
        time.sleep(0.01)
    return alive


def test_leaving_a_stream_ends_its_threads():
    stream = train_batches(Disk(10), 4, 0, 0)
    next(stream)
    assert reading_threads(0) > 0
    stream.close()  # type: ignore[attr-defined]
    assert reading_threads() == 0


def test_a_failed_stream_ends_its_threads_while_the_error_is_held():
    with pytest.raises(DataError) as told:
        next(train_batches(Disk(4, bad=2), 4, 0, 0))
    assert reading_threads() == 0
    assert told.value.__traceback__ is not None  # which holds the frames that hold the reader


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: train_batches(arrays(4), 5, 0, 0), "batch_size=5 is larger than the 4"),
        (lambda: train_batches(arrays(4), 3, 0, 0, process_count=2), "batch_size=3 cannot be divided among 2 processes"),
        (lambda: train_batches(arrays(4), 2, 0, -1), "step=-1"),
        (lambda: train_batches(arrays(4), 2, 0, 0, process_index=2, process_count=2), "process_index=2 of process_count=2"),
        (lambda: eval_batches(arrays(4), 0), "batch_size=0"),
        (lambda: eval_batches(arrays(4), 3, process_count=2), "batch_size=3 cannot be divided"),
    ],
)
def test_mistakes_are_told_before_the_first_batch(call, words):
    with pytest.raises(DataError, match=words):
        call()
