"""Permutations and signs, computed and never stored: bijections, random enough, never changing."""

import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paramshare.schemes.permutation import (
    ROUNDS,
    Permutation,
    _sides,
    derive,
    mix,
    permute,
    signs,
)

# Primes, powers, sizes of kernels, and numbers that are no product of two near factors.
SIZES = (101, 256, 2**6 * 9, 1000, 1009)
LARGE = (4608, 36_864, 65_536, 65_537, 99_991, 2**14 * 9)


def in_numpy(size: int, keys: Iterable[int], inverse: bool = False) -> np.ndarray:
    """`Permutation(size, key)()` for many keys at once, (keys, size), written out.

    In JAX every size would be another program to compile.
    """
    a, b = _sides(size)
    derived = np.array([[derive(key, number) for number in range(ROUNDS)] for key in keys])

    def rounds(x: np.ndarray) -> np.ndarray:
        left, right = x // b, x % b
        for number in reversed(range(ROUNDS)) if inverse else range(ROUNDS):
            key, sign = derived[:, number, None].astype(np.uint32), -1 if inverse else 1
            if number % 2:
                right = (right + sign * in_numpy_mix(left.astype(np.uint32) ^ key) % b) % b
            else:
                left = (left + sign * in_numpy_mix(right.astype(np.uint32) ^ key) % a) % a
        return left * b + right

    x = rounds(np.broadcast_to(np.arange(size), (len(derived), size)))
    while np.any(x >= size):
        x = np.where(x >= size, rounds(x), x)
    return x


def in_numpy_mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return (x ^ (x >> 16)).astype(np.int64)


@pytest.mark.parametrize("size", [1, 2, 5, 180, 36_865, 99_991])
def test_jax_and_numpy_agree(size):
    keys, both = (3, 2**32 - 1), (False, True)
    expected = [in_numpy(size, keys, inverse) for inverse in both]
    result = jax.jit(lambda: [[Permutation(size, k, inverse)() for k in keys] for inverse in both])
    for rows, arrays in zip(result(), expected, strict=True):
        assert {row.dtype for row in rows} == {jnp.dtype(jnp.int32)}
        np.testing.assert_array_equal(rows, arrays)


def test_places_outside_that_map_to_themselves_are_left_out():
    """Walking on from such a place would never end. A whole program may hide that."""
    key = 2**32 - 1
    assert Permutation(5, key)._again(jnp.array([5])).tolist() == [5]
    np.testing.assert_array_equal(Permutation(5, key)(), in_numpy(5, [key])[0])


def test_every_size_has_a_bijection_and_its_inverse():
    for size in (*range(1, 201), *SIZES, *LARGE):
        keys = (0, 2**32 - 1)
        forward, backward = in_numpy(size, keys), in_numpy(size, keys, inverse=True)
        np.testing.assert_array_equal(np.sort(forward), np.tile(np.arange(size), (2, 1)))
        np.testing.assert_array_equal(
            np.take_along_axis(forward, backward, axis=1), np.tile(np.arange(size), (2, 1))
        )


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_small_sizes_take_every_order(size):
    keys = 3000
    orders, counts = np.unique(in_numpy(size, map(derive, range(keys))), axis=0, return_counts=True)
    assert len(orders) == math.factorial(size)
    # Six rounds over sides this small are not quite uniform: allow a factor of two, and five
    # standard errors.
    expected = keys / len(orders)
    slack = 5 * math.sqrt(expected)
    assert expected / 2 - slack < counts.min() <= counts.max() < 2 * expected + slack


@pytest.mark.parametrize("size", [7, 11, 13, 16, 17, 31, 36, 60, 101])
def test_all_places_are_equally_likely(size):
    """Pearson's chi-square of the table of places before and after, over many keys.

    The sums of its rows and columns are fixed.
    """
    keys = 20 * size
    places = in_numpy(size, (derive("place", key) for key in range(keys)))
    pairs = np.arange(size) * size + places
    table = np.bincount(pairs.ravel(), minlength=size**2)
    freedom = (size - 1) ** 2
    chi2 = np.sum((table - keys / size) ** 2) / (keys / size)
    assert abs(chi2 - freedom) < 5 * math.sqrt(2 * freedom) + 0.05 * freedom


