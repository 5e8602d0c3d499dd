"""Rings as Wang et al. publish them: scale, gradients without scatter, contents of a checkpoint."""

import dataclasses
import math
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paramshare
from paramshare import Plan, Ring, Rule, SchemeError, Site
from paramshare.schemes.interface import Weights

SHAPES = ((3, 3, 4, 5), (6, 7), (8,), (3, 3, 4, 5))  # 180 + 42 + 8 + 180 = 410 entries
WIDE = ((3, 3, 32, 64), (3, 3, 32, 64), (1, 1, 64, 128))
SIGMA = math.sqrt(2 / 4608)  # standard deviation of the reference's ring
modes = pytest.mark.parametrize("mode", ["ring", "global", "tile", "hash"])


def sites(*shapes: tuple[int, ...], dtype: str = "float32") -> tuple[Site, ...]:
    return tuple(Site(f"layer{i}/kernel", shape, dtype) for i, shape in enumerate(shapes))


def paper(size: int, mode: Any = "ring", **options) -> Ring:
    return Ring(size, mode, initial="paper", **options)


def weights(ring) -> Weights:
    return Weights({"ring": ring})


def scale_of(site: Site) -> float:
    """s_i = sqrt(4608 / (out kh kw)), the reference's."""
    return math.sqrt(4608 / (site.size if len(site.shape) == 1 else site.size // site.shape[-2]))


@modes
@pytest.mark.parametrize("size", [13, 60])
def test_each_entry_is_one_slot_with_a_sign(mode, size):
    """K_i = s_i R_i W, each row of R_i with one nonzero, +-1; the gradient is the transpose."""
    scheme, members = paper(size, mode), sites((2, 3, 4), (5,), dtype="float64")

    def flat(ring):
        return jnp.concatenate([k.ravel() for k in scheme.expand(weights(ring), members)])

    @jax.jit
    def results(ring, cotangent):
        kernels, pull = jax.vjp(flat, ring)
        return jax.vmap(flat, out_axes=1)(jnp.eye(size)), kernels, *pull(cotangent)

    ring = np.random.default_rng(0).normal(size=size)
    cotangent = np.random.default_rng(1).normal(size=29)
    with jax.enable_x64(True):
        matrix, kernels, gradient = map(np.asarray, results(ring, cotangent))
    assert np.all(np.sum(matrix != 0, axis=1) == 1)
    expected = np.repeat([scale_of(site) for site in members], [24, 5])
    # The scale is a quotient of square roots: a few roundings.
    np.testing.assert_allclose(np.abs(matrix).sum(axis=1), expected, rtol=1e-15)
    np.testing.assert_array_equal(kernels, matrix @ ring)  # sums of one product: exact
    # Sums of at most 29 products, in another order.
    limit = 29 * 2**-52 * np.abs(matrix.T @ np.abs(cotangent)).max()
    np.testing.assert_allclose(gradient, matrix.T @ cotangent, rtol=0, atol=limit)


@pytest.mark.parametrize("mode", ["ring", "global"])
@pytest.mark.parametrize("size", [410, 500])
def test_a_ring_of_as_many_slots_as_entries_is_the_unshared_network(mode, size):
    """For N >= T every set of kernels has a ring, and no slot serves two entries.

    R^T R is diagonal: a gradient step on the ring is one on the kernels.
    """
    scheme, members = paper(size, mode), sites(*SHAPES)
    rng = np.random.default_rng(0)
    kernels = tuple(rng.normal(size=site.shape).astype(np.float32) for site in members)

    @jax.jit
    def round_trip(kernels):
        fitted = scheme.from_dense(kernels, members)
        return fitted, scheme.expand(fitted, members)

    fitted, expanded = round_trip(kernels)
    assert fitted.coefficients == fitted.own == {}
    for kernel, result in zip(kernels, expanded, strict=True):
        # Times s, divided by its square, times s.
        np.testing.assert_allclose(result, kernel, rtol=4 * 2**-23)
    # Random kernels have no zero: as many nonzero slots as entries.
    assert np.sum(np.asarray(fitted.bank["ring"]) != 0) == 410


@pytest.mark.parametrize(("size", "draws"), [(1000, 200), (100_000, 4), (2_000_000, 1)])
def test_kernels_have_he_scale_for_every_ring_size(size, draws):
    """sqrt(2 / fan_out), the paper's."""
    members = sites((3, 3, 16, 64), (1, 1, 64, 32), (128, 10))
    deviations = [math.sqrt(2 / 576), math.sqrt(2 / 32), math.sqrt(2 / 10)]
    assert_deviations(paper(size), members, deviations, draws)


def test_kernels_have_the_scale_of_the_models_initializer():
    """LeCun's sqrt(1 / fan_in), measured as `Site.std`."""
    deviations = [1 / 12, 1 / 8, math.sqrt(1 / 128)]
    members = sites((3, 3, 16, 64), (1, 1, 64, 32), (128, 10))
    members = tuple(
        dataclasses.replace(site, std=std) for site, std in zip(members, deviations, strict=True)
    )
    assert_deviations(Ring(1000), members, deviations, draws=200)


def assert_deviations(scheme: Ring, members: tuple[Site, ...], deviations: list[float], draws: int):
    """Standard deviations of the initial kernels, within five standard errors."""

    @jax.jit
    def squares(key):
        kernels = scheme.expand(scheme.init(key, members), members)
        return jnp.stack([jnp.mean(kernel**2) for kernel in kernels])

    means = np.mean([squares(jax.random.key(i)) for i in range(draws)], axis=0)
    for square, deviation, site in zip(means, deviations, members, strict=True):
        independent = draws * min(site.size, scheme.size)
        # The relative standard error of a standard deviation is 1 / sqrt(2 n).
        limit = 5 / math.sqrt(2 * independent)
        assert math.sqrt(square) == pytest.approx(deviation, rel=limit)


def test_the_ring_is_drawn_as_in_the_reference(assert_he_normal):
    """N(0, 2 / 4608)."""
    bank = paper(100_000).init(jax.random.key(0), sites((3, 3))).bank
    assert_he_normal(bank["ring"], SIGMA**2)


def test_another_seed_gives_unrelated_kernels():
    ring = weights(jax.random.normal(jax.random.key(0), (20_000,)))
    first, second = jax.jit(
        lambda ring: [paper(20_000, seed=s).expand(ring, sites(WIDE[0]))[0] for s in (0, 1)]
    )(ring)
    correlation = np.corrcoef(np.ravel(first), np.ravel(second))[0, 1]
    assert abs(correlation) < 5 / math.sqrt(first.size)


def loss(scheme: Ring, members: tuple[Site, ...]):
    def total(ring):
        return sum(jnp.sum(jnp.sin(kernel)) for kernel in scheme.expand(weights(ring), members))

    return total


@pytest.mark.parametrize(
    ("mode", "block"),
    [("ring", 1), ("ring", 2), ("global", 1), ("global", 2), ("tile", 1), ("hash", 1)],
)
def test_only_hashing_adds_in_a_scatter(mode, block):
    """A permutation's few indices that are outside at first are set in one, each once."""
    gradient = jax.jit(jax.grad(loss(paper(101, mode, block=block), sites(*SHAPES))))
    traced = gradient.trace(jnp.ones(101))
    scatters = re.findall(r":(\w+)\[[\d,]*\] = (scatter[-\w]*)\[", str(traced.jaxpr))
    adds = {("f32", "scatter-add")} if mode == "hash" else set()
    assert set(scatters) - {("i32", "scatter")} == adds
    text = traced.lower().compile().as_text() or ""
    assert bool(re.search(r"f32\S* scatter\(|/scatter-add", text)) == (mode == "hash")


def test_forward_derivatives_of_tiled_rings():
    scheme, members = paper(101, "tile"), sites(*SHAPES)
    ring = jnp.linspace(-1.0, 1.0, 101)
    kernels, tangents = jax.jvp(lambda ring: scheme.expand(weights(ring), members), [ring], [ring])
    for one, other in zip(kernels, tangents, strict=True):  # linear in the ring
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("mode", ["ring", "global"])
def test_gradients_are_bit_identical_every_time(mode):
    gradient = jax.jit(jax.grad(loss(paper(1001, mode), sites(*WIDE))))
    ring = jax.random.normal(jax.random.key(0), (1001,))
    first = np.asarray(gradient(ring))
    assert all(np.asarray(gradient(ring)).tobytes() == first.tobytes() for _ in range(3))


def test_a_ring_has_at_least_float32():
    dtypes = ["bfloat16", "float16", "float32"]
    mixed = tuple(Site(dtype, (6, 7), dtype) for dtype in dtypes)
    scheme = paper(50)
    ring = scheme.init(jax.random.key(0), mixed).bank["ring"]
    assert ring.dtype == jnp.float32

    def total(ring):
        kernels = scheme.expand(weights(ring), mixed)
        assert [kernel.dtype.name for kernel in kernels] == dtypes
        return sum(jnp.sum(kernel.astype(jnp.float32)) for kernel in kernels)

    assert jax.eval_shape(jax.grad(total), ring).dtype == jnp.float32
    with jax.enable_x64(True):
        wider = (*mixed, Site("d", (2,), "float64"))
        bank = jax.eval_shape(lambda: scheme.init(jax.random.key(0), wider)).bank
    assert bank["ring"].dtype == jnp.float64


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i, width in enumerate((8, 12, 8)):
            x = nn.relu(nn.LayerNorm(name=f"norm{i}")(nn.Dense(width, name=f"dense{i}")(x)))
        return x


@modes
def test_variables_hold_the_ring_and_private_parameters_only(mode):
    """No maps, no signs, no scales."""
    x = jnp.ones((2, 8))
    shared = paramshare.share(Net(), Plan(Rule(r"dense\d/kernel", paper(50, mode))), x)
    variables = jax.eval_shape(shared.init, jax.random.key(0), x)
    private = {f"dense{i}": {"bias": (n,)} for i, n in enumerate((8, 12, 8))}
    private |= {f"norm{i}": {"bias": (n,), "scale": (n,)} for i, n in enumerate((8, 12, 8))}
    assert jax.tree.map(jnp.shape, variables) == {
        "banks": {"shared": {"ring": (50,)}},
        "params": {"model": private},
    }
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert paramshare.count(variables) == {
        "banks": 50,
        "coefficients": 0,
        "private": 84,
        "trainable": 134,
    }


def test_a_shared_model_computes_with_the_kernels_of_the_ring():
    x = jnp.ones((2, 8))
    shared = paramshare.share(Net(), Plan(Rule(r"dense\d/kernel", paper(50))), x)

    @jax.jit
    def outputs():
        variables = shared.init(jax.random.key(0), x)
        return shared.apply(variables, x), Net().apply(shared.expand(variables), x)

    np.testing.assert_array_equal(*outputs())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, r"Ring\(size=0\): size must be an integer, 1 or more"),
        ({"size": -3}, "size=-3"),
        ({"size": 1.5}, "size=1.5"),
        ({"size": True}, "size=True"),
        ({"size": 2**31}, r"below 2\^31"),
        ({"size": 5, "mode": "spiral"}, "mode='spiral'.* one of 'ring', 'global'"),
        ({"size": 5, "block": 0}, "block=0"),
        ({"size": 5, "mode": "tile", "block": 2}, "block=2"),
        ({"size": 5, "mode": "hash", "block": 2}, "block=2"),
        ({"size": 5, "seed": -1}, "seed=-1"),
        ({"size": 5, "initial": "he"}, "initial='he'"),
    ],
)
def test_invalid_arguments(arguments, message):
    with pytest.raises(SchemeError, match=message):
        Ring(**arguments)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ((), "at least one site"),
        (sites((3, 0)), "layer0/kernel is an empty weight"),
        (sites((2**16, 2**14), (2**16, 2**14)), r"2,147,483,648 kernel entries.* 2\^31"),
    ],
)
def test_invalid_sites(members, message):
    for method in (paper(5).check, lambda sites: paper(5).init(jax.random.key(0), sites)):
        with pytest.raises(SchemeError, match=message):
            method(members)


def test_arrays_of_other_shapes():
    with pytest.raises(SchemeError, match=r"bank/ring of shape \(5,\), got \(6,\)"):
        paper(5).expand(weights(jnp.ones(6)), sites((3, 4)))
    with pytest.raises(SchemeError, match=r"shape \(3, 4\), got \(4, 3\)"):
        paper(5).from_dense((jnp.ones((4, 3)),), sites((3, 4)))
