"""Pruning, codebooks, and networks whose banks are quantised."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paramshare
from paramshare import Plan, Ring, Rule, Soft, Tied, share
from paramshare.models import ResNet
from paramshare.schemes import Compressed
from paramshare.schemes.compressed import best_edge, round_to_levels, uniform_grid
from paramshare.transform.compress import (
    CompressError,
    banks_table,
    compressed_banks,
    finalise,
    prune,
    quantise,
)
from paramshare.transform.kmeans import kmeans

X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 1)), jnp.float32)


@pytest.fixture(scope="module")
def network():
    """Three banks of three schemes, initial values, and the outputs as a compiled function."""
    plan = Plan(
        Rule("stage1/.*/conv./kernel", Soft(2), bank="templates"),
        Rule("stage2/block1/.*/kernel", Ring(500), bank="ring"),
        Rule("stage2/block2/conv./kernel", Tied(), bank="kernels"),
    )
    shared = share(ResNet((1, 2), (4, 8), num_classes=10, stem="cifar", stem_width=4), plan, X)
    return shared, jax.jit(shared.init)(jax.random.key(0), X)


def test_clusters_that_gaps_divide_are_found():
    """Of unequal size, so that neither quantiles nor a uniform grid find them."""
    rng = np.random.default_rng(0)
    centres, sizes = np.array([-5.0, -4.5, 0.1, 3.0, 9.0]), [3, 500, 20, 1, 200]
    values = np.concatenate(
        [c + rng.uniform(-0.05, 0.05, size=n) for c, n in zip(centres, sizes, strict=True)]
    )
    levels = kmeans(rng.permutation(values), 5)
    expected = [part.mean() for part in np.split(values, np.cumsum(sizes)[:-1])]
    np.testing.assert_allclose(levels, expected, rtol=1e-12)


@pytest.mark.parametrize("kind", ["normal", "laplace", "lognormal", "two scales", "few"])
@pytest.mark.parametrize("bits", [2, 8])
def test_a_codebook_is_never_worse_than_a_uniform_grid(kind, bits):
    rng = np.random.default_rng(bits)
    values = {
        "normal": rng.normal(size=3000),
        "laplace": rng.laplace(size=3000),
        "lognormal": rng.lognormal(sigma=2, size=3000),
        "two scales": np.concatenate([rng.normal(size=1500), 100 * rng.normal(size=20)]),
        "few": rng.normal(size=7),
    }[kind].astype(np.float32)
    edge = best_edge(jnp.asarray(values), bits)
    book = kmeans(values, 2**bits, uniform_grid(edge, bits)[0])
    assert book.shape == (2**bits,) and (np.diff(book) >= 0).all()
    kinds: Any = (("uniform", edge), ("kmeans", jnp.asarray(book, jnp.float32)))
    rounded = [round_to_levels(kind, bits, jnp.asarray(values), grid) for kind, grid in kinds]
    errors = [float(np.sum((np.asarray(x) - values) ** 2)) for x in rounded]
    assert errors[1] <= errors[0] * (1 + 1e-5)  # levels are stored in float32
    # Lloyd's conditions: each level is the mean of the numbers nearest to it.
    nearest = np.abs(values[:, None] - book).argmin(axis=1)
    for k in np.unique(nearest):
        if kind != "lognormal":  # where it may not have ended
            assert book[k] == pytest.approx(values[nearest == k].mean(), abs=1e-3)


def test_codebooks_of_little_data():
    assert kmeans([2.0, 1.0, 2.0], 4).tolist() == [1, 2, 2, 2]
    assert kmeans([], 4).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("fraction", [0.0, 0.25, 1 / 3, 0.99])
def test_the_smallest_numbers_are_pruned_and_as_many_as_asked(network, fraction):
    shared, variables = network
    pruned = prune(shared, variables, fraction, ["ring", "ker.*"])
    for name in ("ring", "kernels"):
        (before,), (after,) = (jax.tree.leaves(v["banks"][name]) for v in (variables, pruned))
        gone = np.asarray(after == 0)
        assert gone.sum() == round(fraction * before.size)
        np.testing.assert_array_equal(after, np.where(gone, 0, before))
        if gone.sum() > 0:
            assert np.abs(before)[gone].max() <= np.abs(before)[~gone].min()
    assert pruned["banks"]["templates"] is variables["banks"]["templates"]
    assert pruned["params"] is variables["params"]
    again = prune(shared, pruned, fraction, ["ring", "kernels"])
    chex.assert_trees_all_equal(again, pruned)


def test_ties_are_pruned_in_order():
    shared = share(
        ResNet((1,), (4,), num_classes=10, stem="cifar", stem_width=4),
        Plan(Rule("stage1/.*/kernel", Ring(8), bank="ring")),
        X,
    )
    banks = {"ring": {"ring": jnp.array([1.0, -1, 1, -1, 2, 0, 1, 1])}}
    pruned = prune(shared, {"banks": banks}, 0.5)
    assert pruned["banks"]["ring"]["ring"].tolist() == [0, 0, 0, -1, 2, 0, 1, 1]


@pytest.mark.parametrize("method", ["kmeans", "uniform"])
def test_a_quantised_network_equals_its_final_form(network, method):
    shared, variables = network
    pruned = prune(shared, variables, 0.5)
    small, quantised = quantise(shared, pruned, 3, method, ["ring", "kernels"])
    chex.assert_trees_all_equal(quantised["banks"], pruned["banks"])  # they are still trained
    schemes = {bank.name: bank.scheme for bank in small.layout.banks}
    assert schemes["templates"] == shared.layout["templates"].scheme
    assert schemes["ring"] == Compressed(Ring(500), 3, method)
    plain, final = finalise(small, quantised)
    assert plain.layout == shared.layout
    chex.assert_trees_all_equal_shapes(final, variables)
    outputs = jax.jit(small.apply)(quantised, X)
    np.testing.assert_array_equal(outputs, jax.jit(plain.apply)(final, X))
    reports = {bank.name: bank for bank in compressed_banks(variables, final)}
    for name in ("ring", "kernels"):
        assert reports[name].zeros * 2 == reports[name].parameters
        assert reports[name].levels <= 9
    assert "250 (50.0%)" in banks_table(list(reports.values()))
    # Nothing is left to do: no bank is quantised.
    assert finalise(plain, final) == (plain, final)


def test_a_codebook_is_closer_than_a_grid_and_more_bits_are_closer(network):
    shared, variables = network
    changes = {
        (bits, method): compressed_banks(
            variables, finalise(*quantise(shared, variables, bits, method))[1]
        )
        for bits in (2, 4, 8)
        for method in ("uniform", "kmeans")
    }
    for i in range(3):
        uniform, book = (
            [changes[b, m][i].change for b in (2, 4, 8)] for m in ("uniform", "kmeans")
        )
        assert all(a <= b * (1 + 1e-6) for a, b in zip(book, uniform, strict=True))
        assert uniform == sorted(uniform, reverse=True) and uniform[2] < 0.02


def test_bad_arguments(network):
    shared, variables = network
    small, quantised = quantise(shared, variables, 4, "uniform", ["ring"])
    plain: Any = paramshare.create_model("resnet8", input_shape=(8, 8, 1))
    broken = {"ring": {"ring": jnp.full(500, np.nan)}}
    for call, message in [
        (lambda: prune(plain, {}, 0.5), "takes a Shared"),
        (lambda: prune(shared, variables, 1.0), r"fraction=1.0: must be in \[0, 1\)"),
        (lambda: prune(shared, variables, -0.1), r"must be in \[0, 1\)"),
        (lambda: prune(shared, variables, 0.5, ["x"]), "'x' matches no bank; the banks are"),
        (lambda: prune(shared, variables, 0.5, ["("]), "no regular expression"),
        (lambda: quantise(shared, variables, 1), "bits must be an integer, 2 or more"),
        (lambda: quantise(shared, variables, 9), "from 2 to 8"),
        (lambda: quantise(small, quantised, 4), "quantised already"),
        (
            lambda: quantise(shared, variables | {"banks": variables["banks"] | broken}, 4),
            "'ring' has values that are not finite",
        ),
    ]:
        with pytest.raises(CompressError, match=message):
            call()
