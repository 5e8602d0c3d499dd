"""Permutations and signs that nothing stores: bijections of any size, random enough, the same for ever."""

import math
import types
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paramshare.schemes import permutation
from paramshare.schemes.permutation import Permutation, derive, mix, permute, signs

SIZES = (101, 256, 2**6 * 9, 1000, 1009)  # primes, powers, kernels, what is no product of two near numbers
LARGE = (4608, 36_864, 65_536, 65_537, 99_991, 2**14 * 9)


@pytest.fixture
def in_numpy(monkeypatch) -> Callable[..., np.ndarray]:
    """`Permutation(...)()` by its own code, run by NumPy: no compiling, where every size is another program."""

    def while_loop(condition, body, x):
        while condition(x):
            x = body(x)
        return x

    lax = types.SimpleNamespace(iota=lambda dtype, size: np.arange(size, dtype=dtype), while_loop=while_loop)
    monkeypatch.setattr(permutation, "jax", types.SimpleNamespace(lax=lax))
    monkeypatch.setattr(permutation, "jnp", np)
    return lambda size, key, inverse=False: np.asarray(Permutation(size, key, inverse)())


@pytest.mark.parametrize("size", [1, 2, 3, 7, 10, 180, 181, 36_865])
@pytest.mark.parametrize("inverse", [False, True])
def test_compiled_it_is_what_numpy_computes(in_numpy, monkeypatch, size, inverse):
    expected = in_numpy(size, 3, inverse)
    monkeypatch.undo()
    found = jax.jit(Permutation(size, 3, inverse))()
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, expected)


def test_a_bijection_of_every_size_and_its_inverse(in_numpy):
    for size in (*range(1, 201), *SIZES, *LARGE):
        for key in (0, 2**32 - 1):
            forth, back = in_numpy(size, key), in_numpy(size, key, inverse=True)
            np.testing.assert_array_equal(np.sort(forth), np.arange(size))
            np.testing.assert_array_equal(forth[back], np.arange(size))


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_small_sizes_take_every_order_there_is(in_numpy, size):
    keys = 3000
    orders, counts = np.unique([in_numpy(size, derive(key)) for key in range(keys)], axis=0, return_counts=True)
    assert len(orders) == math.factorial(size)
    # A few rounds over so small sides are not quite uniform: within a factor of two, beside five standard errors.
    expected = keys / len(orders)
    assert expected / 2 - 5 * math.sqrt(expected) < counts.min() <= counts.max() < 2 * expected + 5 * math.sqrt(expected)


@pytest.mark.parametrize("size", [7, 11, 13, 16, 17, 31, 36, 60, 101])
def test_every_place_is_as_likely_as_another(in_numpy, size):
    """Pearson's chi-square of a size x size table of where each place goes, over keys; its rows and columns have fixed sums."""
    keys = 20 * size
    table = np.zeros((size, size))
    for key in range(keys):
        table[np.arange(size), in_numpy(size, derive("place", key))] += 1
    freedom = (size - 1) ** 2
    chi2 = np.sum((table - keys / size) ** 2) / (keys / size)
    assert abs(chi2 - freedom) < 5 * math.sqrt(2 * freedom) + 0.05 * freedom


@pytest.mark.parametrize("size", [5, 7, 8, 13, 17, 31, 64, 101, 180, 1009])
def test_fixed_points_are_those_of_random_permutations(in_numpy, size):
    """Their number has mean 1 and variance 1, whatever the size (Montmort, 1713)."""
    fixed = np.array([np.sum(in_numpy(size, derive("fixed", key)) == np.arange(size)) for key in range(2000)])
    assert abs(fixed.mean() - 1) < 5 / math.sqrt(2000)
    # Six rounds over sides of two to four places are not quite uniform (a rotation's variance would be size - 1).
    slack = 0.5 if size < 16 else 0
    assert abs(fixed.var() - 1) < slack + 5 * math.sqrt(3 / 2000)  # variance of a sample variance: (m4 - 1) / n, Poisson's m4 = 4


@pytest.mark.parametrize("size", [7, 13, 17, 101, 180])
def test_neighbours_part(in_numpy, size):
    """The difference of two neighbours' places, modulo the size, is any of 1 .. size - 1: not always the same, as in a rotation."""
    keys = 500
    steps = np.concatenate([np.diff(in_numpy(size, derive("step", key))) % size for key in range(keys)])
    counts = np.bincount(steps, minlength=size)[1:]
    expected = keys  # size - 1 differences a key, over size - 1 values
    # Differences within one permutation hang together a little: half as much again as independent ones.
    assert np.all(np.abs(counts - expected) < 7.5 * math.sqrt(expected))


