"""Which slots of a ring every kernel reads, with which signs, in every mode: the maps that no checkpoint holds."""

import functools
import hashlib
import math
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paramshare import Ring, Site

SHAPES = ((3, 3, 4, 5), (6, 7), (8,), (3, 3, 4, 5))  # 180 + 42 + 8 + 180 = 410 numbers
WIDE = ((3, 3, 32, 64), (3, 3, 32, 64), (1, 1, 64, 128))  # 18,432 twice, 8,192
MODES: tuple[Any, ...] = ("ring", "global", "tile", "hash")


def sites(*shapes: tuple[int, ...], dtype: str = "float32") -> tuple[Site, ...]:
    return tuple(Site(f"layer{i}/kernel", shape, dtype) for i, shape in enumerate(shapes))


def doubles(where: tuple[Site, ...]) -> tuple[Site, ...]:
    return tuple(Site(site.path, site.shape, "float64", site.index) for site in where)


def scale_of(site: Site) -> float:
    """s_i = sqrt(4608 / (out kh kw)), the reference's."""
    return math.sqrt(4608 / (site.size if len(site.shape) == 1 else site.size // site.shape[-2]))


@functools.cache
def read(scheme: Ring, where: tuple[Site, ...]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """For every site, the slots that its numbers read and their signs: seen from a ring of 1 .. N."""
    with jax.enable_x64(True):
        expand = jax.jit(lambda ring: scheme.expand({"ring": ring}, {}, doubles(where)))
        kernels = [np.asarray(kernel).ravel() for kernel in expand(jnp.arange(1.0, scheme.size + 1))]
    slots, signs = [], []
    for kernel, site in zip(kernels, where, strict=True):
        values = kernel / scale_of(site)
        np.testing.assert_allclose(np.abs(values), np.rint(np.abs(values)), rtol=1e-14)  # three roundings
        slots.append(np.rint(np.abs(values)).astype(int) - 1)
        signs.append(np.sign(values))
    return slots, signs


def starts(where: tuple[Site, ...], size: int) -> np.ndarray:
    return np.cumsum([0, *(site.size for site in where[:-1])]) % size


def uses(slots: list[np.ndarray], size: int) -> np.ndarray:
    return np.bincount(np.concatenate(slots), minlength=size)


def window(start: int, length: int, size: int) -> list[int]:
    return sorted(((start + np.arange(length)) % size).tolist())


@pytest.mark.parametrize("size", [1, 7, 101, 410, 500])
@pytest.mark.parametrize("mode", ["ring", "global"])
def test_slots_are_used_evenly(mode, size):
    """T div N times each, or once more; in ring order those once more are the first T mod N."""
    slots, _ = read(Ring(size, mode), sites(*SHAPES))
    laps, rest = divmod(410, size)
    assert sorted(uses(slots, size)) == [laps] * (size - rest) + [laps + 1] * rest
    if mode == "ring":
        np.testing.assert_array_equal(uses(slots, size), laps + (np.arange(size) < rest))


@pytest.mark.parametrize("size", [7, 101, 410, 500])
def test_sites_take_consecutive_slots_around_the_ring(size):
    """Site i the n_i slots from (n_1 + ... + n_(i-1)) mod N on: none twice while n_i <= N."""
    where = sites(*SHAPES)
    for slots, start, site in zip(read(Ring(size), where)[0], starts(where, size), where, strict=True):
        assert sorted(slots) == window(start, site.size, size)
        if site.size <= size:
            assert len(set(slots)) == site.size


def test_a_kernel_of_many_laps_reads_them_in_no_order():
    (slots,), _ = read(Ring(7), sites((100, 100)))
    assert set(np.bincount(slots)) <= {10_000 // 7, 10_000 // 7 + 1}
    # Which slot follows which: 7 x 7 pairs, chi-square with some 36 degrees of freedom.
    pairs = np.bincount(slots[:-1] * 7 + slots[1:], minlength=49)
    assert np.sum((pairs - 9999 / 49) ** 2) / (9999 / 49) < 36 + 5 * math.sqrt(72)


def test_tile_reads_from_slot_zero_without_signs():
    for slots, signs, site in zip(*read(Ring(101, "tile"), sites(*SHAPES)), sites(*SHAPES), strict=True):
        np.testing.assert_array_equal(slots, np.arange(site.size) % 101)
        assert np.all(signs == 1)


def test_hash_uses_slots_as_chance_has_it():
    slots, _ = read(Ring(1000, "hash"), sites(*WIDE))
    total = sum(map(len, slots))
    chi2 = np.sum((uses(slots, 1000) - total / 1000) ** 2) / (total / 1000)
    assert abs(chi2 - 999) < 5 * math.sqrt(2 * 999)


def test_global_draws_the_slots_that_serve_once_more():
    size = 10_000
    slots, _ = read(Ring(size, "global"), sites(*WIDE))
    more = uses(slots, size) > sum(map(len, slots)) // size
    assert abs(np.corrcoef(more, np.arange(size))[0, 1]) < 5 / math.sqrt(size)


def test_global_repeats_slots_in_a_kernel_as_drawing_from_the_pool_does():
    size = 10_000
    slots, _ = read(Ring(size, "global"), sites(*WIDE))
    total = sum(map(len, slots))
    laps, rest = divmod(total, size)
    for found in slots:
        # A slot that stands c times in the pool misses a draw of n numbers without replacement.
        missed = [math.prod((total - len(found) - j) / (total - j) for j in range(copies)) for copies in (laps, laps + 1)]
        expected = size - (size - rest) * missed[0] - rest * missed[1]
        deviation = math.sqrt((size - rest) * missed[0] * (1 - missed[0]) + rest * missed[1] * (1 - missed[1]))  # if independent
        assert len(set(found)) < len(found)
        assert abs(len(set(found)) - expected) < 5 * deviation


@pytest.mark.parametrize("mode", ["ring", "global", "hash"])
def test_signs_are_fair_and_sites_and_seeds_are_unlike(mode):
    """Destructive sharing: two layers that read the same numbers must not look alike."""
    where, size = sites(*WIDE), 20_000
    slots, signs = read(Ring(size, mode), where)
    other_slots, other_signs = read(Ring(size, mode, seed=1), where)
    n = WIDE[0][0] * WIDE[0][1] * 32 * 64
    assert n == len(slots[0]) == len(slots[1])
    limit = 5 / math.sqrt(n)
    origin = starts(where, size) if mode == "ring" else np.zeros(3, int)
    orders, other_orders = ([(s - o) % size for s, o in zip(found, origin, strict=True)] for found in (slots, other_slots))
    assert all(abs(np.mean(found)) < 5 / math.sqrt(len(found)) for found in signs)
    for a, b in ((0, 1), (1, 0)):
        assert abs(np.mean(signs[a] * signs[b])) < limit
        assert abs(np.corrcoef(orders[a], orders[b])[0, 1]) < limit
    assert abs(np.mean(signs[0] * other_signs[0])) < limit
    assert abs(np.corrcoef(orders[0], other_orders[0])[0, 1]) < limit
    assert np.sum(orders[0] == orders[1]) < 12 and np.sum(orders[0] == other_orders[0]) < 12  # Poisson of mean 1 or less
    # Neither do signs go with slots, or a kernel's neighbours read neighbours.
    assert abs(np.corrcoef(signs[0], slots[0])[0, 1]) < limit
    assert np.sum(np.abs(np.diff(slots[0])) == 1) < 14  # of mean 2


def test_layers_of_one_stacked_parameter_are_unlike():
    one, other = read(Ring(500), tuple(Site("layers/kernel", (3, 3, 4, 5), index=i) for i in range(2)))[0]
    assert not np.array_equal((one - 0) % 500, (other - 180) % 500)


@pytest.mark.parametrize("mode", ["ring", "tile", "hash"])
def test_a_layer_added_behind_moves_nothing(mode):
    fewer, more = (read(Ring(101, mode), sites(*shapes)) for shapes in (SHAPES[:3], SHAPES))
    for short, long in zip(fewer, more, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(short, long[:3], strict=True))


@pytest.mark.parametrize("mode", ["ring", "tile", "hash"])
def test_a_layer_put_in_front_moves_nothing_but_starts(mode):
    size, where = 101, sites(*SHAPES)
    slots, signs = read(Ring(size, mode), where)
    moved, same = read(Ring(size, mode), (Site("stem/kernel", (5, 3)), *where))
    for before, after in zip(slots, moved[1:], strict=True):
        np.testing.assert_array_equal((after - before) % size, 15 if mode == "ring" else 0)
    assert all(np.array_equal(a, b) for a, b in zip(signs, same[1:], strict=True))


@pytest.mark.parametrize("size", [180, 500])
def test_block_keeps_neighbours_together_and_the_tail_in_place(size):
    block, where = 16, sites((3, 3, 4, 5), (6, 7), (8,))
    for slots, start, site in zip(read(Ring(size, block=block), where)[0], starts(where, size), where, strict=True):
        whole = site.size // block * block
        places = (slots - start) % size
        np.testing.assert_array_equal(np.diff(places[:whole].reshape(-1, block)), 1)
        assert sorted(places[:whole:block]) == list(range(0, whole, block))
        np.testing.assert_array_equal(places[whole:], np.arange(whole, site.size))
        if whole > 2 * block:
            assert not np.array_equal(places, np.arange(site.size))


@settings(deadline=None, max_examples=20, derandomize=True, database=None)
@given(
    shapes=st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple), min_size=1, max_size=3),
    size=st.integers(1, 300),
    mode=st.sampled_from(MODES),
    seed=st.integers(0, 2**40),
    block=st.integers(1, 8),
)
def test_any_ring_on_any_sites(shapes, size, mode, seed, block):
    where = sites(*shapes)
    scheme = Ring(size, mode, seed, block if mode in ("ring", "global") else 1)
    slots, signs = read(scheme, where)
    total = sum(site.size for site in where)
    if mode in ("ring", "global"):
        assert uses(slots, size).max() - uses(slots, size).min() <= 1 and uses(slots, size).max() == -(-total // size)
    if mode == "ring":
        assert all(sorted(s) == window(o, len(s), size) for s, o in zip(slots, starts(where, size), strict=True))
    if mode == "tile":
        assert all(np.array_equal(s, np.arange(len(s)) % size) for s in slots) and all(np.all(s == 1) for s in signs)
    # The gradient of sum(c . K) is R^T c, whole numbers here: exact.
    cotangents = [np.arange(1.0, site.size + 1) for site in where]
    expected = sum(
        np.bincount(a, weights=b * c * scale_of(site), minlength=size)
        for a, b, c, site in zip(slots, signs, cotangents, where, strict=True)
    )
    with jax.enable_x64(True):
        product = lambda r: sum(  # noqa: E731
            jnp.sum(k.ravel() * c) for k, c in zip(scheme.expand({"ring": r}, {}, doubles(where)), cotangents, strict=True)
        )
        np.testing.assert_allclose(jax.jit(jax.grad(product))(jnp.ones(size)), expected, rtol=1e-12, atol=1e-10)


def digest() -> str:
    """Of kernels in all modes, to the bit."""
    ring, where = {"ring": jnp.linspace(-1, 1, 101)}, sites(*SHAPES)
    parts = [jax.jit(lambda b, m=m: Ring(101, m).expand(b, {}, where))(ring) for m in MODES]
    return hashlib.sha256(b"".join(np.asarray(kernel).tobytes() for kernels in parts for kernel in kernels)).hexdigest()


@pytest.mark.parametrize("hash_seed", ["0", "12345"])
def test_other_processes_make_the_same_kernels(hash_seed):
    """As the hosts of one run must, and the next run from a checkpoint."""
    code = f"import runpy; print(runpy.run_path({__file__!r})['digest']())"
    env = os.environ | {"PYTHONHASHSEED": hash_seed, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == digest(), done.stderr


GOLDEN = {  # (mode, block): six slots of the first and of the second site, twelve signs of the second
    ("ring", 1): ([43, 36, 51, 100, 16, 39], [83, 14, 82, 17, 2, 18], "++---+--++--"),
    ("ring", 4): ([4, 5, 6, 7, 7, 8], [83, 84, 85, 86, 79, 80], "++---+--++--"),
    ("global", 1): ([7, 41, 2, 77, 16, 88], [31, 23, 11, 99, 18, 89], "++---+--++--"),
    ("hash", 1): ([87, 77, 74, 85, 58, 33], [86, 9, 29, 35, 2, 62], "++---+--++--"),
}


@pytest.mark.parametrize(("mode", "block"), GOLDEN)
def test_maps_never_change(mode, block):
    """Stored checkpoints depend on these slots and signs, and hold none of them: a ring under other maps is worthless."""
    (first, second, *_), (_, signs, *_) = read(Ring(101, mode, seed=3, block=block), sites(*SHAPES))
    found = first[:6].tolist(), second[:6].tolist(), "".join("+" if sign > 0 else "-" for sign in signs[:12])
    assert found == GOLDEN[mode, block]
