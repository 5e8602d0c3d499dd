"""ResNeXt against a NumPy forward pass, its shapes, and illegal attributes."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paramshare.models import ModelError, ResNeXt
from paramshare.models.layers import convolution
from paramshare.models.resnext import GroupedBasisBlock, GroupedBlock

SIZES = {"cifar": 32, "imagenet": 224}


def conv(x, p, stride=1, groups=1):
    """Grouped cross-correlation with zero padding, as a sum over the kernel's positions."""
    kernel = p["kernel"]
    size, half = kernel.shape[0], kernel.shape[0] // 2
    height, width = ((n + 2 * half - size) // stride + 1 for n in x.shape[1:3])
    x = np.pad(x, ((0, 0), (half, half), (half, half), (0, 0)))
    outputs = []
    for x_group, kernel_group in zip(
        np.split(x, groups, axis=-1), np.split(kernel, groups, axis=-1), strict=True
    ):
        taps = [(i, j) for i in range(size) for j in range(size)]
        rows, columns = stride * height, stride * width
        products = [
            x_group[:, i : i + rows : stride, j : j + columns : stride] @ kernel_group[i, j]
            for i, j in taps
        ]
        outputs.append(np.sum(products, axis=0))
    return np.concatenate(outputs, axis=-1)


def norm(x, params, stats=None):
    mean, var = (
        (stats["mean"], stats["var"]) if stats else (x.mean(axis=(0, 1, 2)), x.var(axis=(0, 1, 2)))
    )
    return (x - mean) / np.sqrt(var + 1e-5) * params["scale"] + params["bias"]


def relu(x):
    return np.maximum(x, 0)


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


def block_by_hand(p, x, stride, groups, s=None):
    """`groups` of `conv2`, or by name of the convolutions that replace it."""
    s = s or {}
    r = (
        norm(conv(x, p["shortcut"], stride), p["shortcut_bn"], s.get("shortcut_bn"))
        if "shortcut" in p
        else x
    )
    h = relu(norm(conv(x, p["conv1"]), p["bn1"], s.get("bn1")))
    if "conv2" in p:
        h = relu(norm(conv(h, p["conv2"], stride, groups), p["bn2"], s.get("bn2")))
    else:
        h = np.concatenate(
            [conv(h, p[name], 1, groups[name]) for name in groups if name in p],
            axis=-1,
        )
        h = relu(norm(h, p["basis_bn"], s.get("basis_bn")))
    return relu(r + norm(conv(h, p["conv3"]), p["bn3"], s.get("bn3")))


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


def check_block(block, x, stride, groups, train, parts):
    variables = filled(jax.eval_shape(lambda x: block.init(jax.random.key(0), x), float32(x)))
    p, s = variables["params"], variables["batch_stats"]
    assert set(p) == {"conv1", "bn1", "conv3", "bn3", *parts}
    output, _ = jax.jit(lambda v, x: block.apply(v, x, mutable=["batch_stats"]))(
        float32(variables), float32(x)
    )
    expected = block_by_hand(p, x, stride, groups, None if train else s)
    np.testing.assert_allclose(
        output, expected, rtol=2e-4, atol=2e-5
    )  # float32 sums of 9 x 16 terms at most, against float64


def norm_layer(train):
    return functools.partial(nn.BatchNorm, use_running_average=not train)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    ("channels", "stride", "size"), [(12, 1, 6), (10, 1, 6), (12, 2, 6), (10, 2, 7)]
)
def test_grouped_block(channels, stride, size, train):
    x = np.random.default_rng(0).normal(size=(2, size, size, channels))
    shortcut = [] if (channels, stride) == (12, 1) else ["shortcut", "shortcut_bn"]
    check_block(
        GroupedBlock(convolution, norm_layer(train), 12, 8, 4, stride),
        x,
        stride,
        4,
        train,
        ["conv2", "bn2", *shortcut],
    )


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [
        dict(unique=(8, 2), shared=(12, 4)),
        dict(unique=(4, 1), shared=(16, 4)),
        dict(shared=(8, 2)),
        dict(unique=(8, 2)),
    ],
)
def test_grouped_basis_block(sizes, train):
    x = np.random.default_rng(0).normal(size=(2, 6, 6, 12))
    filters = tuple((name, *size) for name, size in sizes.items())
    block = GroupedBasisBlock(convolution, norm_layer(train), 12, 16, filters)
    check_block(
        block,
        x,
        1,
        {name: groups for name, (_, groups) in sizes.items()},
        train,
        ["basis_bn", *sizes],
    )


