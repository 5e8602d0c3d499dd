"""Quantised banks of every scheme: what is rounded, what trains, and what stays 0."""

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from paramshare import Ring, SchemeError, Site, Soft, Tied
from paramshare.schemes import Compressed, Weights
from paramshare.schemes.compressed import LEVELS, best_edge, round_to_levels, uniform_grid

NORMAL = np.random.default_rng(0).normal(size=4000).astype(np.float32)


@functools.cache
def drawn(case: Any) -> tuple[Compressed, Weights]:
    sites = case.sites
    scheme = Compressed(case.scheme, 2, "uniform" if len(sites) % 2 else "kmeans")
    return scheme, jax.jit(lambda key: scheme.init(key, sites))(jax.random.key(7))


def test_every_scheme_can_be_quantised(case):
    """The bank and everything else have the shapes of the plain scheme; levels are added."""
    scheme = Compressed(case.scheme, 4, "kmeans")
    weights, plain = scheme.shapes(case.sites), case.scheme.shapes(case.sites)
    others = {key: leaf for key, leaf in weights.coefficients.items() if key != LEVELS}
    assert (weights.bank, others, weights.own) == plain
    assert {leaf.shape for leaf in jax.tree.leaves(weights.coefficients[LEVELS])} == {(16,)}
    kernels = jax.eval_shape(lambda w: scheme.expand(w, case.sites), weights)
    assert [kernel.shape for kernel in kernels] == [site.shape for site in case.sites]


def test_kernels_are_those_of_the_rounded_bank(one):
    """The bank is rounded to the same bits in every program.

    So are kernels, but for schemes with matrix products: XLA may sum these in another order where
    it fuses them with the rounding.
    """
    scheme, weights = drawn(one)
    rounded, together = jax.jit(lambda w: (scheme.rounded(w), scheme.expand(w, one.sites)))(weights)
    chex.assert_trees_all_equal(rounded, jax.jit(scheme.rounded)(weights), scheme.rounded(weights))
    apart = jax.jit(lambda w: one.scheme.expand(w, one.sites))(rounded)
    gathers = not isinstance(one.scheme, Soft) and type(one.scheme).__name__ != "LowRank"
    chex.assert_trees_all_close(together, apart, rtol=0 if gathers else 1e-6)
    for leaf in jax.tree.leaves(rounded.bank):
        assert len(np.unique(leaf)) <= 4


def test_the_bank_starts_as_without_levels(one):
    weights = drawn(one)[1]
    plain = jax.jit(lambda key: one.scheme.init(key, one.sites))(jax.random.key(7))
    chex.assert_trees_all_close(weights.bank, plain.bank, rtol=1e-6)
    others = {key: leaf for key, leaf in weights.coefficients.items() if key != LEVELS}
    chex.assert_trees_all_close((others, weights.own), (plain.coefficients, plain.own), rtol=1e-6)


