"""Tied kernels: one for all layers or for each group, with and without signed scales."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paramshare import SchemeError, Site, Tied
from paramshare.schemes import Weights
from paramshare.schemes.tied import leading

KEY = jax.random.key(0, impl="rbg")  # compiles faster than the default
LOOP = (0, 1, 0, 1, 0)


def paper(**options: Any) -> Tied:
    return Tied(initial="paper", **options)


def sites(
    number: int, shape: tuple[int, ...] = (3, 3, 4, 8), dtype: str = "float32"
) -> tuple[Site, ...]:
    return tuple(Site(f"layer{i}/kernel", shape, dtype) for i in range(number))


@pytest.mark.parametrize(
    ("shape", "wide"), [((3, 3, 4, 8), True), ((6, 6), True), ((1, 1, 5, 20), False)]
)
@pytest.mark.parametrize(("dtype", "atol"), [("float32", 2e-6), ("float64", 4e-15)])
def test_tied_kernels_start_orthonormal_on_the_shorter_side(rows, shape, wide, dtype, atol):
    """Filters that outnumber their entries (an expansion p -> 4p): the entries are orthonormal."""
    with jax.enable_x64(dtype == "float64"):
        weights = paper(orthonormal=True).init(KEY, sites(3, shape, dtype))
    assert weights.coefficients == weights.own == {}
    filters_NxP = rows(weights.bank["kernels"][0])
    gram = filters_NxP @ filters_NxP.T if wide else filters_NxP.T @ filters_NxP
    np.testing.assert_allclose(gram, np.eye(min(filters_NxP.shape)), atol=atol)


def test_tied_kernels_start_he_normal(assert_he_normal):
    weights = paper().init(KEY, sites(2, (3, 3, 64, 48)))
    assert_he_normal(weights.bank["kernels"], 2 / (9 * 48))


def test_tied_kernels_are_one_kernel_in_every_layer():
    where = (*sites(2), dataclasses.replace(sites(1)[0], path="half/kernel", dtype="bfloat16"))
    weights = paper().init(KEY, where)
    (kernel,) = weights.bank["kernels"]
    first, second, half = paper().expand(weights, where)
    np.testing.assert_array_equal(first, kernel)
    np.testing.assert_array_equal(second, kernel)
    np.testing.assert_array_equal(half, kernel.astype(jnp.bfloat16))


@pytest.mark.parametrize("scaled", [False, True])
def test_layers_of_a_group_use_one_kernel_up_to_their_scales(scaled):
    where = sites(5, (3, 2))
    scheme, kernels = Tied(groups=LOOP, scaled=scaled), jnp.arange(12.0).reshape(2, 3, 2)
    scales = jnp.array([1.0, -2.0, 0.5, 0.0, 3.0])
    weights = scheme.weights(kernels, scales, where)
    np.testing.assert_array_equal(scheme.kernels(weights.bank), kernels)
    np.testing.assert_array_equal(scheme.scales(weights, where), scales if scaled else np.ones(5))
    for kernel, group, scale in zip(scheme.expand(weights, where), LOOP, scales, strict=True):
        np.testing.assert_array_equal(kernel, (scale if scaled else 1) * kernels[group])


@pytest.mark.parametrize("orthonormal", [False, True])
def test_the_kernels_of_groups_are_drawn_apart(orthonormal):
    scheme = paper(orthonormal=orthonormal, groups=LOOP, scaled=True)
    weights, again = (scheme.init(KEY, sites(5)) for _ in range(2))
    np.testing.assert_array_equal(scheme.scales(weights, sites(5)), np.ones(5))
    first, second = (np.ravel(kernel) for kernel in weights.bank["kernels"])
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / math.sqrt(first.size)
    np.testing.assert_array_equal(weights.bank["kernels"], again.bank["kernels"])


def test_one_group_spelled_out_is_the_default():
    plain, spelled = (s.init(KEY, sites(3)).bank for s in (paper(), paper(groups=(0, 0, 0))))
    np.testing.assert_array_equal(plain["kernels"], spelled["kernels"])


def test_recurrent_kernels_are_restored_with_signed_scales():
    """Kernels that are c_l K_g(l) exactly, up to one factor for each group."""
    rng = np.random.default_rng(0)
    kernels, scales = rng.normal(size=(2, 3, 4)), np.array([1.5, -0.2, -2.0, 3.0, 0.4])
    dense = [scale * kernels[group] for scale, group in zip(scales, LOOP, strict=True)]
    scheme, where = Tied(groups=LOOP, scaled=True), sites(5, (3, 4), "float64")
    with jax.enable_x64(True):
        weights = scheme.from_dense(tuple(map(jnp.asarray, dense)), where)
        again, fitted = scheme.expand(weights, where), scheme.scales(weights, where)
    for kernel, expected in zip(again, dense, strict=True):
        np.testing.assert_allclose(kernel, expected, atol=1e-14)
    for group in (0, 1):
        members = [i for i in range(5) if LOOP[i] == group]
        fitted_of_group = np.asarray(fitted)[members]
        assert np.mean(np.abs(fitted_of_group)) == pytest.approx(1)
        assert np.ptp(fitted_of_group / scales[members]) < 1e-14  # one factor, with its sign


@pytest.mark.parametrize("seed", range(4))
def test_the_leading_vector_is_scaled_and_signed(seed):
    """The mean of |c| is 1 and most of c is positive, whichever sign the decomposition takes."""
    rows_LxN = np.random.default_rng(seed).normal(size=(5, 6)).astype(np.float32)
    r, scales_L = leading(jnp.asarray(rows_LxN))
    assert float(jnp.mean(jnp.abs(scales_L))) == pytest.approx(1, abs=1e-6)
    assert float(jnp.sum(scales_L)) > 0
    left, singular, right = np.linalg.svd(rows_LxN.astype(np.float64))
    expected = singular[0] * np.outer(left[:, 0], right[0])
    np.testing.assert_allclose(np.outer(scales_L, r), expected, atol=1e-5)


def test_the_leading_vector_of_nothing_is_nothing():
    row, scales = leading(jnp.zeros((3, 4)))
    np.testing.assert_array_equal(row, np.zeros(4))
    np.testing.assert_array_equal(scales, np.ones(3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"groups": (1, 0)},
            "numbered from 0 in the order of their first site, but 1 comes before 0",
        ),
        ({"groups": (0, -1)}, "-1"),
        ({"groups": (0, 2)}, "2 comes before 1"),
        ({"groups": ()}, "give each site a group"),
        ({"groups": (0, 1.5)}, "must be integers"),
        ({"groups": 3}, "must be integers"),
        ({"scaled": 1}, "True or False"),
    ],
    ids=str,
)
def test_impossible_groups(options, message):
    with pytest.raises(SchemeError, match=message):
        Tied(**options)


def test_impossible_sites():
    with pytest.raises(
        SchemeError, match=r"groups for 5 sites, but there are 4, the first is layer0/kernel"
    ):
        Tied(groups=LOOP).check(sites(4))


def test_arrays_of_other_options_are_refused():
    scheme, where = Tied(groups=LOOP, scaled=True), sites(5)
    weights = scheme.weights(jnp.ones((2, *where[0].shape)), jnp.ones(5), where)
    for other, arrays in (
        (Tied(), Weights(weights.bank)),
        (Tied(groups=LOOP), weights),
        (scheme, Weights(weights.bank)),
    ):
        with pytest.raises(SchemeError, match="of shape"):
            other.expand(arrays, where)
