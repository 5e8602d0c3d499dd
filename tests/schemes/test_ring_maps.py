"""Which slots of the ring each kernel reads, and with which signs: maps that are never stored."""

import dataclasses
import functools
import hashlib
import math
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
from paramshare.schemes.interface import Weights

SHAPES = ((3, 3, 4, 5), (6, 7), (8,), (3, 3, 4, 5))  # 180 + 42 + 8 + 180 = 410 entries
WIDE = ((3, 3, 32, 64), (3, 3, 32, 64), (1, 1, 64, 128))  # 18,432 twice, 8,192
MODES: tuple[Any, ...] = ("ring", "global", "tile", "hash")


def sites(*shapes: tuple[int, ...], dtype: str = "float32") -> tuple[Site, ...]:
    return tuple(Site(f"layer{i}/kernel", shape, dtype) for i, shape in enumerate(shapes))


def paper(size: int, mode: Any = "ring", seed: int = 0, block: int = 1) -> Ring:
    return Ring(size, mode, seed, block, initial="paper")


def doubles(members: tuple[Site, ...]) -> tuple[Site, ...]:
    return tuple(dataclasses.replace(site, dtype="float64") for site in members)


def scale_of(site: Site) -> float:
    """s_i = sqrt(4608 / (out kh kw)), the reference's."""
    return math.sqrt(4608 / (site.size if len(site.shape) == 1 else site.size // site.shape[-2]))


@functools.cache
def read(scheme: Ring, members: tuple[Site, ...]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The slots that each site's entries read, and their signs: the kernels of the ring 1 .. N."""
    with jax.enable_x64(True):
        expand = jax.jit(lambda ring: scheme.expand(Weights({"ring": ring}), doubles(members)))
        return decode(expand(jnp.arange(1.0, scheme.size + 1)), members)


def decode(kernels, members: tuple[Site, ...]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The slots and signs of kernels made from the ring 1 .. N."""
    slots, signs = [], []
    for kernel, site in zip(kernels, members, strict=True):
        values = np.ravel(kernel) / scale_of(site)
        # A few roundings of the scale.
        np.testing.assert_allclose(np.abs(values), np.rint(np.abs(values)), rtol=1e-14)
        slots.append(np.rint(np.abs(values)).astype(int) - 1)
        signs.append(np.sign(values))
    return slots, signs


def starts(members: tuple[Site, ...], size: int) -> np.ndarray:
    return np.cumsum([0, *(site.size for site in members[:-1])]) % size


def uses(slots: list[np.ndarray], size: int) -> np.ndarray:
    return np.bincount(np.concatenate(slots), minlength=size)


def window(start: int, length: int, size: int) -> list[int]:
    return sorted(((start + np.arange(length)) % size).tolist())


@pytest.mark.parametrize("size", [1, 7, 101, 410, 500])
@pytest.mark.parametrize("mode", ["ring", "global"])
def test_slots_are_used_evenly(mode, size):
    """T div N times or once more; in mode "ring" the first T mod N slots serve once more."""
    slots, _ = read(paper(size, mode), sites(*SHAPES))
    laps, remainder = divmod(410, size)
    assert sorted(uses(slots, size)) == [laps] * (size - remainder) + [laps + 1] * remainder
    if mode == "ring":
        np.testing.assert_array_equal(uses(slots, size), laps + (np.arange(size) < remainder))


@pytest.mark.parametrize("size", [7, 101, 410, 500])
def test_sites_take_consecutive_slots_around_the_ring(size):
    """Site i takes n_i slots from (n_1 + ... + n_(i-1)) mod N on, none twice while n_i <= N."""
    members = sites(*SHAPES)
    for slots, start, site in zip(
        read(paper(size), members)[0], starts(members, size), members, strict=True
    ):
        assert sorted(slots) == window(start, site.size, size)
        if site.size <= size:
            assert len(set(slots)) == site.size


def test_a_kernel_of_many_laps_reads_slots_in_random_order():
    (slots,), _ = read(paper(7), sites((100, 100)))
    assert set(np.bincount(slots)) <= {10_000 // 7, 10_000 // 7 + 1}
    # Pairs of neighbours, 7 x 7: chi-square with about 36 degrees of freedom.
    pairs = np.bincount(slots[:-1] * 7 + slots[1:], minlength=49)
    assert np.sum((pairs - 9999 / 49) ** 2) / (9999 / 49) < 36 + 5 * math.sqrt(72)


def test_tile_reads_from_slot_zero_without_signs():
    for slots, signs, site in zip(
        *read(paper(101, "tile"), sites(*SHAPES)), sites(*SHAPES), strict=True
    ):
        np.testing.assert_array_equal(slots, np.arange(site.size) % 101)
        assert np.all(signs == 1)


def test_hash_uses_random_slots():
    slots, _ = read(paper(1000, "hash"), sites(*WIDE))
    total = sum(map(len, slots))
    chi2 = np.sum((uses(slots, 1000) - total / 1000) ** 2) / (total / 1000)
    assert abs(chi2 - 999) < 5 * math.sqrt(2 * 999)


def test_global_draws_the_slots_of_the_last_incomplete_lap():
    size = 10_000
    slots, _ = read(paper(size, "global"), sites(*WIDE))
    extra = uses(slots, size) > sum(map(len, slots)) // size
    assert abs(np.corrcoef(extra, np.arange(size))[0, 1]) < 5 / math.sqrt(size)


def test_global_repeats_slots_in_a_kernel_as_often_as_random_draws():
    size = 10_000
    slots, _ = read(paper(size, "global"), sites(*WIDE))
    total = sum(map(len, slots))
    laps, remainder = divmod(total, size)
    for kernel in slots:
        # The probability that a slot with c copies in the pool is not among n draws without
        # replacement.
        missed = [
            math.prod((total - len(kernel) - j) / (total - j) for j in range(copies))
            for copies in (laps, laps + 1)
        ]
        groups = list(zip((size - remainder, remainder), missed, strict=True))
        expected = size - sum(count * p for count, p in groups)
        # As if the slots were independent.
        deviation = math.sqrt(sum(count * p * (1 - p) for count, p in groups))
        assert len(set(kernel)) < len(kernel)
        assert abs(len(set(kernel)) - expected) < 5 * deviation


@pytest.mark.parametrize("mode", ["ring", "global", "hash"])
def test_signs_are_fair_and_sites_and_seeds_are_unrelated(mode):
    """Two layers that read the same slots must not resemble each other."""
    members, size = sites(*WIDE), 20_000
    slots, signs = read(paper(size, mode), members)
    other_slots, other_signs = read(paper(size, mode, seed=1), members)
    n = WIDE[0][0] * WIDE[0][1] * 32 * 64
    assert n == len(slots[0]) == len(slots[1])
    limit = 5 / math.sqrt(n)
    origin = starts(members, size) if mode == "ring" else np.zeros(3, int)
    orders, other_orders = (
        [(s - o) % size for s, o in zip(kernels, origin, strict=True)]
        for kernels in (slots, other_slots)
    )
    assert all(abs(np.mean(sign)) < 5 / math.sqrt(len(sign)) for sign in signs)
    assert abs(np.mean(signs[0] * signs[1])) < limit
    assert abs(np.corrcoef(orders[0], orders[1])[0, 1]) < limit
    assert abs(np.mean(signs[0] * other_signs[0])) < limit
    assert abs(np.corrcoef(orders[0], other_orders[0])[0, 1]) < limit
    # Equal places are Poisson of mean 1 or less.
    assert np.sum(orders[0] == orders[1]) < 12
    assert np.sum(orders[0] == other_orders[0]) < 12
    # Signs do not depend on slots, and neighbours in a kernel do not read neighbours.
    assert abs(np.corrcoef(signs[0], slots[0])[0, 1]) < limit
    assert np.sum(np.abs(np.diff(slots[0])) == 1) < 14  # of mean 2


def test_layers_of_one_stacked_parameter_read_different_slots():
    layers = tuple(Site("layers/kernel", (3, 3, 4, 5), index=i) for i in range(2))
    (first, second), _ = read(paper(500), layers)
    assert not np.array_equal(first % 500, (second - 180) % 500)


@pytest.mark.parametrize("mode", ["ring", "tile", "hash"])
def test_a_layer_added_at_the_end_moves_nothing(mode):
    fewer, more = (read(paper(101, mode), sites(*shapes)) for shapes in (SHAPES[:3], SHAPES))
    for short, long in zip(fewer, more, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(short, long[:3], strict=True))


@pytest.mark.parametrize("mode", ["ring", "tile", "hash"])
def test_a_layer_added_in_front_only_moves_the_starts(mode):
    size, members = 101, sites(*SHAPES)
    slots, signs = read(paper(size, mode), members)
    moved, moved_signs = read(paper(size, mode), (Site("first/kernel", (5, 3)), *members))
    for before, after in zip(slots, moved[1:], strict=True):
        np.testing.assert_array_equal((after - before) % size, 15 if mode == "ring" else 0)
    assert all(np.array_equal(a, b) for a, b in zip(signs, moved_signs[1:], strict=True))


@pytest.mark.parametrize("size", [180, 500])
def test_block_keeps_neighbours_together_and_the_remainder_in_place(size):
    block, members = 16, sites((3, 3, 4, 5), (6, 7), (8,))
    for slots, start, site in zip(
        read(paper(size, block=block), members)[0], starts(members, size), members, strict=True
    ):
        whole = site.size // block * block
        places = (slots - start) % size
        np.testing.assert_array_equal(np.diff(places[:whole].reshape(-1, block)), 1)
        assert sorted(places[:whole:block]) == list(range(0, whole, block))
        np.testing.assert_array_equal(places[whole:], np.arange(whole, site.size))
        if whole > 2 * block:
            assert not np.array_equal(places, np.arange(site.size))


@pytest.mark.slow
@settings(deadline=None, max_examples=12, derandomize=True, database=None)
@given(
    shapes=st.lists(
        st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple), min_size=1, max_size=3
    ),
    size=st.integers(1, 300),
    mode=st.sampled_from(MODES),
    seed=st.integers(0, 2**40),
    block=st.integers(1, 8),
)
def test_any_ring_on_any_sites(shapes, size, mode, seed, block):
    members = sites(*shapes)
    scheme = paper(size, mode, seed, block if mode in ("ring", "global") else 1)
    cotangents = tuple(np.arange(1.0, site.size + 1).reshape(site.shape) for site in members)

    @jax.jit
    def results(ring, cotangents):
        expand = lambda ring: scheme.expand(Weights({"ring": ring}), doubles(members))  # noqa: E731
        kernels, pull = jax.vjp(expand, ring)
        return kernels, *pull(cotangents)

    with jax.enable_x64(True):
        kernels, gradient = results(np.arange(1.0, size + 1), cotangents)
    slots, signs = decode(kernels, members)
    total = sum(site.size for site in members)
    if mode in ("ring", "global"):
        assert uses(slots, size).max() - uses(slots, size).min() <= 1
        assert uses(slots, size).max() == -(-total // size)
    if mode == "ring":
        for site_slots, start in zip(slots, starts(members, size), strict=True):
            assert sorted(site_slots) == window(start, len(site_slots), size)
    if mode == "tile":
        assert all(np.array_equal(s, np.arange(len(s)) % size) for s in slots)
        assert all(np.all(s == 1) for s in signs)
    # The gradient of sum(c . K) is R^T c.
    expected = sum(
        np.bincount(a, weights=b * c.ravel() * scale_of(site), minlength=size)
        for a, b, c, site in zip(slots, signs, cotangents, members, strict=True)
    )
    np.testing.assert_allclose(gradient, expected, rtol=1e-12, atol=1e-10)


@functools.cache
def digest() -> str:
    """A hash of the kernels' bytes, in all modes."""
    weights, members = Weights({"ring": jnp.linspace(-1, 1, 101)}), sites(*SHAPES)
    kernels = jax.jit(lambda w: [paper(101, mode).expand(w, members) for mode in MODES])(weights)
    arrays = [np.asarray(kernel) for kernel in jax.tree.leaves(kernels)]
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()


def test_other_processes_make_the_same_kernels(environment):
    """All hosts of a run must, and so must a run that resumes.

    The other process has another hash seed and another number of devices.
    """
    code = f"import runpy; print(runpy.run_path({__file__!r})['digest']())"
    env = environment(PYTHONHASHSEED="12345")
    process = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False
    )
    assert process.stdout.strip() == digest(), process.stderr


# (mode, block): six slots of the first and of the second site, twelve signs of the second.
GOLDEN = {
    ("ring", 1): ([43, 36, 51, 100, 16, 39], [83, 14, 82, 17, 2, 18], "++---+--++--"),
    ("ring", 4): ([4, 5, 6, 7, 7, 8], [83, 84, 85, 86, 79, 80], "++---+--++--"),
    ("global", 1): ([7, 41, 2, 77, 16, 88], [31, 23, 11, 99, 18, 89], "++---+--++--"),
    ("hash", 1): ([87, 77, 74, 85, 58, 33], [86, 9, 29, 35, 2, 62], "++---+--++--"),
}


@pytest.mark.parametrize(("mode", "block"), GOLDEN)
def test_maps_never_change(mode, block):
    """A checkpoint depends on these slots and signs without storing them."""
    (first, second, *_), (_, signs, *_) = read(paper(101, mode, 3, block), sites(*SHAPES))
    shown = "".join("+" if sign > 0 else "-" for sign in signs[:12])
    assert (first[:6].tolist(), second[:6].tolist(), shown) == GOLDEN[mode, block]
