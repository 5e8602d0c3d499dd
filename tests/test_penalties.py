"""Penalties, against their formulas in double precision, and the published floors."""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from paramshare import (
    FilterBasis,
    PenaltyError,
    PlanError,
    Repeat,
    Ring,
    Shared,
    Site,
    Soft,
    Tied,
    orthogonality,
    recurrence,
)
from paramshare.layout import Layout, SharedBank, variables_of
from paramshare.schemes import Scheme

RNG = np.random.default_rng(0)
# A float32 product of P = 36 terms around 1/36 has an error of some 1e-7 of it.
CLOSE = 1e-6
Model = tuple[Shared, dict[str, Any]]  # a shared model and its variables


def rows(kernel: Any) -> np.ndarray:
    """B of the paper: (n, P), the flattened filters of a kernel (..., n), not normalised."""
    kernel = np.asarray(kernel, np.float64)
    return kernel.reshape(-1, kernel.shape[-1]).T


def squares(b: np.ndarray) -> float:
    """|| B B^T - I ||_F^2."""
    return float(np.sum((b @ b.T - np.eye(len(b))) ** 2))


def draw(*shape: int, scale: float = 0.2) -> np.ndarray:
    return (scale * RNG.normal(size=shape)).astype(np.float32)


def orthonormal(p: int, n: int) -> np.ndarray:
    """A kernel (p, n) with orthonormal columns, or with orthonormal rows if n > p."""
    q = np.linalg.qr(RNG.normal(size=(max(p, n), min(p, n))))[0]
    return q if p >= n else q.T


def sharing(banks: Mapping[str, tuple[Scheme, tuple[int, ...], int]]) -> Shared:
    """A model with banks of a scheme, and a shape and number of sites each."""
    layout = Layout(
        tuple(
            SharedBank(name, scheme, tuple(Site(f"{name}{i}/kernel", shape) for i in range(count)))
            for name, (scheme, shape, count) in banks.items()
        ),
        plain=0,
    )
    return Shared(nn.Dense(1), layout)


