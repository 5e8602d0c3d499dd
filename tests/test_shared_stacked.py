"""`Shared` with layers stacked by `nn.scan` and `nn.vmap`, boxed parameters, and bfloat16."""

from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paramshare
from paramshare import Plan, Rule, Soft

KEY = jax.random.key(0, impl="rbg")  # compiles faster than the default
X = jax.random.normal(jax.random.key(1), (4, 8))
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # five float32 layers, one after another


SOFT = Soft(2, initial="paper")


class Step(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(nn.Dense(8, name="dense")(x)), None


class Scanned(nn.Module):
    """Five layers in one stacked parameter, between two layers of their own."""

    axis: int = 0
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        step = nn.remat(Step) if self.remat else Step
        layers = nn.scan(step, {"params": self.axis}, split_rngs={"params": True}, length=5)(
            name="layers"
        )
        x, _ = layers(nn.Dense(8, name="first")(x), None)
        return nn.Dense(8, name="last")(x)


@pytest.mark.parametrize(("axis", "remat"), [(0, False), (1, True)])
def test_scanned_layers_share_with_one_another_and_with_others(axis, remat):
    model = Scanned(axis, remat)
    plan = Plan(
        Rule("layers/dense/kernel", SOFT, stack_axis=axis), Rule("(first|last)/kernel", SOFT)
    )
    shared = paramshare.share(model, plan, X)
    sites = [str(site) for site in shared.layout["shared"].sites]
    assert sites == [
        "first/kernel",
        *(f"layers/dense/kernel[{i}]" for i in range(5)),
        "last/kernel",
    ]
    variables = jax.jit(shared.init)(KEY, X)
    stacked = shared.expand(variables)["params"]["layers"]["dense"]["kernel"]
    coefficients = variables["params"]["coefficients"]["shared"]
    assert set(coefficients) == {site.replace("/", ".") for site in sites}
    (templates,) = jax.tree.leaves(variables["banks"])
    kernels = [
        jnp.dot(coefficients[site.replace("/", ".")], templates).reshape(8, 8) for site in sites
    ]
    for i in range(5):
        chex.assert_trees_all_close(
            jnp.take(stacked, i, axis), kernels[1 + i], rtol=1e-6, atol=1e-6
        )
    # By hand: seven layers with these kernels and the biases of the scan.
    private, y = variables["params"]["model"], X
    biases = [
        private["first"]["bias"],
        *private["layers"]["dense"]["bias"],
        private["last"]["bias"],
    ]
    if axis:
        biases[1:-1] = list(private["layers"]["dense"]["bias"].T)
    for i, (kernel, bias) in enumerate(zip(kernels, biases, strict=True)):
        y = y @ kernel + bias[None]
        y = nn.tanh(y) if 0 < i < 6 else y
    chex.assert_trees_all_close(jax.jit(shared.apply)(variables, X), y, **CLOSE)
    chex.assert_trees_all_close(model.apply(shared.expand(variables), X), y, **CLOSE)
    gradient = jax.jit(jax.grad(lambda v: jnp.sum(jnp.asarray(shared.apply(v, X)) ** 2)))(variables)
    for row in gradient["params"]["coefficients"]["shared"].values():
        assert np.any(np.asarray(row) != 0)


def test_layers_stacked_by_vmap():
    class Experts(nn.Module):
        @nn.compact
        def __call__(self, x):
            lift: Any = nn.vmap
            experts = lift(
                nn.Dense,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=None,
                axis_size=3,
            )
            return experts(8, name="experts")(x)

    plan = Plan(Rule("experts/kernel", Soft(1, initial="paper"), stack_axis=0))
    shared = paramshare.share(Experts(), plan, X)
    variables = shared.init(KEY, X)
    assert paramshare.count(variables) == {
        "banks": 64,
        "coefficients": 3,
        "private": 24,
        "trainable": 91,
    }
    output: Any = shared.apply(variables, X)
    chex.assert_trees_all_close(output, Experts().apply(shared.expand(variables), X), **CLOSE)
    # One template: experts are multiples of one another.
    rows = variables["params"]["coefficients"]["shared"]
    scale = [np.asarray(rows[f"experts.kernel[{i}]"]) for i in range(3)]
    np.testing.assert_allclose(
        output[1] * scale[0][None], output[0] * scale[1][None], rtol=1e-5, atol=1e-5
    )


class Boxed(nn.Module):
    """Parameters in boxes that describe their sharding."""

    @nn.compact
    def __call__(self, x):
        init = nn.with_partitioning(nn.initializers.he_normal(), (None, "model"))
        for i in range(3):
            x = nn.Dense(8, kernel_init=init, name=f"dense{i}")(x)
        return x


def test_boxed_parameters():
    shared = paramshare.share(Boxed(), Plan(Rule("dense[01]/kernel", SOFT)), X)
    assert [site.shape for site in shared.layout["shared"].sites] == [(8, 8), (8, 8)]
    variables = shared.init(KEY, X)
    assert isinstance(variables["params"]["model"]["dense2"]["kernel"], nn.Partitioned)
    plain = shared.expand(variables)
    chex.assert_trees_all_close(shared.apply(variables, X), Boxed().apply(plain, X), **CLOSE)
    chex.assert_trees_all_close(
        shared.apply(nn.meta.unbox(variables), X), shared.apply(variables, X), **CLOSE
    )


class Mixed(nn.Module):
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x):
        for i in range(3):
            x = nn.Dense(8, dtype=self.dtype, param_dtype=self.param_dtype, name=f"dense{i}")(x)
        return x


@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
def test_banks_stay_float32_under_bfloat16_compute(param_dtype):
    model = Mixed(jnp.bfloat16, param_dtype)
    shared = paramshare.share(model, Plan(Rule(".*/kernel", SOFT)), X)
    variables = shared.init(KEY, X)
    leaves = jax.tree.leaves((variables["banks"], variables["params"]["coefficients"]))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.float32)}
    plain = shared.expand(variables)
    assert {leaf.dtype for leaf in jax.tree.leaves(plain)} == {jnp.dtype(param_dtype)}
    output: Any = shared.apply(variables, X)
    assert output.dtype == jnp.bfloat16
    chex.assert_trees_all_equal(output, model.apply(plain, X))
    gradient = jax.grad(lambda v: jnp.sum(jnp.asarray(shared.apply(v, X), jnp.float32) ** 2))(
        variables
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(gradient, variables)
