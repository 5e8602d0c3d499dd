"""Relaxed sharing: low-rank differences, and what a fit to dense kernels leaves."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paramshare import FilterBasis, Relaxed, SchemeError, Site, Soft, Tied
from paramshare.schemes import relaxed

SITES = tuple(Site(f"block{i}/kernel", (3, 4, 10), std=0.1) for i in range(5))


def kernels(seed: int = 0, rank: int = 10) -> tuple[np.ndarray, ...]:
    """One common kernel, and a difference of some rank for each site."""
    rng = np.random.default_rng(seed)
    common = rng.normal(size=(12, 10))
    differences = rng.normal(size=(5, 12, rank)) @ rng.normal(size=(5, rank, 10))
    return tuple((common + d).reshape(3, 4, 10).astype(np.float32) for d in differences)


def error(scheme, dense) -> float:
    fitted = jax.jit(lambda k: scheme.expand(scheme.from_dense(k, SITES), SITES))(dense)
    return float(sum(np.sum((np.asarray(f) - d) ** 2) for f, d in zip(fitted, dense, strict=True)))


@pytest.mark.parametrize("inner", [Tied(), Soft(2), FilterBasis(4, 6)], ids=str)
def test_kernels_start_as_without_differences(inner):
    key = jax.random.key(0)
    expected = inner.expand(inner.init(key, SITES), SITES)
    for scheme in (Relaxed(inner, 3), Relaxed(inner, 3, scale=True)):
        for kernel, like in zip(
            scheme.expand(scheme.init(key, SITES), SITES), expected, strict=True
        ):
            np.testing.assert_array_equal(kernel, like)


def test_rank_0_is_the_wrapped_scheme():
    scheme, inner = Relaxed(Soft(2), 0), Soft(2)
    assert scheme.shapes(SITES) == inner.shapes(SITES)
    weights = inner.from_dense(kernels(), SITES)  # pyright: ignore
    np.testing.assert_array_equal(scheme.mixing(weights, SITES), inner.mixing(weights, SITES))
    assert Relaxed(Tied(groups=(0, 1, 0, 1, 0)), 0).groups_of(SITES) == (0, 1, 0, 1, 0)
    assert Relaxed(Tied(), 1).groups_of(SITES) is Relaxed(Soft(2), 1).mixing(weights, SITES) is None


def test_a_higher_rank_and_every_round_reduce_the_error(monkeypatch):
    errors = [error(Relaxed(Tied(), rank), kernels()) for rank in (0, 1, 3, 6, 10)]
    assert all(low < 0.9 * high for high, low in itertools.pairwise(errors))
    assert errors[-1] < 1e-9 * errors[0]
    rounds = []
    for count in (1, 2, 4, 10):
        monkeypatch.setattr(relaxed, "ROUNDS", count)
        rounds.append(error(Relaxed(Tied(), 3), kernels(rank=3)))
    assert all(low < 0.9 * high for high, low in itertools.pairwise(rounds))


def test_the_first_round_is_the_paper_s(monkeypatch):
    """Means, and the singular vectors of what they leave (Bae et al., section 2.2)."""
    monkeypatch.setattr(relaxed, "ROUNDS", 1)
    dense = kernels()
    matrices = np.stack(dense).reshape(5, 12, 10).astype(np.float64)
    left = np.linalg.svd(matrices - matrices.mean(0), compute_uv=False)[:, 4:]
    assert error(Relaxed(Tied(), 4), dense) == pytest.approx(np.sum(left**2), rel=1e-4)


def test_scales_fit_outputs_that_differ_in_size_only():
    rng = np.random.default_rng(0)
    common = rng.normal(size=(3, 4, 10))
    dense = tuple((common * s).astype(np.float32) for s in rng.uniform(0.5, 2, (5, 10)))
    assert error(Relaxed(Tied(), 0, scale=True), dense) < 1e-9 * error(Tied(), dense)
    zeros = tuple(np.zeros((3, 4, 10), np.float32) for _ in SITES)
    assert error(Relaxed(Tied(), 2, scale=True), zeros) == 0


def test_a_step_of_training_makes_the_layers_differ():
    scheme = Relaxed(Tied(), 2)
    weights = scheme.init(jax.random.key(0), SITES)

    def loss(weights):
        made = scheme.expand(weights, SITES)
        return sum(jnp.sum((m - d) ** 2) for m, d in zip(made, kernels(), strict=True))

    def step(weights):
        return jax.tree.map(lambda w, g: w - 0.01 * g, weights, jax.grad(loss)(weights))

    trained = jax.jit(lambda w: step(step(w)))(weights)
    made = scheme.expand(trained, SITES)
    assert not np.allclose(made[0], made[1], atol=1e-3)
    assert loss(trained) < loss(weights)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Relaxed(Tied(), -1), r"Relaxed\(rank=-1\): rank must be an integer, 0 or more"),
        (lambda: Relaxed(Tied(), *[1.5]), "rank must be an integer"),  # pyright: ignore
        (lambda: Relaxed(Tied(), 1, **{"scale": "yes"}), "scale must be True or False"),  # pyright: ignore
        (lambda: Relaxed(*[8, 1]), r"Relaxed\(8\): the first argument must be a sharing scheme"),  # pyright: ignore
        (lambda: Relaxed(*[Tied, 1]), "the first argument must be a sharing scheme"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(SchemeError, match=message):
        make()
