"""Residual networks against a NumPy forward pass, their initialization, illegal attributes."""

import functools
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paramshare.models import ModelError, ResNet
from paramshare.models.resnet import BOTTLENECK_BLOCKS, BasicBlock, BottleneckBlock, FactoredBlock

IMAGES = jax.random.normal(jax.random.key(5), (2, 9, 8, 3))


def conv(p, x, stride=1):
    """Cross-correlation with symmetric zero padding, as a sum over the kernel's positions; bias."""
    size, half = p["kernel"].shape[0], p["kernel"].shape[0] // 2
    height, width = ((n + 2 * half - size) // stride + 1 for n in x.shape[1:3])
    x = np.pad(x, ((0, 0), (half, half), (half, half), (0, 0)))
    taps = [(i, j) for i in range(size) for j in range(size)]
    rows, columns = stride * height, stride * width
    return np.sum(
        [
            x[:, i : i + rows : stride, j : j + columns : stride] @ p["kernel"][i, j]
            for i, j in taps
        ],
        axis=0,
    ) + p.get("bias", 0)


def relu(x):
    return np.maximum(x, 0)


def norms(p, s):
    """A module's batch norms by name, with the statistics `s`, or the batch's if `s` is None."""

    def norm(name, x):
        if name not in p:
            return x
        mean, var = (
            (s[name]["mean"], s[name]["var"])
            if s
            else (x.mean(axis=(0, 1, 2)), x.var(axis=(0, 1, 2)))
        )
        return (x - mean) / np.sqrt(var + 1e-5) * p[name]["scale"] + p[name]["bias"]

    return norm


def block_by_hand(p, x, stride, s=None):
    """Basic, bottleneck or factored, by its parameters; no projection means a padded shortcut."""
    norm = norms(p, s)
    if "basis1" in p:
        h = norm("basis_bn1", conv(p["basis1"], x))
        h = relu(norm("bn1", conv(p["coefficients1"], h)))
        h = norm("basis_bn2", conv(p["basis2"], h))
        return relu(norm("bn2", conv(p["coefficients2"], h)) + x)
    if "conv3" in p:
        h = relu(norm("bn1", conv(p["conv1"], x)))
        h = relu(norm("bn2", conv(p["conv2"], h, stride)))  # the 3x3 strides
        h = norm("bn3", conv(p["conv3"], h))
    else:
        h = relu(norm("bn1", conv(p["conv1"], x, stride)))
        h = norm("bn2", conv(p["conv2"], h))
    if "shortcut" in p:
        return relu(h + norm("shortcut_bn", conv(p["shortcut"], x, stride)))
    front = (h.shape[-1] - x.shape[-1]) // 2
    r = np.zeros_like(h)
    r[..., front : front + x.shape[-1]] = x[:, ::stride, ::stride]
    return relu(h + r)


def network_by_hand(model, p, x, s):
    x = relu(norms(p, s)("bn", conv(p["stem"], x, 2 if model.stem == "imagenet" else 1)))
    if model.stem == "imagenet":
        x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
        x = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))[:, ::2, ::2].max(
            axis=(-2, -1)
        )
    for stage, blocks in enumerate(model.blocks, start=1):
        for block in range(1, blocks + 1):
            of_block = lambda tree: tree[f"stage{stage}"][f"block{block}"]  # noqa: B023, E731
            x = block_by_hand(of_block(p), x, 2 if block == 1 and stage > 1 else 1, of_block(s))
    return x.mean(axis=(1, 2)) @ p["classifier"]["kernel"] + p["classifier"]["bias"]


def shapes(model):
    return jax.eval_shape(lambda x: model.init(jax.random.key(0), x), IMAGES)


def filled(model, images):
    """Random variables of a model; a new network has ones and zeros."""
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        around = 1.0 if path[-1].key in ("scale", "var") else 0.0
        return around + rng.normal(size=leaf.shape) * (
            np.sqrt(2 / np.prod(leaf.shape[:-1])) if leaf.ndim > 1 else 0.1
        )

    empty = jax.eval_shape(
        lambda x: model.init(jax.random.key(0), x), jnp.asarray(images, jnp.float32)
    )
    return jax.tree_util.tree_map_with_path(draw, empty)


def float32(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)


