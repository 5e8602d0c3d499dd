"""Filter bases as Kang & Kim publish them: what stands where in a kernel, how banks start, what decays."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paramshare
from paramshare import FilterBasis, Plan, PlanError, Rule, SchemeError, Shared, Site, Soft
from paramshare.schemes import Scheme

KEY = jax.random.key(0, impl="rbg")  # compiles faster than the default


def sites(number: int, shape: tuple[int, ...] = (3, 3, 4, 8), dtype: str = "float32") -> tuple[Site, ...]:
    return tuple(Site(f"layer{i}/kernel", shape, dtype) for i in range(number))


@pytest.mark.parametrize(("shape", "s", "u"), [((3, 3, 4, 8), 6, 2), ((1, 1, 9, 5), 5, 0), ((7, 4), 3, 1)])
@pytest.mark.parametrize("bases", [1, 2])
def test_unique_filters_stand_before_shared_ones(shape, s, u, bases):
    scheme, where, cell = FilterBasis(s, u, bases), sites(4, shape), shape[:-1]
    shared_QxPxS = np.arange(bases * math.prod(cell) * s, dtype=np.float32).reshape(bases, *cell, s)
    unique_LxPxU = -1 - np.arange(4 * math.prod(cell) * u, dtype=np.float32).reshape(4, *cell, u)
    kernels = scheme.expand({"filters": jnp.asarray(shared_QxPxS)}, {"unique": jnp.asarray(unique_LxPxU)} if u else {}, where)
    for i, kernel in enumerate(kernels):  # first, second, first, second, ... where there are two bases
        np.testing.assert_array_equal(kernel, np.concatenate([unique_LxPxU[i], shared_QxPxS[i % bases]], axis=-1))


def test_bases_are_dealt_out_in_the_order_of_calls():
    """The paper's "double": one basis for all first, one for all second convolutions of the blocks, as a plan meets them."""

    class Blocks(nn.Module):
        @nn.compact
        def __call__(self, x):
            for block in (2, 3, 10):
                for conv in (1, 2):
                    x = nn.Dense(6, name=f"block{block}_basis{conv}")(x)
            return x

    x = jnp.ones((1, 6))
    shared = paramshare.share(Blocks(), Plan(Rule(".*/kernel", FilterBasis(3, 3, bases=2))), x)
    variables = shared.init(KEY, x)
    params: Any = shared.expand(variables)["params"]
    for block in (2, 3, 10):
        for conv in (1, 2):
            kernel = params[f"block{block}_basis{conv}"]["kernel"]
            np.testing.assert_array_equal(kernel[:, 3:], variables["banks"]["shared"]["filters"][conv - 1])


@pytest.mark.parametrize(("shape", "s", "u", "bases"), [((3, 3, 4, 8), 8, 0, 1), ((3, 3, 4, 8), 7, 1, 3), ((3, 3, 4, 19), 18, 1, 2)])
@pytest.mark.parametrize(("dtype", "atol"), [("float32", 2e-6), ("float64", 4e-15)])  # some ten roundings, in QR, of numbers below 1
def test_shared_filters_start_orthonormal_those_of_all_bases_jointly(rows, shape, s, u, bases, dtype, atol):
    with jax.enable_x64(dtype == "float64"):
        bank, _ = FilterBasis(s, u, bases).init(KEY, sites(4, shape, dtype))
    assert bank["filters"].shape == (bases, *shape[:-1], s)
    filters_NxP = np.concatenate([rows(basis) for basis in bank["filters"]])
    np.testing.assert_allclose(filters_NxP @ filters_NxP.T, np.eye(bases * s), atol=atol)


@pytest.mark.parametrize("unique", [False, True])
def test_a_fresh_bank_has_no_penalty_on_its_shared_filters(unique):
    bank, own = FilterBasis(6, 2, bases=2).init(KEY, sites(4))
    variables = {"banks": {"stage": bank}, "params": {"coefficients": {"stage": own}}}
    penalty = float(paramshare.orthogonality(variables, unique=unique))
    # The mean square of roundings; He-normal filters of 36 numbers with variance 2 / (9 * 2) are far from orthonormal.
    assert penalty > 0.1 if unique else penalty < 1e-12


