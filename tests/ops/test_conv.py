"""Convolutions in both forms: the same results and derivatives, and only where they apply."""

import contextlib
import functools
import re
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import paramshare
from paramshare import ops
from paramshare.ops import conv

ORDERS = {
    1: ("NWC", "WIO", "NWC"),
    2: ("NHWC", "HWIO", "NHWC"),
    3: ("NDHWC", "DHWIO", "NDHWC"),
}
# Inputs, kernel, strides, padding, kernel dilation, groups.
CASES = {
    "plain": ((3, 7, 8, 4), (3, 3, 4, 6), (1, 1), "SAME", None, 1),
    "valid, strides, dilation": ((3, 9, 8, 4), (3, 3, 4, 6), (2, 1), "VALID", (1, 2), 1),
    "1x1": ((3, 5, 6, 4), (1, 1, 4, 6), (2, 2), "SAME", None, 1),
    "groups": ((5, 9, 8, 4), (3, 2, 2, 6), (2, 2), [(1, 0), (2, 3)], (2, 1), 2),
    "depthwise": ((5, 9, 8, 4), (3, 2, 1, 4), (2, 1), [(1, 0), (2, 3)], (2, 1), 4),
    "several kernels a channel": ((2, 6, 5, 4), (3, 3, 1, 8), (1, 1), "SAME", None, 4),
    "one dimension, negative padding": ((5, 9, 4), (3, 4, 8), (2,), [(-1, 0)], None, 1),
    "three dimensions": ((2, 4, 3, 5, 2), (2, 3, 1, 2, 4), (1, 2, 1), "SAME_LOWER", None, 1),
}


def draw(*shape: int) -> Any:
    return np.random.default_rng(len(shape)).normal(size=shape)


def derivatives(function, lhs, rhs, strides, padding, dilation, groups):
    """The result, and derivatives forwards, backwards and of second order."""
    call = functools.partial(
        function,
        window_strides=strides,
        padding=padding,
        rhs_dilation=dilation,
        dimension_numbers=ORDERS[lhs.ndim - 2],
        feature_group_count=groups,
    )

    def both(lhs, rhs):
        out, pull = jax.vjp(call, lhs, rhs)
        return out, *pull(jnp.cos(out))

    tangents = jnp.sin(lhs), jnp.sin(rhs)
    of_kernel = jax.grad(lambda rhs: jnp.sum(jnp.sin(both(lhs, rhs)[2])))(rhs)
    several = jax.vmap(lambda scale: both(scale * lhs, scale * rhs)[2])(jnp.array([1.0, 0.5]))
    _, forwards = jax.jvp(both, (lhs, rhs), tangents)
    _, constant_input = jax.jvp(lambda rhs: call(lhs, rhs), (rhs,), tangents[1:])
    return *both(lhs, rhs), forwards, constant_input, of_kernel, several


@pytest.mark.parametrize("bytes_at_a_time", [conv.PATCH_BYTES, 3000])
@pytest.mark.parametrize("case", CASES)
def test_results_and_derivatives_are_those_of_xla(monkeypatch, case, bytes_at_a_time):
    monkeypatch.setattr(conv, "PATCH_BYTES", bytes_at_a_time)
    inputs, kernel, *geometry = CASES[case]
    lhs, rhs = draw(*inputs), draw(*kernel)
    of = lambda function: derivatives(function, lhs, rhs, *geometry)  # noqa: E731
    with ops.form("fast"), jax.enable_x64(True):
        result, expected = jax.jit(lambda: (of(ops.convolution), of(lax.conv_general_dilated)))()
    for one, other in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        assert one.dtype == np.float64
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-13 * np.abs(other).max())


