"""The orthogonality penalty of Kang & Kim, against their formula in double precision, and the floors that follow from it."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import paramshare
from paramshare import FilterBasis, PenaltyError, Plan, Repeat, Ring, Rule, Soft, Tied, orthogonality

KEY = jax.random.key(0, impl="rbg")  # compiles faster than the default
RNG = np.random.default_rng(0)
# A float32 product of P = 36 terms around 1/36 errs by some 1e-7 of it; squares and their mean keep that.
CLOSE = 1e-6


def rows(kernel: Any) -> np.ndarray:
    """B of the paper: (n, P), the flattened filters of a kernel (..., n), not normalised."""
    kernel = np.asarray(kernel, np.float64)
    return np.stack([kernel[..., n].ravel() for n in range(kernel.shape[-1])])


def squares(b: np.ndarray) -> float:
    """|| B B^T - I ||_F^2."""
    return float(np.sum((b @ b.T - np.eye(len(b))) ** 2))


def draw(*shape: int, scale: float = 0.2) -> np.ndarray:
    return (scale * RNG.normal(size=shape)).astype(np.float32)


def orthonormal(p: int, n: int) -> np.ndarray:
    """A kernel (p, n) whose n filters, or if those are more than p then their p numbers, are orthonormal."""
    q = np.linalg.qr(RNG.normal(size=(max(p, n), min(p, n))))[0]
    return q if p >= n else q.T


def tied(*kernels: Any) -> dict:
    return {"banks": {f"stage{i}": {"kernels": jnp.asarray(kernel)[None]} for i, kernel in enumerate(kernels)}}


def test_one_basis_a_stage_is_one_mean_over_all_stages():
    kernels = [draw(3, 3, 4, 8), draw(3, 3, 6, 16), draw(10, 5)]
    banks = {f"stage{i}": {"filters": jnp.asarray(kernel)[None]} for i, kernel in enumerate(kernels)}
    wanted = sum(squares(rows(k)) for k in kernels) / (8**2 + 16**2 + 5**2)
    np.testing.assert_allclose(orthogonality({"banks": banks}), wanted, rtol=CLOSE)
    np.testing.assert_allclose(orthogonality(tied(*kernels)), wanted, rtol=CLOSE)  # a tied kernel is a basis of all its filters


def test_two_bases_of_a_stage_are_stacked():
    stages = [draw(2, 3, 3, 4, 8), draw(2, 3, 3, 6, 5)]
    banks = {f"stage{i}": {"filters": jnp.asarray(filters)} for i, filters in enumerate(stages)}
    stacked = [np.concatenate([rows(basis) for basis in filters]) for filters in stages]
    np.testing.assert_allclose(orthogonality({"banks": banks}), sum(map(squares, stacked)) / (16**2 + 10**2), rtol=CLOSE)


def test_pools_have_a_mean_each_and_are_added():
    """The "++" networks: the 3x3 of all stages, and apart from them the 1x1 of all stages."""
    convs, expansions = [draw(3, 3, 4, 4), draw(3, 3, 6, 6)], [draw(4, 16), draw(6, 24)]
    banks = {f"conv-{i}": {"kernels": k[None]} for i, k in enumerate(convs)} | {
        f"expand-{i}": {"kernels": k[None]} for i, k in enumerate(expansions)
    }
    first, second = (sum(squares(rows(k)) for k in ks) / sum(k.shape[-1] ** 2 for k in ks) for ks in (convs, expansions))
    np.testing.assert_allclose(orthogonality({"banks": banks}, r"conv-\d", r"expand-\d"), first + second, rtol=CLOSE)
    np.testing.assert_allclose(orthogonality({"banks": banks}, r"expand-\d"), second, rtol=CLOSE)
    together = sum(squares(rows(k)) for k in convs + expansions) / sum(k.shape[-1] ** 2 for k in convs + expansions)
    np.testing.assert_allclose(orthogonality({"banks": banks}, ".*"), together, rtol=CLOSE)
    np.testing.assert_allclose(orthogonality({"banks": banks}), together, rtol=CLOSE)


def test_pools_match_whole_names():
    banks = {"stage1": {"kernels": draw(1, 4, 4)}, "stage10": {"kernels": draw(1, 4, 4)}}
    np.testing.assert_allclose(orthogonality({"banks": banks}, "stage1"), squares(rows(banks["stage1"]["kernels"][0])) / 16, rtol=CLOSE)


@pytest.mark.parametrize("bases", [1, 2])
def test_unique_filters_are_counted_as_in_the_reference(bases):
    """Of all inner products of [shared, unique of every layer]: shared rows with all columns, and every layer's own with one another."""
    shared, own, plain = draw(bases, 3, 3, 4, 6), draw(4, 3, 3, 4, 2), draw(3, 3, 4, 5)
    all_rows = np.concatenate([*map(rows, shared), *map(rows, own)])
    layer = np.array([-1] * (6 * bases) + [i for i in range(4) for _ in range(2)])  # who a row belongs to; -1: everybody
    counted = (layer[:, None] == -1) | (layer[:, None] == layer[None, :])
    assert counted.sum() == 6 * bases * (6 * bases + 8) + 4 * 2 * 2
    found = np.sum((all_rows @ all_rows.T - np.eye(len(layer)))[counted] ** 2)
    variables = {
        "banks": {
            "stage1": {"filters": jnp.asarray(shared)},
            "stage2": {"kernels": jnp.asarray(plain)[None]},
        },  # the second has no unique ones
        "params": {"coefficients": {"stage1": {"unique": jnp.asarray(own)}}, "model": {}},
    }
    wanted = (found + squares(rows(plain))) / (counted.sum() + 25)
    np.testing.assert_allclose(orthogonality(variables, unique=True), wanted, rtol=CLOSE)
    np.testing.assert_allclose(orthogonality(variables, "stage1", unique=True), found / counted.sum(), rtol=CLOSE)
    alone = squares(np.concatenate([rows(basis) for basis in shared])) / (6 * bases) ** 2
    np.testing.assert_allclose(orthogonality(variables, "stage1"), alone, rtol=CLOSE)