@pytest.mark.parametrize("u", [1, 4])
def test_unique_filters_start_he_normal_of_their_own_fan_out(assert_he_normal, u):
    _, own = FilterBasis(60 - u, u).init(KEY, sites(40, (3, 3, 64, 60)))
    assert own["unique"].shape == (40, 3, 3, 64, u)
    assert_he_normal(own["unique"], 2 / (9 * u))


def test_shared_filters_start_he_normal_on_request(rows, assert_he_normal):
    """Of the s filters' own fan-out, independent of the basis beside them."""
    scheme = FilterBasis(30, 2, bases=2, orthonormal=False)
    bank, own = scheme.init(KEY, sites(4, (3, 3, 64, 32)))
    assert_he_normal(bank["filters"], 2 / (9 * 30))
    assert_he_normal(own["unique"], 2 / (9 * 2))
    first, second = (rows(basis).ravel() for basis in bank["filters"])
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / math.sqrt(first.size)


@pytest.mark.parametrize("orthonormal", [False, True])
def test_shared_and_unique_filters_are_drawn_apart(rows, orthonormal):
    """As many of each, from one key: in no order of the one do they go together with the other, not even through QR."""
    bank, own = FilterBasis(8, 8, bases=2, orthonormal=orthonormal).init(KEY, sites(2, (3, 3, 64, 16)))
    shared_NxP = np.concatenate([rows(basis) for basis in bank["filters"]])
    for shared in (bank["filters"], shared_NxP, shared_NxP.T):
        for unique in (own["unique"], [rows(filters) for filters in own["unique"]]):
            assert abs(np.corrcoef(np.ravel(shared), np.ravel(unique))[0, 1]) < 5 / math.sqrt(shared_NxP.size)


def test_everything_comes_from_the_key():
    def draw(scheme: Scheme, seed: int):
        return jax.tree.leaves(scheme.init(jax.random.key(seed, impl="rbg"), sites(4)))

    for scheme in (FilterBasis(6, 2), FilterBasis(6, 2, orthonormal=False)):
        assert all(np.array_equal(a, b) for a, b in zip(draw(scheme, 0), draw(scheme, 0), strict=True))
        assert not any(np.allclose(a, b) for a, b in zip(draw(scheme, 0), draw(scheme, 1), strict=True))


def test_the_layers_filters_are_nobody_elses():
    """Each layer's loss moves the shared filters of its basis and its own unique ones."""
    scheme, where = FilterBasis(6, 2, bases=2), sites(4)
    bank, own = scheme.init(KEY, where)
    for i in range(4):
        loss = lambda b, c, i=i: jnp.sum(jnp.sin(scheme.expand(b, c, where)[i]))  # noqa: E731
        shared, unique = jax.grad(loss, (0, 1))(bank, own)
        assert [bool(np.any(np.asarray(part) != 0)) for part in shared["filters"]] == [i % 2 == 0, i % 2 == 1]
        assert [bool(np.any(np.asarray(part) != 0)) for part in unique["unique"]] == [j == i for j in range(4)]


class Mixed(nn.Module):
    """Two layers on a basis, two on soft templates, one on its own."""

    @nn.compact
    def __call__(self, x):
        for name in ("basis1", "basis2", "soft1", "soft2", "own"):
            x = nn.Dense(8, name=name)(x)
        return x


class Outer(nn.Module):
    given: Shared

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="top")(self.given(x))


X = jnp.ones((2, 8))
MIXED = Plan(Rule(r"basis\d/kernel", FilterBasis(5, 3), bank="basis"), Rule(r"soft\d/kernel", Soft(1), bank="soft"))


@pytest.mark.parametrize("nested", [False, True])
def test_unique_filters_decay_and_are_private(nested):
    shared = paramshare.share(Mixed(), MIXED, X)
    model = Outer(shared) if nested else shared
    variables = jax.eval_shape(model.init, KEY, X)
    private = 2 * 8 * 3 + 5 * 8 + 8 * 8 + (8 * 3 + 3 if nested else 0)  # unique filters, biases, the fifth layer's kernel
    assert paramshare.count(variables) == {
        "banks": 8 * 5 + 8 * 8,
        "coefficients": 2,
        "private": private,
        "trainable": 8 * 5 + 8 * 8 + 2 + private,
    }
    mask = paramshare.decay_mask(variables)
    inner = mask["params"]["given"] if nested else mask["params"]
    assert inner["coefficients"] == {"basis": {"unique": True}, "soft": False}
    assert sum(not decays for decays in jax.tree.leaves(mask)) == 1


