"""Soft sharing as Savarese & Maire publish it: its initialisation, and banks made of dense kernels."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paramshare import SchemeError, Site, Soft

SIZES = [(1, 6), (2, 6), (4, 6), (6, 6), (9, 6), (3, 1), (8, 10)]


def sites(number: int, shape: tuple[int, ...] = (3, 3, 4, 5)) -> tuple[Site, ...]:
    return tuple(Site(f"layer{i}/kernel", shape) for i in range(number))


@pytest.mark.parametrize(("k", "number"), SIZES)
def test_coefficients_start_orthonormal_on_the_shorter_side(k, number):
    _, a = Soft(k).init(jax.random.key(1), sites(number))
    a = np.asarray(a, np.float64)
    gram = a.T @ a if k <= number else a @ a.T
    np.testing.assert_allclose(gram, np.eye(min(k, number)), atol=1e-6)


def test_layers_do_not_start_unlike():
    """For k < L the layers' similarity does not start as the identity; off its diagonal it is that of NumPy's QR of Gaussians."""
    k, number, draws = 4, 6, 400
    rng = np.random.default_rng(0)
    q, r = np.linalg.qr(rng.normal(size=(draws, number, k)))
    theirs = q * np.sign(np.diagonal(r, axis1=1, axis2=2))[:, None, :]
    ours = jax.jit(jax.vmap(lambda key: Soft(k).init(key, sites(number, (1, 1)))[1]))(jax.random.split(jax.random.key(0), draws))

    def likeness(a_NxLxK):
        a_NxLxK = np.asarray(a_NxLxK, np.float64)
        unit = a_NxLxK / np.linalg.norm(a_NxLxK, axis=2, keepdims=True)
        return (np.abs(unit @ unit.swapaxes(1, 2)).sum(axis=(1, 2)) - number) / (number * (number - 1))

    means, errors = zip(*((x.mean(), x.std() / math.sqrt(draws)) for x in map(likeness, (ours, theirs))), strict=True)
    assert abs(means[0] - means[1]) < 4 * math.hypot(*errors)
    # Uniform over all such matrices, so every entry has mean zero (without the signs of R's diagonal, LAPACK's first row does not).
    entries = np.asarray(ours, np.float64)
    np.testing.assert_array_less(np.abs(entries.mean(axis=0)), 5 * entries.std(axis=0) / math.sqrt(draws))


def test_templates_start_he_normal(assert_he_normal):
    bank, _ = Soft(3).init(jax.random.key(0), sites(2, (3, 3, 64, 64)))
    assert_he_normal(bank["templates"], 2 / (9 * 64))


def test_kernels_are_the_sum_of_the_paper():
    k, number = 3, 4
    bank, a = Soft(k).init(jax.random.key(2), sites(number))
    templates = np.asarray(bank["templates"]).reshape(k, 3, 3, 4, 5)
    for kernel, row in zip(Soft(k).expand(bank, a, sites(number)), np.asarray(a), strict=True):
        np.testing.assert_allclose(kernel, sum(c * t for c, t in zip(row, templates, strict=True)), atol=1e-6)


def test_banks_and_coefficients_come_from_the_key():
    first, again, other = (Soft(2).init(jax.random.key(seed), sites(3)) for seed in (0, 0, 1))
    assert jax.tree.all(jax.tree.map(np.array_equal, first, again))
    assert not jax.tree.all(jax.tree.map(np.allclose, first, other))


@pytest.mark.parametrize(("k", "number", "shape"), [(9, 6, (3, 4)), (6, 6, (3, 4)), (5, 6, (3, 1)), (2, 6, (3, 4))])
@pytest.mark.parametrize("alike", [False, True])
def test_a_bank_from_dense_kernels_can_train_all_of_it(k, number, shape, alike):
    """A template trains if any coefficient on it is not zero, for its gradient is A^T dW; k > L and kernels all alike included."""
    scheme, where = Soft(k), sites(number, shape)
    kernels = tuple(jax.random.normal(jax.random.key(0 if alike else i), shape) for i in range(number))
    bank, coefficients = scheme.from_dense(kernels, where)
    loss = lambda b: sum(jnp.sum(kernel * (1 + i) ** 2) for i, kernel in enumerate(scheme.expand(b, coefficients, where)))  # noqa: E731
    gradient = jax.grad(loss)(bank)["templates"]
    assert np.all(np.any(np.abs(np.asarray(gradient)) > 1e-4, axis=1))
    a = np.asarray(coefficients, np.float64)
    np.testing.assert_allclose(a.T @ a if k <= number else a @ a.T, np.eye(min(k, number)), atol=2e-6)


@pytest.mark.parametrize("templates", [0, -1, 1.5, 2.0, "2", None, True])
def test_templates_must_be_a_positive_integer(templates):
    with pytest.raises(SchemeError, match=rf"templates={templates!r}"):
        Soft(templates)


def test_numpy_integers_are_integers():
    assert Soft(np.int64(2)) == Soft(2)  # type: ignore[arg-type]


def test_sites_must_have_one_shape():
    odd = (*sites(2), Site("odd/kernel", (1, 1, 4, 5)))
    for attempt in (lambda: Soft(2).check(odd), lambda: Soft(2).init(jax.random.key(0), odd)):
        with pytest.raises(SchemeError, match=r"layer0/kernel is \(3, 3, 4, 5\) and odd/kernel is \(1, 1, 4, 5\)"):
            attempt()


@pytest.mark.parametrize(
    ("where", "said"), [((), "at least one site"), (sites(2, (3, 0)), "layer0/kernel"), (sites(2, (0, 3)), "layer0/kernel")]
)
def test_impossible_sites(where, said):
    with pytest.raises(SchemeError, match=said):
        Soft(2).init(jax.random.key(0), where)


def test_from_dense_wants_the_sites_shapes():
    with pytest.raises(SchemeError, match="from_dense wants kernels of shapes"):
        Soft(1).from_dense((jnp.ones((3, 3)), jnp.ones((3, 2))), sites(2, (3, 3)))
