"""Dense networks against a NumPy forward pass, their shapes, and illegal attributes."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paramshare.models import DenseNet, ModelError
from paramshare.models.densenet import DenseLayer, Transition
from paramshare.models.layers import convolution

SIZES = {"cifar": 32, "imagenet": 224}


def conv(x, p, stride=1):
    """Cross-correlation with symmetric zero padding, as a sum over the kernel's positions."""
    kernel = p["kernel"]
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


def mean_pool(x):
    """2x2 means; an odd last row or column is left out."""
    batch, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2].reshape(
        batch, height // 2, 2, width // 2, 2, channels
    )
    return x.mean(axis=(2, 4))


def max_pool(x):
    """3x3 with stride 2, a frame of one pixel that never wins."""
    height, width = ((n - 1) // 2 + 1 for n in x.shape[1:3])
    x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    taps = [
        x[:, i : i + 2 * height : 2, j : j + 2 * width : 2][:, :height, :width]
        for i in range(3)
        for j in range(3)
    ]
    return np.max(taps, axis=0)


def layer_by_hand(p, x, s=None):
    h = conv(relu(norm(x, p["bn1"], s and s["bn1"])), p["conv1"])
    h = relu(norm(h, p["bn2"], s and s["bn2"]))
    if "basis" in p:
        h = conv(norm(conv(h, p["basis"]), p["basis_bn"], s and s["basis_bn"]), p["coefficients"])
    else:
        h = conv(h, p["conv2"])
    return np.concatenate([x, h], axis=-1)


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


def names(params):
    return {
        "/".join(key.key for key in path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }


def parts(train: bool):
    return convolution, functools.partial(nn.BatchNorm, use_running_average=not train)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("rank", [0, 3])
def test_layer(rank, train):
    x = np.random.default_rng(0).normal(size=(2, 6, 6, 5))
    layer = DenseLayer(*parts(train), 4, rank)
    variables = filled(jax.eval_shape(lambda x: layer.init(jax.random.key(0), x), float32(x)))
    p, s = variables["params"], variables["batch_stats"]
    assert set(p) == {"bn1", "conv1", "bn2"} | (
        {"basis", "basis_bn", "coefficients"} if rank else {"conv2"}
    )
    assert p["basis" if rank else "conv2"]["kernel"].shape == (3, 3, 16, rank or 4)
    output, _ = jax.jit(lambda v, x: layer.apply(v, x, mutable=["batch_stats"]))(
        float32(variables), float32(x)
    )
    expected = layer_by_hand(p, x, None if train else s)
    np.testing.assert_allclose(
        output, expected, rtol=2e-4, atol=2e-5
    )  # float32 sums of 9 x 16 terms, against float64


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(("channels", "size", "relu_"), [(6, 6, False), (7, 5, True)])
def test_transition(channels, size, relu_, train):
    x = np.random.default_rng(0).normal(size=(2, size, size, channels))
    transition = Transition(*parts(train), relu_)
    variables = filled(jax.eval_shape(lambda x: transition.init(jax.random.key(0), x), float32(x)))
    p, s = variables["params"], variables["batch_stats"]
    output, _ = jax.jit(lambda v, x: transition.apply(v, x, mutable=["batch_stats"]))(
        float32(variables), float32(x)
    )
    h = norm(x, p["bn"], None if train else s["bn"])
    expected = mean_pool(conv(relu(h) if relu_ else h, p["conv"]))
    assert expected.shape == (2, size // 2, size // 2, 3)
    np.testing.assert_allclose(output, expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("stem", "size", "last"), [("cifar", 8, 2), ("imagenet", 32, 2), ("imagenet", 29, 2)]
)
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("form", ["paper", "torchvision"])
def test_the_whole_network(stem, size, last, rank, form):
    images = np.random.default_rng(0).normal(size=(2, size, size, 3))
    model = DenseNet((2, 1, 2), growth=4, rank=rank, num_classes=7, stem=stem, form=form)
    variables = filled(shapes(model, size)[1])
    p, s = variables["params"], variables["batch_stats"]
    if stem == "cifar":
        x = conv(images, p["stem"])
    else:
        x = max_pool(relu(norm(conv(images, p["stem"], 2), p["stem_bn"], s["stem_bn"])))
    for stage, layers in (("stage1", 2), ("stage2", 1), ("stage3", 2)):
        for name in [f"layer{number + 1}" for number in range(layers)]:
            x = layer_by_hand(p[stage][name], x, s[stage][name])
        if stage != "stage3":
            transition = f"transition{stage[-1]}"
            h = norm(x, p[transition]["bn"], s[transition]["bn"])
            x = mean_pool(conv(relu(h) if form == "torchvision" else h, p[transition]["conv"]))
    # 8 channels and 2 x 4 more; half of these and 4 more; half of these and 2 x 4 more.
    assert x.shape == (2, last, last, 14)
    expected = (
        relu(norm(x, p["bn"], s["bn"])).mean(axis=(1, 2)) @ p["classifier"]["kernel"]
        + p["classifier"]["bias"]
    )
    logits = jax.jit(model.apply)(float32(variables), float32(images))
    np.testing.assert_allclose(logits, expected, rtol=5e-4, atol=5e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("stem", "size", "last"),
    [("cifar", 32, 4), ("imagenet", 224, 7), ("cifar", 224, 28), ("imagenet", 32, 1)],
)
def test_output_shapes(stem, size, last):
    logits, state = shapes(
        DenseNet(num_classes=13, stem=stem), size, capture_intermediates=True, mutable=True
    )
    assert (logits.shape, logits.dtype) == ((2, 13), jnp.float32)
    assert state["intermediates"]["stage4"]["__call__"][0].shape == (2, last, last, 1024)


def test_bfloat16_compute_keeps_float32_parameters_and_logits():
    model = DenseNet((1, 1), growth=4, rank=2, stem="cifar", dtype=jnp.bfloat16)
    with jax.numpy_dtype_promotion(
        "standard"
    ):  # Flax's BatchNorm subtracts float32 means from bfloat16 images
        logits, variables = shapes(model, capture_intermediates=True, mutable=True)
    computed = variables.pop("intermediates")
    assert {leaf.dtype for leaf in jax.tree.leaves((variables, logits))} == {jnp.dtype(jnp.float32)}
    assert computed["stage2"]["__call__"][0].dtype == jnp.bfloat16


def test_convolutions_start_he_normal_with_fan_out():
    model = DenseNet((1,), growth=32, stem="cifar")
    params = jax.jit(
        lambda key: model.init(key, jnp.zeros((1, 4, 4, 3)))["params"]["stage1"]["layer1"]
    )(jax.random.key(0))
    for name, shape in (("conv1", (1, 1, 64, 128)), ("conv2", (3, 3, 128, 32))):
        kernel = params[name]["kernel"]
        assert kernel.shape == shape
        unit = np.asarray(kernel, np.float64) / np.sqrt(2 / (shape[0] * shape[1] * shape[3]))
        assert np.mean(unit**2) == pytest.approx(1, abs=5 * np.sqrt(2 / kernel.size))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stem": "CIFAR"}, "stem='CIFAR'; the stem must be 'imagenet' or 'cifar'"),
        ({"form": "keras"}, "form='keras'; the form must be 'paper' or 'torchvision'"),
        ({"blocks": ()}, r"at least one stage, .*got blocks=\(\), growth=32"),
        ({"blocks": (6, 0)}, r"one layer per stage.*got blocks=\(6, 0\)"),
        ({"growth": 0}, "a growth of 1; got .*growth=0"),
        ({"rank": -1}, "rank=-1; .*or 0 for"),
        (
            {"rank": 145, "growth": 4},
            "rank=145; the rank of 3x3 kernels over 16 channels must be 1 to 144",
        ),
    ],
)
def test_illegal_attributes(options, message):
    with pytest.raises(ModelError, match=message):
        shapes(DenseNet(**options), 32)


@pytest.mark.parametrize(
    ("model", "size", "least", "message"),
    [
        (
            DenseNet(stem="cifar"),
            7,
            8,
            "images of 7x7 are too small: .* 7x7, and 3 transitions need at least 8 pixels",
        ),
        (DenseNet(), 28, 29, "images of 28x28 are too small: the stem's output is 7x7"),
        (
            DenseNet((1, 1)),
            4,
            5,
            "images of 4x4 are too small: .* 1x1, and 1 transitions need at least 2 pixels",
        ),
    ],
)
def test_images_too_small_for_the_transitions(model, size, least, message):
    with pytest.raises(ModelError, match=message):
        shapes(model, size)
    assert shapes(model, least)[0].shape == (2, 1000)


@pytest.mark.parametrize("shape", [(8, 8, 3), (2, 0, 8, 3), (2, 64), ()])
def test_illegal_inputs(shape):
    with pytest.raises(ModelError, match="images must be of shape"):
        DenseNet(stem="cifar").init(jax.random.key(0), jnp.zeros(shape))
