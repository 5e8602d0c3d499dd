"""The recurrence penalty: one minus similarity, with a finite gradient everywhere."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import paramshare
from paramshare import Shared, Site, Soft, recurrence
from paramshare.layout import Layout, SharedBank

RNG = np.random.default_rng(0)


def soft(**rows: Any) -> tuple[Shared, dict[str, Any]]:
    """A model of banks of templates with these rows of coefficients, and its variables."""
    banks, templates, coefficients = [], {}, {}
    for name, array in rows.items():
        layers, k = np.shape(array)
        sites = tuple(Site(f"{name}{i}/kernel", (5, 1)) for i in range(layers))
        banks.append(SharedBank(name, Soft(k), sites))
        shapes = Soft(k).shapes(sites).bank
        templates[name] = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), shapes)
        coefficients[name] = {
            site.key: jnp.asarray(row, jnp.result_type(float))
            for site, row in zip(sites, array, strict=True)
        }
    variables = {"banks": templates, "params": {"coefficients": coefficients, "model": {}}}
    return Shared(nn.Dense(1), Layout(tuple(banks), plain=0)), variables


def dissimilarity(rows: np.ndarray) -> float:
    """Sum over pairs of 1 - |cosine|, in double precision, pair by pair."""
    return sum(1 - abs(a @ b) / np.linalg.norm(a) / np.linalg.norm(b) for a in rows for b in rows)


def test_sums_over_all_pairs_of_all_banks():
    a, b = RNG.normal(size=(4, 3)), RNG.normal(size=(3, 6))
    model, expected = soft(a=a, b=b), dissimilarity(a) + dissimilarity(b)
    np.testing.assert_allclose(recurrence(*model), expected, rtol=1e-6)
    np.testing.assert_allclose(recurrence(*model, "b"), dissimilarity(b), rtol=1e-6)
    np.testing.assert_allclose(recurrence(*model, "b", "[ab]"), expected, rtol=1e-6)  # none twice


def test_it_is_zero_for_one_kernel_with_signed_scales():
    row = RNG.normal(size=4)
    assert abs(float(recurrence(*soft(a=np.outer([1, -3, 0.01, 100], row))))) < 1e-5


def test_it_is_one_minus_similarity():
    shared, variables = soft(a=RNG.normal(size=(4, 3)), b=RNG.normal(size=(3, 6)))
    similarity = paramshare.similarity(shared, variables)
    expected = sum(float(jnp.sum(1 - matrix)) for matrix in similarity.values())
    assert float(recurrence(shared, variables)) == pytest.approx(expected, abs=1e-5)


def test_gradient_against_finite_differences():
    with jax.enable_x64(True):
        shared, variables = soft(a=RNG.normal(size=(5, 3)))

        keys = list(variables["params"]["coefficients"]["a"])

        @jax.jit
        def penalty(rows):
            params = {"coefficients": {"a": dict(zip(keys, rows, strict=True))}}
            return recurrence(shared, {"banks": variables["banks"], "params": params})

        check_grads(penalty, (jnp.asarray(RNG.normal(size=(5, 3))),), order=2)


@pytest.mark.parametrize(
    "rows",
    [np.zeros((3, 2)), np.array([[1, 0], [0, 0], [2, 1.0]]), np.eye(3), np.ones((3, 1))],
    ids=["zero", "a zero row", "orthogonal", "equal"],
)
def test_the_gradient_is_finite_at_zero_rows_and_at_the_kink(rows):
    shared, variables = soft(a=rows)
    value, gradient = jax.value_and_grad(lambda v: recurrence(shared, v))(variables)
    assert np.isfinite(value)
    slope = np.stack(list(gradient["params"]["coefficients"]["a"].values()))
    assert np.isfinite(slope).all()
    np.testing.assert_array_equal(slope[~rows.any(axis=1)], 0)
    if np.array_equal(rows, np.eye(3)):
        np.testing.assert_array_equal(slope, 0)
    # It acts only on coefficients.
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradient["banks"]))


def test_gradient_descent_makes_layers_alike():
    shared, variables = soft(a=RNG.normal(size=(6, 4)))
    gradient = jax.grad(lambda v: recurrence(shared, v))

    @jax.jit
    def descend(variables):
        step = lambda _, v: jax.tree.map(lambda x, g: x - 0.05 * g, v, gradient(v))  # noqa: E731
        return jax.lax.fori_loop(0, 300, step, variables)

    assert float(recurrence(shared, descend(variables))) < 1e-2


def test_the_length_of_rows_does_not_matter():
    rows = RNG.normal(size=(4, 3))
    expected = float(recurrence(*soft(a=rows)))
    for length in (1e-30, 1e30):
        actual = float(recurrence(*soft(a=length * rows)))
        assert actual == pytest.approx(expected, rel=1e-5)
