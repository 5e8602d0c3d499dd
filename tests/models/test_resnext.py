"""ResNeXt against a forward pass written by hand, the published counts, and what it refuses."""

import functools
import math
import re

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
    """Cross-correlation as a sum over the taps of the kernel; a group of outputs sees its own group of inputs only."""
    kernel = p["kernel"]
    size, half = kernel.shape[0], kernel.shape[0] // 2
    height, width = ((n + 2 * half - size) // stride + 1 for n in x.shape[1:3])
    x = np.pad(x, ((0, 0), (half, half), (half, half), (0, 0)))
    outputs = []
    for x_group, kernel_group in zip(np.split(x, groups, axis=-1), np.split(kernel, groups, axis=-1), strict=True):
        taps = [(i, j) for i in range(size) for j in range(size)]
        tap = lambda i, j: x_group[:, i : i + stride * height : stride, j : j + stride * width : stride]  # noqa: B023, E731
        outputs.append(np.sum([tap(i, j) @ kernel_group[i, j] for i, j in taps], axis=0))
    return np.concatenate(outputs, axis=-1)


def norm(x, params, stats=None):
    mean, var = (stats["mean"], stats["var"]) if stats else (x.mean(axis=(0, 1, 2)), x.var(axis=(0, 1, 2)))
    return (x - mean) / np.sqrt(var + 1e-5) * params["scale"] + params["bias"]


def relu(x):
    return np.maximum(x, 0)


def max_pool(x):
    """3x3 with stride 2, a frame of one pixel that never wins."""
    height, width = ((n - 1) // 2 + 1 for n in x.shape[1:3])
    x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    taps = [x[:, i : i + 2 * height : 2, j : j + 2 * width : 2][:, :height, :width] for i in range(3) for j in range(3)]
    return np.max(taps, axis=0)


def block_by_hand(p, x, stride, groups, s=None):
    """`groups` of conv2, or of unique and shared."""
    s = s or {}
    r = norm(conv(x, p["shortcut"], stride), p["shortcut_bn"], s.get("shortcut_bn")) if "shortcut" in p else x
    h = relu(norm(conv(x, p["conv1"]), p["bn1"], s.get("bn1")))
    if "conv2" in p:
        h = relu(norm(conv(h, p["conv2"], stride, groups), p["bn2"], s.get("bn2")))
    else:
        h = np.concatenate([conv(h, p[name], 1, groups[name]) for name in ("unique", "shared") if name in p], axis=-1)
        h = relu(norm(h, p["basis_bn"], s.get("basis_bn")))
    return relu(r + norm(conv(h, p["conv3"]), p["bn3"], s.get("bn3")))


def shapes(model, size=None, **options):
    size = size or SIZES[model.stem]
    x = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    return jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x, **options), x)


def filled(shapes):
    """Variables of these shapes, all of them at random: no fresh network's ones and zeros."""
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        around = 1.0 if path[-1].key in ("scale", "var") else 0.0
        return around + rng.normal(size=leaf.shape) * (np.sqrt(2 / np.prod(leaf.shape[:-1])) if leaf.ndim > 1 else 0.1)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def float32(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)


