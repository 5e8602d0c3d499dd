"""What every sharing scheme must satisfy. A new scheme is one line in the table of conftest.py."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paramshare import SchemeError, Site
from paramshare.schemes import Sliced, Weights
from paramshare.schemes.sliced import join

KEY = jax.random.key(7)


def as_dtype(case: Any, dtype: str) -> tuple[Site, ...]:
    return tuple(dataclasses.replace(site, dtype=dtype) for site in case.sites)


@functools.cache
def drawn(case: Any) -> Weights:
    return jax.jit(lambda key: case.scheme.init(key, case.sites))(KEY)


@functools.cache
def exact_and_rounded(case: Any) -> Callable[[Weights], list[tuple[jax.Array, ...]]]:
    """Float32 and bfloat16 kernels, in one program, so that both round the same float32 sums."""
    return jax.jit(
        lambda w: [
            case.scheme.expand(w, as_dtype(case, dtype)) for dtype in ("float32", "bfloat16")
        ]
    )


def expand(case: Any, weights: Weights) -> tuple[jax.Array, ...]:
    return exact_and_rounded(case)(weights)[0]


@functools.cache
def from_dense(case: Any) -> Callable[[Any], Weights]:
    return jax.jit(lambda kernels: case.scheme.from_dense(kernels, case.sites))


@functools.cache
def many(case: Any) -> tuple[Weights, tuple[jax.Array, ...]]:
    """A thousand draws and their kernels, the first of them `drawn`."""

    def draw(key: jax.Array) -> tuple[Weights, tuple[jax.Array, ...]]:
        weights = case.scheme.init(key, case.sites)
        return weights, case.scheme.expand(weights, case.sites)

    keys = jax.vmap(jax.random.key)(jnp.arange(1000)).at[0].set(KEY)
    return jax.jit(jax.vmap(draw))(keys)


def loss(case: Any, weights: Weights, weight: Any) -> Any:
    kernels = case.scheme.expand(weights, case.sites)
    return weight * sum(
        jnp.sum(jnp.sin(kernel) * number)
        for kernel, number in zip(kernels, dense(case), strict=True)
    )


@functools.cache
def in_double(case: Any) -> Any:
    """Of float64 variables: kernels of two kinds of sites, and slopes and gradient of a loss."""
    with jax.enable_x64(True):
        members = case.sites, as_dtype(case, "float64")
        weights = jax.tree.map(lambda x: np.asarray(x, np.float64), drawn(case))
        rng = np.random.default_rng(8)
        direction = jax.tree.map(lambda x: rng.normal(size=x.shape), weights)
        numbers = [rng.normal(size=site.shape) for site in case.sites]

        @jax.jit
        def program(weights: Weights, direction: Weights) -> Any:
            def loss(weights: Weights) -> Any:
                kernels = case.scheme.expand(weights, members[1])
                return sum(jnp.vdot(jnp.sin(k), n) for k, n in zip(kernels, numbers, strict=True))

            # One evaluation on both sides, mapped: it is compiled once.
            points = jax.vmap(lambda t: jax.tree.map(lambda w, d: w + t * d, weights, direction))
            sides = jax.vmap(loss)(points(jnp.array([1e-6, -1e-6])))
            kernels = [case.scheme.expand(weights, sites) for sites in members]
            return kernels, sides, jax.grad(loss)(weights)

        kernels, (ahead, behind), gradient = jax.device_get(program(weights, direction))
        slope = sum(jax.tree.leaves(jax.tree.map(np.vdot, gradient, direction)))
        return kernels, ((ahead - behind) / 2e-6, slope), gradient


@functools.cache
def dense(case: Any) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(7)
    return tuple(rng.normal(size=site.shape).astype(np.float32) for site in case.sites)


def flat(kernels: Any) -> np.ndarray:
    return np.concatenate([np.asarray(kernel, np.float64).ravel() for kernel in kernels])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_shapes_and_dtypes(case, dtype):
    sites = as_dtype(case, dtype)
    with jax.enable_x64(dtype == "float64"):
        weights = jax.eval_shape(lambda: case.scheme.init(jax.random.key(0), sites))
        kernels = jax.eval_shape(lambda w: case.scheme.expand(w, sites), weights)
    # A bank is never held below float32, whatever the sites are.
    held = jnp.float64 if dtype == "float64" else jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(weights)} == {jnp.dtype(held)}
    assert [(kernel.shape, kernel.dtype) for kernel in kernels] == [
        (site.shape, jnp.dtype(dtype)) for site in sites
    ]


def test_kernels_are_as_exact_as_float64_variables(case):
    """As weights of a plain model are: nothing is rounded to the dtype of the sites."""
    kernels, exact = in_double(case)[0]
    chex.assert_trees_all_equal(kernels, exact)


def test_kernels_have_the_dtype_that_variables_are_cast_to(one):
    weights = jax.tree.map(lambda x: x.astype(jnp.bfloat16), drawn(one))
    kernels = jax.eval_shape(lambda w: one.scheme.expand(w, one.sites), weights)
    assert {kernel.dtype for kernel in kernels} == {jnp.dtype(jnp.bfloat16)}
    with jax.enable_x64(True):
        kernels = tuple(jnp.asarray(kernel, jnp.float64) for kernel in dense(one))
        fitted = jax.eval_shape(lambda k: one.scheme.from_dense(k, one.sites), kernels)
        assert {leaf.dtype for leaf in jax.tree.leaves(fitted)} == {jnp.dtype(jnp.float64)}


def test_paper_initialization_never_changes(case):
    if case.golden is None:
        pytest.skip("not recorded")
    last, squares = case.golden
    kernels = flat(expand(case, drawn(case)))
    # The QR of another LAPACK rounds differently.
    assert kernels[-1] == pytest.approx(last, abs=1e-6)
    assert np.sum(kernels**2) == pytest.approx(squares, rel=1e-6)


def test_entries_of_single_sites_have_their_keys(case):
    weights = case.scheme.shapes(case.sites)
    assert {*weights.coefficients, *weights.own} <= {site.key for site in case.sites}


def test_low_precision_kernels_are_the_rounded_ones(case):
    exact, rounded = exact_and_rounded(case)(drawn(case))
    chex.assert_trees_all_equal(rounded, tuple(kernel.astype(jnp.bfloat16) for kernel in exact))


def test_trainable_count_is_the_formula(case):
    shapes = case.scheme.shapes(case.sites)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == case.trainable


def test_vmap_changes_nothing(case):
    weights, kernels = jax.tree.map(lambda leaf: leaf[0], many(case))
    # XLA reorders the sums inside QR.
    chex.assert_trees_all_close(weights, drawn(case), rtol=1e-5, atol=1e-6)
    assert_kernels_close(kernels, expand(case, drawn(case)))


def test_jit_changes_nothing(one):
    weights = one.scheme.init(KEY, one.sites)
    chex.assert_trees_all_close(weights, drawn(one), rtol=1e-5, atol=1e-6)
    assert_kernels_close(one.scheme.expand(weights, one.sites), expand(one, drawn(one)))


def assert_kernels_close(actual: tuple[jax.Array, ...], expected: tuple[jax.Array, ...]):
    # A float32 rounding of a product for each term of the sums: 16 units in the last place of
    # kernels around 1.
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=2e-6)


def test_equal_schemes_and_sites_are_one_static_argument(case):
    traces = []

    def expand(scheme, sites, weights):
        traces.append(scheme)
        return scheme.expand(weights, sites)

    jitted = jax.jit(expand, static_argnums=(0, 1))
    copy = dataclasses.replace(case.scheme)
    assert copy is not case.scheme
    assert (copy, hash(copy)) == (case.scheme, hash(case.scheme))
    for scheme in (case.scheme, copy):
        sites = tuple(dataclasses.replace(site) for site in case.sites)
        jitted.eval_shape(scheme, sites, drawn(case))
    assert len(traces) == 1


def test_gradient_against_finite_differences(case):
    expected, actual = in_double(case)[1]
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6)


def test_kernels_depend_on_all_trainable_parameters(case):
    gradients = np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(in_double(case)[2])])
    assert np.sum(gradients == 0) == case.idle


def test_init_scale_of_every_kernel(case):
    if isinstance(case.scale, str):
        pytest.skip(case.scale)
    he = [np.sqrt(2 / site.fan_in) for site in case.sites]
    kernels = [
        np.asarray(kernel, np.float64) / s for kernel, s in zip(many(case)[1], he, strict=True)
    ]
    draws = len(kernels[0])
    for moment, expected in ((1, 0.0), (2, case.scale)):
        # Errors over draws, not over entries, which may repeat or have a fixed sum of squares.
        values = np.stack(
            [np.mean(kernel.reshape(draws, -1) ** moment, axis=1) for kernel in kernels]
        )
        error = values.std(axis=1) / math.sqrt(draws)
        assert np.all(error < 0.1)  # or the next line would say nothing
        # Five standard errors (the seeds are fixed), and the rounding of a fixed sum of squares.
        np.testing.assert_array_less(np.abs(values.mean(axis=1) - expected), 5 * error + 1e-6)


def test_from_dense_is_the_best_there_is(case):
    if case.tail is None:
        pytest.skip("the best fit of this scheme has no closed form")
    kernels = dense(case)
    weights = from_dense(case)(kernels)
    chex.assert_trees_all_equal_shapes_and_dtypes(weights, drawn(case))
    error = np.sum((flat(expand(case, weights)) - flat(kernels)) ** 2)
    # A float32 decomposition errs by some 1e-6 of the kernels' norm; squared, and beside a tail,
    # that is below 1e-5 of the whole.
    whole = np.sum(flat(kernels) ** 2)
    assert error == pytest.approx(
        case.tail(case, [np.asarray(kernel, np.float64) for kernel in kernels]),
        rel=1e-5,
        abs=1e-11 * whole,
    )


def test_from_dense_restores_the_kernels_of_a_bank(case):
    if case.tail is None:
        pytest.skip("the best fit of this scheme has no closed form")
    # As after a step of training.
    weights = jax.tree.map(
        lambda x: np.asarray(x) + np.float32(0.1) * np.sin(10 * np.asarray(x)), drawn(case)
    )
    kernels = expand(case, weights)
    again = expand(case, from_dense(case)(kernels))
    np.testing.assert_allclose(
        flat(again), flat(kernels), atol=2e-6 * float(np.linalg.norm(flat(kernels)))
    )


def test_pmap_gives_every_device_the_same(one):
    if jax.device_count() < 4:
        pytest.skip("needs 4 devices")

    def step(weights, weight):
        return jax.lax.pmean(
            jax.value_and_grad(functools.partial(loss, one))(weights, weight), "device"
        )

    each = jax.pmap(step, "device", in_axes=(None, 0))(drawn(one), jnp.arange(4.0))
    # 1.5 is the mean of the weights 0, 1, 2, 3.
    single = jax.jit(jax.value_and_grad(functools.partial(loss, one)))(drawn(one), 1.5)
    for device in range(4):
        chex.assert_trees_all_close(
            jax.tree.map(lambda leaf, d=device: np.asarray(leaf[d]), each),
            jax.device_get(single),
            rtol=1e-5,
            atol=1e-5,
        )


def test_a_bank_divided_over_devices_makes_the_same_kernels(one):
    """Bit for bit. The gradient of a slice is the slice of the gradient, summed over devices."""
    devices = 3  # most arrays must be padded
    sliced, weights = Sliced(one.scheme, "device", devices), drawn(one)

    def squares(scheme: Any, bank: Any, weights: Weights) -> Any:
        kernels = scheme.expand(weights._replace(bank=bank), one.sites)
        return sum(jnp.sum(kernel**2) for kernel in kernels), kernels

    def step(scheme: Any, weights: Weights) -> Any:
        gradient = jax.grad(functools.partial(squares, scheme), has_aux=True)
        return gradient(weights.bank, weights)

    parts, kernels = jax.pmap(
        functools.partial(step, sliced),
        "device",
        in_axes=(Weights(0, None, None),),  # pyright: ignore[reportArgumentType]
        out_axes=(0, None),  # pyright: ignore[reportArgumentType]
    )(weights._replace(bank=sliced.cut(weights.bank)))
    for kernel, expected in zip(kernels, expand(one, weights), strict=True):
        np.testing.assert_array_equal(kernel, expected)
    whole, _ = jax.jit(functools.partial(step, one.scheme))(weights)
    joined = jax.tree.map(lambda part, like: join(part, like.shape), parts, whole)
    expected = jax.tree.map(lambda leaf: devices * leaf, whole)
    chex.assert_trees_all_close(joined, expected, rtol=1e-5, atol=1e-5)


def test_divided_banks_communicate_in_the_compute_dtype(one):
    """A model in bfloat16 gets what it would round the kernels to; whole banks stay exact."""
    sliced, weights = Sliced(one.scheme, "device", 2, "bfloat16"), drawn(one)
    expand_slices = jax.pmap(
        lambda weights: sliced.expand(weights, one.sites),
        "device",
        in_axes=(Weights(0, None, None),),  # pyright: ignore[reportArgumentType]
        out_axes=None,  # pyright: ignore[reportArgumentType]
    )
    slices = weights._replace(bank=sliced.cut(weights.bank))
    for kernel, exact in zip(expand_slices(slices), expand(one, weights), strict=True):
        assert kernel.dtype == exact.dtype
        np.testing.assert_array_equal(kernel.astype(jnp.bfloat16), exact.astype(jnp.bfloat16))
    gathers = re.findall(r"all_gather.*-> tensor<.*x(\w+)>", expand_slices.lower(slices).as_text())
    assert set(gathers) == {"bf16" if one.scheme.entrywise else "f32"}


def test_foreign_arrays_and_kernels_are_refused(one):
    """The checks of the base class, under every scheme."""
    weights = drawn(one)
    first, *others = jax.tree.leaves(weights)
    changed = jax.tree.unflatten(jax.tree.structure(weights), [first[None], *others])
    for foreign in (changed, weights._replace(bank={}), weights._replace(own={"odd": first})):
        with pytest.raises(SchemeError, match=r"of shape .*, got .*; pass the variables"):
            one.scheme.expand(foreign, one.sites)
    kernels = dense(one)
    for foreign in (kernels[1:], (kernels[0][None], *kernels[1:])):
        with pytest.raises(SchemeError, match="kernel"):
            one.scheme.from_dense(foreign, one.sites)
