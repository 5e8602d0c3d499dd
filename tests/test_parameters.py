"""What a plan learns of parameters: input and output axes, and how the model initializes them."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paramshare.parameters
import paramshare.plan
from paramshare import FilterBasis, Plan, PlanError, Repeat, Ring, Rule, Site, Soft, Tied

X = jax.ShapeDtypeStruct((2, 8), jnp.float32)
IMAGES = jax.ShapeDtypeStruct((2, 6, 6, 8), jnp.float32)
TOKENS = jax.ShapeDtypeStruct((2, 5), jnp.int32)
WORDS = jax.ShapeDtypeStruct((2, 5, 8), jnp.float32)
# Five standard errors of a standard deviation, measured on 16,384 normal entries.
MEASURED = 5 / (2 * 16_384) ** 0.5


def site_of(model: nn.Module, path: str, x: Any, scheme: Any = None, **options) -> Site:
    """The site of one parameter."""
    rule = Rule(paths=(path,), scheme=scheme or Tied(initial="paper"), **options)
    (site, *_) = Plan(rule).resolve(model, x)["shared"].sites
    return site


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.MultiHeadDotProductAttention(4, qkv_features=12, name="attention")(x)


class Heads(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Einsum((3, 8, 2), name="heads")(x, "bi,oih->boh")


class StackedHeads(nn.Module):
    @nn.compact
    def __call__(self, x):
        lift: Any = nn.vmap
        heads = lift(
            nn.DenseGeneral,
            variable_axes={"params": 1},
            split_rngs={"params": True},
            in_axes=None,
            axis_size=2,
        )
        return heads((4, 3), name="heads")(x)


AXES = {
    # model, path, input, options of the rule, matrix shape, fan-in, fan-out
    "Dense": (nn.Dense(3), "kernel", X, {}, (8, 3), 8, 3),
    "Dense's bias": (nn.Dense(3), "bias", X, {}, (1, 3), 1, 3),
    "Conv": (nn.Conv(5, (3, 2)), "kernel", IMAGES, {}, (3, 2, 8, 5), 48, 30),
    "depthwise Conv": (
        nn.Conv(8, (3, 3), feature_group_count=8),
        "kernel",
        IMAGES,
        {},
        (3, 3, 1, 8),
        9,
        72,
    ),
    "ConvTranspose": (
        nn.ConvTranspose(5, (3, 3), transpose_kernel=True),
        "kernel",
        IMAGES,
        {},
        (3, 3, 8, 5),
        72,
        45,
    ),
    "DenseGeneral, two inputs": (
        nn.DenseGeneral(3, axis=(-2, -1)),
        "kernel",
        IMAGES,
        {},
        (48, 3),
        48,
        3,
    ),
    "DenseGeneral, two outputs": (nn.DenseGeneral((2, 3)), "kernel", X, {}, (8, 6), 8, 6),
    "DenseGeneral's bias": (nn.DenseGeneral((2, 3)), "bias", X, {}, (1, 6), 1, 6),
    "query (D, H, K)": (Attention(), "attention/query/kernel", WORDS, {}, (8, 12), 8, 12),
    "out (H, K, D)": (Attention(), "attention/out/kernel", WORDS, {}, (12, 8), 12, 8),
    "Embed": (nn.Embed(20, 8), "embedding", TOKENS, {}, (20, 8), 20, 8),
    "DenseGeneral, features as a NumPy integer": (
        nn.DenseGeneral(np.int64(5)),  # pyright: ignore[reportArgumentType]
        "kernel",
        X,
        {},
        (8, 5),
        8,
        5,
    ),
    "Einsum, string passed at call": (Heads(), "heads/kernel", X, {}, (8, 6), 8, 6),
    "Einsum's bias": (Heads(), "heads/bias", X, {}, (1, 6), 1, 6),
    "Einsum of any rank": (
        nn.Einsum((8, 3, 2), "...i,ioh->...oh"),
        "kernel",
        WORDS,
        {},
        (8, 6),
        8,
        6,
    ),
    "Einsum of any rank, bias": (
        nn.Einsum((8, 3, 2), "...i,ioh->...oh"),
        "bias",
        WORDS,
        {},
        (1, 6),
        1,
        6,
    ),
    "Einsum of an unknown kernel": (
        nn.Einsum((8, 3, 2), "bi,i...->b..."),
        "kernel",
        X,
        {},
        (8, 3, 2),
        24,
        16,
    ),
    "Einsum": (nn.Einsum((3, 8, 2), "bi,oih->boh"), "kernel", X, {}, (8, 6), 8, 6),
    "a stack of DenseGeneral": (
        StackedHeads(),
        "heads/kernel",
        X,
        {"stack_axis": 1},
        (8, 12),
        8,
        12,
    ),
    "axes of the rule": (
        nn.Embed(20, 8),
        "embedding",
        TOKENS,
        {"in_axes": 1, "out_axes": [0]},
        (8, 20),
        8,
        20,
    ),
    "one axis of the rule, the others derived": (
        nn.DenseGeneral((2, 3)),
        "kernel",
        X,
        {"in_axes": ()},
        (8, 1, 6),
        8,
        48,
    ),
}


@pytest.mark.parametrize("case", AXES)
def test_input_and_output_axes_follow_the_layer(case):
    model, path, x, options, *expected = AXES[case]
    site = site_of(model, path, x, **options)
    assert [site.matrix_shape, site.fan_in, site.fan_out] == expected


def test_axes_decide_which_entries_belong_to_one_filter():
    """The matrix of an attention's kernels maps flat inputs to flat outputs."""
    query = site_of(Attention(), "attention/query/kernel", WORDS)
    kernel = jnp.arange(8.0 * 12).reshape(8, 4, 3)
    assert query.shape == kernel.shape
    assert jnp.array_equal(query.to_matrix(kernel), kernel.reshape(8, 12))
    out = site_of(Attention(), "attention/out/kernel", WORDS)
    kernel = jnp.arange(12.0 * 8).reshape(4, 3, 8)
    assert out.shape == kernel.shape
    assert jnp.array_equal(out.to_matrix(kernel), kernel.reshape(12, 8))


