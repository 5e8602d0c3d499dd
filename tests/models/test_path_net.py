"""The network for shortest paths: its function in NumPy, grids of any size, illegal sizes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paramshare.models import ModelError, PathNet

KEY = jax.random.key(0, impl="rbg")  # compiles faster than the default


def conv(x: np.ndarray, kernel: Any) -> Any:
    """A convolution of stride 1 with zero padding, as a sum over the kernel's positions."""
    kernel = np.asarray(kernel, np.float64)
    half, (height, width) = kernel.shape[0] // 2, x.shape[1:3]
    x = np.pad(x, ((0, 0), (half, half), (half, half), (0, 0)))
    return sum(
        x[:, i : i + height, j : j + width] @ kernel[i, j]
        for i in range(kernel.shape[0])
        for j in range(kernel.shape[1])
    )


@pytest.mark.parametrize("train", [False, True])
def test_the_whole_network(train):
    x = np.random.default_rng(0).normal(size=(2, 6, 5, 2)).astype(np.float32)
    model = PathNet(depth=3, width=4)
    variables = jax.tree.map(lambda leaf: leaf + 0.1 * jnp.cos(7 * leaf + 1), model.init(KEY, x))
    p, s = variables["params"], variables["batch_stats"]
    h = conv(np.asarray(x, np.float64), p["first"]["kernel"])
    for name in ("layer1", "layer2", "layer3"):
        y = conv(h, p[name]["conv"]["kernel"])
        mean, var = (
            (y.mean((0, 1, 2)), y.var((0, 1, 2)))
            if train
            else (s[name]["bn"]["mean"], s[name]["bn"]["var"])
        )
        bn = p[name]["bn"]
        h = h + np.maximum(
            (y - np.asarray(mean)) / np.sqrt(np.asarray(var) + 1e-5) * np.asarray(bn["scale"])
            + np.asarray(bn["bias"]),
            0,
        )
    expected = (
        h @ np.asarray(p["last"]["kernel"], np.float64)[0, 0] + np.asarray(p["last"]["bias"])
    )[..., 0]
    outputs: Any = model.apply(variables, x, train=train, mutable=["batch_stats"])[0]
    # float32 sums of some tens of terms, against float64.
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-4)


def test_grids_of_any_size():
    model = PathNet(depth=2, width=4)
    variables = model.init(KEY, jnp.zeros((1, 8, 8, 2)))
    assert [
        jax.eval_shape(model.apply, variables, jnp.zeros((1, n, m, 2))).shape
        for n, m in ((48, 48), (1, 9))
    ] == [
        (1, 48, 48),
        (1, 1, 9),
    ]


@pytest.mark.parametrize("options", [{"depth": 0}, {"width": 0}], ids=str)
def test_impossible_sizes(options):
    with pytest.raises(ModelError, match="must be at least 1; got depth="):
        jax.eval_shape(lambda: PathNet(**options).init(KEY, jnp.zeros((1, 8, 8, 2))))
