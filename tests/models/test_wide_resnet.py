"""Wide residual networks against a NumPy forward pass, and illegal attributes."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paramshare.models import ModelError, WideResNet
from paramshare.models.layers import convolution
from paramshare.models.wide_resnet import PreActivationBlock

IMAGES = jax.random.normal(jax.random.key(5), (2, 8, 8, 3))


def conv(x, kernel, stride=1):
    """Cross-correlation with symmetric zero padding, as a sum over the kernel's positions."""
    size, half = kernel.shape[0], kernel.shape[0] // 2
    height, width = ((n + 2 * half - size) // stride + 1 for n in x.shape[1:3])
    x = np.pad(x, ((0, 0), (half, half), (half, half), (0, 0)))
    taps = [(i, j) for i in range(size) for j in range(size)]
    return np.sum(
        [
            x[:, i : i + stride * height : stride, j : j + stride * width : stride] @ kernel[i, j]
            for i, j in taps
        ],
        axis=0,
    )


def norm(x, params, stats=None):
    mean, var = (
        (stats["mean"], stats["var"]) if stats else (x.mean(axis=(0, 1, 2)), x.var(axis=(0, 1, 2)))
    )
    return (x - mean) / np.sqrt(var + 1e-5) * params["scale"] + params["bias"]


def relu(x):
    return np.maximum(x, 0)


def filled(model, images):
    """Random variables of a model; a new network has ones and zeros."""
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        around = 1.0 if path[-1].key in ("scale", "var") else 0.0
        return around + rng.normal(size=leaf.shape) * (
            np.sqrt(2 / np.prod(leaf.shape[:-1])) if leaf.ndim > 1 else 0.1
        )

    shapes = jax.eval_shape(
        lambda x: model.init(jax.random.key(0), x), jnp.asarray(images, jnp.float32)
    )
    return jax.tree_util.tree_map_with_path(draw, nn.meta.unbox(shapes))


def float32(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)


def block_by_hand(p, x, stride, s=None):
    o = relu(norm(x, p["bn1"], s and s["bn1"]))
    r = conv(o, p["shortcut"]["kernel"], stride) if "shortcut" in p else x
    o = conv(o, p["conv1"]["kernel"], stride)
    return r + conv(relu(norm(o, p["bn2"], s and s["bn2"])), p["conv2"]["kernel"])


def parts(train: bool):
    return convolution, functools.partial(nn.BatchNorm, use_running_average=not train)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    ("channels", "stride", "size"), [(6, 1, 8), (8, 1, 8), (8, 2, 8), (8, 2, 7), (6, 1, 5)]
)
def test_pre_activation_block(channels, stride, size, train):
    x = np.asarray(jax.random.normal(jax.random.key(0), (2, size, size, 6)), np.float64)
    block = PreActivationBlock(*parts(train), channels, stride)
    variables = filled(block, x)
    assert ("shortcut" in variables["params"]) == (
        channels != 6
    )  # exists only when the width changes
    output, _ = jax.jit(lambda v, x: block.apply(v, x, mutable=["batch_stats"]))(
        float32(variables), float32(x)
    )
    expected = block_by_hand(
        variables["params"], x, stride, None if train else variables["batch_stats"]
    )
    np.testing.assert_allclose(
        output, expected, rtol=2e-4, atol=2e-5
    )  # float32 sums of 9 x 8 terms, against float64


def test_the_whole_network():
    model = WideResNet(depth=16, width=0.25, num_classes=7)
    variables = filled(model, IMAGES)
    p, s = variables["params"], variables["batch_stats"]
    x = conv(np.asarray(IMAGES, np.float64), p["stem"]["kernel"])
    for stage, stride in (("stage1", 1), ("stage2", 2), ("stage3", 2)):
        for name in ("block1", "block2"):
            x = block_by_hand(p[stage][name], x, stride if name == "block1" else 1, s[stage][name])
    assert x.shape == (2, 2, 2, 16)
    expected = (
        relu(norm(x, p["bn"], s["bn"])).mean(axis=(1, 2)) @ p["classifier"]["kernel"]
        + p["classifier"]["bias"]
    )
    np.testing.assert_allclose(
        jax.jit(model.apply)(float32(variables), IMAGES),
        expected,
        rtol=5e-4,
        atol=5e-4 * np.abs(expected).max(),
    )


