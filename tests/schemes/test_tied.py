"""Tied kernels: one for all layers, or one for each group, with and without signed scales."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paramshare import SchemeError, Site, Tied
from paramshare.schemes.tied import leading

KEY = jax.random.key(0, impl="rbg")  # compiles faster than the default
LOOP = (0, 1, 0, 1, 0)


def sites(number: int, shape: tuple[int, ...] = (3, 3, 4, 8), dtype: str = "float32") -> tuple[Site, ...]:
    return tuple(Site(f"layer{i}/kernel", shape, dtype) for i in range(number))


@pytest.mark.parametrize(("shape", "wide"), [((3, 3, 4, 8), True), ((6, 6), True), ((1, 1, 5, 20), False)])
@pytest.mark.parametrize(("dtype", "atol"), [("float32", 2e-6), ("float64", 4e-15)])
def test_tied_kernels_start_orthonormal_on_the_shorter_side(rows, shape, wide, dtype, atol):
    """Filters that outnumber their own numbers (an expansion p -> 4p): the numbers, over all filters, are orthonormal."""
    with jax.enable_x64(dtype == "float64"):
        bank, own = Tied(orthonormal=True).init(KEY, sites(3, shape, dtype))
    assert own == {}
    filters_NxP = rows(bank["kernels"][0])
    gram = filters_NxP @ filters_NxP.T if wide else filters_NxP.T @ filters_NxP
    np.testing.assert_allclose(gram, np.eye(min(filters_NxP.shape)), atol=atol)


@pytest.mark.parametrize(
    ("scheme", "variance"),
    [(Tied(), 2 / (9 * 48)), (Tied(scale=1.0, fan="fan_in"), 1 / (9 * 64)), (Tied(scale=0.5), 0.5 / (9 * 48))],
    ids=str,
)
def test_tied_kernels_start_normal_with_the_variance_asked_for(assert_he_normal, scheme, variance):
    bank, _ = scheme.init(KEY, sites(2, (3, 3, 64, 48)))
    assert_he_normal(bank["kernels"], variance)


def test_tied_kernels_are_one_kernel_in_every_layer():
    where = (*sites(2), dataclasses.replace(sites(1)[0], path="half/kernel", dtype="bfloat16"))
    bank, own = Tied().init(KEY, where)
    first, second, half = Tied().expand(bank, own, where)
    np.testing.assert_array_equal(first, bank["kernels"][0])
    np.testing.assert_array_equal(second, bank["kernels"][0])
    np.testing.assert_array_equal(half, bank["kernels"][0].astype(jnp.bfloat16))


@pytest.mark.parametrize("scale", [0, -1.0, math.nan, math.inf, "2", None])
def test_tied_scale_is_positive(scale):
    with pytest.raises(SchemeError, match=r"Tied\(scale="):
        Tied(scale=scale)


@pytest.mark.parametrize("fan", ["fan_avg", "", None])
def test_tied_fan_is_one_of_two(fan):
    with pytest.raises(SchemeError, match=r"Tied\(fan=.*'fan_in' or 'fan_out'"):
        Tied(fan=fan)


@pytest.mark.parametrize("scaled", [False, True])
def test_layers_of_a_group_use_one_kernel_up_to_their_scales(scaled):
    where = sites(5, (3, 2))
    bank = {"kernels": jnp.asarray(np.arange(12.0).reshape(2, 3, 2), jnp.float32)}
    scales = jnp.array([1.0, -2.0, 0.5, 0.0, 3.0])
    found = Tied(groups=LOOP, scaled=scaled).expand(bank, scales if scaled else {}, where)
    for kernel, group, scale in zip(found, LOOP, scales, strict=True):
        np.testing.assert_array_equal(kernel, (scale if scaled else 1) * bank["kernels"][group])


@pytest.mark.parametrize("orthonormal", [False, True])
def test_the_kernels_of_groups_are_drawn_apart(orthonormal):
    bank, scales = Tied(orthonormal=orthonormal, groups=LOOP, scaled=True).init(KEY, sites(5))
    np.testing.assert_array_equal(scales, np.ones(5))
    first, second = (np.ravel(kernel) for kernel in bank["kernels"])
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / math.sqrt(first.size)
    again, _ = Tied(orthonormal=orthonormal, groups=LOOP, scaled=True).init(KEY, sites(5))
    np.testing.assert_array_equal(bank["kernels"], again["kernels"])


def test_one_group_spelled_out_is_the_default():
    plain, spelled = Tied().init(KEY, sites(3)), Tied(groups=(0, 0, 0)).init(KEY, sites(3))
    np.testing.assert_array_equal(plain[0]["kernels"], spelled[0]["kernels"])


def test_recurrent_kernels_come_back_with_their_signed_scales():
    """Kernels that are c_l K_g(l) exactly: found again, up to one factor a group."""
    rng = np.random.default_rng(0)
    kernels, scales = rng.normal(size=(2, 3, 4)), np.array([1.5, -0.2, -2.0, 3.0, 0.4])
    dense = [scale * kernels[group] for scale, group in zip(scales, LOOP, strict=True)]
    scheme, where = Tied(groups=LOOP, scaled=True), sites(5, (3, 4), "float64")
    with jax.enable_x64(True):
        bank, found = scheme.from_dense(tuple(map(jnp.asarray, dense)), where)
        again = scheme.expand(bank, found, where)
    for kernel, wanted in zip(again, dense, strict=True):
        np.testing.assert_allclose(kernel, wanted, atol=1e-14)
    for group in (0, 1):
        members = [i for i in range(5) if LOOP[i] == group]
        assert np.mean(np.abs(found[np.array(members)])) == pytest.approx(1)
        assert np.ptp(np.asarray(found)[members] / scales[members]) < 1e-14  # one factor, signs and all


def test_the_leading_vector_of_nothing_is_nothing():
    row, scales = leading(jnp.zeros((3, 4)))
    np.testing.assert_array_equal(row, np.zeros(4))
    np.testing.assert_array_equal(scales, np.ones(3))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"groups": (1, 0)}, "numbered from 0 in the order of their first site, but 1 comes early"),
        ({"groups": (0, -1)}, "-1"),
        ({"groups": (0, 2)}, "2 comes early"),
        ({"groups": ()}, "give each site a group"),
        ({"groups": (0, 1.5)}, "whole numbers"),
        ({"groups": 3}, "whole numbers"),
        ({"scaled": 1}, "True or False"),
    ],
    ids=str,
)
def test_impossible_groups(options, said):
    with pytest.raises(SchemeError, match=said):
        Tied(**options)


def test_impossible_sites():
    with pytest.raises(SchemeError, match="at least one site"):
        Tied().check(())
    with pytest.raises(SchemeError, match=r"layer0/kernel is .* and odd/kernel is \(3, 3, 8, 4\)"):
        Tied().check((*sites(1), Site("odd/kernel", (3, 3, 8, 4))))
    with pytest.raises(SchemeError, match=r"groups to 5 sites, but there are 4, the first layer0/kernel"):
        Tied(groups=LOOP).check(sites(4))


def test_arrays_of_another_form_are_refused():
    where = sites(5)
    bank, scales = Tied(groups=LOOP, scaled=True).init(KEY, where)
    for scheme, its_bank, its_scales in (
        (Tied(), bank, {}),
        (Tied(groups=LOOP), bank, scales),
        (Tied(groups=LOOP, scaled=True), bank, {}),
        (Tied(), {"kernel": bank["kernels"][0]}, {}),
    ):
        with pytest.raises(SchemeError, match="of shapes"):
            scheme.expand(its_bank, its_scales, where)