def growing(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A stack of three layers, of standard deviations 0.1, 0.2 and 0.3."""
    return jax.random.normal(key, shape) * jnp.array([0.1, 0.2, 0.3])[:, None, None]


class Initialized(nn.Module):
    """Layers of many initializers."""

    @nn.compact
    def __call__(self, x):
        init = nn.initializers
        nn.Dense(3, name="lecun")(x)
        nn.Dense(3, kernel_init=init.normal(0.02), bias_init=init.ones, name="normal")(x)
        nn.Dense(3, kernel_init=init.uniform(1.0), name="uniform")(x)
        nn.DenseGeneral((2, 3), name="general")(x)
        nn.Conv(3, (3, 3), kernel_init=init.he_normal(), name="conv")(jnp.zeros((1, 4, 4, 8)))
        self.param("stack", growing, (3, 64, 64))
        return nn.BatchNorm(use_running_average=True, name="norm")(x)


INITIALIZERS = {  # mean and standard deviation
    "lecun/kernel": (0, 8**-0.5),
    "lecun/bias": (0, 0),
    "normal/kernel": (0, 0.02),
    "normal/bias": (1, 0),
    "uniform/kernel": (0.5, 12**-0.5),
    "general/kernel": (0, 8**-0.5),
    "conv/kernel": (0, (2 / 72) ** 0.5),
    "norm/scale": (1, 0),
}
STACK = (0.1, 0.2, 0.3)


def test_mean_and_standard_deviation_are_those_of_the_models_initializers():
    rules = [
        Rule(paths=(path,), scheme=Tied(), bank=path.replace("/", "-")) for path in INITIALIZERS
    ]
    layout = Plan(*rules, Rule("stack", Tied(), "stack", stack_axis=0)).resolve(Initialized(), X)
    for path, (mean, std) in INITIALIZERS.items():
        (site,) = layout[path.replace("/", "-")].sites
        assert site.mean == pytest.approx(mean, abs=MEASURED * std), path
        assert site.std == pytest.approx(std, rel=MEASURED), path
    stds = [site.std for site in layout["stack"].sites]
    assert stds == pytest.approx(STACK, rel=MEASURED)


def test_kernels_start_with_the_standard_deviation_of_their_layers():
    plan = Plan(Rule("stack", Soft(2), stack_axis=0))
    layout = plan.resolve(Initialized(), X)
    banks, params = layout.init(jax.random.key(0, impl="rbg"))
    kernels = layout.expand({"banks": banks, "params": params})["stack"]
    # Two templates of 4096 normal entries.
    assert jnp.std(kernels, axis=(1, 2)) == pytest.approx(STACK, rel=5 / (2 * 4096) ** 0.5)


def test_measured_statistics_are_the_same_every_time():
    """Equal layouts are equal keys of compiled programs: they must not depend on the trace."""
    plan = Plan(Rule("lecun/kernel", Soft(1)))
    first = plan.resolve(Initialized(), X)
    paramshare.parameters.linen._trace.cache_clear()
    assert plan.resolve(Initialized(), X) == first


@pytest.mark.parametrize(
    "settings", [jax.threefry_partitionable(False), jax.default_prng_impl("rbg")]
)
@pytest.mark.parametrize("traced_before", [False, True])
def test_measured_statistics_do_not_depend_on_prng_settings(settings, traced_before):
    """A trained ring would be rescaled; nor may a trace of one setting break another's."""
    trace = paramshare.parameters.trace
    target: Any = {"kernel": None}
    expected = trace(nn.Dense(8), X).measure(target)
    paramshare.parameters.linen._trace.cache_clear()
    traced = trace(nn.Dense(8), X) if traced_before else None
    with settings:
        assert (traced or trace(nn.Dense(8), X)).measure(target) == expected


@pytest.mark.parametrize(
    "scheme", [Soft(1), Ring(24), Repeat(base=(4, 3)), FilterBasis(2, 1)], ids=str
)
@pytest.mark.parametrize("constant", [0, 1])
def test_schemes_that_cannot_keep_a_constant_refuse_it(scheme, constant):
    dense = nn.Dense(3, kernel_init=nn.initializers.constant(constant))
    message = rf"bank 'shared': kernel starts with mean {constant} and .*initial='paper'"
    with pytest.raises(PlanError, match=message) as caught:
        site_of(dense, "kernel", X, scheme)
    assert "\n" not in str(caught.value)
    assert site_of(dense, "kernel", X, Tied()).mean == constant


def test_schemes_that_cannot_keep_a_mean_refuse_one():
    with pytest.raises(PlanError, match=r"uniform/kernel starts with mean 0\.(49|50)"):
        site_of(Initialized(), "uniform/kernel", X, Soft(1))


def test_the_papers_initialization_measures_nothing(monkeypatch):
    def fail(*_):
        raise AssertionError("the initializers were measured")

    monkeypatch.setattr(paramshare.parameters.linen, "_measure", fail)
    model = nn.Dense(3, kernel_init=nn.initializers.normal(0.5))
    for scheme in (Soft, Ring, Tied, FilterBasis, Repeat):
        arguments: Any = {Soft: (1,), Ring: (24,), Tied: (), FilterBasis: (2, 1)}.get(scheme)
        options: Any = {"base": (4, 3)} if scheme is Repeat else {}
        site = site_of(model, "kernel", X, scheme(*arguments or (), initial="paper", **options))
        assert (site.mean, site.std) == (None, None)
        with pytest.raises(AssertionError, match="measured"):
            site_of(model, "kernel", X, scheme(*arguments or (), **options))


def test_what_another_plan_has_measured_changes_nothing():
    """Equal layers are measured by one draw: which one depends on the plan alone."""
    model = nn.Sequential([nn.Dense(8), nn.Dense(8), nn.Dense(8)])
    paths = [f"layers_{i}/kernel" for i in range(3)]

    def of(traced: Any, *several: str) -> Any:
        return traced.measure(dict.fromkeys(several))

    whole = paramshare.parameters.linen.trace(model, X)
    alone = of(dataclasses.replace(whole, measured={}), *paths)
    assert alone[paths[0]] == alone[paths[2]]
    other = dataclasses.replace(whole, measured={})
    assert of(other, paths[2]) != {paths[2]: alone[paths[2]]}  # draws of its own
    assert of(other, *paths) == alone
