"""`Repeat` fitted to kernels: exact where linear, else by alternating least squares."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paramshare import Repeat, SchemeError, Site
from paramshare.schemes import repetition, repetition_fit
from paramshare.schemes.interface import Weights


def sites(*shapes: tuple[int, ...]) -> tuple[Site, ...]:
    return tuple(Site(f"layer{i}/kernel", shape) for i, shape in enumerate(shapes))


def random(members: tuple[Site, ...]) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    return tuple((0.1 * rng.normal(size=site.shape)).astype(np.float32) for site in members)


@functools.cache
def generated(scheme: Repeat, members: tuple[Site, ...]) -> Callable[[int], tuple[jax.Array, ...]]:
    """A function of a seed: kernels that the scheme can make, not too near the initial ones."""

    def kernels(seed):
        weights = scheme.init(jax.random.key(seed), members)
        return scheme.expand(jax.tree.map(lambda x: x + 0.1 * jnp.sin(10 * x), weights), members)

    return jax.jit(kernels)


@functools.cache
def fitted(scheme: Repeat, members: tuple[Site, ...]) -> Callable[[Any, int], Any]:
    """A function of kernels and the number of rounds: the weights, and the kernels they make."""

    def fit(kernels: Any, rounds: Any) -> tuple[Weights, tuple[jax.Array, ...]]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(repetition, "fit", functools.partial(repetition_fit.fit, rounds=rounds))
            weights = scheme.from_dense(kernels, members)
        return weights, scheme.expand(weights, members)

    return jax.jit(fit)


def relative_error(
    scheme: Repeat, members: tuple[Site, ...], kernels: Any, rounds: int = repetition_fit.ROUNDS
) -> float:
    weights, results = fitted(scheme, members)(kernels, rounds)
    assert jax.tree.map(jnp.shape, weights) == jax.tree.map(jnp.shape, scheme.shapes(members))
    differences = [np.asarray(a, np.float64) - b for a, b in zip(results, kernels, strict=True)]
    total = sum(np.sum(np.square(kernel, dtype=np.float64)) for kernel in kernels)
    return float(np.sqrt(sum(np.sum(d**2) for d in differences) / total))


def test_linear_bases_are_means():
    """By hand: entry 0 of base (1, 2) is at outputs 0 and 2 of kernel (2, 3), for both inputs."""
    members = sites((2, 3))
    kernel = np.array([[1.0, 10.0, 3.0], [5.0, 30.0, 11.0]], np.float32)
    weights = Repeat(base=(1, 2), transform="linear").from_dense((jnp.asarray(kernel),), members)
    expected = [[(1 + 3 + 5 + 11) / 4, (10 + 30) / 2]]
    np.testing.assert_array_equal(weights.bank["layer0.kernel"], expected)
    assert weights.coefficients == {}


@pytest.mark.parametrize(
    ("scheme", "members", "tolerance"),
    [
        (Repeat(base=(3, 3, 4, 8), initial="paper"), sites((3, 3, 8, 16)), 2e-3),
        (
            Repeat(source="layer0/kernel", initial="paper"),
            sites((3, 4, 4), (3, 4, 8), (3, 9, 10)),
            2e-3,
        ),
        (Repeat(base=(3, 4, 8), transform="fourier", initial="paper"), sites((3, 8, 16)), 2e-3),
        (Repeat(base=(3, 4, 8), transform="scale", initial="paper"), sites((3, 8, 16)), 1e-5),
    ],
    ids=["whole tiles", "depth", "fourier", "scale"],
)
def test_generated_kernels_are_recovered(scheme, members, tolerance):
    """Plain copies are off by half and more.

    Alternating steps end in flat valleys, where base and scalars trade scale, and not at the last
    digit.
    """
    kernels = generated(scheme, members)(0)
    assert relative_error(scheme, members, kernels) < tolerance


CASES = [
    (Repeat(base=(3, 2, 3), initial="paper"), sites((3, 5, 7))),
    (Repeat(source="layer0/kernel"), sites((3, 2, 3), (3, 4, 3), (3, 5, 6))),
    (Repeat(base=(3, 2, 3), transform="fourier"), sites((3, 5, 7))),
]


@pytest.mark.parametrize(("scheme", "members"), CASES, ids=["width", "depth", "fourier"])
def test_every_round_reduces_the_error(scheme, members):
    """The start is as good as plain copies of the mean, and no round is worse than the last."""
    kernels = random(members)
    errors = [
        relative_error(scheme, members, kernels, rounds) for rounds in (0, 1, 2, 4, 8, 30, 100)
    ]
    copies = Repeat(base=scheme.base, source=scheme.source, transform="linear")
    assert errors[0] <= relative_error(copies, members, kernels) * (1 + 1e-6)
    # Rounding: a step is taken where it reduces a float32 sum of squares.
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in itertools.pairwise(errors))
    assert errors[-1] < 0.97 * errors[0]


def test_multiples_of_one_small_tile_are_recovered():
    """For small beta w a swish is alpha w / 2, so tiles of one direction are fitted exactly."""
    rng = np.random.default_rng(0)
    tile = 1e-3 * rng.normal(size=(4, 3))
    kernel = np.concatenate([tile, -2 * tile, 0.5 * tile], axis=1).astype(np.float32)
    assert relative_error(Repeat(base=(4, 3)), sites((4, 9)), (kernel,)) < 1e-5


@pytest.mark.parametrize("transform", ["swish", "fourier"])
def test_kernels_of_zeros(transform):
    scheme, members = Repeat(base=(2, 3), transform=transform), sites((5, 7))
    weights, (kernel,) = fitted(scheme, members)((jnp.zeros((5, 7)),), 10)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(weights))
    np.testing.assert_array_equal(kernel, 0)


def test_kernels_of_other_shapes():
    with pytest.raises(SchemeError, match=r"must have shape \(4, 6\), got \(4, 5\)"):
        Repeat(base=(2, 3)).from_dense((jnp.ones((4, 5)),), sites((4, 6)))