def zeros(shared: Shared) -> dict[str, Any]:
    """Variables of a model, all zero."""
    banks, params = variables_of({b.name: b.scheme.shapes(b.sites) for b in shared.layout.banks})
    shapes = {"banks": banks, "params": params}
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def banks_of(shared: Shared, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The banks of a model, each holding one array."""
    return {
        bank.name: jax.tree.map(
            lambda _, name=bank.name: jnp.asarray(arrays[name]),
            bank.scheme.shapes(bank.sites).bank,
        )
        for bank in shared.layout.banks
    }


def tied(kernels: Mapping[str, Any]) -> Model:
    """Banks of one kernel each, for two sites."""
    shared = sharing({name: (Tied(), kernel.shape, 2) for name, kernel in kernels.items()})
    return shared, {"banks": banks_of(shared, {n: kernel[None] for n, kernel in kernels.items()})}


def stages(*kernels: Any) -> Model:
    return tied({f"stage{i}": kernel for i, kernel in enumerate(kernels)})


def basis(filters: Mapping[str, Any], own: Mapping[str, Any] | None = None) -> Model:
    """Banks of filters (bases, ..., s), and own filters (sites, ..., u)."""
    own = own or {}
    banks = {}
    for name, array in filters.items():
        unique, count = (own[name].shape[-1], len(own[name])) if name in own else (0, len(array))
        scheme = FilterBasis(array.shape[-1], unique, bases=len(array))
        banks[name] = scheme, (*array.shape[1:-1], array.shape[-1] + unique), count
    params = {
        name: {f"{name}{i}.kernel": jnp.asarray(array) for i, array in enumerate(arrays)}
        for name, arrays in own.items()
    }
    shared = sharing(banks)
    return shared, {"banks": banks_of(shared, filters), "params": {"own": params}}


def both(*models: Model) -> Model:
    """One model with the banks of two."""
    (first, a), (second, b) = models
    layout = Layout((*first.layout.banks, *second.layout.banks), plain=0)
    return Shared(nn.Dense(1), layout), {**a, **b, "banks": a["banks"] | b["banks"]}


def test_one_basis_a_stage_is_one_mean_over_all_stages():
    kernels = [draw(3, 3, 4, 8), draw(3, 3, 6, 16), draw(10, 5)]
    expected = sum(squares(rows(k)) for k in kernels) / (8**2 + 16**2 + 5**2)
    bases = basis({f"stage{i}": kernel[None] for i, kernel in enumerate(kernels)})
    np.testing.assert_allclose(orthogonality(*bases), expected, rtol=CLOSE)
    # A tied kernel is a basis of all its filters.
    np.testing.assert_allclose(orthogonality(*stages(*kernels)), expected, rtol=CLOSE)


def test_two_bases_of_a_stage_are_stacked():
    filters = [draw(2, 3, 3, 4, 8), draw(2, 3, 3, 6, 5)]
    stacked = [np.concatenate([rows(one) for one in array]) for array in filters]
    model = basis({f"stage{i}": array for i, array in enumerate(filters)})
    expected = sum(map(squares, stacked)) / (16**2 + 10**2)
    np.testing.assert_allclose(orthogonality(*model), expected, rtol=CLOSE)


def test_filters_follow_the_output_axes_of_the_site():
    kernel = draw(3, 2, 4)  # two heads' outputs of three entries, from four inputs
    sites = (Site("out/kernel", kernel.shape, in_axes=(2,), out_axes=(0, 1)),)
    shared = Shared(nn.Dense(1), Layout((SharedBank("heads", Tied(), sites),), plain=0))
    variables = {"banks": banks_of(shared, {"heads": kernel[None]})}
    expected = squares(kernel.reshape(6, 4).astype(np.float64)) / 36
    np.testing.assert_allclose(orthogonality(shared, variables), expected, rtol=CLOSE)


def test_pools_have_a_mean_each_and_are_added():
    """The "++" networks: the 3x3 kernels of all stages are one pool, the 1x1 kernels another."""
    convs, expansions = [draw(3, 3, 4, 4), draw(3, 3, 6, 6)], [draw(4, 16), draw(6, 24)]
    named = {f"conv-{i}": k for i, k in enumerate(convs)}
    model = tied(named | {f"expand-{i}": k for i, k in enumerate(expansions)})

    def mean(kernels: list) -> float:
        return sum(squares(rows(k)) for k in kernels) / sum(k.shape[-1] ** 2 for k in kernels)

    expected = {
        (r"conv-\d", r"expand-\d"): mean(convs) + mean(expansions),
        (r"expand-\d",): mean(expansions),
        (".*",): mean(convs + expansions),
        (): mean(convs + expansions),
    }
    for pools, value in expected.items():
        np.testing.assert_allclose(orthogonality(*model, *pools), value, rtol=CLOSE)


def test_pools_match_whole_names():
    kernel, other = draw(4, 4), draw(4, 4)
    actual = orthogonality(*tied({"stage1": kernel, "stage10": other}), "stage1")
    np.testing.assert_allclose(actual, squares(rows(kernel)) / 16, rtol=CLOSE)


@pytest.mark.parametrize("bases", [1, 2])
def test_unique_filters_are_counted_as_in_the_reference(bases):
    """Shared rows with all columns, and each layer's unique filters with one another."""
    filters, own, plain = draw(bases, 3, 3, 4, 6), draw(4, 3, 3, 4, 2), draw(3, 3, 4, 5)
    all_rows = np.concatenate([*map(rows, filters), *map(rows, own)])
    # The layer of each row; -1: shared by all.
    layer = np.array([-1] * (6 * bases) + [i for i in range(4) for _ in range(2)])
    counted = (layer[:, None] == -1) | (layer[:, None] == layer[None, :])
    assert counted.sum() == 6 * bases * (6 * bases + 8) + 4 * 2 * 2
    error = np.sum((all_rows @ all_rows.T - np.eye(len(layer)))[counted] ** 2)
    # The second stage has no unique filters.
    model = both(basis({"stage1": filters}, {"stage1": own}), tied({"stage2": plain}))
    model[1]["params"] = basis({"stage1": filters}, {"stage1": own})[1]["params"]
    expected = (error + squares(rows(plain))) / (counted.sum() + 25)
    np.testing.assert_allclose(orthogonality(*model, unique=True), expected, rtol=CLOSE)
    np.testing.assert_allclose(
        orthogonality(*model, "stage1", unique=True), error / counted.sum(), rtol=CLOSE
    )
    alone = squares(np.concatenate([rows(one) for one in filters])) / (6 * bases) ** 2
    np.testing.assert_allclose(orthogonality(*model, "stage1"), alone, rtol=CLOSE)


@pytest.mark.parametrize("angle", [90, 60, 10])
def test_it_measures_angles_and_lengths(angle):
    """Of two unit filters, two of four products are the cosine; of length r, one is r^2 - 1."""
    cosine = math.cos(math.radians(angle))
    filters = np.array([[1, 0], [cosine, math.sin(math.radians(angle))]], np.float32).T
    np.testing.assert_allclose(
        orthogonality(*stages(filters)), 2 * cosine**2 / 4, rtol=1e-6, atol=1e-13
    )
    half = np.float32(0.5 * np.eye(5, 1))
    np.testing.assert_allclose(orthogonality(*stages(half)), (0.25 - 1) ** 2, rtol=1e-6)


@pytest.mark.parametrize(("p", "n"), [(36, 8), (9, 9), (5, 1)])
def test_it_is_zero_for_orthonormal_filters_and_for_no_others(p, n):
    kernel = orthonormal(p, n)
    # Squares of float32 roundings, 6e-8.
    assert float(orthogonality(*stages(np.float32(kernel)))) < 1e-13
    for _ in range(5):
        # (1 + e S)^2 - 1 = 2 e S + ..., of norm 2 e; antisymmetric directions keep it zero.
        symmetric = RNG.normal(size=(n, n))
        symmetric += symmetric.T
        moved = np.float32(kernel + 1e-2 * kernel @ symmetric / np.linalg.norm(symmetric))
        assert float(orthogonality(*stages(moved))) == pytest.approx(4e-4 / n**2, rel=0.011)
    if n > 1:
        kernel[:, 0] = kernel[:, 1]
        actual = float(orthogonality(*stages(np.float32(kernel))))
        assert actual == pytest.approx(2 / n**2, rel=1e-5)


FLOORS = {
    "ResNet50-Shared++, second basis": (
        [(p, 4 * p) for p in (64, 128, 256, 512)],
        5.17004e-4,
        5e-10,
    ),
    "MobileNetV2-Shared": ([(c, 6 * c) for c in (32, 64, 96, 160)], 1.224181e-3, 5e-10),
}


@pytest.mark.parametrize("case", FLOORS)
def test_the_published_floors_where_filters_outnumber_their_entries(case):
    """To as many digits as are published; the gradient is zero there."""
    shapes, floor, half_a_digit = FLOORS[case]
    kernels = [orthonormal(*shape).astype(np.float32) for shape in shapes]
    shared, variables = stages(*kernels)
    value, gradient = jax.jit(jax.value_and_grad(lambda v: orthogonality(shared, v)))(variables)
    assert float(value) == pytest.approx(floor, abs=half_a_digit)
    # An entry's gradient is 4 / sum n^2 times a sum that is zero up to rounding.
    largest = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(gradient))
    assert largest < 1e-6 * 4 / sum(n**2 for _, n in shapes)