@pytest.mark.parametrize("size", [5, 7, 8, 13, 17, 31, 64, 101, 180, 1009])
def test_fixed_points_are_as_frequent_as_in_random_permutations(size):
    """The number of fixed points has mean 1 and variance 1, for every size (Montmort, 1713)."""
    keys = 2000
    places = in_numpy(size, (derive("fixed", key) for key in range(keys)))
    counts = np.sum(places == np.arange(size), axis=1)
    assert abs(counts.mean() - 1) < 5 / math.sqrt(keys)
    # Six rounds over sides of two to four places are not quite uniform. (A rotation's variance
    # would be size - 1.)
    slack = 0.5 if size < 16 else 0
    # The variance of a sample variance is (m4 - 1) / n, with m4 = 4 for Poisson's distribution.
    assert abs(counts.var() - 1) < slack + 5 * math.sqrt(3 / keys)


@pytest.mark.parametrize("size", [7, 13, 17, 101, 180])
def test_neighbours_move_apart(size):
    """The places of two neighbours differ by any of 1 .. size - 1, modulo the size.

    In a rotation they would always differ by the same number.
    """
    keys = 500
    places = in_numpy(size, (derive("step", key) for key in range(keys)))
    steps = np.diff(places.astype(np.int64), axis=1) % size
    counts = np.bincount(steps.ravel(), minlength=size)[1:]
    expected = keys  # size - 1 differences for each key, over size - 1 values
    # The differences within one permutation depend on each other a little, so the limit is half as
    # large again as for independent ones.
    assert np.all(np.abs(counts - expected) < 7.5 * math.sqrt(expected))


@pytest.mark.parametrize("size", LARGE)
def test_large_permutations_have_no_pattern(size):
    """No correlation of places with themselves, with their neighbours, or with another key's.

    The limit is five standard errors, of 1 / sqrt(size) each.
    """
    one, other = in_numpy(size, (derive("one"), derive("other"))).astype(np.float64)
    places = np.arange(size)
    limit = 5 / math.sqrt(size)
    for a, b in (
        (one, places),
        (one, other),
        (one[1:], one[:-1]),
        (one[2:], one[:-2]),
        (one % 2, places % 2),
        (one % 9, places % 9),
    ):
        assert abs(np.corrcoef(a, b)[0, 1]) < limit
    # Beyond correlation: a 16 x 16 table of the places before and after.
    table = np.histogram2d(places, one, bins=16)[0]
    chi2 = np.sum((table - size / 256) ** 2) / (size / 256)
    assert abs(chi2 - 225) < 5 * math.sqrt(2 * 225)
    # Neighbours that stay neighbours in the same order: about one pair.
    assert np.sum(np.diff(one) == 1) < 10


@pytest.mark.parametrize("keys", [(0, 1), (3, 2**31 + 3), (7, 8)])
def test_similar_keys_give_unrelated_permutations(keys):
    one, other = in_numpy(10_007, keys).astype(np.float64)
    assert abs(np.corrcoef(one, other)[0, 1]) < 5 / math.sqrt(10_007)
    assert np.sum(one == other) < 10  # Poisson of mean 1


def test_signs_are_fair_and_independent():
    size, keys = 100_003, (0, 1, derive("a"), derive("b"))
    bits = jax.jit(lambda: jnp.stack([signs(size, key) for key in keys]))()
    values = np.asarray(bits) * -2.0 + 1
    limit = 5 / math.sqrt(size)
    assert np.all(np.abs(values.mean(axis=1)) < limit)
    assert np.all(np.abs(values @ values.T / size - np.eye(4)) < limit)
    for lag in (1, 2, 3, 64, 576):
        products = np.mean(values[:, lag:] * values[:, :-lag], axis=1)
        assert np.all(np.abs(products) < limit * math.sqrt(size / (size - lag)))


