"""Soft sharing as published by Savarese & Maire: initialization, and banks from dense kernels."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paramshare import SchemeError, Site, Soft
from paramshare.schemes import Weights
from paramshare.schemes.soft import mix

SIZES = [(1, 6), (2, 6), (4, 6), (6, 6), (9, 6), (3, 1), (8, 10)]


def sites(number: int, shape: tuple[int, ...] = (3, 3, 4, 5)) -> tuple[Site, ...]:
    return tuple(Site(f"layer{i}/kernel", shape) for i in range(number))


def paper(k: int) -> Soft:
    return Soft(k, initial="paper")


def rows(weights: Weights) -> np.ndarray:
    """(L, k): the coefficients, in double precision."""
    keys = [f"layer{i}.kernel" for i in range(len(weights.coefficients))]
    return np.stack([np.asarray(weights.coefficients[key], np.float64) for key in keys])


@pytest.mark.parametrize(("k", "number"), SIZES)
def test_coefficients_start_orthonormal_on_the_shorter_side(k, number):
    a = rows(paper(k).init(jax.random.key(1), sites(number)))
    gram = a.T @ a if k <= number else a @ a.T
    np.testing.assert_allclose(gram, np.eye(min(k, number)), atol=1e-6)


def test_layers_do_not_start_orthogonal():
    """For k < L layers start as similar as NumPy's QR of Gaussians makes them."""
    k, number, draws = 4, 6, 400
    rng = np.random.default_rng(0)
    q, r = np.linalg.qr(rng.normal(size=(draws, number, k)))
    theirs = q * np.sign(np.diagonal(r, axis1=1, axis2=2))[:, None, :]
    where = sites(number, (1, 1))
    ours = jax.jit(jax.vmap(lambda key: paper(k).mixing(paper(k).init(key, where), where)))(
        jax.random.split(jax.random.key(0), draws)
    )

    def likeness(a_NxLxK):
        a_NxLxK = np.asarray(a_NxLxK, np.float64)
        unit = a_NxLxK / np.linalg.norm(a_NxLxK, axis=2, keepdims=True)
        cosines = np.abs(unit @ unit.swapaxes(1, 2))
        return (cosines.sum(axis=(1, 2)) - number) / (number * (number - 1))

    means, errors = zip(
        *((x.mean(), x.std() / math.sqrt(draws)) for x in map(likeness, (ours, theirs))),
        strict=True,
    )
    assert abs(means[0] - means[1]) < 4 * math.hypot(*errors)
    # Uniform over all such matrices, so every entry has mean zero. Without the signs of R's
    # diagonal, LAPACK's first row does not.
    entries = np.asarray(ours, np.float64)
    np.testing.assert_array_less(
        np.abs(entries.mean(axis=0)), 5 * entries.std(axis=0) / math.sqrt(draws)
    )


def test_templates_start_he_normal(assert_he_normal):
    weights = paper(3).init(jax.random.key(0), sites(2, (3, 3, 64, 64)))
    assert_he_normal(weights.bank["templates"], 2 / (9 * 64))


def test_kernels_are_the_sum_of_the_paper():
    k, number = 3, 4
    weights = paper(k).init(jax.random.key(2), sites(number))
    templates = np.asarray(weights.bank["templates"]).reshape(k, 3, 3, 4, 5)
    for kernel, row in zip(paper(k).expand(weights, sites(number)), rows(weights), strict=True):
        np.testing.assert_allclose(
            kernel, sum(c * t for c, t in zip(row, templates, strict=True)), atol=1e-6
        )


def test_banks_and_coefficients_come_from_the_key():
    first, again, other = (paper(2).init(jax.random.key(seed), sites(3)) for seed in (0, 0, 1))
    assert jax.tree.all(jax.tree.map(np.array_equal, first, again))
    assert not jax.tree.all(jax.tree.map(np.allclose, first, other))


@pytest.mark.parametrize(
    ("k", "number", "shape"), [(9, 6, (3, 4)), (6, 6, (3, 4)), (5, 6, (3, 1)), (2, 6, (3, 4))]
)
@pytest.mark.parametrize("alike", [False, True])
def test_all_of_a_bank_from_dense_kernels_trains(k, number, shape, alike):
    """A template trains if any coefficient on it is not zero: its gradient is A^T dW.

    This includes k > L, and equal kernels.
    """
    scheme, where = Soft(k), sites(number, shape)
    kernels = tuple(
        jax.random.normal(jax.random.key(0 if alike else i), shape) for i in range(number)
    )
    weights = scheme.from_dense(kernels, where)

    def loss(weights: Weights) -> jax.Array:
        kernels = scheme.expand(weights, where)
        return sum((jnp.sum(x * (1 + i) ** 2) for i, x in enumerate(kernels)), jnp.zeros(()))

    gradient = jax.grad(loss)(weights).bank["templates"]
    assert np.all(np.any(np.abs(np.asarray(gradient)) > 1e-4, axis=1))
    a = rows(weights)
    gram = a.T @ a if k <= number else a @ a.T
    np.testing.assert_allclose(gram, np.eye(min(k, number)), atol=2e-6)