@pytest.mark.parametrize("angle", [90, 60, 10])
def test_it_measures_angles_and_lengths(angle):
    """Two unit filters at an angle: two inner products of four are off, by the cosine. One of length r: by r^2 - 1."""
    cosine = math.cos(math.radians(angle))
    filters = np.array([[1, 0], [cosine, math.sin(math.radians(angle))]]).T
    np.testing.assert_allclose(orthogonality(tied(np.float32(filters))), 2 * cosine**2 / 4, rtol=1e-6, atol=1e-13)
    np.testing.assert_allclose(orthogonality(tied(np.float32(0.5 * np.eye(5, 1)))), (0.25 - 1) ** 2, rtol=1e-6)


@pytest.mark.parametrize(("p", "n"), [(36, 8), (9, 9), (5, 1)])
def test_it_is_zero_for_orthonormal_filters_and_for_no_others(p, n):
    kernel = orthonormal(p, n)
    zero = float(orthogonality(tied(np.float32(kernel))))
    assert zero < 1e-13  # squares of float32 roundings, 6e-8
    for _ in range(5):  # away from them: (1 + e S)^2 - 1 = 2 e S + ..., of norm 2 e; other directions keep them so
        symmetric = RNG.normal(size=(n, n))
        symmetric += symmetric.T
        moved = kernel + 1e-2 * kernel @ symmetric / np.linalg.norm(symmetric)
        assert float(orthogonality(tied(np.float32(moved)))) == pytest.approx(4e-4 / n**2, rel=0.011)
    if n > 1:
        kernel[:, 0] = kernel[:, 1]
        assert float(orthogonality(tied(np.float32(kernel)))) == pytest.approx(2 / n**2, rel=1e-5)


FLOORS = {
    "ResNet50-Shared++, second basis": ([(p, 4 * p) for p in (64, 128, 256, 512)], 5.17004e-4, 5e-10),
    "MobileNetV2-Shared": ([(c, 6 * c) for c in (32, 64, 96, 160)], 1.224181e-3, 5e-10),
}


@pytest.mark.parametrize("case", FLOORS)
def test_the_published_floors_where_filters_outnumber_their_numbers(case):
    """As many digits as are published; and its gradient is zero there."""
    shapes, floor, half_a_digit = FLOORS[case]
    kernels = [jnp.asarray(orthonormal(*shape), jnp.float32) for shape in shapes]
    value, gradient = jax.jit(jax.value_and_grad(orthogonality))(tied(*kernels))
    assert float(value) == pytest.approx(floor, abs=half_a_digit)
    # An entry's gradient is 4 / sum n^2 times a sum that is zero but for roundings.
    assert max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(gradient)) < 1e-6 * 4 / sum(n**2 for _, n in shapes)


def test_no_filters_are_below_the_floor():
    """p numbers, n > p filters: B B^T has rank p, so n - p of its eigenvalues are zero and miss the one they should be."""
    for p, n in ((1, 2), (3, 7), (6, 8)):
        for scale in (0.1, 0.5, 1.0):
            assert float(orthogonality(tied(draw(p, n, scale=scale)))) >= (n - p) / n**2 * (1 - 1e-6)
        kernel = orthonormal(p, n)
        for scale in (0.9, 1.0, 1.1):  # p eigenvalues are scale^2
            wanted = (n - p + p * (scale**2 - 1) ** 2) / n**2
            assert float(orthogonality(tied(np.float32(scale * kernel)))) == pytest.approx(wanted, rel=1e-6)


def both(bases: int = 2) -> dict:
    """Variables with filters, unique ones among them, and pools."""
    return {
        "banks": {"a": {"filters": draw(bases, 3, 3, 2, 3)}, "b": {"kernels": draw(1, 3, 7)}},
        "params": {"coefficients": {"a": {"unique": draw(4, 3, 3, 2, 2)}}, "model": {"bias": draw(3)}},
        "batch_stats": {"model": {"mean": draw(3)}},
    }


