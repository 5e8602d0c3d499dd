"""The layer similarity matrix of coefficients made by hand, and of every scheme."""

import functools
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paramshare
from paramshare import FilterBasis, Plan, Repeat, Ring, Rule, Shared, Soft, Tied, share

X = jnp.ones((1, 8))
KEY = jax.random.key(0)


@functools.cache
def network(layers: int, scheme: Any) -> Shared:
    model = nn.Sequential([nn.Dense(8) for _ in range(layers)])
    return share(model, Plan(Rule(".*/kernel", scheme, bank="b")), X)


def similarity(rows_LxK) -> np.ndarray:
    rows_LxK = jnp.asarray(rows_LxK, jnp.float32)
    shared = network(len(rows_LxK), Soft(rows_LxK.shape[1], initial="paper"))
    banks, _ = jax.jit(shared.layout.init)(KEY)
    sites = shared.layout["b"].sites
    rows = {site.key: row for site, row in zip(sites, rows_LxK, strict=True)}
    variables = {"banks": banks, "params": {"coefficients": {"b": rows}}}
    return np.asarray(paramshare.similarity(shared, variables)["b"])


def test_a_loop_of_two_layers_with_signed_scales():
    even, odd = np.array([1.0, 2.0, 0.5]), np.array([2.0, -1.0, 0.0])  # orthogonal
    rows = [even, odd, -3 * even, 0.01 * odd, 1e4 * even, -odd]
    expected = (np.add.outer(range(6), range(6)) % 2 == 0).astype(float)
    np.testing.assert_allclose(similarity(rows), expected, atol=3e-7)


def test_angles():
    rows = [[np.cos(t), np.sin(t)] for t in (0.0, np.pi / 3, np.pi / 4, np.pi / 2)]
    np.testing.assert_allclose(similarity(rows)[0], [1, 0.5, np.sqrt(0.5), 0], atol=3e-7)


def test_a_row_of_zeros_is_similar_to_nothing():
    matrix = similarity([[1.0, 1.0], [0.0, 0.0], [2.0, 2.0]])
    np.testing.assert_allclose(matrix, [[1, 0, 1], [0, 0, 0], [1, 0, 1]], atol=3e-7)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_values_lie_in_the_unit_interval_at_any_scale(scale):
    matrix = similarity(scale * np.random.default_rng(0).normal(size=(20, 3)))
    assert matrix.min() >= 0
    assert matrix.max() <= 1
    np.testing.assert_allclose(matrix, matrix.T, atol=3e-7)
    np.testing.assert_allclose(np.diagonal(matrix), 1, atol=3e-7)


def test_one_template_makes_all_layers_equal():
    shared = network(5, Soft(1, initial="paper"))
    matrices = paramshare.similarity(shared, jax.jit(shared.init)(KEY, X))
    np.testing.assert_allclose(matrices["b"], np.ones((5, 5)), atol=3e-7)


def test_one_matrix_per_bank_under_jit():
    model: Any = paramshare.create_model("swrn-16-1-2", input_shape=(8, 8, 3))
    banks, params = model.layout.init(jax.random.key(0, impl="rbg"))
    variables = {"banks": banks, "params": params}
    matrices = jax.jit(lambda v: paramshare.similarity(model, v))(variables)
    assert list(matrices) == ["stage1", "stage2", "stage3"]
    for matrix in matrices.values():  # as many templates as layers: orthogonal rows
        chex.assert_trees_all_close(matrix, jnp.eye(2), atol=1e-6)


@pytest.mark.parametrize(
    "scheme",
    [
        Soft(2, initial="paper"),
        Tied(initial="paper"),
        FilterBasis(8, initial="paper"),
        FilterBasis(6, 2, initial="paper"),
        Ring(50, initial="paper"),
        Repeat(base=(4, 4), initial="paper"),
        Repeat(base=(2, 8), transform="linear", initial="paper"),
    ],
)
def test_weights_of_every_scheme_can_be_compared(scheme):
    shared = network(3, scheme)
    variables = jax.jit(shared.init)(KEY, X)
    dense = jax.jit(shared.expand)(variables)
    rows = np.stack([np.ravel(layer["kernel"]) for layer in dense["params"].values()])
    lengths = np.linalg.norm(rows, axis=1)
    cosines = np.abs(rows @ rows.T) / np.outer(lengths, lengths)
    matrix = paramshare.similarity(shared, variables, by="weights")["b"]
    np.testing.assert_allclose(matrix, cosines, atol=1e-6)
    # The plain model's variables: the plan says which layers to compare.
    np.testing.assert_allclose(paramshare.similarity(shared, dense)["b"], matrix, atol=1e-6)
    default = paramshare.similarity(shared, variables)["b"]
    if isinstance(scheme, Soft):  # compares coefficients by default
        assert np.abs(default - cosines).max() > 0.01
    else:
        np.testing.assert_array_equal(default, matrix)


def test_shapes_are_compared_separately():
    """A bank with sites of several shapes has a matrix for each shape of at least two sites."""
    model = nn.Sequential([nn.Dense(n) for n in (8, 6, 6, 6, 4)])
    shared = share(model, Plan(Rule(".*/kernel", Ring(50, initial="paper"), bank="b")), X)
    matrices = paramshare.similarity(shared, jax.jit(shared.init)(KEY, X))
    assert {name: matrix.shape for name, matrix in matrices.items()} == {"b 6x6": (2, 2)}


def test_illegal_by():
    shared = network(3, Soft(2, initial="paper"))
    with pytest.raises(ValueError, match="by='rows': must be 'coefficients' or 'weights'"):
        paramshare.similarity(shared, {}, by="rows")  # type: ignore[arg-type]
