"""Parameter rings as Wang et al. publish them: their scale, a gradient without scatter, and what a checkpoint holds."""

import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paramshare
from paramshare import Plan, Ring, Rule, SchemeError, Site

SHAPES = ((3, 3, 4, 5), (6, 7), (8,), (3, 3, 4, 5))  # 180 + 42 + 8 + 180 = 410 numbers
WIDE = ((3, 3, 32, 64), (3, 3, 32, 64), (1, 1, 64, 128))
modes = pytest.mark.parametrize("mode", ["ring", "global", "tile", "hash"])


def sites(*shapes: tuple[int, ...], dtype: str = "float32") -> tuple[Site, ...]:
    return tuple(Site(f"layer{i}/kernel", shape, dtype) for i, shape in enumerate(shapes))


def scale_of(site: Site) -> float:
    """s_i = sqrt(4608 / (out kh kw)), the reference's."""
    return math.sqrt(4608 / (site.size if len(site.shape) == 1 else site.size // site.shape[-2]))


@modes
@pytest.mark.parametrize("size", [1, 13, 60])
def test_kernels_are_one_signed_slot_a_number(mode, size):
    """K_i = s_i R_i W with one nonzero, +-1, in each of R_i's rows; and the gradient is the transpose."""
    scheme, where = Ring(size, mode), sites((2, 3, 4), (5,), dtype="float64")
    with jax.enable_x64(True):
        flat = jax.jit(lambda ring: jnp.concatenate([kernel.ravel() for kernel in scheme.expand({"ring": ring}, {}, where)]))
        matrix = np.asarray(jax.jit(jax.vmap(flat, out_axes=1))(jnp.eye(size)))
        ring, cotangent = np.random.default_rng(0).normal(size=size), np.random.default_rng(1).normal(size=29)
        kernels, pull = jax.vjp(flat, jnp.asarray(ring))
        (gradient,) = pull(jnp.asarray(cotangent))
    assert np.all(np.sum(matrix != 0, axis=1) == 1)
    expected = np.repeat([scale_of(site) for site in where], [24, 5])
    np.testing.assert_allclose(np.abs(matrix).sum(axis=1), expected, rtol=4e-16)  # a unit in the last place, of a square root's quotient
    np.testing.assert_array_equal(kernels, matrix @ ring)  # sums of one product: exact
    # Sums of 29 products at most, in another order.
    np.testing.assert_allclose(gradient, matrix.T @ cotangent, rtol=0, atol=29 * 2**-52 * np.abs(matrix.T @ np.abs(cotangent)).max())


@pytest.mark.parametrize("mode", ["ring", "global"])
@pytest.mark.parametrize("size", [410, 500])
def test_a_ring_of_all_numbers_is_the_unshared_network(mode, size):
    """From N = T on any kernels have a ring, and a step on the ring is a step on the kernels: R^T R is diagonal."""
    scheme, where = Ring(size, mode), sites(*SHAPES)
    kernels = tuple(np.asarray(jax.random.normal(jax.random.key(i), site.shape)) for i, site in enumerate(where))
    bank, coefficients = jax.jit(lambda k: scheme.from_dense(k, where))(kernels)
    assert not coefficients
    for kernel, again in zip(kernels, jax.jit(lambda b: scheme.expand(b, {}, where))(bank), strict=True):
        np.testing.assert_allclose(again, kernel, rtol=4 * 2**-23)  # times s, over s squared, times s
    # Generic kernels: as many slots that are not zero as numbers, so that no slot serves two.
    assert np.sum(np.asarray(bank["ring"]) != 0) == 410


@pytest.mark.parametrize(("size", "draws"), [(1000, 200), (100_000, 4), (20_000_000, 1)])
@pytest.mark.parametrize("lecun", [False, True])
def test_kernels_start_at_the_scale_of_their_layers_whatever_the_ring_is(size, draws, lecun):
    """He's sqrt(2 / fan-out), or LeCun's sqrt(1 / fan-in)."""
    if lecun and size != 1000:
        pytest.skip("the ring's size is the same question")
    where = sites((3, 3, 16, 64), (1, 1, 64, 32), (128, 10))
    deviations = [math.sqrt(2 / 576), math.sqrt(2 / 32), math.sqrt(2 / 10)] if not lecun else [1 / 12, 1 / 8, math.sqrt(1 / 128)]
    scheme = Ring(size, scale=1, fan="fan_in") if lecun else Ring(size)
    expand = jax.jit(lambda key: scheme.expand(*scheme.init(key, where), where))
    found = [[np.std(np.asarray(kernel, np.float64)) for kernel in expand(jax.random.key(i))] for i in range(draws)]
    for deviation, wanted, site in zip(np.sqrt(np.mean(np.square(found), axis=0)), deviations, where, strict=True):
        independent = draws * min(site.size, size)  # numbers; a standard deviation's relative error is 1 / sqrt(2 n)
        assert deviation == pytest.approx(wanted, rel=5 / math.sqrt(2 * independent))


def test_a_ring_is_drawn_as_the_reference_draws_it():
    ring = np.asarray(Ring(100_000).init(jax.random.key(0), sites((3, 3)))[0]["ring"], np.float64) / math.sqrt(2 / 4608)
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):  # of a standard normal, five standard errors
        assert abs(np.mean(ring**power) - moment) < 5 * math.sqrt(variance / ring.size)


def test_another_seed_is_another_network():
    """The seed is a key: kernels from a trained ring under a wrong one have nothing to do with the right ones."""
    ring = {"ring": jax.random.normal(jax.random.key(0), (20_000,))}
    right, wrong = (jax.jit(lambda b, s=s: Ring(20_000, seed=s).expand(b, {}, sites(WIDE[0])))(ring)[0] for s in (0, 1))
    n = right.size
    assert abs(np.corrcoef(np.ravel(right), np.ravel(wrong))[0, 1]) < 5 / math.sqrt(n)


def loss(scheme: Ring, where: tuple[Site, ...]):
    return lambda ring: sum(jnp.sum(jnp.sin(kernel)) for kernel in scheme.expand({"ring": ring}, {}, where))


@pytest.mark.parametrize(("mode", "block"), [("ring", 1), ("ring", 2), ("global", 1), ("global", 2), ("tile", 1), ("hash", 1)])
def test_only_hashing_needs_a_scatter(mode, block):
    lowered = jax.jit(jax.grad(loss(Ring(101, mode, block=block), sites(*SHAPES)))).lower(jnp.ones(101))
    for text in (lowered.as_text(), str(lowered.compile().as_text())):
        # As an operation, or the name of the one that it was compiled from; this function's own name stands in the text as well.
        assert bool(re.search(r"stablehlo\.scatter|scatter\(|/scatter", text)) == (mode == "hash")


@pytest.mark.parametrize("mode", ["ring", "global"])
def test_a_gradient_has_the_same_bits_again(mode):
    gradient = jax.jit(jax.grad(loss(Ring(1001, mode), sites(*WIDE))))
    ring = jax.random.normal(jax.random.key(0), (1001,))
    first = np.asarray(gradient(ring))
    assert all(np.asarray(gradient(ring)).tobytes() == first.tobytes() for _ in range(3))


def test_a_ring_is_held_in_float32_or_more():
    mixed = (Site("a", (6, 7), "bfloat16"), Site("b", (6, 7), "float16"), Site("c", (6, 7), "float32"))
    scheme = Ring(50)
    bank, _ = scheme.init(jax.random.key(0), mixed)
    assert bank["ring"].dtype == jnp.float32
    assert [kernel.dtype.name for kernel in scheme.expand(bank, {}, mixed)] == ["bfloat16", "float16", "float32"]
    assert (
        jax.grad(lambda r: sum(jnp.sum(k.astype(jnp.float32)) for k in scheme.expand({"ring": r}, {}, mixed)))(bank["ring"]).dtype
        == "float32"
    )
    with jax.enable_x64(True):
        assert scheme.init(jax.random.key(0), (*mixed, Site("d", (2,), "float64")))[0]["ring"].dtype == jnp.float64


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i, width in enumerate((8, 12, 8)):
            x = nn.relu(nn.LayerNorm(name=f"norm{i}")(nn.Dense(width, name=f"dense{i}")(x)))
        return x


@modes
def test_variables_hold_the_ring_and_private_parameters_and_no_maps(mode):
    x = jnp.ones((2, 8))
    plan = Plan(Rule(r"dense\d/kernel", Ring(50, mode)))
    shared = paramshare.share(Net(), plan, x)
    variables = shared.init(jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, variables["banks"]) == {"shared": {"ring": (50,)}}
    assert set(variables) == {"banks", "params"} and set(variables["params"]) == {"model"}  # no "coefficients"
    private = {f"dense{i}": {"bias": (n,)} for i, n in enumerate((8, 12, 8))}
    private |= {f"norm{i}": {"bias": (n,), "scale": (n,)} for i, n in enumerate((8, 12, 8))}
    assert jax.tree.map(jnp.shape, variables["params"]["model"]) == private
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert paramshare.count(variables) == {"banks": 50, "coefficients": 0, "private": 84, "trainable": 134}
    np.testing.assert_array_equal(shared.apply(variables, x), Net().apply(shared.expand(variables), x))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"size": 0}, r"Ring\(size=0\): size must be an integer, 1 or more"),
        ({"size": -3}, r"size=-3"),
        ({"size": 1.5}, r"size=1.5"),
        ({"size": True}, r"size=True"),
        ({"size": 2**31}, r"size=2147483648\): a ring has less than 2\^31"),
        ({"size": 5, "mode": "spiral"}, r"mode='spiral'\): the modes are 'ring', 'global', 'tile', 'hash'"),
        ({"size": 5, "block": 0}, r"block=0"),
        ({"size": 5, "mode": "tile", "block": 2}, r"block=2\) goes with mode 'ring' or 'global'; mode 'tile'"),
        ({"size": 5, "mode": "hash", "block": 2}, r"mode 'hash' permutes nothing"),
        ({"size": 5, "seed": -1}, r"seed=-1\): seed must be an integer, 0 or more"),
        ({"size": 5, "scale": 0}, r"scale=0"),
        ({"size": 5, "scale": math.nan}, r"scale=nan"),
        ({"size": 5, "scale": "2"}, r"scale='2'"),
        ({"size": 5, "fan": "fan_avg"}, r"fan='fan_avg'"),
    ],
)
def test_impossible_rings(arguments, said):
    with pytest.raises(SchemeError, match=said):
        Ring(**arguments)


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ((), "needs at least one site"),
        (sites((3, 0)), r"layer0/kernel is \(3, 0\)"),
        (sites((2**16, 2**14), (2**16, 2**14)), r"2,147,483,648 numbers; a ring serves less than 2\^31"),
    ],
)
def test_impossible_sites(where, said):
    for attempt in (lambda: Ring(5).check(where), lambda: Ring(5).init(jax.random.key(0), where)):
        with pytest.raises(SchemeError, match=said):
            attempt()


def test_arrays_of_another_plan():
    with pytest.raises(SchemeError, match=r"wants a bank of shapes .*\(5,\).* got .*\(6,\)"):
        Ring(5).expand({"ring": jnp.ones(6)}, {}, sites((3, 4)))
    with pytest.raises(SchemeError, match=r"wants kernels of shapes .*\(3, 4\).* got .*\(4, 3\)"):
        Ring(5).from_dense((jnp.ones((4, 3)),), sites((3, 4)))