def test_shared_only_has_no_coefficients():
    shared = paramshare.share(Mixed(), Plan(Rule(r"basis\d/kernel", FilterBasis(8))), X)
    variables = shared.init(KEY, X)
    assert set(variables["params"]) == {"model"}
    assert paramshare.count(variables)["coefficients"] == 0
    params: Any = shared.expand(variables)["params"]
    np.testing.assert_array_equal(params["basis1"]["kernel"], params["basis2"]["kernel"])


IMPOSSIBLE = {
    "no site": (FilterBasis(1), (), "at least one site"),
    "two shapes": (
        FilterBasis(6, 2),
        (*sites(2), Site("odd/kernel", (1, 1, 4, 8))),
        r"layer0/kernel is .* and odd/kernel is \(1, 1, 4, 8\)",
    ),
    "ranks below the filters": (
        FilterBasis(6, 1),
        sites(2),
        r"6 = 7 filters, but layer0/kernel is \(3, 3, 4, 8\), of 8; make the ranks add",
    ),
    "ranks above the filters": (FilterBasis(8, 1), sites(2), r"1 \+ 8 = 9 filters, but layer0/kernel is \(3, 3, 4, 8\), of 8"),
    "a rank above the numbers of a filter": (
        FilterBasis(8),
        sites(2, (1, 1, 7, 8)),
        "shares 8 filters, but a filter of layer0/kernel has 7",
    ),
    "two bases above it together": (FilterBasis(4, bases=2), sites(2, (7, 4)), "shares 8 filters, but a filter of layer0/kernel has 7"),
    "more bases than sites": (FilterBasis(4, 4, bases=3), sites(2), "more bases than sites: 2, the first of them layer0/kernel"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_impossible_sites(case):
    scheme, where, said = IMPOSSIBLE[case]
    for attempt in (scheme.check, lambda where: scheme.init(KEY, where)):
        with pytest.raises(SchemeError, match=said):
            attempt(where)


def test_ranks_may_be_as_large_as_a_filter():
    FilterBasis(7).check(sites(2, (1, 1, 7, 7)))
    FilterBasis(4, 4, bases=2).check(sites(2))


def test_a_plan_names_the_bank_that_does_not_fit():
    with pytest.raises(PlanError, match=r"bank 'narrow': FilterBasis.*make the ranks add up"):
        paramshare.share(Mixed(), Plan(Rule("basis.*/kernel", FilterBasis(5, 2), bank="narrow")), X)


@pytest.mark.parametrize(("name", "least"), [("shared", 1), ("unique", 0), ("bases", 1)])
@pytest.mark.parametrize("below", [-1, 1.5, 2.0, "2", None, True])
def test_numbers_are_whole(name, least, below):
    make: Any = FilterBasis
    for value in (below, least - 1):
        with pytest.raises(SchemeError, match=rf"FilterBasis\({name}={value!r}\): {name} must be an integer, {least} or more"):
            make(**{"shared": 4, name: value})
    assert make(**{"shared": 4, name: np.int64(3)}) == make(**{"shared": 4, name: 3})


def test_foreign_arrays_are_told():
    scheme, where = FilterBasis(6, 2), sites(2)
    bank, own = scheme.init(KEY, where)
    for arrays, said in (
        (({"filters": bank["filters"][0]}, own), r"wants a bank of shapes .*\(1, 3, 3, 4, 6\).*got .*\(3, 3, 4, 6\)"),
        (({"kernel": bank["filters"]}, own), "wants a bank of shapes"),
        ((bank, {}), r"wants coefficients of shapes .*\(2, 3, 3, 4, 2\)"),
        ((bank, {"unique": own["unique"][:1]}), "wants coefficients of shapes"),
    ):
        with pytest.raises(SchemeError, match=said):
            scheme.expand(*arrays, where)