def names(params):
    return {"/".join(key.key for key in path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def trainable(model, tied=None):
    """Numbers in the parameters, those at paths that match with equal groups once."""
    found = {}
    for name, shape in names(shapes(model)[1]["params"]).items():
        match = re.fullmatch(tied, name) if tied else None
        key = match.groups() if match else name
        assert found.setdefault(key, shape) == shape  # what is tied has one shape
    return sum(map(math.prod, found.values()))


def check_block(block, x, stride, groups, train, parts):
    variables = filled(jax.eval_shape(lambda x: block.init(jax.random.key(0), x), float32(x)))
    p, s = variables["params"], variables["batch_stats"]
    assert set(p) == {"conv1", "bn1", "conv3", "bn3", *parts}
    output, _ = jax.jit(lambda v, x: block.apply(v, x, mutable=["batch_stats"]))(float32(variables), float32(x))
    wanted = block_by_hand(p, x, stride, groups, None if train else s)
    np.testing.assert_allclose(output, wanted, rtol=2e-4, atol=2e-5)  # float32 sums of 9 x 16 terms at most, against float64


def norm_layer(train):
    return functools.partial(nn.BatchNorm, use_running_average=not train)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(("channels", "stride", "size"), [(12, 1, 6), (10, 1, 6), (12, 2, 6), (10, 2, 7)])
def test_grouped_block(channels, stride, size, train):
    x = np.random.default_rng(0).normal(size=(2, size, size, channels))
    shortcut = [] if (channels, stride) == (12, 1) else ["shortcut", "shortcut_bn"]
    check_block(GroupedBlock(convolution, norm_layer(train), 12, 8, 4, stride), x, stride, 4, train, ["conv2", "bn2", *shortcut])


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    "filters", [(("unique", 8, 2), ("shared", 12, 4)), (("unique", 4, 1), ("shared", 16, 4)), (("shared", 8, 2),), (("unique", 8, 2),)]
)
def test_grouped_basis_block(filters, train):
    x = np.random.default_rng(0).normal(size=(2, 6, 6, 12))
    block = GroupedBasisBlock(convolution, norm_layer(train), 12, 16, filters)
    check_block(block, x, 1, {name: groups for name, _, groups in filters}, train, ["basis_bn", *(name for name, *_ in filters)])


@pytest.mark.parametrize(
    ("stem", "size", "shared", "unique"), [("cifar", 6, 8, 4), ("cifar", 6, 8, 0), ("cifar", 6, 0, 4), ("imagenet", 13, 0, 0)]
)
def test_the_whole_network(stem, size, shared, unique):
    images = np.random.default_rng(0).normal(size=(2, size, size, 3))
    model = ResNeXt((2, 2), groups=4, group_width=2, shared=shared, unique=unique, num_classes=7, stem=stem)
    variables = filled(shapes(model, size)[1])
    p, s = variables["params"], variables["batch_stats"]
    x = relu(norm(conv(images, p["stem"], 1 if stem == "cifar" else 2), p["bn"], s["bn"]))
    x = x if stem == "cifar" else max_pool(x)
    x = block_by_hand(p["stage1"]["block1"], x, 1, 4, s["stage1"]["block1"])
    x = block_by_hand(p["stage1"]["block2"], x, 1, {"unique": 1, "shared": 2} if shared or unique else 4, s["stage1"]["block2"])
    x = block_by_hand(p["stage2"]["block1"], x, 2, 4, s["stage2"]["block1"])
    x = block_by_hand(p["stage2"]["block2"], x, 1, {"unique": 2, "shared": 2} if shared or unique else 4, s["stage2"]["block2"])
    assert x.shape == (2, *((3, 3) if stem == "cifar" else (2, 2)), 512)  # 13 pixels become 7, 4, 2
    wanted = x.mean(axis=(1, 2)) @ p["classifier"]["kernel"] + p["classifier"]["bias"]
    logits = jax.jit(model.apply)(float32(variables), float32(images))
    np.testing.assert_allclose(logits, wanted, rtol=5e-4, atol=5e-4 * np.abs(wanted).max())


def test_published_counts():
    tied = r"(stage\d)/block\d+/shared/kernel"
    assert trainable(ResNeXt(num_classes=100, stem="cifar")) == 23_177_124
    assert trainable(ResNeXt(shared=64, unique=4, num_classes=100, stem="cifar"), tied) == 19_333_380
    assert trainable(ResNeXt()) == 25_028_904  # torchvision's resnext50_32x4d


@pytest.mark.parametrize(
    ("g", "unique", "shared"),
    [
        # inputs of a group, filters: u 2^g in u 2^g / 4 groups, s 2^g in s / 4 groups
        (0, (128, 4), (8, 64)),
        (1, (128, 8), (16, 128)),
        (2, (128, 16), (32, 256)),
        (3, (128, 32), (64, 512)),
    ],
)
def test_filters_and_groups(g, unique, shared):
    stage = names(shapes(ResNeXt(shared=64, unique=4, stem="cifar"))[1]["params"][f"stage{g + 1}"])
    blocks = (3, 4, 6, 3)[g]
    for kind, shape in (("unique", unique), ("shared", shared)):
        found = {name: shape for name, shape in stage.items() if name.endswith(f"{kind}/kernel")}
        assert found == {f"block{number}/{kind}/kernel": (3, 3, *shape) for number in range(2, blocks + 1)}
    assert [name for name in stage if name.endswith("conv2/kernel")] == ["block1/conv2/kernel"]


@pytest.mark.parametrize("filters", [{}, {"shared": 64, "unique": 4}])
@pytest.mark.parametrize(("stem", "size", "last"), [("cifar", 32, 4), ("imagenet", 224, 7), ("cifar", 224, 28), ("imagenet", 32, 1)])
def test_output_shapes(stem, size, last, filters):
    logits, state = shapes(ResNeXt(num_classes=13, stem=stem, **filters), size, capture_intermediates=True, mutable=True)
    assert (logits.shape, logits.dtype) == ((2, 13), jnp.float32)
    assert state["intermediates"]["stage4"]["__call__"][0].shape == (2, last, last, 2048)


def test_bfloat16_compute_keeps_float32_parameters_and_logits():
    model = ResNeXt((2,), shared=8, unique=4, stem="cifar", dtype=jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"):  # Flax's BatchNorm subtracts float32 means from bfloat16 images
        logits, variables = shapes(model, capture_intermediates=True, mutable=True)
    computed = variables.pop("intermediates")
    assert {leaf.dtype for leaf in jax.tree.leaves((variables, logits))} == {jnp.dtype(jnp.float32)}
    assert computed["stage1"]["__call__"][0].dtype == jnp.bfloat16


def test_convolutions_start_he_normal_with_fan_out():
    model = ResNeXt((2,), shared=64, unique=32, stem="cifar")

    @jax.jit  # compiles what is asked for, no more
    def drawn(key):
        params = model.init(key, jnp.zeros((1, 4, 4, 3)))["params"]["stage1"]
        return [params["block1"]["conv2"]["kernel"], *(params["block2"][name]["kernel"] for name in ("unique", "shared", "conv3"))]

    kernels = drawn(jax.random.key(0))
    assert [kernel.shape for kernel in kernels] == [(3, 3, 4, 128), (3, 3, 16, 32), (3, 3, 8, 64), (1, 1, 96, 256)]
    for kernel in kernels:
        unit = np.asarray(kernel, np.float64) / np.sqrt(2 / (kernel.shape[0] * kernel.shape[1] * kernel.shape[3]))
        assert np.mean(unit**2) == pytest.approx(1, abs=5 * np.sqrt(2 / kernel.size))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stem": "CIFAR"}, "stem='CIFAR'; the stem is 'imagenet' or 'cifar'"),
        ({"blocks": ()}, r"a stage or more, .* got blocks=\(\)"),
        ({"blocks": (3, 0)}, r"each of a block or more, .* got blocks=\(3, 0\)"),
        ({"groups": 0}, "groups and channels in them; got .*groups=0"),
        ({"group_width": 0}, "groups and channels in them; got .*group_width=0"),
        ({"unique": 6}, "unique=6; .*give a multiple"),
        ({"unique": -4}, "unique=-4; .*or 0 for none"),
        ({"shared": 2}, "shared=2; filters come in groups of 4"),
        ({"shared": 12}, "shared=12 makes 3 groups in stage 1, which do not divide its 128 channels"),
        ({"unique": 12, "shared": 64}, "unique=12 makes 3 groups in stage 1"),
    ],
)
def test_illegal_attributes(options, message):
    with pytest.raises(ModelError, match=message):
        shapes(ResNeXt(**options), 32)


@pytest.mark.parametrize("shape", [(8, 8, 3), (2, 0, 8, 3), (2, 64), ()])
def test_what_is_no_batch_of_images(shape):
    with pytest.raises(ModelError, match="images must be of shape"):
        ResNeXt(stem="cifar").init(jax.random.key(0), jnp.zeros(shape))
