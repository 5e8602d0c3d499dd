"""Repetition fitted to given kernels: exact where it is linear, alternating least squares where it is not."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paramshare import Repeat, SchemeError, Site
from paramshare.schemes import repetition, repetition_fit

KEY = jax.random.key(0, impl="rbg")  # compiles faster than the default


def sites(*shapes: tuple[int, ...]) -> tuple[Site, ...]:
    return tuple(Site(f"layer{i}/kernel", shape) for i, shape in enumerate(shapes))


def random(where: tuple[Site, ...]) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    return tuple((0.1 * rng.normal(size=site.shape)).astype(np.float32) for site in where)


def own(scheme: Repeat, where: tuple[Site, ...], seed: int) -> tuple[jax.Array, ...]:
    """Kernels of the scheme's own, as they are after a step of training."""
    bank, numbers = jax.jit(lambda: scheme.init(jax.random.key(seed), where))()
    bank, numbers = jax.tree.map(lambda x: x + 0.1 * jnp.sin(10 * x), (bank, numbers))
    return scheme.expand(bank, numbers, where)


@functools.cache
def fitted(scheme: Repeat, where: tuple[Site, ...]) -> Any:
    """A function of kernels, and of how many rounds; compiled once."""

    def fit(kernels: Any, rounds: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(repetition, "fit", functools.partial(repetition_fit.fit, rounds=rounds))
            return scheme.from_dense(kernels, where)

    return jax.jit(fit)


def relative_error(scheme: Repeat, where: tuple[Site, ...], kernels: Any, rounds: int = repetition_fit.ROUNDS) -> float:
    bank, numbers = fitted(scheme, where)(kernels, rounds)
    shapes = jax.eval_shape(lambda: scheme.init(KEY, where))
    assert jax.tree.map(jnp.shape, (bank, numbers)) == jax.tree.map(jnp.shape, shapes)
    made = scheme.expand(bank, numbers, where)
    squares = [np.sum((np.asarray(a, np.float64) - b) ** 2) for a, b in zip(made, kernels, strict=True)]
    return float(np.sqrt(sum(squares) / sum(np.sum(np.square(kernel, dtype=np.float64)) for kernel in kernels)))


def test_linear_bases_are_means_by_pencil():
    """A base (1, 2) in a kernel (2, 3): its first entry stands at outputs 0 and 2, its second at 1, in both inputs."""
    where = sites((2, 3))
    kernel = np.array([[1.0, 10.0, 3.0], [5.0, 30.0, 11.0]], np.float32)
    bank, numbers = Repeat(base=(1, 2), transform="linear").from_dense((jnp.asarray(kernel),), where)
    np.testing.assert_array_equal(bank["layer0.kernel"], [[(1 + 3 + 5 + 11) / 4, (10 + 30) / 2]])
    assert numbers == {}


@pytest.mark.parametrize(
    ("scheme", "where", "tolerance"),
    [
        (Repeat(base=(3, 3, 4, 8)), sites((3, 3, 8, 16)), 2e-3),
        (Repeat(base=(3, 2, 3)), sites((3, 5, 7)), 2e-2),
        (Repeat(source="layer0/kernel"), sites((3, 4, 4), (3, 4, 8), (3, 9, 10)), 2e-3),
        (Repeat(base=(3, 4, 8), transform="fourier"), sites((3, 8, 16)), 2e-3),
    ],
    ids=["whole tiles", "remainders", "depth", "fourier"],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_schemes_own_kernels_come_back_nearly(scheme, where, tolerance, seed):
    """Alternating steps end in flat valleys (a base and its numbers trade scale), not at the last digit; copies alone are off by half
    and more."""
    kernels = own(scheme, where, seed)
    assert relative_error(scheme, where, kernels) < tolerance


CASES = [
    (Repeat(base=(3, 2, 3)), sites((3, 5, 7))),
    (Repeat(source="layer0/kernel"), sites((3, 2, 3), (3, 4, 3), (3, 5, 6))),
    (Repeat(base=(3, 2, 3), transform="fourier"), sites((3, 5, 7))),
]


@pytest.mark.parametrize(("scheme", "where"), CASES, ids=["width", "depth", "fourier"])
def test_every_round_lessens_the_error(scheme, where):
    """From plain copies of the mean on: rounds 0 are at least as good as these, and none is worse than those before."""
    kernels = random(where)
    errors = [relative_error(scheme, where, kernels, rounds) for rounds in (0, 1, 2, 4, 8, 30, 100)]
    copies = Repeat(base=scheme.base, source=scheme.source, transform="linear")
    assert errors[0] <= relative_error(copies, where, kernels) * (1 + 1e-6)
    # Rounding: float32 sums of squares decide whether a step is taken.
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in itertools.pairwise(errors))
    assert errors[-1] < 0.97 * errors[0]


def test_one_tile_of_numbers_is_the_singular_vector():
    """While beta w is small a swish is alpha w / 2: tiny tiles of one direction, and others' signed multiples, are exact."""
    rng = np.random.default_rng(0)
    tile = 1e-3 * rng.normal(size=(4, 3))
    kernel = np.concatenate([tile, -2 * tile, 0.5 * tile], axis=1).astype(np.float32)
    assert relative_error(Repeat(base=(4, 3)), sites((4, 9)), (kernel,)) < 1e-5


@pytest.mark.parametrize("transform", ["swish", "fourier"])
def test_kernels_of_zeros(transform):
    scheme, where = Repeat(base=(2, 3), transform=transform), sites((5, 7))
    found = fitted(scheme, where)((jnp.zeros((5, 7)),), 10)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    np.testing.assert_array_equal(scheme.expand(found[0], found[1], where)[0], 0)


def test_kernels_of_other_shapes():
    with pytest.raises(SchemeError, match=r"wants kernels of shapes \(\(4, 6\),\), got \(\(4, 5\),\)"):
        Repeat(base=(2, 3)).from_dense((jnp.ones((4, 5)),), sites((4, 6)))
