"""Filter bases as published by Kang & Kim: the layout of a kernel, initialization, decay."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paramshare
from paramshare import FilterBasis, Plan, PlanError, Rule, SchemeError, Shared, Site, Soft
from paramshare.schemes import Weights

KEY = jax.random.key(0, impl="rbg")  # compiles faster than the default


def basis(shared: int, unique: int = 0, bases: int = 1, **options: Any) -> FilterBasis:
    return FilterBasis(shared, unique, bases, initial="paper", **options)


def sites(
    number: int, shape: tuple[int, ...] = (3, 3, 4, 8), dtype: str = "float32"
) -> tuple[Site, ...]:
    return tuple(Site(f"layer{i}/kernel", shape, dtype) for i in range(number))


def own_filters(weights: Weights) -> np.ndarray:
    """(L, ..., u): the sites' own filters."""
    return np.stack([weights.own[f"layer{i}.kernel"] for i in range(len(weights.own))])


@pytest.mark.parametrize(
    ("shape", "s", "u"), [((3, 3, 4, 8), 6, 2), ((1, 1, 10, 5), 5, 0), ((7, 4), 3, 1)]
)
@pytest.mark.parametrize("bases", [1, 2])
def test_unique_filters_stand_before_shared_ones(shape, s, u, bases):
    scheme, where, cell = FilterBasis(s, u, bases), sites(4, shape), shape[:-1]
    shared_QxPxS = np.arange(bases * math.prod(cell) * s, dtype=np.float32).reshape(bases, *cell, s)
    unique_LxPxU = -1 - np.arange(4 * math.prod(cell) * u, dtype=np.float32).reshape(4, *cell, u)
    own = {site.key: jnp.asarray(unique_LxPxU[i]) for i, site in enumerate(where)} if u else {}
    kernels = scheme.expand(Weights({"filters": jnp.asarray(shared_QxPxS)}, own=own), where)
    for i, kernel in enumerate(kernels):  # two bases: first, second, first, second, ...
        np.testing.assert_array_equal(
            kernel, np.concatenate([unique_LxPxU[i], shared_QxPxS[i % bases]], axis=-1)
        )


def test_bases_are_dealt_out_in_the_order_of_calls():
    """The paper's "double": one basis for all first, one for all second convolutions of blocks."""

    class Blocks(nn.Module):
        @nn.compact
        def __call__(self, x):
            for block in (2, 3, 10):
                for conv in (1, 2):
                    x = nn.Dense(6, name=f"block{block}_basis{conv}")(x)
            return x

    x = jnp.ones((1, 6))
    shared = paramshare.share(Blocks(), Plan(Rule(".*/kernel", basis(3, 3, bases=2))), x)
    variables = shared.init(KEY, x)
    params: Any = shared.expand(variables)["params"]
    for block in (2, 3, 10):
        for conv in (1, 2):
            kernel = params[f"block{block}_basis{conv}"]["kernel"]
            np.testing.assert_array_equal(
                kernel[:, 3:], variables["banks"]["shared"]["filters"][conv - 1]
            )


@pytest.mark.parametrize(
    ("shape", "s", "u", "bases"),
    [((3, 3, 4, 8), 8, 0, 1), ((3, 3, 4, 8), 7, 1, 3), ((3, 3, 4, 19), 18, 1, 2)],
)
# Some ten roundings, in QR, of entries below 1.
@pytest.mark.parametrize(("dtype", "atol"), [("float32", 2e-6), ("float64", 4e-15)])
def test_shared_filters_start_orthonormal_those_of_all_bases_jointly(
    rows, shape, s, u, bases, dtype, atol
):
    with jax.enable_x64(dtype == "float64"):
        bank = basis(s, u, bases).init(KEY, sites(4, shape, dtype)).bank
    assert bank["filters"].shape == (bases, *shape[:-1], s)
    filters_NxP = np.concatenate([rows(filters) for filters in bank["filters"]])
    np.testing.assert_allclose(filters_NxP @ filters_NxP.T, np.eye(bases * s), atol=atol)


@pytest.mark.parametrize("unique", [False, True])
def test_an_initial_bank_has_no_penalty_on_shared_filters(unique):
    plan = Plan(Rule("basis./kernel", basis(5, 3)))
    shared = paramshare.share(Mixed(), plan, X)
    variables = shared.init(KEY, X)
    penalty = float(paramshare.orthogonality(shared, variables, unique=unique))
    # The mean square of roundings; He-normal filters of 8 entries are far from orthonormal.
    assert penalty > 0.1 if unique else penalty < 1e-12


