"""The recurrence penalty: what is missing from the layers' similarity, with a gradient everywhere."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import paramshare
from paramshare import PenaltyError, recurrence

RNG = np.random.default_rng(0)


def variables(**rows) -> dict:
    """Of soft banks with those coefficients."""
    return {
        "banks": {name: {"templates": jnp.ones((len(its[0]), 5))} for name, its in rows.items()},
        "params": {"coefficients": {name: jnp.asarray(its, jnp.float32) for name, its in rows.items()}, "model": {}},
    }


def missing(rows: np.ndarray) -> float:
    """Sum over pairs of 1 - |cosine|, in double precision, pair by pair."""
    return sum(1 - abs(a @ b) / np.linalg.norm(a) / np.linalg.norm(b) for a in rows for b in rows)


def test_sums_over_all_pairs_of_all_banks():
    a, b = RNG.normal(size=(4, 3)), RNG.normal(size=(3, 6))
    np.testing.assert_allclose(recurrence(variables(a=a, b=b)), missing(a) + missing(b), rtol=1e-6)
    np.testing.assert_allclose(recurrence(variables(a=a, b=b), "b"), missing(b), rtol=1e-6)
    np.testing.assert_allclose(recurrence(variables(a=a, b=b), "b", "[ab]"), missing(a) + missing(b), rtol=1e-6)  # no bank twice


def test_nothing_is_missing_from_one_kernel_with_signed_scales():
    row = RNG.normal(size=4)
    assert abs(float(recurrence(variables(a=np.outer([1, -3, 0.01, 100], row))))) < 1e-5


def test_it_is_what_similarity_leaves():
    shared: Any = paramshare.create_model("swrn-16-1-2", input_shape=(8, 8, 3))
    its = shared.init(jax.random.key(0, impl="rbg"), jnp.zeros((1, 8, 8, 3)))
    left = sum(float(jnp.sum(1 - matrix)) for matrix in paramshare.similarity(shared, its).values())
    assert float(recurrence(its)) == pytest.approx(left, abs=1e-5)


def test_gradient_against_finite_differences():
    with jax.enable_x64(True):
        rows = jnp.asarray(RNG.normal(size=(5, 3)))
        check_grads(lambda rows: recurrence({"banks": {"a": {"templates": 1}}, "params": {"coefficients": {"a": rows}}}), (rows,), order=2)


@pytest.mark.parametrize(
    "rows",
    [np.zeros((3, 2)), np.array([[1, 0], [0, 0], [2, 1.0]]), np.eye(3), np.ones((3, 1))],
    ids=["zero", "a zero row", "orthogonal", "equal"],
)
def test_the_gradient_is_finite_at_zero_rows_and_at_the_kink(rows):
    value, gradient = jax.value_and_grad(recurrence)(variables(a=rows))
    assert np.isfinite(value)
    slope = np.asarray(gradient["params"]["coefficients"]["a"])
    assert np.isfinite(slope).all()
    np.testing.assert_array_equal(slope[~rows.any(axis=1)], 0)
    if np.array_equal(rows, np.eye(3)):
        np.testing.assert_array_equal(slope, 0)
    np.testing.assert_array_equal(gradient["banks"]["a"]["templates"], 0)  # it acts on coefficients only


def test_following_it_makes_layers_alike():
    its = variables(a=RNG.normal(size=(6, 4)))
    step = jax.jit(lambda v: jax.tree.map(lambda x, g: x - 0.05 * g, v, jax.grad(recurrence)(v)))
    for _ in range(300):
        its = step(its)
    assert float(recurrence(its)) < 1e-2


def test_the_length_of_rows_does_not_matter():
    rows = RNG.normal(size=(4, 3))
    wanted = float(recurrence(variables(a=rows)))
    for length in (1e-30, 1e30):
        assert float(recurrence(variables(a=length * rows))) == pytest.approx(wanted, rel=1e-5)


def test_bad_input_is_told():
    its = variables(a=np.ones((2, 2)))
    with pytest.raises(PenaltyError, match=r"'stage1' matches no bank; the banks are \['a'\]"):
        recurrence(its, "stage1")
    with pytest.raises(PenaltyError, match=r"recurrence: pool .* is not a regular expression"):
        recurrence(its, "(")
    with pytest.raises(PenaltyError, match=r"without banks of templates \(Soft\); its banks are \['r'\]"):
        recurrence({"banks": {"r": {"ring": jnp.ones(3)}}, "params": {}})
    with pytest.raises(PenaltyError, match=r"bank 'r' holds \['ring'\], no templates"):
        recurrence({**its, "banks": {"r": {"ring": jnp.ones(3)}}}, "r")
    with pytest.raises(PenaltyError, match="needs the coefficients of bank 'a'"):
        recurrence({"banks": its["banks"]})