@pytest.mark.parametrize(
    ("stem", "size", "basis"),
    [
        ("cifar", 6, dict(shared=8, unique=4)),
        ("cifar", 6, dict(shared=8)),
        ("cifar", 6, dict(unique=4)),
        ("imagenet", 13, {}),
    ],
)
def test_the_whole_network(stem, size, basis):
    images = np.random.default_rng(0).normal(size=(2, size, size, 3))
    model = ResNeXt((2, 2), groups=4, group_width=2, num_classes=7, stem=stem, **basis)
    variables = filled(shapes(model, size)[1])
    p, s = variables["params"], variables["batch_stats"]
    x = relu(norm(conv(images, p["stem"], 1 if stem == "cifar" else 2), p["bn"], s["bn"]))
    x = x if stem == "cifar" else max_pool(x)
    x = block_by_hand(p["stage1"]["block1"], x, 1, 4, s["stage1"]["block1"])
    x = block_by_hand(
        p["stage1"]["block2"],
        x,
        1,
        dict(unique=1, shared=2) if basis else 4,
        s["stage1"]["block2"],
    )
    x = block_by_hand(p["stage2"]["block1"], x, 2, 4, s["stage2"]["block1"])
    x = block_by_hand(
        p["stage2"]["block2"],
        x,
        1,
        dict(unique=2, shared=2) if basis else 4,
        s["stage2"]["block2"],
    )
    assert x.shape == (2, *((3, 3) if stem == "cifar" else (2, 2)), 512)  # 13 pixels become 7, 4, 2
    expected = x.mean(axis=(1, 2)) @ p["classifier"]["kernel"] + p["classifier"]["bias"]
    logits = jax.jit(model.apply)(float32(variables), float32(images))
    np.testing.assert_allclose(logits, expected, rtol=5e-4, atol=5e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("g", "expected"),
    [
        # inputs of a group, filters: u 2^g in u 2^g / 4 groups, s 2^g in s / 4 groups
        (0, dict(unique=(128, 4), shared=(8, 64))),
        (1, dict(unique=(128, 8), shared=(16, 128))),
        (2, dict(unique=(128, 16), shared=(32, 256))),
        (3, dict(unique=(128, 32), shared=(64, 512))),
    ],
)
def test_filters_and_groups(g, expected):
    stage = names(shapes(ResNeXt(shared=64, unique=4, stem="cifar"))[1]["params"][f"stage{g + 1}"])
    blocks = (3, 4, 6, 3)[g]
    for kind, shape in expected.items():
        kernels = {name: shape for name, shape in stage.items() if name.endswith(f"{kind}/kernel")}
        assert kernels == {
            f"block{number}/{kind}/kernel": (3, 3, *shape) for number in range(2, blocks + 1)
        }
    assert [name for name in stage if name.endswith("conv2/kernel")] == ["block1/conv2/kernel"]


@pytest.mark.parametrize("basis", [{}, dict(shared=64, unique=4)])
@pytest.mark.parametrize(
    ("stem", "size", "last"),
    [("cifar", 32, 4), ("imagenet", 224, 7), ("cifar", 224, 28), ("imagenet", 32, 1)],
)
def test_output_shapes(stem, size, last, basis):
    logits, state = shapes(
        ResNeXt(num_classes=13, stem=stem, **basis),
        size,
        capture_intermediates=True,
        mutable=True,
    )
    assert (logits.shape, logits.dtype) == ((2, 13), jnp.float32)
    assert state["intermediates"]["stage4"]["__call__"][0].shape == (2, last, last, 2048)


def test_bfloat16_compute_keeps_float32_parameters_and_logits():
    model = ResNeXt((2,), shared=8, unique=4, stem="cifar", dtype=jnp.bfloat16)
    with jax.numpy_dtype_promotion(
        "standard"
    ):  # Flax's BatchNorm subtracts float32 means from bfloat16 images
        logits, variables = shapes(model, capture_intermediates=True, mutable=True)
    computed = variables.pop("intermediates")
    assert {leaf.dtype for leaf in jax.tree.leaves((variables, logits))} == {jnp.dtype(jnp.float32)}
    assert computed["stage1"]["__call__"][0].dtype == jnp.bfloat16


def test_convolutions_start_he_normal_with_fan_out():
    model = ResNeXt((2,), shared=64, unique=32, stem="cifar")

    @jax.jit  # compiles only what it returns
    def drawn(key):
        params = model.init(key, jnp.zeros((1, 4, 4, 3)))["params"]["stage1"]
        return [
            params["block1"]["conv2"]["kernel"],
            *(
                params["block2"][convolution]["kernel"]
                for convolution in dict(unique=32, shared=64, conv3=256)
            ),
        ]

    kernels = drawn(jax.random.key(0))
    assert [kernel.shape for kernel in kernels] == [
        (3, 3, 4, 128),
        (3, 3, 16, 32),
        (3, 3, 8, 64),
        (1, 1, 96, 256),
    ]
    for kernel in kernels:
        unit = np.asarray(kernel, np.float64) / np.sqrt(
            2 / (kernel.shape[0] * kernel.shape[1] * kernel.shape[3])
        )
        assert np.mean(unit**2) == pytest.approx(1, abs=5 * np.sqrt(2 / kernel.size))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stem": "CIFAR"}, "stem='CIFAR'; the stem must be 'imagenet' or 'cifar'"),
        ({"blocks": ()}, r"at least one stage, .*got blocks=\(\)"),
        ({"blocks": (3, 0)}, r"one block per stage, .*got blocks=\(3, 0\)"),
        ({"groups": 0}, "one group and one channel per group; got .*groups=0"),
        ({"group_width": 0}, "one group and one channel per group; got .*group_width=0"),
        (dict(unique=6), "unique=6; .*must be a multiple of 4"),
        (dict(unique=-4), "unique=-4; .*or 0 for none"),
        ({"shared": 2}, "shared=2; the number of filters must be a multiple of 4"),
        (
            {"shared": 12},
            "shared=12 makes 3 groups in stage 1, which do not divide its 128 channels",
        ),
        (dict(unique=12, shared=64), "unique=12 makes 3 groups in stage 1"),
    ],
)
def test_illegal_attributes(options, message):
    with pytest.raises(ModelError, match=message):
        shapes(ResNeXt(**options), 32)


@pytest.mark.parametrize("shape", [(8, 8, 3), (2, 0, 8, 3), (2, 64), ()])
def test_illegal_inputs(shape):
    with pytest.raises(ModelError, match="images must be of shape"):
        ResNeXt(stem="cifar").init(jax.random.key(0), jnp.zeros(shape))