def test_signs_of_a_smaller_size_are_a_prefix():
    np.testing.assert_array_equal(signs(1000, 5)[:300], signs(300, 5))


def test_mix_is_a_bijection():
    """No two of 2^19 random words collide; a random function would have 32 collisions."""
    words = np.unique(np.random.default_rng(0).integers(2**32, size=2**19, dtype=np.uint32))
    assert len(np.unique(jax.jit(mix)(jnp.asarray(words)))) == len(words)


def test_mix_is_the_finaliser_of_murmur3():
    def reference(h: int) -> int:
        h ^= h >> 16
        h = h * 0x85EBCA6B % 2**32
        h ^= h >> 13
        h = h * 0xC2B2AE35 % 2**32
        return h ^ h >> 16

    words = [0, 1, 2, 0x12345678, 0xDEADBEEF, 2**31, 2**32 - 1]
    assert mix(jnp.asarray(words, jnp.uint32)).tolist() == [reference(word) for word in words]


def test_derive_separates_its_parts():
    parts = [
        *[("",), (0,), (1,), (0, 1), (1, 0), (10,), (0, 10), (0, 1, 0)],
        *[("a", "b"), ("ab",), ("a/b",), ("a", "b", "")],
    ]
    assert len({derive(*p) for p in parts}) == len(parts)
    assert derive(1, "a") == derive("1", "a")  # only the text counts
    assert all(0 <= derive(*p) < 2**32 for p in parts)


@pytest.mark.parametrize(("size", "block"), [(12, 1), (14, 3), (180, 4)])
@pytest.mark.parametrize("inverse", [False, True])
def test_permute_moves_blocks_and_its_gradient_moves_them_back(size, block, inverse):
    order = Permutation(size // block, 7, inverse)
    whole, x = size // block * block, np.arange(size, dtype=np.float32)

    @jax.jit
    def both(x, cotangent):
        moved, pull = jax.vjp(lambda x: permute(x, order, block), x)
        return order(), moved, *pull(cotangent)

    cotangent = np.sin(x)
    places, moved, back = both(x, cotangent)
    blocks = np.arange(whole).reshape(-1, block)[np.asarray(places)]
    expected = np.concatenate([blocks.ravel(), np.arange(whole, size)])
    np.testing.assert_array_equal(moved, expected)
    np.testing.assert_array_equal(np.asarray(back)[expected], cotangent)


def test_maps_never_change():
    """A checkpoint depends on these values without storing them; with others it would be noise."""
    assert (derive(0, "conv/kernel"), derive()) == (1450393804, 1120186595)
    golden = {
        12: ([2, 7, 6, 5, 1, 3, 4, 9, 11, 0, 8, 10], [9, 4, 0, 5, 6, 3, 2, 1, 10, 7, 11, 8]),
        1009: ([798, 522, 186, 949, 493, 618, 5, 266], [1000, 598, 425, 455, 939, 6, 707, 206]),
        36_864: (
            [250, 22606, 16987, 5116, 12715, 9385, 2975, 9727],
            [30143, 13980, 29866, 30192, 8255, 10209, 4429, 9812],
        ),
    }

    @jax.jit
    def starts():
        pairs = [[Permutation(size, 2**31 + 1, back) for back in (False, True)] for size in golden]
        return [[order()[:12] for order in pair] for pair in pairs]

    for values, pair in zip(starts(), golden.values(), strict=True):
        for array, expected in zip(values, pair, strict=True):
            assert array.tolist()[: len(expected)] == expected
    minus = "".join(str(int(bit)) for bit in np.asarray(signs(16, 9)))
    assert minus == "1100011110101100"