def test_rows_have_length_one_under_the_models_initialization():
    """Where all sites have one standard deviation, the rows' directions are the paper's."""
    where = tuple(Site(f"layer{i}/kernel", (4, 4), std=0.3) for i in range(5))
    weights, published = (s.init(jax.random.key(0), where) for s in (Soft(2), paper(2)))
    lengths = np.linalg.norm(rows(published), axis=1, keepdims=True)
    np.testing.assert_allclose(rows(weights), rows(published) / lengths, atol=1e-6)


@pytest.mark.parametrize("templates", [0, -1, 1.5, 2.0, "2", None, True])
def test_templates_must_be_a_positive_integer(templates):
    with pytest.raises(SchemeError, match=rf"templates={templates!r}"):
        Soft(templates)


def test_numpy_integers_are_integers():
    assert Soft(np.int64(2)) == Soft(2)  # type: ignore[arg-type]


ODD = (*sites(2), Site("odd/kernel", (1, 1, 4, 5)))
IMPOSSIBLE = {  # checks of the base class
    "none": ((), "at least one site"),
    "empty": (sites(2, (3, 0)), r"layer0/kernel is an empty weight, of shape \(3, 0\)"),
    "integers": ((Site("steps", (3,), "int32"),), "steps has dtype int32"),
    "two shapes": (ODD, r"layer0/kernel is \(3, 3, 4, 5\) and odd/kernel is \(1, 1, 4, 5\)"),
    "one key": ((Site("a/b", (3,)), Site("a.b", (3,))), "2 sites have the key 'a.b'"),
    "one axis twice": ((Site("a", (3, 4), out_axes=(0,)),), "must be different axes from 0 to 1"),
    "a missing axis": ((Site("a", (3, 4), in_axes=(2,)),), "must be different axes from 0 to 1"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_impossible_sites(case):
    where, message = IMPOSSIBLE[case]
    for attempt in (Soft(2).check, lambda where: paper(2).init(jax.random.key(0), where)):
        with pytest.raises(SchemeError, match=message):
            attempt(where)


def test_matrices_of_sites():
    """to_matrix puts receptive axes first, then inputs, then outputs; from_matrix undoes it."""
    site = Site("a", (2, 3, 4, 5), in_axes=(0, 2), out_axes=(1,))
    kernel = np.arange(120.0).reshape(site.shape)
    matrix = site.to_matrix(jnp.asarray(kernel))
    assert matrix.shape == site.matrix_shape == (5, 8, 3)
    assert (site.fan_in, site.fan_out) == (40, 15)
    assert matrix[3, 1 * 4 + 2, 1] == kernel[1, 1, 2, 3]
    np.testing.assert_array_equal(site.from_matrix(matrix), kernel)
    vector = Site("b", (7,))
    assert (vector.fan_in, vector.fan_out, vector.matrix_shape) == (1, 7, (1, 7))


@pytest.mark.parametrize(("k", "number"), [(2, 6), (4, 7), (8, 4)])
def test_slices_of_templates_make_slices_of_kernels_bit_for_bit(k, number):
    """An einsum over (l, k) and (k, p) is not rounded like that: it fails here for these sizes."""
    row_key, template_key = jax.random.split(jax.random.key(0))
    rows_LxK = jax.random.normal(row_key, (number, k))
    templates_KxP = jax.random.normal(template_key, (k, 9216))

    @jax.jit
    def kernels(templates_KxP):
        return jnp.stack(mix(rows_LxK, templates_KxP))

    whole, start = kernels(templates_KxP), 0
    for end in (1, 38, 1190, 9216):
        part = kernels(templates_KxP[:, start:end])
        np.testing.assert_array_equal(part, whole[:, start:end])
        start = end
    exact = np.asarray(rows_LxK, np.float64) @ np.asarray(templates_KxP, np.float64)
    np.testing.assert_allclose(whole, exact, atol=1e-5)