def parts(train: bool, bias: bool = False):
    convolution = lambda f, k, stride=1, **o: nn.Conv(f, (k, k), stride, k // 2, use_bias=bias, **o)  # noqa: E731
    return convolution, functools.partial(nn.BatchNorm, use_running_average=not train)


BASIC = ("conv1", "bn1", "conv2", "bn2")
BOTTLENECK = (*BASIC, "conv3", "bn3")
PROJECTION = ("shortcut", "shortcut_bn")
CONVOLUTIONS = ("basis1", "coefficients1", "basis2", "coefficients2")
NORMS = ("basis_bn1", "bn1", "basis_bn2", "bn2")

BLOCKS: dict[str, tuple[Any, dict[str, Any], tuple[str, ...]]] = {
    "basic": (BasicBlock, {"features": 6, "stride": 1}, BASIC),
    "basic, wider": (BasicBlock, {"features": 8, "stride": 1}, BASIC + PROJECTION),
    "basic, strided": (BasicBlock, {"features": 6, "stride": 2}, BASIC + PROJECTION),
    "basic, wider and strided": (BasicBlock, {"features": 8, "stride": 2}, BASIC + PROJECTION),
    "basic, padded": (BasicBlock, {"features": 12, "stride": 2, "pad": True}, BASIC),
    "basic, padded in channels only": (
        BasicBlock,
        {"features": 10, "stride": 1, "pad": True},
        BASIC,
    ),
    "basic, padded in space only": (BasicBlock, {"features": 6, "stride": 2, "pad": True}, BASIC),
    "bottleneck": (BottleneckBlock, {"features": 6, "inner": 4, "stride": 1}, BOTTLENECK),
    "bottleneck, wider and strided": (
        BottleneckBlock,
        {"features": 12, "inner": 4, "stride": 2},
        BOTTLENECK + PROJECTION,
    ),
    "bottleneck, padded": (
        BottleneckBlock,
        {"features": 12, "inner": 4, "stride": 2, "pad": True},
        BOTTLENECK,
    ),
    "factored": (FactoredBlock, {"features": 6, "rank": 5}, CONVOLUTIONS + NORMS),
    "factored, few norms": (
        FactoredBlock,
        {"features": 6, "rank": 5, "inner_norm": False},
        (*CONVOLUTIONS, "bn2"),
    ),
}


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks(kind, train):
    build, options, names = BLOCKS[kind]
    x = np.asarray(jax.random.normal(jax.random.key(0), (2, 7, 8, 6)), np.float64)
    block = build(
        *parts(train, bias=not train), **options
    )  # a batch's own mean would take the biases away again
    variables = filled(block, x)
    assert set(variables["params"]) == set(names)
    output, _ = jax.jit(lambda v, x: block.apply(v, x, mutable=["batch_stats"]))(
        float32(variables), float32(x)
    )
    expected = block_by_hand(
        variables["params"],
        x,
        options.get("stride", 1),
        None if train else variables["batch_stats"],
    )
    np.testing.assert_allclose(
        output, expected, rtol=2e-4, atol=2e-5
    )  # float32 sums of 9 x 12 terms, against float64


NETWORKS = {
    "basic": ResNet((2, 1), (4, 8), 5, stem_width=4),
    "padded": ResNet((1, 2, 1), (4, 8, 12), 5, stem="cifar", stem_width=4, shortcut="pad"),
    "bottleneck": ResNet((1, 2), (2, 4), 5, bottleneck=True, inner=1.5, stem_width=6),
    "factored": ResNet((3, 2), (4, 8), 5, stem="cifar", stem_width=4, rank=3),
    "factored, few norms": ResNet(
        (2, 2), (4, 8), 5, stem="cifar", stem_width=4, rank=3, inner_norm=False
    ),
    "with biases": ResNet((2, 1), (4, 8), 5, stem="cifar", stem_width=6, bias=True),
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_whole_network(kind):
    model = NETWORKS[kind]
    variables = filled(model, IMAGES)
    expected = network_by_hand(
        model, variables["params"], np.asarray(IMAGES, np.float64), variables["batch_stats"]
    )
    assert expected.shape == (2, 5)
    output = jax.jit(model.apply)(float32(variables), IMAGES)
    # Float32 rounding through a dozen layers, against float64.
    np.testing.assert_allclose(output, expected, rtol=5e-4, atol=5e-4 * np.abs(expected).max())


def paths(tree, last=1):
    """Paths of the modules that own parameters, or with last=0 of the parameters themselves."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(part.key for part in path[: len(path) - last]) for path, _ in leaves}


def test_parameter_paths():
    expected = {"stem", "bn", "classifier"}
    expected |= {f"stage1/block1/{x}" for x in BASIC} | {
        f"stage2/block1/{x}" for x in BASIC + PROJECTION
    }
    expected |= {
        f"stage{g}/block{b}/{x}" for g, b in ((1, 2), (1, 3), (2, 2)) for x in CONVOLUTIONS + NORMS
    }
    assert paths(shapes(NETWORKS["factored"])["params"]) == expected
    assert set(shapes(NETWORKS["factored, few norms"])["params"]["stage1"]["block2"]) == {
        *CONVOLUTIONS,
        "bn2",
    }
    expected = {f"block{b}/{x}" for b in (1, 2) for x in BOTTLENECK} | {
        f"block1/{x}" for x in PROJECTION
    }
    assert paths(shapes(NETWORKS["bottleneck"])["params"]["stage2"]) == expected


def test_only_convolutions_of_blocks_have_a_bias_and_only_on_request():
    norm = lambda path: "bn" in path.split("/")[-2]  # noqa: E731
    params = shapes(ResNet((2, 2), (4, 8), rank=2, bias=True))["params"]
    convolutions = {
        path for path in paths(params, last=0) if not norm(path) and path.startswith("stage")
    }
    assert {path.removesuffix("kernel") for path in convolutions if path.endswith("kernel")} == {
        path.removesuffix("bias") for path in convolutions if path.endswith("bias")
    }
    assert set(params["stem"]) == {"kernel"}
    plain = shapes(ResNet((2, 2), (4, 8), rank=2))["params"]
    assert {path for path in paths(plain, last=0) if path.endswith("bias") and not norm(path)} == {
        "classifier/bias"
    }


@pytest.mark.parametrize(
    ("model", "side", "last"),
    [
        (
            ResNet((1, 1, 1), (16, 32, 64), 10, stem="cifar", stem_width=16),
            33,
            (9, 9, 64),
        ),  # symmetric padding rounds up: 33, 17, 9
        (
            ResNet(BOTTLENECK_BLOCKS[50], bottleneck=True),
            224,
            (7, 7, 2048),
        ),  # 224, 112, 56, 28, 14, 7
        (ResNet(), 32, (1, 1, 512)),
    ],
)
def test_feature_maps(model, side, last):
    x = jax.ShapeDtypeStruct((3, side, side, 3), jnp.float32)
    logits, state = jax.eval_shape(
        lambda x: model.init_with_output(
            jax.random.key(0), x, capture_intermediates=True, mutable=True
        ),
        x,
    )
    assert logits.shape == (3, model.num_classes)
    assert state["intermediates"][f"stage{len(model.blocks)}"]["__call__"][0].shape == (3, *last)


def test_initialisation_is_he_normal_with_fan_out():
    model = ResNet((1, 2), (16, 48), 500, stem="cifar", stem_width=24, rank=10, bias=True)
    fast = jax.random.key(0, impl="rbg")  # compiles faster than the default
    params = jax.jit(model.init)(fast, IMAGES)["params"]
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        owner, name = path[-2].key, path[-1].key
        if name == "bias":
            assert np.all(np.asarray(leaf) == np.float32(0.01 if "bn" in owner else 0))
        elif name == "kernel" and owner != "classifier" and leaf.size > 2000:
            fan_out = (
                leaf.size // leaf.shape[-2]
            )  # of most of these not the fan-in: 16 -> 48, 48 -> 20, 20 -> 48 channels
            unit = np.asarray(leaf, np.float64) / np.sqrt(2 / fan_out)
            assert np.mean(unit**2) == pytest.approx(1, abs=5 * np.sqrt(2 / leaf.size)), path
            assert np.mean(unit**4) == pytest.approx(3, abs=5 * np.sqrt(96 / leaf.size)), (
                path
            )  # a truncated normal has 2.4
    assert not np.any(jax.jit(ResNet((1,), (4,)).init)(fast, IMAGES)["params"]["bn"]["bias"])


def test_bfloat16_compute_keeps_float32_parameters_and_logits():
    model = ResNet((2, 1), (8, 16), rank=2, dtype=jnp.bfloat16)
    with jax.numpy_dtype_promotion(
        "standard"
    ):  # Flax's BatchNorm subtracts float32 means from bfloat16 images
        logits, variables = jax.eval_shape(
            lambda x: model.init_with_output(jax.random.key(0), x), IMAGES
        )
        work = jax.make_jaxpr(model.apply)(variables, IMAGES)
    assert {leaf.dtype for leaf in jax.tree.leaves((variables, logits))} == {jnp.dtype(jnp.float32)}
    convolutions = [
        equation for equation in work.eqns if equation.primitive.name == "conv_general_dilated"
    ]
    assert {equation.outvars[0].aval.dtype for equation in convolutions} == {
        jnp.dtype(jnp.bfloat16)
    }


def test_statistics_of_a_cut_batch_are_those_of_the_whole_with_an_axis_name():
    model = ResNet((2,), (4,), 5, stem="cifar", stem_width=4, rank=3, axis_name="device")
    variables = float32(filled(model, IMAGES))
    train = lambda m: lambda v, x: m.apply(v, x, True, mutable=["batch_stats"])  # noqa: E731
    cut = jax.jit(jax.vmap(train(model), (None, 0), axis_name="device"))(variables, IMAGES[:, None])
    whole = jax.jit(train(model.clone(axis_name=None)))(variables, IMAGES)
    # The same float32 sums in two halves.
    chex.assert_trees_all_close(cut[0][:, 0], whole[0], rtol=1e-3, atol=1e-3)
    chex.assert_trees_all_close(
        jax.tree.map(lambda leaf: leaf[0], cut[1]), whole[1], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": (2, 2, 2)}, "an entry for each stage; got 3 and 4 entries"),
        ({"blocks": (), "widths": ()}, r"at least one stage, .*got blocks=\(\)"),
        ({"blocks": (2, 0, 2, 2)}, r"one block per stage.*got blocks=\(2, 0, 2, 2\)"),
        (
            {"widths": (64, 128, 256, -512)},
            r"one channel everywhere; .*widths=\(64, 128, 256, -512\)",
        ),
        ({"stem_width": 0}, "stem_width=0"),
        ({"stem": "mnist"}, "stem='mnist'; the stem must be 'imagenet' or 'cifar'"),
        ({"shortcut": "Pad"}, "shortcut='Pad'; the shortcut must be 'projection' or 'pad'"),
        ({"rank": -1}, "rank=-1; the number of basis filters in the first stage must be positive"),
        (
            {"rank": 577},
            "rank=577 means 577 basis filters in stage 1; .* 64 channels is at most 576",
        ),
        (
            {"rank": 10, "blocks": (2, 2), "widths": (8, 2)},
            "rank=10 means 20 basis filters in stage 2; .* 2 channels is at most 18",
        ),
        ({"rank": 2, "bottleneck": True}, "rank=2 factors basic blocks only"),
        ({"bottleneck": True, "inner": 1.01}, "multiple of 1/64; got 1.01"),
        ({"bottleneck": True, "inner": 0}, "multiple of 1/64; got 0"),
        ({"inner": 2}, "inner=2 widens bottlenecks only"),
        ({"stem_width": 66, "shortcut": "pad"}, "cannot lead from 66 channels to 64"),
        (
            {"stem_width": 63, "shortcut": "pad"},
            "an even number of channels; it cannot lead from 63 channels to 64",
        ),
    ],
)
def test_illegal_attributes(options, message):
    with pytest.raises(ModelError, match=message):
        shapes(ResNet(**options))


def test_the_largest_rank_is_legal():
    params = shapes(ResNet((2, 2), (4, 8), rank=36))["params"]
    assert params["stage2"]["block2"]["basis1"]["kernel"].shape == (3, 3, 8, 72)


@pytest.mark.parametrize("shape", [(8, 8, 3), (2, 8, 8), (2, 0, 8, 3), (2, 64), ()])
def test_illegal_inputs(shape):
    with pytest.raises(ModelError, match="images must be of shape"):
        ResNet().init(jax.random.key(0), jnp.zeros(shape))