def test_initialisation_is_he_normal_with_fan_in():
    fast = jax.random.key(0, impl="rbg")  # compiles faster than the default
    params = jax.jit(WideResNet(depth=10, width=4).init)(fast, IMAGES)["params"]
    for path, kernel in jax.tree_util.tree_leaves_with_path(params):
        if path[-1].key == "kernel" and kernel.size > 5000:
            fan_in = kernel.size // kernel.shape[-1]
            unit = np.asarray(kernel, np.float64) / np.sqrt(2 / fan_in)
            assert np.mean(unit**2) == pytest.approx(1, abs=5 * np.sqrt(2 / kernel.size))
            assert np.mean(unit**4) == pytest.approx(
                3, abs=5 * np.sqrt(96 / kernel.size)
            )  # a truncated normal has 2.4
    assert not np.any(params["classifier"]["bias"])
    kernel = params["classifier"]["kernel"]
    assert np.std(kernel) == pytest.approx(np.sqrt(2 / 256), rel=5 / np.sqrt(2 * kernel.size))


def test_feature_maps():
    x = jax.ShapeDtypeStruct((3, 33, 33, 3), jnp.float32)
    model = WideResNet(10, 1)
    logits, state = jax.eval_shape(
        lambda x: model.init_with_output(
            jax.random.key(0), x, capture_intermediates=True, mutable=True
        ),
        x,
    )
    assert logits.shape == (3, 10)
    # Symmetric padding rounds up: 33, 17, 9.
    assert state["intermediates"]["stage3"]["__call__"][0].shape == (3, 9, 9, 64)


def test_bfloat16_compute_keeps_float32_parameters_and_logits():
    model = WideResNet(10, 1, dtype=jnp.bfloat16)
    with jax.numpy_dtype_promotion(
        "standard"
    ):  # Flax's BatchNorm subtracts float32 means from bfloat16 images
        logits, variables = jax.eval_shape(
            lambda x: model.init_with_output(jax.random.key(0), x), IMAGES
        )
    assert {leaf.dtype for leaf in jax.tree.leaves((variables, logits))} == {jnp.dtype(jnp.float32)}


def test_statistics_of_a_cut_batch_are_those_of_the_whole_with_an_axis_name():
    model = WideResNet(10, 0.25, axis_name="device")
    variables = float32(filled(model, IMAGES))
    train = lambda m: lambda v, x: m.apply(v, x, True, mutable=["batch_stats"])  # noqa: E731
    cut = jax.jit(jax.vmap(train(model), (None, 0), axis_name="device"))(variables, IMAGES[:, None])
    whole = jax.jit(train(WideResNet(10, 0.25)))(variables, IMAGES)
    chex.assert_trees_all_close(cut[0][:, 0], whole[0], rtol=1e-3, atol=1e-3)
    # The running mean moves a tenth of the way to the batch's.
    stem = conv(np.asarray(IMAGES, np.float64), np.asarray(variables["params"]["stem"]["kernel"]))
    before, after = (
        np.asarray(v["batch_stats"]["stage1"]["block1"]["bn1"]["mean"])
        for v in (variables, whole[1])
    )
    np.testing.assert_allclose(
        after, 0.9 * before + 0.1 * stem.mean(axis=(0, 1, 2)), rtol=1e-4, atol=1e-5
    )
    chex.assert_trees_all_close(
        jax.tree.map(lambda leaf: leaf[0], cut[1]), whole[1], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("depth", [0, 4, 9, 12, 27, -2])
def test_illegal_depths(depth):
    with pytest.raises(ModelError, match=rf"must be 6 n \+ 4 .*got {depth}, the nearest are"):
        WideResNet(depth, 1).init(jax.random.key(0), IMAGES)


@pytest.mark.parametrize("width", [0, -1, 0.03, 1.01])
def test_illegal_widths(width):
    with pytest.raises(ModelError, match=f"multiple of 1/16; got {width}"):
        WideResNet(10, width).init(jax.random.key(0), IMAGES)


@pytest.mark.parametrize("shape", [(8, 8, 3), (2, 8, 8), (2, 0, 8, 3), (2, 64), ()])
def test_illegal_inputs(shape):
    with pytest.raises(ModelError, match="images must be of shape"):
        WideResNet(10, 1).init(jax.random.key(0), jnp.zeros(shape))
