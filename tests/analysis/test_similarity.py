"""The layer similarity matrix on coefficients made by hand."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paramshare
from paramshare import FilterBasis, Plan, Repeat, Ring, Rule, Shared, Soft, Tied, share


def shared(layers: int, templates: int) -> Shared:
    model = nn.Sequential([nn.Dense(4, use_bias=False) for _ in range(layers)])
    return paramshare.share(model, Plan(Rule(".*", Soft(templates))), jnp.ones((1, 4)))


def similarity(rows) -> np.ndarray:
    a = jnp.asarray(rows, jnp.float32)
    variables = {"banks": {"shared": {"templates": jnp.ones((a.shape[1], 16))}}, "params": {"coefficients": {"shared": a}}}
    return np.asarray(paramshare.similarity(shared(*a.shape), variables)["shared"])


def test_a_loop_of_two_layers_with_signed_scales():
    even, odd = np.array([1.0, 2.0, 0.5]), np.array([2.0, -1.0, 0.0])  # orthogonal
    rows = [even, odd, -3 * even, 0.01 * odd, 1e4 * even, -odd]
    wanted = (np.add.outer(range(6), range(6)) % 2 == 0).astype(float)
    np.testing.assert_allclose(similarity(rows), wanted, atol=3e-7)


def test_angles():
    rows = [[np.cos(t), np.sin(t)] for t in (0.0, np.pi / 3, np.pi / 4, np.pi / 2)]
    np.testing.assert_allclose(similarity(rows)[0], [1, 0.5, np.sqrt(0.5), 0], atol=3e-7)


def test_a_row_of_zeros_is_like_nothing():
    matrix = similarity([[1.0, 1.0], [0.0, 0.0], [2.0, 2.0]])
    np.testing.assert_allclose(matrix, [[1, 0, 1], [0, 0, 0], [1, 0, 1]], atol=3e-7)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_values_lie_in_the_unit_interval_whatever_the_scale(scale):
    matrix = similarity(scale * np.random.default_rng(0).normal(size=(20, 3)))
    assert matrix.min() >= 0
    assert matrix.max() <= 1
    np.testing.assert_allclose(matrix, matrix.T, atol=3e-7)
    np.testing.assert_allclose(np.diagonal(matrix), 1, atol=3e-7)


def test_one_template_is_a_loop_by_construction():
    model = shared(5, 1)
    matrices = paramshare.similarity(model, model.init(jax.random.key(0), jnp.ones((1, 4))))
    np.testing.assert_allclose(matrices["shared"], np.ones((5, 5)), atol=3e-7)


def test_a_matrix_a_bank_under_jit():
    model = paramshare.create_model("swrn-16-1-2")
    assert isinstance(model, Shared)
    banks, coefficients = model.layout.init(jax.random.key(0, impl="rbg"))
    variables = {"banks": banks, "params": {"coefficients": coefficients}}
    matrices = jax.jit(lambda v: paramshare.similarity(model, v))(variables)
    assert {name: matrix.shape for name, matrix in matrices.items()} == {f"stage{i}": (2, 2) for i in (1, 2, 3)}
    for matrix in matrices.values():  # L = k: orthogonal rows
        chex.assert_trees_all_close(matrix, jnp.eye(2), atol=1e-6)


@pytest.mark.parametrize(
    "scheme",
    [
        Soft(2),
        Tied(),
        FilterBasis(8),
        FilterBasis(6, 2),
        Ring(50),
        Repeat(base=(4, 4)),
        Repeat(base=(8, 8)),
        Repeat(base=(2, 8), transform="linear"),
    ],
)
def test_every_scheme_has_a_similarity(scheme):
    model = nn.Sequential([nn.Dense(8) for _ in range(3)])
    x = jnp.ones((1, 8))
    network = share(model, Plan(Rule(".*/kernel", scheme, bank="b")), x)
    variables = network.init(jax.random.key(0), x)
    rows = np.stack([np.ravel(layer["kernel"]) for layer in network.expand(variables)["params"].values()])
    cosines = np.abs(rows @ rows.T) / np.outer(np.linalg.norm(rows, axis=1), np.linalg.norm(rows, axis=1))
    found = paramshare.similarity(network, variables)["b"]
    if not isinstance(scheme, Soft):  # whose coefficients are looked at
        np.testing.assert_allclose(found, cosines, atol=1e-6)
    assert found.shape == (3, 3)