def test_no_filters_are_below_the_floor():
    """With p entries and n > p filters, n - p eigenvalues of B B^T are zero instead of one."""
    for p, n in ((1, 2), (3, 7), (6, 8)):
        for scale in (0.1, 0.5, 1.0):
            actual = float(orthogonality(*stages(draw(p, n, scale=scale))))
            assert actual >= (n - p) / n**2 * (1 - 1e-6)
        kernel = orthonormal(p, n)
        for scale in (0.9, 1.0, 1.1):  # p eigenvalues are scale^2
            expected = (n - p + p * (scale**2 - 1) ** 2) / n**2
            actual = float(orthogonality(*stages(np.float32(scale * kernel))))
            assert actual == pytest.approx(expected, rel=1e-6)


def pooled() -> Model:
    """Shared and unique filters, and a tied kernel."""
    model = basis({"a": draw(2, 3, 3, 2, 3)}, {"a": draw(4, 3, 3, 2, 2)})
    shared, variables = both(tied({"b": draw(3, 7)}), model)
    variables["params"]["model"] = {"bias": draw(3)}
    return shared, variables | {"batch_stats": {"model": {"mean": draw(3)}}}


@pytest.mark.parametrize("include_unique", [False, True])
def test_gradient_of_orthogonality_against_finite_differences(include_unique):
    with jax.enable_x64(True):
        shared, variables = pooled()
        variables = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), variables)
        penalty = jax.jit(lambda v: orthogonality(shared, v, "a", "b", unique=include_unique))
        check_grads(penalty, (variables,), order=1, modes=("rev",), rtol=1e-6, atol=1e-6)
        gradient = jax.jit(jax.grad(penalty))(variables)
    zero = {
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradient)
        if not np.any(np.asarray(leaf))
    }
    own = {f"['params']['own']['a']['a{i}.kernel']" for i in range(4)}
    ignored = {"['params']['model']['bias']", "['batch_stats']['model']['mean']"}
    assert zero == ignored | (set() if include_unique else own)


