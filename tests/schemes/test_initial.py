"""How banks start: like the model's own initializers, or to the last digit as in the papers."""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paramshare import (
    FilterBasis,
    Plan,
    PlanError,
    Repeat,
    Ring,
    Rule,
    SchemeError,
    Site,
    Soft,
    Steerable,
    Tied,
    parameters,
)
from paramshare.schemes.repetition_transform import PARAMETERS, neutral, transform

IDS = jax.ShapeDtypeStruct((1, 4), jnp.int32)


class Net(nn.Module):
    """Two layers of each kind, all of them with as many outputs as `width`."""

    width: int = 16

    @nn.compact
    def __call__(self, ids_BxT):
        he = nn.initializers.he_normal()
        x = sum(nn.Embed(32, self.width, name=f"embed{i}")(ids_BxT) for i in (1, 2))
        for i in (1, 2):
            x = nn.Dense(self.width, kernel_init=nn.initializers.normal(0.02), name=f"dense{i}")(x)
        for i in (1, 2):
            x = nn.MultiHeadDotProductAttention(2, name=f"attention{i}")(x)
        x = x[:, None]
        for i in (1, 2):
            x = nn.Conv(self.width, (3, 3), kernel_init=he, name=f"conv{i}")(x)
        for i in (1, 2):
            groups = self.width
            x = nn.Conv(groups, (5, 5), feature_group_count=groups, name=f"depthwise{i}")(x)
        return x


KINDS = {
    "dense": r"dense\d/kernel",
    "conv": r"conv\d/kernel",
    "depthwise": r"depthwise\d/kernel",
    "embed": r"embed\d/embedding",
    "dhk": r"attention\d/query/kernel",
    "hkd": r"attention\d/out/kernel",
}
STDS = {  # of their initializers
    "dense": 0.02,
    "conv": (2 / (9 * 16)) ** 0.5,
    "depthwise": 25**-0.5,
    "embed": 16**-0.5,
    "dhk": 16**-0.5,
    "hkd": 16**-0.5,
}
# A scheme and the kinds of layers: where it uses matrices, those with axes of their own.
SCHEMES = {
    "soft": (Soft(1), ("embed", "conv")),
    "basis": (FilterBasis(12, 4), ("depthwise", "dhk")),
    "basis of normal filters": (FilterBasis(8, 8, bases=2, orthonormal=False), ("hkd", "conv")),
    "tied": (Tied(), tuple(KINDS)),
    "ring": (Ring(500), ("dense", "embed", "dhk")),
    "repeat with remainders": (Repeat(like=Net(12)), ("conv", "dhk")),
    "steerable": (Steerable(4), ("conv",)),
}


def plan(scheme: Any, kinds: Iterable[str] = tuple(KINDS)) -> Plan:
    return Plan(*(Rule(KINDS[kind], scheme, bank=kind) for kind in kinds))


@functools.cache
def seeds() -> jax.Array:
    return jax.random.split(jax.random.key(0, impl="unsafe_rbg"), 20)  # compiles fastest


