"""What every sharing scheme owes. A new scheme is one line in `CASES`."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from jax.test_util import check_grads

from paramshare import FilterBasis, Repeat, Ring, Site, Soft, Tied
from paramshare.schemes import Scheme

CONV, DENSE, VECTOR = (3, 3, 4, 5), (6, 7), (8,)
MIXED = (CONV, DENSE, VECTOR)  # 230 numbers
KEY = jax.random.key(7)


@dataclasses.dataclass(frozen=True)
class Case:
    """A scheme on some sites, and what is published of it there.

    `trainable` is the scheme's formula; `scale` is every kernel's expected square at init, in units of He's 2 / fan_in, one number or one a
    site, or else the reason why there is none; `tail` gives the squared error that `from_dense` must reach for some kernels (None:
    there is no closed form); `idle` is how many of the trainable numbers no kernel depends on.
    """

    scheme: Scheme
    sites: tuple[Site, ...]
    trainable: int
    scale: float | tuple[float, ...] | str = 1.0
    tail: "Callable[[Case, list[np.ndarray]], float] | None" = None
    idle: int = 0

    def __str__(self) -> str:
        shapes = ["x".join(map(str, site.shape)) for site in self.sites]
        return f"{self.scheme}-{f'{len(shapes)}x{shapes[0]}' if len(set(shapes)) == 1 else '+'.join(shapes)}"


def sites(*shapes: tuple[int, ...]) -> tuple[Site, ...]:
    return tuple(Site(f"layer{i}/kernel", shape) for i, shape in enumerate(shapes))


def least_squares(case: Case, kernels: list[np.ndarray]) -> float:
    """Of a scheme whose kernels are linear in all that it trains: the distance to that matrix's range, by LAPACK."""
    flat, unravel = ravel_pytree(
        jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), jax.eval_shape(lambda: case.scheme.init(KEY, case.sites)))
    )

    def column(one: jax.Array) -> jax.Array:
        bank, coefficients = unravel(one)
        return jnp.concatenate([kernel.ravel() for kernel in case.scheme.expand(bank, coefficients, case.sites)])

    matrix = np.asarray(jax.jit(jax.vmap(column, out_axes=1))(jnp.eye(flat.size)), np.float64)
    wanted = np.concatenate([kernel.ravel() for kernel in kernels])
    return float(np.sum((matrix @ np.linalg.lstsq(matrix, wanted)[0] - wanted) ** 2))


def soft(k: int, number: int, shape: tuple[int, ...]) -> Case:
    def tail(case: Case, kernels: list[np.ndarray]) -> float:  # Eckart & Young, 1936
        stack_LxP = np.stack([kernel.ravel() for kernel in kernels])
        return float(np.sum(np.linalg.svd(stack_LxP, compute_uv=False)[k:] ** 2))

    return Case(Soft(k), sites(*[shape] * number), k * math.prod(shape) + k * number, min(k, number) / number, tail)


def basis(s: int, u: int, bases: int, number: int, *cell: int) -> Case:
    # Mean squares: 2 / (kh kw u) of the unique filters, 1 / (kh kw C) of orthonormal ones.
    scale = (cell[-1] + s / 2) / (u + s) if u else 1 / 2
    trainable = math.prod(cell) * (bases * s + number * u)
    return Case(FilterBasis(s, u, bases), sites(*[(*cell, u + s)] * number), trainable, scale, least_squares)


def tied(scheme: Tied, number: int, shape: tuple[int, ...]) -> Case:
    def tail(case: Case, kernels: list[np.ndarray]) -> float:  # Eckart & Young, 1936, for each group
        if not scheme.scaled:
            return least_squares(case, kernels)
        stacks = [[k.ravel() for k, its in zip(kernels, groups, strict=True) if its == g] for g in sorted(set(groups))]
        return float(sum(np.sum(np.linalg.svd(np.stack(stack), compute_uv=False)[1:] ** 2) for stack in stacks))

    fan_in, outputs, groups = math.prod(shape[:-1]), shape[-1], scheme.groups or (0,) * number
    # The shorter side of an orthonormal kernel's matrix has unit norms; else 2 / fan-out, which is 2 in (C / T) of He's.
    scale = fan_in / max(fan_in, outputs) / 2 if scheme.orthonormal else shape[-2] / outputs
    trainable = len(set(groups)) * math.prod(shape) + scheme.scaled * number
    return Case(scheme, sites(*[shape] * number), trainable, scale, tail)