def test_the_gradient_is_that_at_the_rounded_bank(one):
    """Of the bank, where it is not 0; and of everything else."""
    scheme, weights = drawn(one)

    def loss(scheme: Any, weights: Weights) -> jax.Array:
        kernels = scheme.expand(weights, one.sites)
        return sum((jnp.sum(jnp.sin(3 * k)) for k in kernels), jnp.zeros(()))

    through = jax.jit(jax.grad(functools.partial(loss, scheme)))(weights)
    at = jax.jit(jax.grad(functools.partial(loss, one.scheme)))(scheme.rounded(weights))
    chex.assert_trees_all_close(through.bank, at.bank, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(through.own, at.own, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["uniform", "kmeans"])
def test_zeros_stay_zero_and_have_no_gradient(method):
    values = jnp.asarray(NORMAL).at[::3].set(0)
    scheme = Compressed(Ring(4), 3, method)
    levels = scheme.uniform_levels(values)
    gradient: Any = jax.grad(lambda v: jnp.sum(jnp.sin(round_to_levels(method, 3, v, levels))))(
        values
    )
    rounded = np.asarray(round_to_levels(method, 3, values, levels))
    assert (rounded[::3] == 0).all() and np.count_nonzero(rounded) == np.count_nonzero(values)
    assert (gradient[::3] == 0).all() and np.count_nonzero(gradient) == np.count_nonzero(values)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_uniform_rounding_is_as_good_as_the_theory_of_normal_numbers(bits):
    """Max 1960, table II: the least mean squared error of a uniform grid on normal numbers."""
    best = {2: 0.1188, 3: 0.03744, 4: 0.01154, 6: 0.001041, 8: 0.0000569 * 1.5}[bits]
    values = jnp.asarray(np.random.default_rng(1).normal(size=100_000), jnp.float32)
    edge = best_edge(values, bits)
    rounded, step = round_to_levels("uniform", bits, values, edge), edge / 2 ** (bits - 1)
    assert float(jnp.mean((rounded - values) ** 2)) == pytest.approx(best, rel=0.05 + (bits == 8))
    inside = jnp.abs(values) <= step * 2 ** (bits - 1)
    error = jnp.abs(rounded - values)[inside]
    assert float(error.max()) <= float(step) / 2 * (1 + 1e-6) * (1 + 2 ** (bits - 23))


def test_levels_are_rounded_to_themselves():
    for bits in (2, 5, 8):
        levels = uniform_grid(jnp.float32(0.1), bits)[0]
        np.testing.assert_array_equal(
            round_to_levels("uniform", bits, levels, jnp.float32(0.1)), levels
        )
        book = jnp.sort(jnp.asarray(NORMAL[: 2**bits]))
        np.testing.assert_array_equal(round_to_levels("kmeans", bits, book, book[::-1]), book)


@pytest.mark.parametrize("method", ["uniform", "kmeans"])
def test_levels_follow_their_numbers(method):
    """A step of SGD moves them where a fit to the moved numbers would, if none changes its level.

    That is exact: both fits are linear in the numbers. The codebook is not sorted.
    """
    values = jnp.asarray(NORMAL[:200]).at[:20].set(0)
    kept = values != 0
    if method == "uniform":
        levels = best_edge(values, 2)
        offsets = round_to_levels(method, 2, values, levels) / levels
        fit = lambda v: jnp.sum(v * offsets) / jnp.sum(offsets**2)  # noqa: E731
    else:
        levels = jnp.array([1.2, -0.3, -1.5, 0.4])
        rounded = round_to_levels(method, 2, values, levels)
        fit = lambda v: jnp.stack([jnp.mean(v[(rounded == x) & kept]) for x in levels])  # noqa: E731
    slope = lambda x: jnp.sum(jnp.sin(7 * x))  # noqa: E731
    gradient = jax.grad(lambda v, p: slope(round_to_levels(method, 2, v, p)), argnums=(0, 1))
    of_values, of_levels = gradient(values, levels)
    moved = fit(values - 0.01 * of_values) - fit(values)
    np.testing.assert_allclose(-0.01 * of_levels, moved, rtol=2e-3, atol=1e-7)


def test_only_the_size_of_an_edge_counts():
    """An optimizer may carry it below 0."""
    values = jnp.asarray(NORMAL[:200])
    rounded, pull = jax.vjp(lambda e: round_to_levels("uniform", 3, values, e), jnp.float32(1.7))
    mirrored, push = jax.vjp(lambda e: round_to_levels("uniform", 3, values, e), jnp.float32(-1.7))
    np.testing.assert_array_equal(mirrored, rounded)
    assert push(values)[0] == -pull(values)[0] != 0


def test_adam_trains_an_edge_as_slowly_as_the_numbers():
    """With noisy gradients and 256 levels; a trained step between them would cross 0."""
    target = jnp.asarray(0.02 * NORMAL[:1000])
    edge, rule = best_edge(target, 8), optax.adam(1e-3)
    params: Any = {"values": target, "edge": edge}

    def rounded(params):
        return round_to_levels("uniform", 8, params["values"], params["edge"])

    def step(state, key):
        params, moments = state
        noisy = target + 0.02 * jax.random.normal(key, target.shape)
        gradient = jax.grad(lambda params: jnp.sum((rounded(params) - noisy) ** 2))(params)
        updates, moments = rule.update(gradient, moments)
        params: Any = optax.apply_updates(params, updates)
        error = jnp.linalg.norm(rounded(params) - target) / jnp.linalg.norm(target)
        return (params, moments), (error, params["edge"])

    keys = jax.random.split(jax.random.key(0), 200)
    with jax.numpy_dtype_promotion("standard"):  # optax multiplies integer steps with floats
        _, (errors, edges) = jax.lax.scan(step, (params, rule.init(params)), keys)
    assert jnp.max(errors) < 0.3 and jnp.min(edges) > edge / 2


def test_an_empty_level_stays():
    levels = jnp.array([-1.0, 1.0, 50.0, 60.0])
    gradient: Any = jax.grad(
        lambda p: jnp.sum(round_to_levels("kmeans", 2, jnp.asarray(NORMAL), p))
    )
    assert gradient(levels)[2:].tolist() == [0, 0]
    assert float(best_edge(jnp.zeros(5), 4)) == 0


def test_bad_arguments():
    ring, site = Ring(10), Site("levels", (3, 3), std=1.0)
    for options, message in [
        ({"bits": 1}, "bits must be an integer, 2 or more"),
        ({"bits": 9}, "bits must be from 2 to 8"),
        ({"bits": 4, "method": "linear"}, "'kmeans'"),
    ]:
        with pytest.raises(SchemeError, match=message):
            Compressed(ring, **options)
    with pytest.raises(SchemeError, match="quantised already"):
        Compressed(Compressed(ring, 4), 4)
    with pytest.raises(SchemeError, match="rename the parameter"):
        Compressed(ring, 4).check((site,))
    with pytest.raises(SchemeError, match="one shape"):
        sites = site, dataclasses.replace(site, path="b", shape=(2,))
        Compressed(Tied(), 4).check(sites)
