"""Orders are permutations, pure functions of their seeds, and different where they should be."""

import numpy as np
import pytest

from paramshare.data import DataError, epoch_order, order, train_indices


@pytest.mark.parametrize("n", [0, 1, 2, 97])
def test_epoch_order_is_a_permutation_and_repeats_itself(n):
    first = epoch_order(n, seed=3, epoch=5)
    assert np.array_equal(np.sort(first), np.arange(n))
    assert np.array_equal(first, epoch_order(n, seed=3, epoch=5))


def test_orders_differ_between_epochs_and_seeds():
    orders = {tuple(epoch_order(50, seed, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16  # 50! is large: equal orders mean a shared stream


def test_stream_is_philox_as_published():
    # Known answers of the authors' Random123 suite for philox4x64-10. NumPy counts up
    # before it draws, so that the suite's counter zero is all ones here.
    bits = np.random.Philox(
        key=np.zeros(2, np.uint64), counter=np.full(4, 2**64 - 1, np.uint64)
    ).random_raw(4)
    assert [hex(b) for b in bits] == [
        "0x16554d9eca36314c",
        "0xdb20fe9d672d0fdc",
        "0xd7e772cee186176b",
        "0x7e68b68aec7ba23b",
    ]
    ours = order.raw(4, 7, order.CROP, 2, 9)
    direct = np.random.Philox(
        key=np.array([7, order.CROP], np.uint64), counter=np.array([0, 0, 2, 9], np.uint64)
    ).random_raw(4)
    assert np.array_equal(ours, direct)


def test_first_places_are_uniform():
    # Which example comes first, over 4,000 epochs of 8: chi-squared with 7 degrees of freedom
    # exceeds 24.3 once in a thousand.
    counts = np.bincount([epoch_order(8, 0, epoch)[0] for epoch in range(4000)], minlength=8)
    assert ((counts - 500) ** 2 / 500).sum() < 24.3


@pytest.mark.parametrize(("n", "batch_size"), [(10, 3), (12, 4), (5, 5), (7, 1)])
def test_an_epoch_of_batches_is_the_head_of_its_order(n, batch_size):
    steps = n // batch_size
    for epoch in range(3):
        seen = np.concatenate(
            [train_indices(n, batch_size, 1, epoch * steps + s) for s in range(steps)]
        )
        assert np.array_equal(seen, epoch_order(n, 1, epoch)[: steps * batch_size])


def test_writing_into_a_batch_does_not_change_the_order():
    train_indices(6, 3, 0, 0)[:] = -1
    assert np.array_equal(train_indices(6, 3, 0, 0), epoch_order(6, 0, 0)[:3])


@pytest.mark.parametrize("n", [2, 10, 101])
@pytest.mark.parametrize("fraction", [0, 0.1, 0.5])
def test_held_out_parts_are_disjoint_and_whole(n, fraction):
    training, validation = order.held_out(n, fraction, seed=2)
    assert np.array_equal(np.sort(np.concatenate([training, validation])), np.arange(n))
    assert len(validation) == (max(round(fraction * n), 1) if fraction else 0)


def test_subsets_are_drawn_by_the_seed():
    assert not np.array_equal(order.held_out(100, 0, 0, 10)[0], order.held_out(100, 0, 1, 10)[0])


def test_held_out_depends_on_the_seed_and_not_on_the_subset():
    training, validation = order.held_out(100, 0.1, seed=0)
    assert not np.array_equal(validation, order.held_out(100, 0.1, seed=1)[1])
    smaller = None
    for keep in (1, 10, 40, 90):
        part, same = order.held_out(100, 0.1, 0, keep)
        assert np.array_equal(same, validation)
        assert len(part) == keep
        assert set(part) <= set(training)
        assert smaller is None or smaller < set(part)
        smaller = set(part)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: train_indices(3, 4, 0, 0), "batch_size is 4; it must be from 1 to 3"),
        (lambda: train_indices(3, 0, 0, 0), "batch_size is 0"),
        (lambda: train_indices(3, 1, 0, -1), "step is -1"),
        (lambda: epoch_order(3, -1, 0), "seed is -1"),
        (lambda: epoch_order(3, 2**64, 0), "seed is"),
        (lambda: epoch_order(3, 0.5, 0), "seed is 0.5"),  # type: ignore[arg-type]
        (lambda: epoch_order(3, 0, -1), "epoch is -1"),
        (lambda: order.held_out(10, 1.0, 0), "validation is 1.0"),
        (lambda: order.held_out(10, -0.1, 0), "validation is -0.1"),
        (lambda: order.held_out(1, 0.5, 0), "leaves none"),
        (lambda: order.held_out(10, 0.1, 0, 10), "train_examples is 10; it must be from 1 to 9"),
        (lambda: order.held_out(10, 0.1, 0, 0), "train_examples is 0"),
    ],
)
def test_mistakes_raise_errors(call, words):
    with pytest.raises(DataError) as caught:
        call()
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
