"""VGG networks against a NumPy forward pass, their parameters, and illegal attributes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paramshare.models import VGG, ModelError

NAMES = [f"{stage}_{index}" for stage in range(1, 6) for index in (1, 2)]


def conv(x, p):
    """Cross-correlation with a 3x3 kernel and zero padding, as a sum over its positions; bias."""
    height, width = x.shape[1:3]
    x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return (
        np.sum(
            [
                x[:, i : i + height, j : j + width] @ p["kernel"][i, j]
                for i in range(3)
                for j in range(3)
            ],
            axis=0,
        )
        + p["bias"]
    )


def norm(x, params, stats=None):
    mean, var = (
        (stats["mean"], stats["var"]) if stats else (x.mean(axis=(0, 1, 2)), x.var(axis=(0, 1, 2)))
    )
    return (x - mean) / np.sqrt(var + 1e-5) * params["scale"] + params["bias"]


def pool(x):
    """2x2 max-pool; an odd last row or column is left out."""
    batch, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2].reshape(
        batch, height // 2, 2, width // 2, 2, channels
    )
    return x.max(axis=(2, 4))


def shapes(model, size=32):
    x = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    return jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x), x)


def filled(model, size):
    """Random variables of a model; a new network has ones and zeros."""
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        around = 1.0 if path[-1].key in ("scale", "var") else 0.0
        return around + rng.normal(size=leaf.shape) * (
            np.sqrt(2 / np.prod(leaf.shape[:-1])) if leaf.ndim > 1 else 0.1
        )

    return jax.tree_util.tree_map_with_path(draw, nn.meta.unbox(shapes(model, size)[1]))


def float32(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(("depth", "size"), [(4, 8), (5, 7), (6, 9)])
def test_the_whole_network(depth, size, train):
    images = np.random.default_rng(0).normal(size=(3, size, size, 3))
    model = VGG(depth, num_classes=7)
    variables = filled(model, size)
    p, s = variables["params"], variables["batch_stats"]
    x = images
    for name in NAMES[: depth - 1]:
        x = np.maximum(
            norm(conv(x, p[f"conv{name}"]), p[f"bn{name}"], None if train else s[f"bn{name}"]), 0
        )
        if name.endswith("2") or name == NAMES[depth - 2]:
            x = pool(x)
    assert x.shape[1] == {4: 2, 5: 1, 6: 1}[depth]  # halved after a stage that is cut too
    expected = x.mean(axis=(1, 2)) @ p["classifier"]["kernel"] + p["classifier"]["bias"]
    logits, _ = jax.jit(lambda v, x: model.apply(v, x, train, mutable=["batch_stats"]))(
        float32(variables), float32(images)
    )
    # float32 sums of up to 9 x 256 terms, against float64; batch norms over few values add to it.
    np.testing.assert_allclose(logits, expected, rtol=5e-4, atol=5e-4 * np.abs(expected).max())


@pytest.mark.parametrize("depth", [4, 6, 11])
def test_parameters(depth):
    _, variables = shapes(VGG(depth, num_classes=10))
    names = {f"{kind}{name}" for name in NAMES[: depth - 1] for kind in ("conv", "bn")}
    assert set(variables["params"]) == names | {"classifier"}


@pytest.mark.parametrize("size", [32, 224])
def test_output_shapes(size):
    logits, _ = shapes(VGG(11, num_classes=13), size)
    assert (logits.shape, logits.dtype) == ((2, 13), jnp.float32)


def test_bfloat16_compute_keeps_float32_parameters_and_logits():
    with jax.numpy_dtype_promotion(
        "standard"
    ):  # Flax's BatchNorm subtracts float32 means from bfloat16 images
        assert {leaf.dtype for leaf in jax.tree.leaves(shapes(VGG(6, dtype=jnp.bfloat16)))} == {
            jnp.dtype(jnp.float32)
        }


def test_kernels_start_xavier_uniform_and_biases_at_zero():
    params = jax.jit(VGG(6).init)(jax.random.key(0, impl="rbg"), jnp.zeros((1, 8, 8, 3)))["params"]
    for name, shape in (
        ("2_1", (3, 3, 64, 128)),
        ("2_2", (3, 3, 128, 128)),
        ("3_1", (3, 3, 128, 256)),
    ):
        kernel, limit = (
            np.asarray(params[f"conv{name}"]["kernel"], np.float64),
            np.sqrt(6 / (9 * (shape[2] + shape[3]))),
        )
        assert kernel.shape == shape
        assert (
            0.999 * limit < np.abs(kernel).max() <= limit * (1 + 1e-6)
        )  # of 70,000 draws and more, one comes as near to the end
        assert np.mean(kernel**2) == pytest.approx(
            limit**2 / 3, abs=5 * limit**2 * np.sqrt(4 / 45 / kernel.size)
        )  # var u^2 = 4/45
        assert not np.any(params[f"conv{name}"]["bias"])


@pytest.mark.parametrize("depth", [3, 12, 0, -1, 16])
def test_illegal_depths(depth):
    with pytest.raises(ModelError, match=f"depth of a VGG must be 4 to 11; got {depth}"):
        VGG(depth).init(jax.random.key(0), jnp.zeros((2, 32, 32, 3)))


@pytest.mark.parametrize(
    ("depth", "shape", "pools"), [(11, (31, 64), 5), (10, (64, 31), 5), (4, (3, 3), 2)]
)
def test_images_too_small_for_the_pools(depth, shape, pools):
    with pytest.raises(
        ModelError,
        match=f"{shape[0]}x{shape[1]} are too small for {pools} max-pools; .* {2**pools} pixels",
    ):
        VGG(depth).init(jax.random.key(0), jnp.zeros((2, *shape, 3)))
    least = jax.ShapeDtypeStruct((2, 2**pools, 2**pools, 3), jnp.float32)
    assert jax.eval_shape(lambda x: VGG(depth).init_with_output(jax.random.key(0), x), least)[
        0
    ].shape == (2, 10)


@pytest.mark.parametrize("shape", [(8, 8, 3), (2, 0, 8, 3), (2, 64), ()])
def test_illegal_inputs(shape):
    with pytest.raises(ModelError, match="images must be of shape"):
        VGG().init(jax.random.key(0), jnp.zeros(shape))