def test_jit_changes_nothing_and_gives_a_scalar():
    shared, variables = pooled()
    for pools, unique in (((), False), (("a", "b"), True)):
        plain = orthogonality(shared, variables, *pools, unique=unique)
        jitted = jax.jit(lambda v, p=pools, u=unique: orthogonality(shared, v, *p, unique=u))(
            variables
        )
        assert plain.shape == jitted.shape == ()
        assert plain.dtype == jitted.dtype == jnp.float32
        np.testing.assert_allclose(jitted, plain, rtol=CLOSE)


def test_the_precision_is_that_of_the_bank():
    kernel = RNG.normal(size=(5, 4))
    with jax.enable_x64(True):
        double, single = (orthogonality(*stages(k)) for k in (kernel, np.float32(kernel)))
    assert (double.dtype, single.dtype) == (jnp.float64, jnp.float32)
    np.testing.assert_allclose(double, squares(rows(kernel)) / 16, rtol=1e-14)


OTHERS = {
    "soft": (Soft(1), (8, 8), 1),
    "ring": (Ring(50), (8, 8), 1),
    "repeat": (Repeat(base=(4, 4)), (8, 8), 1),
}
FILTERS = {"basis": (FilterBasis(6, 2), (8, 8), 1), "tied": (Tied(), (8, 8), 1)}


def test_banks_without_filters_are_skipped():
    shared = sharing(OTHERS | FILTERS)
    variables = jax.tree.map(lambda leaf: draw(*leaf.shape), zeros(shared))
    (filters,) = jax.tree.leaves(variables["banks"]["basis"])
    (kernels,) = jax.tree.leaves(variables["banks"]["tied"])
    expected = (squares(rows(filters[0])) + squares(rows(kernels[0]))) / (36 + 64)
    np.testing.assert_allclose(orthogonality(shared, variables), expected, rtol=CLOSE)


ERRORS = {
    "no such bank": (
        orthogonality,
        FILTERS,
        ("basic",),
        r"pool 'basic' matches no bank; the banks are \['basis', 'tied'\]",
    ),
    "part of a name": (orthogonality, FILTERS, ("basis", "tie"), "pool 'tie' matches no bank"),
    "a bank without filters": (
        orthogonality,
        OTHERS | FILTERS,
        ("tied|repeat",),
        "bank 'repeat' has no shared filters; exclude it",
    ),
    "no regular expression": (
        orthogonality,
        FILTERS,
        ("basis(",),
        r"orthogonality: pool 'basis\(' is not a regular expression",
    ),
    "no filters in the model": (
        orthogonality,
        OTHERS,
        (),
        r"no bank has shared filters .*; the banks are \['repeat', 'ring', 'soft'\]",
    ),
    "a bank without coefficients": (
        recurrence,
        OTHERS,
        ("ring",),
        "recurrence: bank 'ring' has no mixing coefficients; exclude it",
    ),
    "no coefficients in the model": (recurrence, FILTERS, (), r"no bank has mixing .*\(Soft\)"),
    "no bank of templates": (recurrence, OTHERS, ("stage1",), "recurrence: pool 'stage1' matches"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_penalties_that_do_not_apply_are_refused(case):
    penalty, banks, pools, message = ERRORS[case]
    shared = sharing(banks)
    with pytest.raises(PenaltyError, match=message) as caught:
        jax.eval_shape(lambda v: penalty(shared, v, *pools), zeros(shared))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("penalty", [orthogonality, recurrence])
def test_variables_without_the_banks_are_refused(penalty):
    with pytest.raises(PlanError, match="no entry for bank 'soft' in 'banks'"):
        penalty(sharing(OTHERS | FILTERS), {"banks": {}})
    shared = sharing({"soft": (Soft(1), (8, 8), 2)})
    variables = zeros(shared)
    del variables["params"]["coefficients"]["soft"]["soft1.kernel"]
    with pytest.raises(PlanError, match=r"bank 'soft': .*needs coefficients/soft1.kernel"):
        penalty(shared, variables)


@pytest.mark.parametrize("penalty", [orthogonality, recurrence])
def test_a_model_without_sharing_is_refused(penalty):
    with pytest.raises(PenaltyError, match=f"{penalty.__name__} takes a Shared.*got Dense"):
        penalty(nn.Dense(1), {})