@pytest.mark.parametrize("u", [1, 4])
def test_unique_filters_start_he_normal_of_their_own_fan_out(assert_he_normal, u):
    own = own_filters(basis(60 - u, u).init(KEY, sites(40, (3, 3, 64, 60))))
    assert own.shape == (40, 3, 3, 64, u)
    assert_he_normal(own, 2 / (9 * u))


def test_shared_filters_start_he_normal_on_request(rows, assert_he_normal):
    """With the fan-out of the s filters, and each basis independently."""
    weights = basis(30, 2, 2, orthonormal=False).init(KEY, sites(4, (3, 3, 64, 32)))
    assert_he_normal(weights.bank["filters"], 2 / (9 * 30))
    assert_he_normal(own_filters(weights), 2 / (9 * 2))
    first, second = (rows(filters).ravel() for filters in weights.bank["filters"])
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / math.sqrt(first.size)


@pytest.mark.parametrize("orthonormal", [False, True])
def test_filters_keep_the_scales_of_their_sites(orthonormal):
    """Second convolutions of residual blocks often start smaller: those of the second basis."""
    stds = (0.1, 0.01, 0.3, 0.02)
    where = tuple(Site(f"layer{i}/kernel", (3, 3, 64, 40), std=std) for i, std in enumerate(stds))
    weights = FilterBasis(20, 20, 2, orthonormal).init(KEY, where)
    rms = np.sqrt([(0.1**2 + 0.3**2) / 2, (0.01**2 + 0.02**2) / 2])
    # Some 11,520 entries: five standard errors.
    np.testing.assert_allclose([np.std(f) for f in weights.bank["filters"]], rms, rtol=0.033)
    np.testing.assert_allclose([np.std(f) for f in own_filters(weights)], stds, rtol=0.033)


@pytest.mark.parametrize("orthonormal", [False, True])
def test_shared_and_unique_filters_are_drawn_apart(rows, orthonormal):
    """As many of each, from one key: they are uncorrelated in any order, also through QR."""
    scheme = basis(8, 8, bases=2, orthonormal=orthonormal)
    weights = scheme.init(KEY, sites(2, (3, 3, 64, 16)))
    shared_NxP = np.concatenate([rows(filters) for filters in weights.bank["filters"]])
    own = own_filters(weights)
    for shared in (weights.bank["filters"], shared_NxP, shared_NxP.T):
        for unique in (own, [rows(filters) for filters in own]):
            correlation = np.corrcoef(np.ravel(shared), np.ravel(unique))[0, 1]
            assert abs(correlation) < 5 / math.sqrt(shared_NxP.size)


def test_everything_comes_from_the_key():
    def draw(scheme: FilterBasis, seed: int):
        return jax.tree.leaves(scheme.init(jax.random.key(seed, impl="rbg"), sites(4)))

    for scheme in (basis(6, 2), basis(6, 2, orthonormal=False)):
        assert all(
            np.array_equal(a, b) for a, b in zip(draw(scheme, 0), draw(scheme, 0), strict=True)
        )
        assert not any(
            np.allclose(a, b) for a, b in zip(draw(scheme, 0), draw(scheme, 1), strict=True)
        )


def test_own_filters_belong_to_one_layer():
    """Each layer's loss moves the shared filters of its basis and its own unique ones."""
    scheme, where = basis(6, 2, bases=2), sites(4)
    weights = scheme.init(KEY, where)
    for i in range(4):

        def loss(weights: Weights, i: int = i) -> jax.Array:
            return jnp.sum(jnp.sin(scheme.expand(weights, where)[i]))

        slope = jax.grad(loss)(weights)
        moved = [bool(np.any(part != 0)) for part in slope.bank["filters"]]
        assert moved == [i % 2 == 0, i % 2 == 1]
        assert [bool(np.any(part != 0)) for part in own_filters(slope)] == [
            j == i for j in range(4)
        ]


class Mixed(nn.Module):
    """Two layers on a basis, two on soft templates, a private one."""

    @nn.compact
    def __call__(self, x):
        for name in ("basis1", "basis2", "soft1", "soft2", "private"):
            x = nn.Dense(8, name=name)(x)
        return x