def deviations(params: Any) -> dict[str, float]:
    """Mean standard deviation of each parameter, over seeds."""
    flat = {
        "/".join(str(key.key) for key in path): np.asarray(leaf, np.float64)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    return {p: float(np.mean(x.reshape(20, -1).std(axis=1))) for p, x in flat.items()}


@pytest.mark.parametrize("name", SCHEMES)
def test_every_kernel_starts_with_the_standard_deviation_of_the_plain_models(name):
    plan(Tied()).resolve(Net(), IDS)  # measures all kinds in one program
    scheme, kinds = SCHEMES[name]
    layout = plan(scheme, kinds).resolve(Net(), IDS)

    def draw(key: jax.Array) -> Any:
        banks, params = layout.init(key)
        return layout.expand({"banks": banks, "params": params})

    shared = deviations(jax.jit(jax.vmap(draw))(seeds()))
    assert len(shared) == 2 * len(kinds)
    for bank in layout.banks:
        for site in bank.sites:
            assert shared[site.path] == pytest.approx(STDS[bank.name], rel=0.05), site


def test_layers_of_different_scales_keep_theirs():
    """Residual outputs often start smaller: each site keeps its scale in a bank of several."""
    stds = (0.1, 0.1, 0.02)
    sites = tuple(Site(f"layer{i}/kernel", (32, 32), std=std) for i, std in enumerate(stds))
    for scheme in (Soft(2), Ring(3000), Repeat(base=(16, 32))):

        @jax.jit
        def draw(key: jax.Array, scheme: Any = scheme) -> list[jax.Array]:
            kernels = scheme.expand(scheme.init(key, sites), sites)
            return [jnp.std(kernel) for kernel in kernels]

        # One draw of 1024 entries or fewer: some five per cent.
        np.testing.assert_allclose(draw(seeds()[0]), stds, rtol=0.2)


class Norms(nn.Module):
    """Layers whose vectors start at constants."""

    @nn.compact
    def __call__(self, x):
        for i in (1, 2):
            x = nn.LayerNorm(name=f"norm{i}")(nn.Dense(8, name=f"dense{i}")(x))
            offset = self.param(f"offset{i}", nn.initializers.uniform(0.5), (8, 8))
            x = x @ offset
        return x


X = jax.ShapeDtypeStruct((1, 8), jnp.float32)


def test_tied_weights_keep_constants_and_means():
    layout = Plan(
        Rule(r"norm\d/scale", Tied(), bank="scale"),
        Rule(r"norm\d/bias", Tied(), bank="bias"),
        Rule(r"offset\d", Tied(), bank="offset"),
    ).resolve(Norms(), X)
    banks, params = layout.init(jax.random.key(0))
    kernels = layout.expand({"banks": banks, "params": params})
    np.testing.assert_array_equal(kernels["norm1/scale"], 1)
    np.testing.assert_array_equal(kernels["norm2/bias"], 0)
    assert layout["offset"].sites[0].mean == pytest.approx(0.25, rel=0.02)
    assert float(jnp.mean(kernels["offset1"])) == pytest.approx(0.25, abs=0.1)


@pytest.mark.parametrize(
    ("pattern", "value"),
    [(r"norm\d/scale", "mean 1 and standard deviation 0"), (r"offset\d", "mean 0.2")],
)
def test_other_schemes_refuse_initializers_that_are_not_centred(pattern, value):
    with pytest.raises(PlanError, match=f"1.* starts with {value}.*use Tied or initial='paper'"):
        Plan(Rule(pattern, Ring(8))).resolve(Norms(), X)
    Plan(Rule(pattern, Ring(8, initial="paper"))).resolve(Norms(), X)


def test_sites_without_statistics_are_refused():
    sites = (Site("a", (4, 4)), Site("b", (4, 4)))
    for scheme in (Soft(1), Tied(), Ring(5), FilterBasis(2, 2), Repeat(base=(2, 2))):
        with pytest.raises(SchemeError, match=r"a has no std.*share a model.*Site\(std=.*'paper'"):
            scheme.init(jax.random.key(0), sites)
        paper = dataclasses.replace(scheme, initial="paper")
        jax.eval_shape(lambda key, s=paper: s.init(key, sites), seeds()[0])
    weights = jax.tree.map(lambda x: jnp.zeros(x.shape), Ring(5).shapes(sites))
    with pytest.raises(SchemeError, match="has no std"):
        Ring(5).expand(weights, sites)
    with pytest.raises(SchemeError, match="initial must be one of 'model', 'paper'"):
        Soft(1, initial="he")  # pyright: ignore[reportArgumentType]


def test_the_papers_initializations_measure_nothing(monkeypatch):
    monkeypatch.setattr(parameters.linen, "_measure", None)
    scheme = Soft(1, initial="paper")
    layout = plan(scheme).resolve(Net(), IDS)
    assert all(site.std is None for bank in layout.banks for site in bank.sites)
    with pytest.raises(TypeError):  # as it would be
        plan(Soft(1)).resolve(Net(24), IDS)


def test_each_model_is_measured_once(monkeypatch):
    measure, calls = parameters.linen._measure, []

    def spy(trace: parameters.linen.LinenTrace, targets: Any) -> Any:
        calls.append(targets)
        return measure(trace, targets)

    monkeypatch.setattr(parameters.linen, "_measure", spy)
    x = jax.ShapeDtypeStruct((5, 8), jnp.float32)
    first, second, same = (
        Plan(Rule(r"dense\d/kernel", Soft(k))).resolve(Norms(), x)["shared"].sites
        for k in (1, 2, 2)
    )
    assert first == second == same
    assert calls == [(("dense1/kernel", None), ("dense2/kernel", None))]


def test_layers_of_a_stack_are_measured_one_by_one():
    class Stacked(nn.Module):
        @nn.compact
        def __call__(self, x):
            def init(key, shape):
                keys = jax.random.split(key, 3)
                stds = jnp.array([0.1, 1.0, 5.0])
                draws = [s * jax.random.normal(k, (8, 8)) for s, k in zip(stds, keys, strict=True)]
                return jnp.stack(draws, axis=1)

            return x @ self.param("kernel", init, (8, 3, 8)).sum(axis=1)

    layout = Plan(Rule("kernel", Soft(1), stack_axis=1)).resolve(Stacked(), X)
    actual: Any = [site.std for site in layout["shared"].sites]
    np.testing.assert_allclose(actual, [0.1, 1.0, 5.0], rtol=0.03)


def test_measuring_inside_a_traced_function():
    """Where a model is shared in another module's call, its layout is made under a trace."""

    @jax.jit
    def trained(x):
        layout = Plan(Rule(r"dense\d/kernel", Soft(1))).resolve(Norms(), x)
        return x * sum(bank.sites[0].std or 0.0 for bank in layout.banks)

    assert float(trained(jnp.ones((3, 8)))[0, 0]) == pytest.approx(8**-0.5, rel=0.03)


@pytest.mark.parametrize("before", [0.05, 1.0])
@pytest.mark.parametrize("name", ["swish", "scale", "fourier"])
def test_neutral_scalars_keep_a_standard_deviation(name, before):
    """Of normal weights, whatever beta is; a third here."""
    w = before * jax.random.normal(jax.random.key(1, impl="rbg"), (50_000,))
    m = PARAMETERS[name]
    key = jax.random.key(0, impl="unsafe_rbg")
    scalars = neutral(name, key, jnp.zeros((20, m)), (-1.0, 1.0), before, before / 3)
    for row in scalars:
        copy = transform(name, w, list(row))
        assert float(jnp.sqrt(jnp.mean(copy**2))) == pytest.approx(before / 3, rel=0.03)
    assert len(set(np.sign(scalars[:, 1 if name == "fourier" else 0]).tolist())) == 2