@pytest.mark.parametrize("size", LARGE)
def test_large_ones_are_without_pattern(in_numpy, size):
    """Correlations of places with themselves, their neighbours, and those of other keys: 1 / sqrt(size), in five standard errors."""
    one, other = (in_numpy(size, derive(key)).astype(np.float64) for key in ("one", "other"))
    places = np.arange(size)
    limit = 5 / math.sqrt(size)
    for a, b in ((one, places), (one, other), (one[1:], one[:-1]), (one[2:], one[:-2]), (one % 2, places % 2), (one % 9, places % 9)):
        assert abs(np.corrcoef(a, b)[0, 1]) < limit
    # Beyond correlation: a 16 x 16 table of the places before and after.
    table = np.histogram2d(places, one, bins=16)[0]
    chi2 = np.sum((table - size / 256) ** 2) / (size / 256)
    assert abs(chi2 - 225) < 5 * math.sqrt(2 * 225)
    # Longest runs of neighbours that stay neighbours: about one pair each way.
    assert np.sum(np.diff(one) == 1) < 10


@pytest.mark.parametrize("keys", [(0, 1), (3, 2**31 + 3), (7, 8)])
def test_neighbouring_keys_are_unlike(in_numpy, keys):
    one, other = (in_numpy(10_007, key).astype(np.float64) for key in keys)
    assert abs(np.corrcoef(one, other)[0, 1]) < 5 / math.sqrt(10_007)
    assert np.sum(one == other) < 10  # Poisson of mean 1


def test_signs_are_fair_and_unlike():
    size = 100_003
    drawn = np.stack([np.asarray(signs(size, key)) for key in (0, 1, derive("a"), derive("b"))]) * -2.0 + 1
    limit = 5 / math.sqrt(size)
    assert np.all(np.abs(drawn.mean(axis=1)) < limit)
    assert np.all(np.abs(drawn @ drawn.T / size - np.eye(4)) < limit)
    for lag in (1, 2, 3, 64, 576):
        assert np.all(np.abs(np.mean(drawn[:, lag:] * drawn[:, :-lag], axis=1)) < limit * math.sqrt(size / (size - lag)))


def test_shorter_signs_are_the_beginning_of_longer_ones():
    np.testing.assert_array_equal(signs(1000, 5)[:300], signs(300, 5))


def test_mix_is_a_bijection():
    """Of 32-bit words; seen on 2^20 of them, chosen at random."""
    words = np.unique(np.random.default_rng(0).integers(2**32, size=2**20, dtype=np.uint32))
    assert len(np.unique(mix(jnp.asarray(words)))) == len(words)


def test_mix_is_murmur3s_finaliser():
    def theirs(h: int) -> int:
        h ^= h >> 16
        h = h * 0x85EBCA6B % 2**32
        h ^= h >> 13
        h = h * 0xC2B2AE35 % 2**32
        return h ^ h >> 16

    words = [0, 1, 2, 0x12345678, 0xDEADBEEF, 2**31, 2**32 - 1]
    assert mix(jnp.asarray(words, jnp.uint32)).tolist() == [theirs(word) for word in words]


def test_derive_tells_parts_apart():
    parts = [(), ("",), (0,), (1,), (0, 1), (1, 0), (10,), (0, 10), (0, 1, 0), ("a", "b"), ("ab",), ("a/b",), ("a", "b", "")]
    assert len({derive(*p) for p in parts[1:]}) == len(parts) - 1
    assert derive(1, "a") == derive("1", "a")  # what they read as counts
    assert all(0 <= derive(*p) < 2**32 for p in parts)


@pytest.mark.parametrize(("size", "block"), [(12, 1), (12, 3), (14, 3), (180, 4), (5, 1)])
@pytest.mark.parametrize("inverse", [False, True])
def test_permute_moves_blocks_and_its_gradient_moves_them_back(size, block, inverse):
    order = Permutation(size // block, 7, inverse)
    whole, x = size // block * block, jnp.arange(size, dtype=jnp.float32)
    moved = permute(x, order, block)
    expected = np.concatenate([np.arange(whole).reshape(-1, block)[np.asarray(order())].ravel(), np.arange(whole, size)])
    np.testing.assert_array_equal(moved, expected)
    cotangent = jnp.sin(x)
    (back,) = jax.vjp(lambda x: permute(x, order, block), x)[1](cotangent)
    np.testing.assert_array_equal(np.asarray(back)[expected], cotangent)


def test_nothing_of_this_ever_changes():
    """Stored checkpoints depend on these numbers, and hold none of them: a ring trained under other ones is noise."""
    assert (derive(0, "conv/kernel"), derive()) == (1450393804, 1120186595)
    golden = {
        12: ([2, 7, 6, 5, 1, 3, 4, 9, 11, 0, 8, 10], [9, 4, 0, 5, 6, 3, 2, 1, 10, 7, 11, 8]),
        1009: ([798, 522, 186, 949, 493, 618, 5, 266], [1000, 598, 425, 455, 939, 6, 707, 206]),
        36_864: ([250, 22606, 16987, 5116, 12715, 9385, 2975, 9727], [30143, 13980, 29866, 30192, 8255, 10209, 4429, 9812]),
    }
    for size, (forth, back) in golden.items():
        assert np.asarray(Permutation(size, 2**31 + 1)())[: len(forth)].tolist() == forth
        assert np.asarray(Permutation(size, 2**31 + 1, inverse=True)())[: len(back)].tolist() == back
    assert np.asarray(signs(16, 9)).astype(int).tolist() == [1, 1, 0, 0, 0, 1, 1, 1, 1, 0, 1, 0, 1, 1, 0, 0]
