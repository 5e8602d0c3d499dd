"""What every sharing scheme owes. A new scheme is one line in `CASES`."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from paramshare import Site, Soft
from paramshare.schemes import Scheme

CONV, DENSE, VECTOR = (3, 3, 4, 5), (6, 7), (8,)
KEY = jax.random.key(7)


@dataclasses.dataclass(frozen=True)
class Case:
    """A scheme on some sites, and what is published of it there.

    `trainable` is the scheme's formula; `scale` is every kernel's expected square at init, in units of He's 2 / fan_in;
    `tail` gives the squared error that `from_dense` must reach for an (L, P) stack of kernels (None: the scheme has no `from_dense`).
    """

    scheme: Scheme
    sites: tuple[Site, ...]
    trainable: int
    scale: float = 1.0
    tail: Callable[[np.ndarray], float] | None = None

    def __str__(self) -> str:
        return f"{self.scheme}-{len(self.sites)}x{'x'.join(map(str, self.sites[0].shape))}"


def sites(number: int, shape: tuple[int, ...]) -> tuple[Site, ...]:
    return tuple(Site(f"layer{i}/kernel", shape) for i in range(number))


def soft(k: int, number: int, shape: tuple[int, ...]) -> Case:
    def tail(stack_LxP: np.ndarray) -> float:  # Eckart & Young, 1936
        return float(np.sum(np.linalg.svd(stack_LxP, compute_uv=False)[k:] ** 2))

    return Case(Soft(k), sites(number, shape), k * math.prod(shape) + k * number, min(k, number) / number, tail)


CASES = [
    *[soft(k, 6, CONV) for k in (1, 4, 6, 9)],
    soft(2, 5, DENSE),
    soft(1, 1, CONV),
    soft(3, 1, DENSE),
    soft(10, 12, VECTOR),  # more templates than a kernel has numbers
]
every = pytest.mark.parametrize("case", CASES, ids=str)


def as_dtype(case: Case, dtype: str) -> tuple[Site, ...]:
    return tuple(dataclasses.replace(site, dtype=dtype) for site in case.sites)


@functools.cache
def drawn(case: Case) -> tuple[Any, Any]:
    return case.scheme.init(KEY, case.sites)


@functools.cache
def many(case: Case) -> tuple[Any, Any]:
    """A thousand draws, the first of them `drawn`."""
    keys = jax.vmap(jax.random.key)(jnp.arange(1000)).at[0].set(KEY)
    return jax.jit(jax.vmap(lambda key: case.scheme.init(key, case.sites)))(keys)


@functools.cache
def expand_many(case: Case) -> tuple[jax.Array, ...]:
    return jax.jit(jax.vmap(lambda bank, coefficients: case.scheme.expand(bank, coefficients, case.sites)))(*many(case))


def dense(case: Case) -> tuple[jax.Array, ...]:
    return tuple(jax.random.normal(jax.random.fold_in(KEY, i), site.shape) for i, site in enumerate(case.sites))


def stack(kernels: Any) -> np.ndarray:
    return np.stack([np.asarray(kernel, np.float64).ravel() for kernel in kernels])


@every
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_shapes_and_dtypes(case, dtype):
    wanted = as_dtype(case, dtype)
    with jax.enable_x64(dtype == "float64"):
        bank, coefficients = jax.eval_shape(lambda: case.scheme.init(jax.random.key(0), wanted))
        kernels = jax.eval_shape(lambda b, c: case.scheme.expand(b, c, wanted), bank, coefficients)
    held = jnp.float64 if dtype == "float64" else jnp.float32  # a bank is never held below float32, whatever the sites are
    assert {leaf.dtype for leaf in jax.tree.leaves((bank, coefficients))} == {jnp.dtype(held)}
    assert isinstance(kernels, tuple)
    assert [(kernel.shape, kernel.dtype) for kernel in kernels] == [(site.shape, jnp.dtype(dtype)) for site in wanted]


@every
def test_low_precision_kernels_are_the_rounded_ones(case):
    bank, coefficients = drawn(case)
    exact = case.scheme.expand(bank, coefficients, case.sites)
    rounded = case.scheme.expand(bank, coefficients, as_dtype(case, "bfloat16"))
    chex.assert_trees_all_equal(rounded, tuple(kernel.astype(jnp.bfloat16) for kernel in exact))


@every
def test_trainable_count_is_the_formula(case):
    shapes = jax.eval_shape(lambda: case.scheme.init(KEY, case.sites))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == case.trainable


@every
def test_jit_and_vmap_change_nothing(case):
    first = jax.tree.map(lambda leaf: leaf[0], many(case))
    chex.assert_trees_all_close(first, drawn(case), rtol=1e-5, atol=1e-6)  # XLA reorders the sums inside QR
    kernels = case.scheme.expand(*drawn(case), case.sites)
    # One float32 rounding of a product for each term of the sums: 16 units in the last place of kernels around 1.
    chex.assert_trees_all_close(tuple(kernel[0] for kernel in expand_many(case)), kernels, rtol=1e-5, atol=2e-6)


@every
def test_equal_schemes_and_sites_are_one_static_argument(case):
    traces = []

    def expand(scheme, wanted, bank, coefficients):
        traces.append(scheme)
        return scheme.expand(bank, coefficients, wanted)

    jitted = jax.jit(expand, static_argnums=(0, 1))
    copy = dataclasses.replace(case.scheme)
    assert copy is not case.scheme
    assert (copy, hash(copy)) == (case.scheme, hash(case.scheme))
    for scheme in (case.scheme, copy):
        jitted(scheme, tuple(dataclasses.replace(site) for site in case.sites), *drawn(case))
    assert len(traces) == 1


@every
def test_gradient_against_finite_differences(case):
    with jax.enable_x64(True):
        wanted = as_dtype(case, "float64")
        bank, coefficients = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf, np.float64)), drawn(case))
        expand = jax.jit(lambda b, c: jnp.concatenate([jnp.sin(kernel).ravel() for kernel in case.scheme.expand(b, c, wanted)]))
        # Reverse mode only: a scheme may define its own gradient (`jax.custom_vjp`).
        check_grads(expand, (bank, coefficients), order=1, modes=("rev",), rtol=1e-6, atol=1e-6)


@every
def test_init_scale_of_every_kernel(case):
    he = [np.sqrt(2 / site.fan_in) for site in case.sites]
    kernels = [np.asarray(kernel, np.float64) / s for kernel, s in zip(expand_many(case), he, strict=True)]
    draws = len(kernels[0])
    for moment, wanted in ((1, 0.0), (2, case.scale)):
        values = np.stack([np.mean(kernel.reshape(draws, -1) ** moment, axis=1) for kernel in kernels])
        error = values.std(axis=1) / math.sqrt(draws)
        assert np.all(error < 0.1)  # or the next line would say nothing
        np.testing.assert_array_less(np.abs(values.mean(axis=1) - wanted), 5 * error)  # five standard errors; the seeds are fixed


@every
def test_from_dense_is_the_best_there_is(case):
    if case.tail is None:
        pytest.skip("this scheme has no from_dense")
    kernels = dense(case)
    variables = case.scheme.from_dense(kernels, case.sites)
    chex.assert_trees_all_equal_shapes_and_dtypes(variables, drawn(case))
    error = np.sum((stack(case.scheme.expand(*variables, case.sites)) - stack(kernels)) ** 2)
    # A float32 decomposition errs by some 1e-6 of the stack's norm; squared, and beside a tail, that is below 1e-5 of the whole.
    whole = np.sum(stack(kernels) ** 2)
    assert error == pytest.approx(case.tail(stack(kernels)), rel=1e-5, abs=1e-11 * whole)


@every
def test_from_dense_gives_a_scheme_its_own_kernels_back(case):
    if case.tail is None:
        pytest.skip("this scheme has no from_dense")
    bank, coefficients = drawn(case)
    # As after a step of training: no longer as drawn.
    bank, coefficients = jax.tree.map(lambda x: x + 0.1 * jnp.sin(10 * x), (bank, coefficients))
    kernels = case.scheme.expand(bank, coefficients, case.sites)
    again = case.scheme.expand(*jax.jit(lambda k: case.scheme.from_dense(k, case.sites))(kernels), case.sites)
    np.testing.assert_allclose(stack(again), stack(kernels), atol=2e-6 * float(np.linalg.norm(stack(kernels))))


@every
def test_pmap_gives_every_device_the_same(case):
    if jax.device_count() < 4:
        pytest.skip("needs 4 devices")

    def loss(variables, weight):
        return weight * sum(jnp.sum(jnp.sin(kernel)) for kernel in case.scheme.expand(*variables, case.sites))

    def step(variables, weight):
        return jax.lax.pmean(jax.value_and_grad(loss)(variables, weight), "device")

    each = jax.pmap(step, "device", in_axes=(None, 0))(drawn(case), jnp.arange(4.0))
    single = jax.jit(jax.value_and_grad(loss))(drawn(case), 1.5)  # the mean of the weights 0, 1, 2, 3
    for device in range(4):
        chex.assert_trees_all_close(
            jax.tree.map(lambda leaf, d=device: np.asarray(leaf[d]), each), jax.device_get(single), rtol=1e-5, atol=1e-5
        )
