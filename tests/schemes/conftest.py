"""The table of cases that every sharing scheme must pass, and measures for several tests."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from paramshare import FilterBasis, Relaxed, Repeat, Ring, Site, Soft, Steerable, Tied, Transposed
from paramshare.schemes import Scheme, Weights
from paramshare.schemes.interface import bank_dtype

CONV, DENSE, VECTOR = (3, 3, 4, 5), (6, 7), (8,)
MIXED = (CONV, DENSE, VECTOR)  # 230 entries


@dataclasses.dataclass(frozen=True)
class Case:
    """A scheme on some sites, and what is published about it.

    `trainable` is the scheme's formula. `scale` is every kernel's expected square at init, in units
    of He's 2 / fan_in: one value or one for each site, or the reason why there is none. `tail`
    gives the squared error that `from_dense` must reach for some kernels (None: there is no closed
    form). `idle` is the number of trainable parameters that no kernel depends on.
    `golden` is the last entry and the sum of squares of the initial kernels from key 7, recorded
    when schemes could only start as in their papers.
    """

    scheme: Scheme
    sites: tuple[Site, ...]
    trainable: int
    scale: float | tuple[float, ...] | str = 1.0
    tail: "Callable[[Case, list[np.ndarray]], float] | None" = None
    idle: int = 0
    golden: tuple[float, float] | None = None

    def __str__(self) -> str:
        shapes = ["x".join(map(str, site.shape)) for site in self.sites]
        equal = len(set(shapes)) == 1
        return f"{self.scheme}-{f'{len(shapes)}x{shapes[0]}' if equal else '+'.join(shapes)}"


def sites(*shapes: tuple[int, ...]) -> tuple[Site, ...]:
    return tuple(Site(f"layer{i}/kernel", shape) for i, shape in enumerate(shapes))


def with_axes(case: Case, shape: tuple[int, ...], **axes: tuple[int, ...]) -> Case:
    """The same scheme on kernels of another shape whose matrices are those of the case."""
    reshaped = tuple(dataclasses.replace(site, shape=shape, **axes) for site in case.sites)
    matrices = [site.matrix_shape for site in case.sites]
    assert [site.matrix_shape for site in reshaped] == matrices
    return dataclasses.replace(case, sites=reshaped)


def least_squares(case: Case, kernels: list[np.ndarray]) -> float:
    """Where kernels are linear in the parameters: the distance to the matrix's range, by LAPACK."""
    flat, unravel = ravel_pytree(
        jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), case.scheme.shapes(case.sites))
    )

    def column(one: jax.Array) -> jax.Array:
        return jnp.concatenate([k.ravel() for k in case.scheme.expand(unravel(one), case.sites)])

    matrix = np.asarray(jax.jit(jax.vmap(column, out_axes=1))(jnp.eye(flat.size)), np.float64)
    expected = np.concatenate([kernel.ravel() for kernel in kernels])
    return float(np.sum((matrix @ np.linalg.lstsq(matrix, expected)[0] - expected) ** 2))


def soft(k: int, number: int, shape: tuple[int, ...]) -> Case:
    def tail(case: Case, kernels: list[np.ndarray]) -> float:  # Eckart & Young, 1936
        stack_LxP = np.stack([kernel.ravel() for kernel in kernels])
        return float(np.sum(np.linalg.svd(stack_LxP, compute_uv=False)[k:] ** 2))

    return Case(
        Soft(k, initial="paper"),
        sites(*[shape] * number),
        k * math.prod(shape) + k * number,
        min(k, number) / number,
        tail,
    )


def basis(s: int, u: int, bases: int, number: int, *cell: int) -> Case:
    # Mean squares: 2 / (kh kw u) of the unique filters, 1 / (kh kw C) of orthonormal ones.
    scale = (cell[-1] + s / 2) / (u + s) if u else 1 / 2
    trainable = math.prod(cell) * (bases * s + number * u)
    return Case(
        FilterBasis(s, u, bases, initial="paper"),
        sites(*[(*cell, u + s)] * number),
        trainable,
        scale,
        least_squares,
    )