def ring(size: int, mode: Any = "ring", **options: Any) -> Case:
    fans = [shape[-2] / shape[-1] if len(shape) > 1 else 1 / shape[0] for shape in MIXED]  # fan-in / fan-out
    idle = max(0, size - sum(map(math.prod, MIXED)))
    return Case(Ring(size, mode, **options), sites(*MIXED), size, tuple(fans), least_squares, idle)


def repeat(scheme: Repeat, base: tuple[int, ...], *shapes: tuple[int, ...], numbers: int) -> Case:
    """`numbers` are those of tiles and remainders together."""
    trainable = math.prod(base) * (1 if scheme.source else len(shapes)) + numbers
    scales = [repeated_square(scheme.transform, base, shape) * math.prod(shape[:-1]) / 2 for shape in shapes]
    scale = tuple(scales) if all(map(math.isfinite, scales)) else "what is transformed twice has no expected square in closed form"
    tail = least_squares if scheme.transform == "linear" or {base} == set(shapes) else None  # else there is no closed form
    return Case(scheme, sites(*shapes), trainable, scale, tail)


def repeated_square(transform: str, base: tuple[int, ...], shape: tuple[int, ...]) -> float:
    """E[W'^2] for w uniform within Xavier's L and a tile's numbers within l; NaN where a remainder is transformed once more."""
    largest = math.sqrt(6 / (math.prod(base[:-2]) * (base[-2] + base[-1])))
    tiles, rest = (shape[-1] // base[-1]) * (shape[-2] // base[-2]), shape[-1] % base[-1] + shape[-2] % base[-2]
    if base == shape or transform == "linear":
        return largest**2 / 3
    if rest:
        return math.nan
    if transform == "fourier":  # sum of E[a^2] E[w^2m], m = 0 .. 5
        return 2 / (tiles + 1) * sum(largest ** (2 * m) / (2 * m + 1) for m in range(6))
    nodes, weights = np.polynomial.legendre.leggauss(20)  # smooth: exact to the last digits
    w, beta = np.meshgrid(largest * nodes, math.sqrt(6 / (tiles + 1)) * nodes)
    return 2 / (tiles + 1) * float(np.sum(np.outer(weights, weights) / 4 * (w / (1 + np.exp(beta * w))) ** 2))


SMALL = Repeat(like=nn.Dense(1)).bind(lambda module: {"layer0/kernel": (3, 2, 3), "layer1/kernel": (3, 2, 3), "other": (4,)})

CASES = [
    *[soft(k, 6, CONV) for k in (1, 4, 6, 9)],
    soft(2, 5, DENSE),
    soft(1, 1, CONV),
    soft(3, 1, DENSE),
    soft(10, 12, VECTOR),  # more templates than a kernel has numbers
    basis(5, 0, 1, 3, 3, 3, 4),
    basis(6, 2, 1, 3, 3, 3, 4),
    basis(3, 1, 2, 5, 3, 3, 4),
    tied(Tied(), 3, CONV),
    tied(Tied(orthonormal=True), 3, CONV),
    tied(Tied(orthonormal=True), 2, (2, 7)),  # more filters than are independent
    tied(Tied(groups=(0, 1, 0, 1, 0)), 5, CONV),
    tied(Tied(groups=(0, 1, 1, 2), scaled=True, orthonormal=True), 4, CONV),
    tied(Tied(scaled=True), 3, (2, 7)),
    *[ring(101, mode) for mode in ("ring", "global", "tile")],  # smaller than a kernel
    ring(13, "hash"),
    ring(1),
    ring(300, "global"),  # larger than all kernels
    ring(101, block=4, seed=1),
    repeat(Repeat(base=(3, 2, 3)), (3, 2, 3), (3, 2, 3), (3, 4, 6), (3, 2, 9), numbers=2 * (4 + 3)),
    repeat(Repeat(base=(3, 2, 3)), (3, 2, 3), (3, 5, 7), (3, 4, 4), numbers=2 * ((4 + 1 + 1) + (2 + 1))),
    repeat(Repeat(base=(2, 3), transform="linear"), (2, 3), (2, 3), (5, 7), numbers=0),
    repeat(Repeat(source="layer0/kernel", transform="linear"), (3, 2, 3), (3, 2, 3), (3, 5, 4), (3, 4, 3), numbers=0),
    repeat(Repeat(source="layer0/kernel"), (3, 2, 3), (3, 2, 3), (3, 2, 3), numbers=0),
    repeat(Repeat(base=(2, 3), transform="fourier"), (2, 3), (2, 3), (4, 6), numbers=6 * 4),
    repeat(Repeat(source="layer0/kernel"), (3, 2, 3), (3, 2, 3), (3, 4, 3), (3, 2, 3), numbers=2 * 2),
    repeat(SMALL, (3, 2, 3), (3, 4, 6), (3, 2, 3), numbers=2 * 4),
]
every = pytest.mark.parametrize("case", CASES, ids=str)


def as_dtype(case: Case, dtype: str) -> tuple[Site, ...]:
    return tuple(dataclasses.replace(site, dtype=dtype) for site in case.sites)


@contextlib.contextmanager
def one_by_one() -> Iterator[None]:
    """Outside jit every operation is a program: compiled without optimizations, in half the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)


@functools.cache
def drawn(case: Case) -> tuple[Any, Any]:
    with one_by_one():
        return case.scheme.init(KEY, case.sites)


@functools.cache
def exact_and_rounded(case: Case) -> Callable[[Any, Any], list[tuple[jax.Array, ...]]]:
    """Float32 and bfloat16 kernels, in one program, so that both round the same float32 sums."""
    return jax.jit(lambda b, c: [case.scheme.expand(b, c, as_dtype(case, dtype)) for dtype in ("float32", "bfloat16")])


def expand(case: Case, bank: Any, coefficients: Any) -> tuple[jax.Array, ...]:
    return exact_and_rounded(case)(bank, coefficients)[0]


@functools.cache
def from_dense(case: Case) -> Callable[[Any], tuple[Any, Any]]:
    scheme: Any = case.scheme
    return jax.jit(lambda kernels: scheme.from_dense(kernels, case.sites))


@functools.cache
def many(case: Case) -> tuple[Any, Any]:
    """A thousand draws, the first of them `drawn`."""
    keys = jax.vmap(jax.random.key)(jnp.arange(1000)).at[0].set(KEY)
    return jax.jit(jax.vmap(lambda key: case.scheme.init(key, case.sites)))(keys)


@functools.cache
def expand_many(case: Case) -> tuple[jax.Array, ...]:
    return jax.jit(jax.vmap(lambda bank, coefficients: case.scheme.expand(bank, coefficients, case.sites)))(*many(case))


def loss(case: Case, variables: tuple[Any, Any], weight: Any) -> Any:
    kernels = case.scheme.expand(variables[0], variables[1], case.sites)
    return weight * sum(jnp.sum(jnp.sin(kernel) * number) for kernel, number in zip(kernels, dense(case), strict=True))


@functools.cache
def gradient(case: Case) -> Callable[[Any, Any], tuple[jax.Array, Any]]:
    return jax.jit(jax.value_and_grad(functools.partial(loss, case)))


@functools.cache
def dense(case: Case) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(7)
    return tuple(rng.normal(size=site.shape).astype(np.float32) for site in case.sites)


def flat(kernels: Any) -> np.ndarray:
    return np.concatenate([np.asarray(kernel, np.float64).ravel() for kernel in kernels])


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
    exact, rounded = exact_and_rounded(case)(*drawn(case))
    chex.assert_trees_all_equal(rounded, tuple(kernel.astype(jnp.bfloat16) for kernel in exact))


@every
def test_trainable_count_is_the_formula(case):
    shapes = jax.eval_shape(lambda: case.scheme.init(KEY, case.sites))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == case.trainable


@every
def test_jit_and_vmap_change_nothing(case):
    first = jax.tree.map(lambda leaf: leaf[0], many(case))
    chex.assert_trees_all_close(first, drawn(case), rtol=1e-5, atol=1e-6)  # XLA reorders the sums inside QR
    bank, coefficients = drawn(case)
    with one_by_one():
        kernels = case.scheme.expand(bank, coefficients, case.sites)
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
        jitted.eval_shape(scheme, tuple(dataclasses.replace(site) for site in case.sites), *drawn(case))
    assert len(traces) == 1


@every
def test_gradient_against_finite_differences(case):
    with jax.enable_x64(True):
        wanted = as_dtype(case, "float64")
        bank, coefficients = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf, np.float64)), drawn(case))
        expand = jax.jit(lambda b, c: jnp.concatenate([jnp.sin(kernel).ravel() for kernel in case.scheme.expand(b, c, wanted)]))
        # Reverse mode only: a scheme may define its own gradient (`jax.custom_vjp`).
        check_grads(expand, (bank, coefficients), order=1, modes=("rev",), eps=1e-6, rtol=1e-6, atol=1e-6)


@every
def test_kernels_depend_on_all_that_is_trained(case):
    gradients, _ = ravel_pytree(gradient(case)(drawn(case), 1.0)[1])
    assert np.sum(np.asarray(gradients) == 0) == case.idle


@every
def test_init_scale_of_every_kernel(case):
    if isinstance(case.scale, str):
        pytest.skip(case.scale)
    he = [np.sqrt(2 / math.prod(site.shape[:-1])) for site in case.sites]
    kernels = [np.asarray(kernel, np.float64) / s for kernel, s in zip(expand_many(case), he, strict=True)]
    draws = len(kernels[0])
    for moment, wanted in ((1, 0.0), (2, case.scale)):
        # Errors over draws, not over numbers: those of a kernel may be the same few, or bound to one sum of squares.
        values = np.stack([np.mean(kernel.reshape(draws, -1) ** moment, axis=1) for kernel in kernels])
        error = values.std(axis=1) / math.sqrt(draws)
        assert np.all(error < 0.1)  # or the next line would say nothing
        # Five standard errors, the seeds are fixed; and the rounding of a fixed sum of squares.
        np.testing.assert_array_less(np.abs(values.mean(axis=1) - wanted), 5 * error + 1e-6)


@every
def test_from_dense_is_the_best_there_is(case):
    if case.tail is None:
        pytest.skip("what this scheme fits has no closed form")
    kernels = dense(case)
    variables = from_dense(case)(kernels)
    chex.assert_trees_all_equal_shapes_and_dtypes(variables, drawn(case))
    error = np.sum((flat(expand(case, *variables)) - flat(kernels)) ** 2)
    # A float32 decomposition errs by some 1e-6 of the kernels' norm; squared, and beside a tail, that is below 1e-5 of the whole.
    whole = np.sum(flat(kernels) ** 2)
    assert error == pytest.approx(case.tail(case, [np.asarray(kernel, np.float64) for kernel in kernels]), rel=1e-5, abs=1e-11 * whole)


@every
def test_from_dense_gives_a_scheme_its_own_kernels_back(case):
    if case.tail is None:
        pytest.skip("what this scheme fits has no closed form")
    # As after a step of training: no longer as drawn.
    bank, coefficients = jax.tree.map(lambda x: np.asarray(x) + np.float32(0.1) * np.sin(10 * np.asarray(x)), drawn(case))
    kernels = expand(case, bank, coefficients)
    again = expand(case, *from_dense(case)(kernels))
    np.testing.assert_allclose(flat(again), flat(kernels), atol=2e-6 * float(np.linalg.norm(flat(kernels))))


@every
def test_pmap_gives_every_device_the_same(case):
    if jax.device_count() < 4:
        pytest.skip("needs 4 devices")

    def step(variables, weight):
        return jax.lax.pmean(jax.value_and_grad(functools.partial(loss, case))(variables, weight), "device")

    each = jax.pmap(step, "device", in_axes=(None, 0))(drawn(case), jnp.arange(4.0))
    single = gradient(case)(drawn(case), 1.5)  # the mean of the weights 0, 1, 2, 3
    for device in range(4):
        chex.assert_trees_all_close(
            jax.tree.map(lambda leaf, d=device: np.asarray(leaf[d]), each), jax.device_get(single), rtol=1e-5, atol=1e-5
        )