class Outer(nn.Module):
    given: Shared

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="top")(self.given(x))


X = jnp.ones((2, 8))
MIXED = Plan(
    Rule(r"basis\d/kernel", basis(5, 3), bank="basis"),
    Rule(r"soft\d/kernel", Soft(1, initial="paper"), bank="soft"),
)


@pytest.mark.parametrize("nested", [False, True])
def test_unique_filters_decay_and_are_private(nested):
    shared = paramshare.share(Mixed(), MIXED, X)
    model = Outer(shared) if nested else shared
    variables = jax.eval_shape(model.init, KEY, X)
    # Unique filters, biases, the fifth layer's kernel.
    private = 2 * 8 * 3 + 5 * 8 + 8 * 8 + (8 * 3 + 3 if nested else 0)
    assert paramshare.count(variables) == {
        "banks": 8 * 5 + 8 * 8,
        "coefficients": 2,
        "private": private,
        "trainable": 8 * 5 + 8 * 8 + 2 + private,
    }
    mask = paramshare.decay_mask(variables)
    inner = mask["params"]["given"] if nested else mask["params"]
    assert set(inner["own"]) == {"basis"} and set(inner["coefficients"]) == {"soft"}
    assert all(jax.tree.leaves(inner["own"]))
    assert not any(jax.tree.leaves(inner["coefficients"]))
    assert sum(not decays for decays in jax.tree.leaves(mask)) == 2


def test_shared_only_has_no_coefficients():
    shared = paramshare.share(Mixed(), Plan(Rule(r"basis\d/kernel", basis(8))), X)
    variables = shared.init(KEY, X)
    assert set(variables["params"]) == {"model"}
    assert paramshare.count(variables)["coefficients"] == 0
    params: Any = shared.expand(variables)["params"]
    np.testing.assert_array_equal(params["basis1"]["kernel"], params["basis2"]["kernel"])


IMPOSSIBLE = {
    "ranks below the filters": (FilterBasis(6, 1), sites(2), r"1 \+ 6 = 7 filters, but .* has 8"),
    "ranks above the filters": (FilterBasis(8, 1), sites(2), r"1 \+ 8 = 9 filters, but .* has 8"),
    "a rank above the entries of a filter": (
        FilterBasis(8),
        sites(2, (1, 1, 7, 8)),
        "shares 8 filters, but a filter of layer0/kernel has 7",
    ),
    "two bases above it together": (
        FilterBasis(4, bases=2),
        sites(2, (7, 4)),
        "shares 8 filters, but a filter of layer0/kernel has 7",
    ),
    "more bases than sites": (
        FilterBasis(4, 4, bases=3),
        sites(2),
        "more bases than sites: 2, the first is layer0/kernel",
    ),
    "different axes": (
        FilterBasis(4),
        (Site("a", (2, 4, 4)), Site("b", (2, 4, 4), in_axes=(0, 1), out_axes=(2,))),
        r"as a matrix a is \(2, 4, 4\) and b is \(8, 4\)",
    ),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_impossible_sites(case):
    scheme, where, message = IMPOSSIBLE[case]
    with pytest.raises(SchemeError, match=message):
        scheme.check(where)


def test_ranks_may_be_as_large_as_a_filter():
    FilterBasis(7).check(sites(2, (1, 1, 7, 7)))
    FilterBasis(4, 4, bases=2).check(sites(2))


def test_a_plan_names_the_bank_that_does_not_fit():
    with pytest.raises(PlanError, match=r"bank 'narrow': FilterBasis.*make them add up"):
        paramshare.share(Mixed(), Plan(Rule("basis.*/kernel", FilterBasis(5, 2), bank="narrow")), X)


@pytest.mark.parametrize(("name", "least"), [("shared", 1), ("unique", 0), ("bases", 1)])
def test_counts_are_integers(name, least):
    make: Any = FilterBasis
    for value in (-1, 1.5, 2.0, "2", None, True, least - 1):
        with pytest.raises(
            SchemeError,
            match=rf"FilterBasis\({name}={value!r}\): {name} must be an integer, {least} or more",
        ):
            make(**{"shared": 4, name: value})
    assert make(**{"shared": 4, name: np.int64(3)}) == make(**{"shared": 4, name: 3})