@pytest.mark.parametrize("case", ["depthwise", "groups"])
def test_what_users_get_has_the_derivatives_of_xla(case):
    """On a CPU, of a program that could run elsewhere."""
    inputs, kernel, *geometry = CASES[case]
    lhs, rhs = draw(*inputs), draw(*kernel)
    with jax.enable_x64(True):
        result, expected = jax.jit(
            lambda: [
                derivatives(function, lhs, rhs, *geometry)
                for function in (ops.convolution, lax.conv_general_dilated)
            ]
        )()
    for one, other in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-13 * np.abs(other).max())


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_images_smaller_than_the_kernel(groups):
    lhs, rhs = jnp.ones((1, 1, 2, 4)), jnp.ones((3, 3, 4 // groups, 4))

    def total(rhs):
        out = ops.convolution(
            lhs, rhs, (1, 1), "VALID", dimension_numbers=ORDERS[2], feature_group_count=groups
        )
        assert 0 in out.shape
        return out.sum()

    np.testing.assert_array_equal(jax.grad(total)(rhs), jnp.zeros_like(rhs))


def test_a_kernel_that_does_not_fit_is_refused_in_every_form():
    lhs, rhs = jnp.ones((1, 5, 5, 4)), jnp.ones((3, 3, 2, 4))
    for form in ops.FORMS:
        with ops.form(form), pytest.raises(ValueError, match="feature_group_count"):
            ops.convolution(
                lhs, rhs, (1, 1), "SAME", dimension_numbers=ORDERS[2], feature_group_count=4
            )


def text(form: ops.Form, lhs: Any, rhs: Any, **given: Any) -> str:
    """The program of the gradient of the kernel."""
    options: Any = {"dimension_numbers": ORDERS[2]} | given

    def gradient(lhs, rhs):
        call = lambda rhs: ops.convolution(lhs, rhs, (1, 1), [(1, 1)] * 2, **options)  # noqa: E731
        return jax.vjp(call, rhs)[1](call(rhs))

    with ops.form(form):
        return re.sub("0x[0-9a-f]+", "", str(jax.make_jaxpr(gradient)(lhs, rhs)))


def test_patches_are_used_where_they_pay(monkeypatch):
    image, large = jnp.ones((1, 8, 8, 4)), jnp.ones((256, 8, 8, 4))
    kernel, grouped, single = jnp.ones((3, 3, 4, 4)), jnp.ones((3, 3, 2, 4)), jnp.ones((1, 1, 4, 4))
    xla = text("xla", image, kernel)
    assert "concatenate" not in xla and "conv_general_dilated" in xla
    uses = {
        "few places": text("auto", image, kernel),
        "many places": text("auto", large, kernel),
        "groups": text("auto", image, grouped, feature_group_count=2),
        "1x1": text("auto", image, single),
        "all": text("fast", image, kernel),
    }
    # The gradient by XLA is a convolution, that by patches a product.
    assert {name: "dot_general" in program for name, program in uses.items()} == {
        "few places": False,
        "many places": True,
        "groups": True,
        "1x1": True,
        "all": True,
    }
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert "dot_general" not in text("auto", large, kernel)
    assert "dot_general" in text("fast", large, kernel)


@pytest.mark.parametrize(
    "options",
    [
        {"dimension_numbers": ("NCHW", "OIHW", "NCHW")},
        {"lhs_dilation": (2, 2)},
        {"batch_group_count": 2},
        {"preferred_element_type": jnp.float32},
    ],
)
def test_other_convolutions_are_left_to_xla(options):
    square = jnp.ones((4, 4, 4, 4))
    assert text("fast", square, square, **options) == text("xla", square, square, **options)
    half = square.astype(jnp.bfloat16)
    assert text("fast", half, half) == text("xla", half, half)


def test_patches_are_not_kept_for_the_backward_pass():
    """Nothing between the two passes is larger than the images."""
    lhs, rhs = jnp.ones((64, 8, 8, 4)), jnp.ones((3, 3, 4, 4))

    def call(lhs, rhs):
        return ops.convolution(lhs, rhs, (1, 1), "SAME", dimension_numbers=ORDERS[2])

    with ops.form("fast"):
        _, pull = jax.eval_shape(lambda: jax.vjp(call, lhs, rhs))
    assert max(leaf.size for leaf in jax.tree.leaves(pull)) <= lhs.size


def test_a_depthwise_convolution_runs_on_any_platform_that_it_is_exported_to():
    call = functools.partial(
        ops.convolution, window_strides=(1, 1), padding="SAME", feature_group_count=4,
        dimension_numbers=ORDERS[2],
    )  # fmt: skip
    shapes = (
        jax.ShapeDtypeStruct((2, 8, 8, 4), jnp.float32),
        jax.ShapeDtypeStruct((3, 3, 1, 4), jnp.float32),
    )
    exported = jax.export.export(jax.jit(call), platforms=("cpu", "tpu"))(*shapes)
    lhs, rhs = jnp.float32(draw(2, 8, 8, 4)), jnp.float32(draw(3, 3, 1, 4))
    with ops.form("xla"):
        expected = call(lhs, rhs)
    np.testing.assert_allclose(exported.call(lhs, rhs), expected, atol=1e-5)
    assert "convolution" in exported.mlir_module()  # what the TPU runs


def test_flax_takes_it():
    layer = nn.Conv(6, (3, 3), strides=2, conv_general_dilated_cls=lambda: ops.convolution)
    x = jnp.float32(draw(2, 8, 8, 4))
    variables = layer.init(jax.random.key(0), x)
    results = []
    for form in ops.FORMS:
        with ops.form(form):
            apply: Any = layer.apply
            loss = lambda v: jnp.sum(jnp.square(apply(v, x)))  # noqa: E731, B023
            results.append(jax.jit(jax.grad(loss))(variables))
    for result in results:  # entries of up to 25, sums of about a hundred products
        chex.assert_trees_all_close(result, results[0], rtol=0, atol=5e-5)


@pytest.mark.parametrize("shared", [True, False])
def test_an_unmodified_model_borrows_it(shared):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(4, (1, 1), name="first")(x)
            return nn.Conv(4, (1, 1), conv_general_dilated_cls=lambda: counted, name="second")(x)

    calls = []

    def counted(*args, **options):
        calls.append(options)
        return lax.conv_general_dilated(*args, **options)

    x, model = jnp.float32(draw(2, 8, 8, 4)), Model()
    context = contextlib.nullcontext()
    if shared:
        plan = paramshare.Plan(paramshare.Rule(".*/kernel", paramshare.Soft(1)))
        models = [
            paramshare.share(model, plan, x, fast_convolutions=fast) for fast in (False, True)
        ]
        assert repr(models[0]) == repr(models[1])
        plain, model = models
    else:
        plain, context = model, ops.fast_convolutions()
    variables = plain.init(jax.random.key(0), x)

    def program(model):
        loss = lambda variables: jnp.sum(jnp.square(model.apply(variables, x)))  # noqa: E731
        return jax.jit(jax.grad(loss))(variables), str(jax.make_jaxpr(jax.grad(loss))(variables))

    expected, text = program(plain)
    calls.clear()
    with context:
        result, fast_text = program(model)
    chex.assert_trees_all_close(result, expected, rtol=1e-5, atol=1e-4)
    # The gradient of the first layer's kernel has become a product; the second kept its own.
    assert fast_text.count("conv_general_dilated[") == text.count("conv_general_dilated[") - 1
    assert calls


def test_an_unknown_form_is_named():
    match = r"ops\.form\('slow'\); the form must be one of auto, xla, fast"
    with pytest.raises(ops.OpsError, match=match), ops.form("slow"):  # pyright: ignore
        pass


def test_a_jitted_function_is_traced_anew_in_another_form():
    gradient = jax.jit(
        jax.grad(
            lambda rhs: jnp.sum(
                ops.convolution(
                    jnp.ones((1, 4, 4, 2)), rhs, (1, 1), "SAME", dimension_numbers=ORDERS[2]
                )
            )
        )
    )
    programs = []
    for name in ("fast", "xla", "fast"):
        with ops.form(name):
            programs.append("dot_general" in str(gradient.trace(jnp.ones((3, 3, 2, 2))).jaxpr))
    assert programs == [True, False, True]