@pytest.mark.parametrize("unique", [False, True])
def test_gradient_against_finite_differences(unique):
    with jax.enable_x64(True):
        variables = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), both())
        penalty = jax.jit(lambda v: orthogonality(v, "a", "b", unique=unique))
        check_grads(penalty, (variables,), order=1, modes=("rev",), rtol=1e-6, atol=1e-6)
        gradient = jax.jit(jax.grad(penalty))(variables)
    zero = {jax.tree_util.keystr(path) for path, leaf in jax.tree_util.tree_leaves_with_path(gradient) if not np.any(np.asarray(leaf))}
    assert zero == {"['params']['model']['bias']", "['batch_stats']['model']['mean']"} | (
        set() if unique else {"['params']['coefficients']['a']['unique']"}
    )


def test_jit_changes_nothing_and_gives_a_scalar():
    variables = both()
    for pools, unique in (((), False), (("a",), True), (("a", "b"), True)):
        plain = orthogonality(variables, *pools, unique=unique)
        jitted = jax.jit(lambda v, pools=pools, unique=unique: orthogonality(v, *pools, unique=unique))(variables)
        assert plain.shape == jitted.shape == ()
        assert plain.dtype == jitted.dtype == jnp.float32
        np.testing.assert_allclose(jitted, plain, rtol=CLOSE)


def test_float64_banks_are_summed_in_float64():
    kernel = RNG.normal(size=(5, 4))
    with jax.enable_x64(True):
        found = orthogonality(tied(kernel))
        assert found.dtype == jnp.float64
    np.testing.assert_allclose(found, squares(rows(kernel)) / 16, rtol=1e-14)


def test_float32_banks_where_float64_is_allowed():
    with jax.enable_x64(True):
        found = orthogonality(tied(draw(5, 4)))
    assert found.dtype == jnp.float32


class Net(nn.Module):
    """Five layers, for banks of every kind."""

    @nn.compact
    def __call__(self, x):
        for i in range(5):
            x = nn.Dense(8, name=f"dense{i}")(x)
        return x


X = jnp.ones((2, 8))
OTHERS = (
    Rule("dense0/kernel", Soft(1), bank="soft"),
    Rule("dense1/kernel", Ring(50), bank="ring"),
    Rule("dense2/kernel", Repeat(base=(4, 4)), bank="repeat"),
)
FILTERS = (
    Rule("dense3/kernel", FilterBasis(6, 2), bank="basis"),
    Rule("dense4/kernel", Tied(scale=1.0), bank="tied"),
)


def init(*rules: Rule, model: nn.Module | None = None) -> dict:
    return dict(jax.jit(paramshare.share(model or Net(), Plan(*rules), X).init)(KEY, X))


def test_banks_without_filters_are_passed_over():
    variables = init(*OTHERS, *FILTERS)
    basis, kernel = (rows(variables["banks"]["basis"]["filters"][0]), rows(variables["banks"]["tied"]["kernels"][0]))
    np.testing.assert_allclose(orthogonality(variables), (squares(basis) + squares(kernel)) / (36 + 64), rtol=CLOSE)


ERRORS = {
    "no such bank": (FILTERS, ("basic",), r"pool 'basic' matches no bank; the banks are \['basis', 'tied'\]"),
    "part of a name": (FILTERS, ("basis", "tie"), "pool 'tie' matches no bank"),
    "a bank of templates": ((*OTHERS, *FILTERS), ("soft",), r"bank 'soft' holds \['templates'\], no filters; leave it out"),
    "a bank of bases among others": ((*OTHERS, *FILTERS), ("tied|repeat",), "bank 'repeat' holds .*, no filters; leave it out"),
    "no regular expression": (FILTERS, ("basis(",), r"pool 'basis\(' is not a regular expression"),
    "no filters in the model": (OTHERS, (), r"without banks of filters .*; its banks are \['repeat', 'ring', 'soft'\]"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_it_cannot_be_asked_of(case):
    rules, pools, said = ERRORS[case]
    with pytest.raises(PenaltyError, match=said) as caught:
        jax.eval_shape(lambda: orthogonality(init(*rules), *pools))
    assert "\n" not in str(caught.value)


def test_a_plain_model_has_no_filters_to_ask_of():
    for pools, said in (((), r"without banks of filters .* its banks are \[\]"), ((".*",), "pool '.*' matches no bank")):
        with pytest.raises(PenaltyError, match=said):
            jax.eval_shape(lambda: orthogonality(Net().init(KEY, X), *pools))  # noqa: B023


def test_a_base_of_a_bare_layer_is_no_bank_of_filters():
    with pytest.raises(PenaltyError, match="without banks of filters"):
        jax.eval_shape(lambda: orthogonality(init(Rule("kernel", Repeat(base=(4, 4))), model=nn.Dense(8))))
