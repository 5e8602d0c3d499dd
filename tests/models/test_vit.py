"""Vision transformers: published sizes, a written-out forward pass, stacked blocks, errors."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paramshare import ModelError
from paramshare.models import ViT


def shapes(model: Any, shape: tuple[int, ...] = (224, 224, 3)) -> tuple[Any, Any]:
    image = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    return jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x), image)


@pytest.mark.parametrize(
    ("width", "count"),
    # timm: vit_small_patch16_224, vit_base_patch16_224; vit_tiny_patch16_224 is in the zoo
    [(384, 22_050_664), (768, 86_567_656)],
)
def test_published_sizes(width, count):
    logits, variables = shapes(ViT(12, width, patch=16, class_token=True))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == count
    assert (logits.shape, logits.dtype) == ((1, 1000), jnp.float32)


def test_paths_and_shapes():
    _, variables = shapes(ViT(2, 128, heads=4, patch=4, num_classes=10), (32, 32, 3))
    params = variables["params"]
    assert set(params) == {"patches", "positions", "block1", "block2", "norm", "head"}
    assert params["positions"].shape == (1, 64, 128)
    attention = params["block2"]["attention"]
    assert attention["query"]["kernel"].shape == (128, 4, 32)
    assert attention["out"]["kernel"].shape == (4, 32, 128)
    assert params["block1"]["mlp"]["up"]["kernel"].shape == (128, 512)


def norm(x, p):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def test_the_forward_pass_is_the_papers():
    """Equations 1 to 4, written out in NumPy for one image."""
    model: Any = ViT(2, 8, heads=2, patch=4, num_classes=3, class_token=True)
    image = np.asarray(jax.random.normal(jax.random.key(1), (1, 8, 8, 3)))
    rng = np.random.default_rng(2)
    variables = jax.tree.map(
        lambda x: np.asarray(rng.normal(0, 0.3, x.shape), np.float32),
        jax.eval_shape(model.init, jax.random.key(0), image),
    )
    p: Any = jax.tree.map(lambda x: np.asarray(x, np.float64), variables["params"])
    patches = image[0].reshape(2, 4, 2, 4, 3).transpose(0, 2, 1, 3, 4).reshape(4, -1)
    x = patches @ p["patches"]["kernel"].reshape(-1, 8) + p["patches"]["bias"]
    x = np.concatenate([p["token"][0], x]) + p["positions"][0]
    for name in ("block1", "block2"):
        y, a = norm(x, p[name]["norm1"]), p[name]["attention"]
        heads = []
        for h in range(2):
            q, k, v = (
                y @ a[part]["kernel"][:, h] + a[part]["bias"][h]
                for part in ("query", "key", "value")
            )
            weights = np.exp(q @ k.T / 2)  # sqrt of 4 features
            heads.append(weights / weights.sum(1, keepdims=True) @ v @ a["out"]["kernel"][h])
        x = x + sum(heads) + a["out"]["bias"]
        y, m = norm(x, p[name]["norm2"]), p[name]["mlp"]
        y = y @ m["up"]["kernel"] + m["up"]["bias"]
        y = np.asarray(jax.nn.gelu(jnp.asarray(y, jnp.float32), approximate=False))
        x = x + y @ m["down"]["kernel"] + m["down"]["bias"]
    logits = norm(x, p["norm"])[0] @ p["head"]["kernel"] + p["head"]["bias"]
    ours = jax.jit(model.apply)(variables, image)[0]
    np.testing.assert_allclose(ours, logits, rtol=1e-4, atol=1e-5)


def test_stacked_blocks_make_a_program_of_one_size_at_any_depth():
    """That they compute the same is tested on decoders, which have the same blocks."""
    image = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    sizes = []
    for depth in (3, 30):
        model: Any = ViT(depth, 16, patch=4, scan=True)
        variables = jax.eval_shape(model.init, jax.random.key(0), image)
        assert variables["params"]["blocks"]["mlp"]["up"]["kernel"].shape == (depth, 16, 64)
        sizes.append(len(jax.jit(model.apply).lower(variables, image).as_text().splitlines()))
    assert sizes[0] == sizes[1]


def test_dropout_acts_in_training_only():
    model: Any = ViT(1, 8, patch=4, num_classes=2, dropout=0.5)
    image = jnp.ones((1, 8, 8, 3))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda x: np.asarray(rng.normal(size=x.shape), np.float32),
        jax.eval_shape(model.init, jax.random.key(0), image),
    )
    apply = jax.jit(lambda key: model.apply(variables, image, train=True, rngs={"params": key}))
    a, b, c = (apply(jax.random.key(seed)) for seed in (0, 0, 1))
    assert jnp.array_equal(a, b) and not jnp.array_equal(a, c)
    still = jax.jit(lambda key: model.apply(variables, image, rngs={"params": key}))
    assert jnp.array_equal(still(jax.random.key(0)), still(jax.random.key(1)))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (ViT(0, 8, patch=4), "depth of a ViT must be .* got depth=0"),
        (ViT(1, 8, heads=3, patch=4), "heads=3 must divide the width of a ViT, 8"),
        (ViT(1, 8, patch=5), "images of 8x8 cannot be cut into patches of 5x5"),
        (ViT(1, 8, patch=4, mlp_ratio=0.3), "mlp_ratio=0.3 makes MLPs of 2.4"),
        (ViT(1, 8, patch=4, dropout=1.0), "dropout=1.0"),
        (ViT(1, 8.0, patch=4), "width=8.0"),  # pyright: ignore[reportArgumentType]
    ],
)
def test_errors(model, message):
    with pytest.raises(ModelError, match=message):
        shapes(model, (8, 8, 3))
