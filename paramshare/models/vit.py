"""Vision transformers: Dosovitskiy et al., ICLR 2021."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from paramshare.models.layers import ModelError, check_images
from paramshare.models.transformer import (
    MLP,
    Attention,
    Block,
    apply_blocks,
    check_transformer,
    head_count,
)


class ViT(nn.Module):
    r"""Patches of an image as tokens, pre-norm blocks, and a linear classifier of their mean.

    Initial values are those of big_vision: Xavier-uniform kernels, a zero head. The size of the
    images is fixed by the learned embedding of positions.

    Parameters are at `patches`, `positions`, `block1/norm1`, `block1/attention/query/kernel`
    (D, H, K), `.../key`, `.../value`, `.../out` (H, K, D), `block1/norm2`, `block1/mlp/up`,
    `block1/mlp/down`, ..., `norm`, `head`. One bank can serve all blocks:
    `Rule(r"block\d+/attention/query/kernel", Soft(templates=k))`.

    Attributes:
      depth: number of blocks.
      width: features of a token, D.
      heads: of the attention, H; None for one for each 64 features.
      patch: side of a patch in pixels; divides the sides of the images.
      mlp_ratio: features inside the MLPs, over the width.
      num_classes: outputs.
      class_token: classify an additional, learned token instead of the mean, as in the paper.
      dropout: fraction of features dropped in training.
      scan: stack the parameters of all blocks under `blocks`; see `apply_blocks`.
      dtype: compute dtype; the parameters and the logits stay float32.

    Raises:
      ModelError: when called, if the attributes or the images are not legal.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from paramshare.models import ViT
      >>> images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
      >>> init = lambda x: ViT(12, 384, patch=16, class_token=True).init(jax.random.key(0), x)
      >>> sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(init, images)))
      22050664

    References:
      Dosovitskiy et al., ICLR 2021, arXiv:2010.11929. Mean pooling: Beyer et al., arXiv:2205.01580.
    """

    depth: int = 12
    width: int = 384
    heads: int | None = None
    patch: int = 16
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    class_token: bool = False
    dropout: float = 0.0
    scan: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array, train: bool = False) -> jax.Array:
        heads = head_count(self.heads, self.width)
        sizes = {"depth": self.depth, "width": self.width, "patch": self.patch}
        check_transformer("ViT", sizes, heads, heads, self.dropout)
        inner = self.mlp_ratio * self.width
        if inner < 1 or inner != int(inner):
            raise ModelError(
                f"mlp_ratio={self.mlp_ratio} makes MLPs of {inner} features; they must be a whole "
                "number of at least 1"
            )
        check_images(x_BxHxWxC)
        height, width = x_BxHxWxC.shape[1:3]
        if height % self.patch or width % self.patch:
            raise ModelError(
                f"images of {height}x{width} cannot be cut into patches of {self.patch}x"
                f"{self.patch}; choose a patch that divides both sides"
            )
        x = nn.Conv(
            self.width,
            (self.patch, self.patch),
            (self.patch, self.patch),
            "VALID",
            dtype=self.dtype,
            name="patches",
        )(x_BxHxWxC)
        x_BxTxD = x.reshape(len(x), -1, self.width)
        if self.class_token:
            token = self.param("token", nn.initializers.zeros, (1, 1, self.width))
            token = jnp.broadcast_to(token.astype(self.dtype), (len(x), 1, self.width))
            x_BxTxD = jnp.concatenate([token, x_BxTxD], axis=1)
        init = nn.initializers.normal(self.width**-0.5)
        x_BxTxD += self.param("positions", init, (1, *x_BxTxD.shape[1:])).astype(self.dtype)
        x_BxTxD = nn.Dropout(self.dropout, deterministic=not train)(x_BxTxD)
        norm = functools.partial(nn.LayerNorm, dtype=self.dtype)
        block = functools.partial(
            Block,
            functools.partial(Attention, heads, heads, dtype=self.dtype),
            functools.partial(MLP, int(inner), dtype=self.dtype),
            norm,
            self.dropout,
        )
        start = jnp.zeros((), jnp.int32)
        x_BxTxD = apply_blocks(block, self.depth, self.scan, x_BxTxD, start, train, False)
        x_BxTxD = norm(name="norm")(x_BxTxD)
        x_BxD = x_BxTxD[:, 0] if self.class_token else jnp.mean(x_BxTxD, axis=1)
        head = nn.Dense(
            self.num_classes, dtype=self.dtype, kernel_init=nn.initializers.zeros, name="head"
        )
        return head(x_BxD).astype(jnp.float32)