def tied(number: int, shape: tuple[int, ...], **options: Any) -> Case:
    scheme = Tied(initial="paper", **options)

    def tail(
        case: Case, kernels: list[np.ndarray]
    ) -> float:  # Eckart & Young, 1936, for each group
        if not scheme.scaled:
            return least_squares(case, kernels)
        stacks = [
            [k.ravel() for k, group in zip(kernels, groups, strict=True) if group == g]
            for g in sorted(set(groups))
        ]
        return float(
            sum(
                np.sum(np.linalg.svd(np.stack(stack), compute_uv=False)[1:] ** 2)
                for stack in stacks
            )
        )

    fan_in, outputs, groups = math.prod(shape[:-1]), shape[-1], scheme.groups or (0,) * number
    # The shorter side of an orthonormal kernel's matrix has unit norms; otherwise 2 / fan-out, in
    # units of He's 2 / fan-in.
    scale = fan_in / max(fan_in, outputs) / 2 if scheme.orthonormal else shape[-2] / outputs
    trainable = len(set(groups)) * math.prod(shape) + scheme.scaled * number
    return Case(scheme, sites(*[shape] * number), trainable, scale, tail)


def ring(size: int, mode: Any = "ring", **options: Any) -> Case:
    fans = [
        shape[-2] / shape[-1] if len(shape) > 1 else 1 / shape[0] for shape in MIXED
    ]  # fan-in / fan-out
    idle = max(0, size - sum(map(math.prod, MIXED)))
    scheme = Ring(size, mode, initial="paper", **options)
    return Case(scheme, sites(*MIXED), size, tuple(fans), least_squares, idle)


def repeat(scheme: Repeat, base: tuple[int, ...], *shapes: tuple[int, ...], scalars: int) -> Case:
    """`scalars` are those of tiles and remainders together."""
    scheme = dataclasses.replace(scheme, initial="paper")
    trainable = math.prod(base) * (1 if scheme.source else len(shapes)) + scalars
    scales = [
        repeated_square(scheme.transform, base, shape) * math.prod(shape[:-1]) / 2
        for shape in shapes
    ]
    scale = (
        tuple(scales)
        if all(map(math.isfinite, scales))
        else "the mean square of weights transformed twice has no closed form"
    )
    tail = (
        least_squares if scheme.transform == "linear" or {base} == set(shapes) else None
    )  # else there is no closed form
    return Case(scheme, sites(*shapes), trainable, scale, tail)


