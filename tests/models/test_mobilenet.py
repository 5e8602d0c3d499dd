"""MobileNetV2 against a NumPy forward pass, its shapes, and illegal attributes."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paramshare.models import MobileNetV2, ModelError
from paramshare.models.layers import convolution
from paramshare.models.mobilenet import InvertedResidual

SIZES = {"cifar": 32, "imagenet": 224}
BLOCKS = {"stage1": 1, "stage2": 2, "stage3": 3, "stage4": 4, "stage5": 3, "stage6": 3, "stage7": 1}
PARTS = {"expand", "bn1", "depthwise", "bn2", "project", "bn3"}
WIDENS = (
    "stage1",
    "stage5",
    "stage6",
    "stage7",
)  # with stride 1: where the CIFAR form has a projection


def conv(x, p, stride=1):
    """Cross-correlation by kernel position; depthwise if the kernel has one input."""
    kernel = p["kernel"]
    size, half = kernel.shape[0], kernel.shape[0] // 2
    height, width = ((n + 2 * half - size) // stride + 1 for n in x.shape[1:3])
    x = np.pad(x, ((0, 0), (half, half), (half, half), (0, 0)))
    total = 0
    for i, j in np.ndindex(size, size):
        tap = x[:, i : i + stride * height : stride, j : j + stride * width : stride]
        total = total + (tap * kernel[i, j, 0] if kernel.shape[2] == 1 else tap @ kernel[i, j])
    return total + p.get("bias", 0)


def norm(x, params, stats=None):
    mean, var = (
        (stats["mean"], stats["var"]) if stats else (x.mean(axis=(0, 1, 2)), x.var(axis=(0, 1, 2)))
    )
    return (x - mean) / np.sqrt(var + 1e-5) * params["scale"] + params["bias"]


def block_by_hand(p, x, stride, most, s=None):
    relu = lambda x: np.clip(x, 0, most)  # noqa: E731
    h = relu(norm(conv(x, p["expand"]), p["bn1"], s and s["bn1"])) if "expand" in p else x
    h = relu(norm(conv(h, p["depthwise"], stride), p["bn2"], s and s["bn2"]))
    h = norm(conv(h, p["project"]), p["bn3"], s and s["bn3"])
    if "shortcut" in p:
        return norm(conv(x, p["shortcut"]), p["shortcut_bn"], s and s["shortcut_bn"]) + h
    return x + h if stride == 1 and x.shape == h.shape else h


def shapes(model, size=None, **options):
    size = size or SIZES[model.stem]
    x = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    return jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x, **options), x)


def filled(shapes):
    """Random variables of these shapes; a new network has ones and zeros."""
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        around = 1.0 if path[-1].key in ("scale", "var") else 0.0
        return around + rng.normal(size=leaf.shape) * (
            np.sqrt(2 / np.prod(leaf.shape[:-1])) if leaf.ndim > 1 else 0.1
        )

    return jax.tree_util.tree_map_with_path(draw, shapes)


def float32(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    ("features", "stride", "projection", "how"),
    [(4, 1, False, "same"), (4, 1, True, "same"), (6, 1, False, "none")],
)
@pytest.mark.parametrize("most", [6, np.inf])
def test_block_of_stride_one(features, stride, projection, how, most, train):
    check_block(features, stride, projection, how, most, train, size=6)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    ("features", "stride", "projection", "how"),
    [(6, 1, True, "projection"), (4, 2, False, "none"), (4, 2, True, "none"), (6, 2, True, "none")],
)
@pytest.mark.parametrize("size", [6, 7])
def test_block_of_other_shortcuts(features, stride, projection, how, size, train):
    check_block(features, stride, projection, how, 6, train, size)


def check_block(features, stride, projection, how, most, train, size):
    x = 4 * np.random.default_rng(0).normal(size=(2, size, size, 4))
    relu, batch_norm = (
        nn.relu6 if most == 6 else nn.relu,
        functools.partial(nn.BatchNorm, use_running_average=not train),
    )
    block = InvertedResidual(convolution, batch_norm, relu, 3, features, stride, projection)
    variables = filled(jax.eval_shape(lambda x: block.init(jax.random.key(0), x), float32(x)))
    p, s = variables["params"], variables["batch_stats"]
    assert set(p) == PARTS | ({"shortcut", "shortcut_bn"} if how == "projection" else set())
    assert p["depthwise"]["kernel"].shape == (3, 3, 1, 12)
    output, _ = jax.jit(lambda v, x: block.apply(v, x, mutable=["batch_stats"]))(
        float32(variables), float32(x)
    )
    expected = block_by_hand(p, x, stride, most, None if train else s)
    np.testing.assert_allclose(
        output, expected, rtol=2e-4, atol=1e-4
    )  # float32, values of 10 and more, against float64


@pytest.mark.parametrize(
    ("stem", "form"), [("cifar", "paper"), ("imagenet", "paper"), ("imagenet", "torchvision")]
)
def test_the_whole_network(stem, form):
    images = np.random.default_rng(0).normal(size=(2, 12, 12, 3))
    model = MobileNetV2(num_classes=7, stem=stem, form=form)
    variables = filled(shapes(model, 12)[1])
    p, s = variables["params"], variables["batch_stats"]
    p["stem_bn"]["scale"] *= 5  # to reach both ends of ReLU6; and so the head, below
    strides = dict(stage2=2, stage3=2, stage4=2) | ({"stage6": 2} if stem == "imagenet" else {})
    x = images if stem == "imagenet" else np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    x = np.clip(
        norm(conv(x, p["stem"], 2 if stem == "imagenet" else 1), p["stem_bn"], s["stem_bn"]), 0, 6
    )
    for stage, blocks in BLOCKS.items():
        assert len(p[stage]) == blocks
        for number in range(1, blocks + 1):
            b, stride = f"block{number}", strides.get(stage, 1) if number == 1 else 1
            assert ("shortcut" in p[stage][b]) == (
                stem == "cifar" and number == 1 and stage in WIDENS
            )
            assert ("expand" in p[stage][b]) == (form == "paper" or stage != "stage1")
            most = 6 if form == "torchvision" else np.inf
            x = block_by_hand(p[stage][b], x, stride, most, s[stage][b])
    assert ("bias" in p["stem"]) == ("bias" in p["head"]) == (form == "paper")
    x = conv(x, p["head"])
    s["head_bn"]["var"][:] = x.var() / 25
    x = norm(x, p["head_bn"], s["head_bn"])
    assert x.shape == (
        2,
        *((1, 1) if stem == "imagenet" else (2, 2)),
        1280,
    )  # 12, 6, 6, 3, 2, 1, 1, 1; 14, 14, 7, 4, 2, 2, 2, 2
    assert np.mean(x > 6) > 0.05 and np.mean((x > 0) & (x < 6)) > 0.05
    expected = (
        np.clip(x, 0, 6).mean(axis=(1, 2)) @ p["classifier"]["kernel"] + p["classifier"]["bias"]
    )
    logits = jax.jit(model.apply)(float32(variables), float32(images))
    # 53 convolutions in float32, one after the other, against float64.
    np.testing.assert_allclose(logits, expected, rtol=5e-4, atol=5e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("stem", "size", "last"),
    [("cifar", 32, 5), ("imagenet", 224, 7), ("cifar", 224, 29), ("imagenet", 32, 1)],
)
def test_output_shapes(stem, size, last):
    logits, state = shapes(MobileNetV2(13, stem), size, capture_intermediates=True, mutable=True)
    assert (logits.shape, logits.dtype) == ((2, 13), jnp.float32)
    # Of 32 pixels: 34, 17, 9, 5; of 224: 112, 56, 28, 14, 7.
    assert state["intermediates"]["stage7"]["__call__"][0].shape == (2, last, last, 320)


def test_bfloat16_compute_keeps_float32_parameters_and_logits():
    with jax.numpy_dtype_promotion(
        "standard"
    ):  # Flax's BatchNorm subtracts float32 means from bfloat16 images
        assert {
            leaf.dtype
            for leaf in jax.tree.leaves(shapes(MobileNetV2(stem="cifar", dtype=jnp.bfloat16)))
        } == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(
    ("stem", "dropout", "rate"),
    [("imagenet", None, 0.2), ("cifar", None, 0), ("cifar", 0.3, 0.3), ("imagenet", 0, 0)],
)
@pytest.mark.parametrize("train", [False, True])
def test_dropout_of_the_mean_features(stem, dropout, rate, train):
    calls = []

    def watch(call, arguments, options, context):
        if isinstance(context.module, nn.Dropout):
            calls.append((context.module.rate, context.module.deterministic, arguments[0].shape))
        return call(*arguments, **options)

    with nn.intercept_methods(watch):
        shapes(MobileNetV2(stem=stem, dropout=dropout), 16, train=train)
    assert calls == [(rate, not train, (2, 1280))]


def test_convolutions_start_he_normal_with_fan_out():
    model = MobileNetV2(stem="cifar")

    @jax.jit  # compiles only what it returns
    def drawn(key):
        params = model.init(key, jnp.zeros((1, 4, 4, 3)))["params"]
        biases = params["stem"]["bias"], params["head"]["bias"]
        return biases, [
            params["stage4"]["block2"][name]["kernel"]
            for name in ("expand", "depthwise", "project")
        ] + [params["head"]["kernel"]]

    biases, kernels = drawn(jax.random.key(0))
    assert [kernel.shape for kernel in kernels] == [
        (1, 1, 64, 384),
        (3, 3, 1, 384),
        (1, 1, 384, 64),
        (1, 1, 320, 1280),
    ]
    for kernel in kernels:
        unit = np.asarray(kernel, np.float64) / np.sqrt(
            2 / (kernel.shape[0] * kernel.shape[1] * kernel.shape[3])
        )
        assert np.mean(unit**2) == pytest.approx(1, abs=5 * np.sqrt(2 / kernel.size))
    assert not np.any(biases[0]) and not np.any(biases[1])


def test_torchvisions_form_has_torchvisions_parameters():
    params = shapes(MobileNetV2(form="torchvision"), 224)[1]["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 3_504_872


def test_unknown_form():
    with pytest.raises(ModelError, match="form='keras'; the form must be 'paper' or 'torchvision'"):
        shapes(MobileNetV2(form="keras"), 32)


def test_unknown_stem():
    with pytest.raises(ModelError, match="stem='CIFAR'; the stem must be 'imagenet' or 'cifar'"):
        shapes(MobileNetV2(stem="CIFAR"), 32)


@pytest.mark.parametrize("dropout", [-0.1, 1, 20])
def test_illegal_dropout(dropout):
    with pytest.raises(ModelError, match=f"dropout={dropout}; .*below 1"):
        shapes(MobileNetV2(dropout=dropout), 32)


@pytest.mark.parametrize("shape", [(8, 8, 3), (2, 0, 8, 3), (2, 64), ()])
def test_illegal_inputs(shape):
    with pytest.raises(ModelError, match="images must be of shape"):
        MobileNetV2(stem="cifar").init(jax.random.key(0), jnp.zeros(shape))