def repeated_square(transform: str, base: tuple[int, ...], shape: tuple[int, ...]) -> float:
    """E[W'^2] for w uniform within Xavier's L and a tile's scalars within l.

    NaN where a remainder is transformed once more.
    """
    largest = math.sqrt(6 / (math.prod(base[:-2]) * (base[-2] + base[-1])))
    tiles, remainder = (
        (shape[-1] // base[-1]) * (shape[-2] // base[-2]),
        shape[-1] % base[-1] + shape[-2] % base[-2],
    )
    if base == shape or transform == "linear":
        return largest**2 / 3
    if remainder:
        return math.nan
    if transform == "scale":
        return 2 / (tiles + 1) * largest**2 / 3
    if transform == "fourier":  # sum of E[a^2] E[w^2m], m = 0 .. 5
        return 2 / (tiles + 1) * sum(largest ** (2 * m) / (2 * m + 1) for m in range(6))
    nodes, weights = np.polynomial.legendre.leggauss(20)  # smooth: exact to the last digits
    w, beta = np.meshgrid(largest * nodes, math.sqrt(6 / (tiles + 1)) * nodes)
    return (
        2
        / (tiles + 1)
        * float(np.sum(np.outer(weights, weights) / 4 * (w / (1 + np.exp(beta * w))) ** 2))
    )


@dataclasses.dataclass(frozen=True)
class LowRank(Scheme):
    """A scheme of a user: matrices U V_l, U (P, r) shared, V_l (r, N) for each site."""

    rank: int
    one_shape: ClassVar[bool] = True

    def _init(self, key: jax.Array, sites: tuple[Site, ...]) -> Weights:
        P, N, dtype = sites[0].fan_in, sites[0].matrix_shape[-1], bank_dtype(sites)
        keys = jax.random.split(key, len(sites) + 1)
        left_PxR = jax.random.normal(keys[0], (P, self.rank), dtype) / math.sqrt(self.rank)
        rights = [jax.random.normal(key, (self.rank, N), dtype) for key in keys[1:]]
        return self._weights(left_PxR * math.sqrt(2 / P), rights, sites)

    def _expand(self, weights: Weights, sites: tuple[Site, ...]) -> tuple[jax.Array, ...]:
        products = [weights.bank["left"] @ weights.own[site.key] for site in sites]
        return tuple(s.from_matrix(product) for s, product in zip(sites, products, strict=True))

    def _from_dense(self, kernels: tuple[jax.Array, ...], sites: tuple[Site, ...]) -> Weights:
        P = sites[0].fan_in
        matrices = [s.to_matrix(k).reshape(P, -1) for s, k in zip(sites, kernels, strict=True)]
        left_PxR = jnp.linalg.svd(jnp.concatenate(matrices, axis=1))[0][:, : self.rank]
        return self._weights(left_PxR, [left_PxR.T @ matrix for matrix in matrices], sites)

    def _weights(self, left_PxR: jax.Array, rights: Any, sites: tuple[Site, ...]) -> Weights:
        own = {site.key: right for site, right in zip(sites, rights, strict=True)}
        return Weights({"left": left_PxR}, own=own)


def low_rank(rank: int, number: int, shape: tuple[int, ...]) -> Case:
    def tail(case: Case, kernels: list[np.ndarray]) -> float:  # Eckart & Young, 1936
        stack = np.concatenate([kernel.reshape(-1, shape[-1]) for kernel in kernels], axis=1)
        return float(np.sum(np.linalg.svd(stack, compute_uv=False)[rank:] ** 2))

    trainable = rank * (math.prod(shape[:-1]) + number * shape[-1])
    return Case(LowRank(rank), sites(*[shape] * number), trainable, 1.0, tail)


def steerable(order: int, *shapes: tuple[int, ...], functions: int, **options: Any) -> Case:
    """`functions` is the number of circular harmonics that the kernels are made of."""
    scheme = Steerable(order, initial="paper", **options)
    pairs = sum(math.prod(shape[2:]) for shape in shapes) // order  # N^2 kernels from N F numbers
    return Case(scheme, sites(*shapes), functions * pairs, 1 / 2, least_squares)


def relaxed(inner: Case, rank: int, scale: bool = False) -> Case:
    """Full rank has no error, other ranks no closed form. Left factors are idle while V_l = 0."""
    sides = [(math.prod(site.matrix_shape[:-1]), site.matrix_shape[-1]) for site in inner.sites]
    ranks = [min(rank, *pair) for pair in sides]
    left = sum(r * P for r, (P, _) in zip(ranks, sides, strict=True))
    right = sum(r * N for r, (_, N) in zip(ranks, sides, strict=True))
    return dataclasses.replace(
        inner,
        scheme=Relaxed(inner.scheme, rank, scale),
        trainable=inner.trainable + left + right + scale * sum(N for _, N in sides),
        tail=(lambda case, kernels: 0.0) if ranks == [min(pair) for pair in sides] else None,
        idle=inner.idle + left,
    )


def transposed(inner: Case, *turned: int, **options: Any) -> Case:
    """The scheme on matrices of which those at some places are turned."""
    shapes = [s.shape[::-1] if i in turned else s.shape for i, s in enumerate(inner.sites)]
    fans = [site.fan_in / s[0] for site, s in zip(inner.sites, shapes, strict=True)]
    assert isinstance(inner.scale, float)

    def tail(case: Case, kernels: list[np.ndarray]) -> float:
        assert inner.tail is not None
        return inner.tail(inner, [k.T if i in turned else k for i, k in enumerate(kernels)])

    return dataclasses.replace(
        inner,
        scheme=Transposed(inner.scheme, **options),
        sites=sites(*shapes),
        tail=tail,
        scale=tuple(inner.scale / fan for fan in fans),
    )


SMALL = Repeat(like=nn.Dense(1)).bind(
    lambda module: {"layer0/kernel": (3, 2, 3), "layer1/kernel": (3, 2, 3), "other": (4,)}
)

PAPER = [
    *[soft(k, 6, CONV) for k in (4, 9)],
    soft(1, 1, CONV),
    soft(3, 1, DENSE),
    soft(10, 12, VECTOR),  # more templates than a kernel has entries
    basis(5, 0, 1, 3, 3, 3, 4),
    basis(6, 2, 1, 3, 3, 3, 4),
    basis(3, 1, 2, 5, 3, 3, 4),
    tied(3, CONV, orthonormal=True),
    tied(2, (2, 7), orthonormal=True),  # more filters than are independent
    tied(5, CONV, groups=(0, 1, 0, 1, 0)),
    tied(4, CONV, groups=(0, 1, 1, 2), scaled=True, orthonormal=True),
    tied(3, (2, 7), scaled=True),
    *[ring(101, mode) for mode in ("ring", "global", "tile")],  # smaller than a kernel
    ring(13, "hash"),
    ring(300, "global"),  # larger than all kernels
    ring(101, block=4, seed=1),
    repeat(Repeat(base=(3, 2, 3)), (3, 2, 3), (3, 2, 3), (3, 4, 6), (3, 2, 9), scalars=2 * (4 + 3)),
    repeat(
        Repeat(base=(3, 2, 3)), (3, 2, 3), (3, 5, 7), (3, 4, 4), scalars=2 * ((4 + 1 + 1) + (2 + 1))
    ),
    repeat(Repeat(base=(2, 3), transform="linear"), (2, 3), (2, 3), (5, 7), scalars=0),
    repeat(
        Repeat(source="layer0/kernel", transform="linear"),
        (3, 2, 3),
        (3, 2, 3),
        (3, 5, 4),
        (3, 4, 3),
        scalars=0,
    ),
    repeat(Repeat(base=(2, 3), transform="fourier"), (2, 3), (2, 3), (4, 6), scalars=6 * 4),
    repeat(
        Repeat(source="layer0/kernel"), (3, 2, 3), (3, 2, 3), (3, 4, 3), (3, 2, 3), scalars=2 * 2
    ),
    repeat(SMALL, (3, 2, 3), (3, 4, 6), (3, 2, 3), scalars=2 * 4),
]
GOLDEN = [  # of the cases above, in their order
    (-0.058022741228342056, 38.510313),
    (0.16405746340751648, 58.866877),
    (0.5512444972991943, 10.110999),
    (0.9419057369232178, 14.944542),
    (-2.723611354827881, 154.01008),
    (0.24981284141540527, 15.000001),
    (-0.1427711695432663, 38.490792),
    (-0.01203199289739132, 49.339006),
    (0.19243115186691284, 14.999999),
    (-0.6892792582511902, 4.0000003),
    (0.4930480420589447, 38.002002),
    (0.05789406970143318, 20),
    (-0.9334584474563599, 11.386675),
    (0.5977055430412292, 23.38207),
    (-0.9767255187034607, 22.896073),
    (-0.11186825484037399, 21.685232),
    (-0.07047014683485031, 16.492802),
    (-0.05573238432407379, 29.583765),
    (-0.23286813497543335, 23.38207),
    (-0.14923422038555145, 5.3802097),
    (-0.0051371562294662, 2.2229375),
    (-0.5586618781089783, 16.197961),
    (0.6197424530982971, 17.829473),
    (1.5280752182006836, 33.405643),
    (0.6197424530982971, 6.1160166),
    (-0.28239625692367554, 3.8986758),
]
CASES = [
    *[dataclasses.replace(case, golden=g) for case, g in zip(PAPER, GOLDEN, strict=True)],
    with_axes(soft(2, 5, (6, 8)), (6, 2, 4), in_axes=(0,), out_axes=(1, 2)),  # (D, H, K)
    with_axes(basis(5, 3, 1, 3, 9), (9, 2, 4), in_axes=(0,), out_axes=(1, 2)),
    with_axes(basis(4, 1, 2, 4, 8), (2, 4, 5), in_axes=(0, 1), out_axes=(2,)),  # (H, K, D)
    with_axes(tied(2, (6, 8), orthonormal=True), (6, 2, 4), in_axes=(0,), out_axes=(1, 2)),
    with_axes(
        repeat(Repeat(base=(3, 4)), (3, 4), (6, 8), (6, 8), scalars=2 * 8),
        (6, 2, 4),
        in_axes=(0,),
        out_axes=(1, 2),
    ),
    with_axes(
        repeat(Repeat(base=(4, 3)), (4, 3), (8, 6), scalars=2 * 4),
        (2, 4, 6),
        in_axes=(0, 1),
        out_axes=(2,),
    ),
    low_rank(3, 4, CONV),
    repeat(Repeat(base=(2, 3), transform="scale"), (2, 3), (2, 3), (4, 6), scalars=4),
    relaxed(tied(3, CONV), 2),
    relaxed(basis(2, 3, 1, 4, 5), 1, scale=True),
    relaxed(ring(101), 99, scale=True),
    transposed(tied(2, (5, 3)), 1),
    transposed(soft(2, 4, (4, 4)), 1, 3, transposed=r"layer[13]/.*"),
    steerable(4, (3, 3, 4, 8), (3, 3, 8, 4), functions=1 + 5),
    steerable(8, (5, 5, 3, 8), functions=1 + 5 + 5, lifting=True),
    with_axes(
        steerable(3, (5, 5, 3, 6), functions=1 + 3 + 3, frequencies=(0, 1, 1)),
        (3, 5, 2, 3, 5),
        in_axes=(0,),
        out_axes=(2, 3),
    ),
]


def kind(case: Case) -> tuple[Any, ...]:
    """Cases of one kind take the same way through a scheme; all but the first are slow tests."""
    options = vars(case.scheme)
    return (
        type(case.scheme),
        *(options.get(name) for name in ("mode", "block", "transform", "orthonormal", "scaled")),
        *(options.get(name) for name in ("scale", "transposed")),
        *(options.get(name) is None for name in ("groups", "source", "like")),
        options.get("unique") == 0,
        any(site.in_axes for site in case.sites),
    )


def pytest_generate_tests(metafunc):
    """Tests of conformance and of quantised banks take every `case`, or `one` for each scheme."""
    if metafunc.module.__name__.endswith(("test_conformance", "test_compressed")):
        if "case" in metafunc.fixturenames:
            first = {kind(case): case for case in reversed(CASES)}
            cases = [
                case if case is first[kind(case)] else pytest.param(case, marks=pytest.mark.slow)
                for case in CASES
            ]
            metafunc.parametrize("case", cases, ids=str)
        if "one" in metafunc.fixturenames:
            one_of_each = {type(case.scheme): case for case in CASES}.values()
            metafunc.parametrize("one", one_of_each, ids=str)


@pytest.fixture(scope="session")
def rows() -> Callable[[Any], np.ndarray]:
    """(n, P): the filters of a kernel (..., n), in double precision."""
    return lambda kernel: np.asarray(kernel, np.float64).reshape(-1, kernel.shape[-1]).T


@pytest.fixture(scope="session")
def assert_he_normal() -> Callable[[Any, float], None]:
    """The first four moments are those of N(0, variance), within five standard errors of each."""

    def check(values: Any, variance: float):
        units = np.asarray(values, np.float64).ravel() / math.sqrt(variance)
        for power, moment, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
            assert abs(np.mean(units**power) - moment) < 5 * math.sqrt(spread / units.size)

    return check
