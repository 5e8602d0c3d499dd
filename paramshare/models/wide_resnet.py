"""Wide residual networks with pre-activation blocks, for 32x32 images."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from paramshare.models.layers import (
    HE_NORMAL,
    ModelError,
    Stage,
    check_images,
    check_width,
    layers,
)


class PreActivationBlock(nn.Module):
    """BN, ReLU, 3x3, BN, ReLU, 3x3, plus a shortcut.

    Where the width changes, the shortcut is a 1x1 of the input after BN and ReLU.
    """

    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    features: int
    stride: int

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
        o = nn.relu(self.norm(name="bn1")(x_BxHxWxC))
        r = (
            x_BxHxWxC
            if x_BxHxWxC.shape[-1] == self.features
            else self.conv(self.features, 1, self.stride, name="shortcut")(o)
        )
        o = self.conv(self.features, 3, self.stride, name="conv1")(o)
        o = nn.relu(self.norm(name="bn2")(o))
        return r + self.conv(self.features, 3, name="conv2")(o)


class WideResNet(nn.Module):
    """WRN-depth-width: three stages of pre-activation blocks, 16, 32 and 64 times `width` wide.

    Attributes:
      depth: 6 n + 4, for n blocks per stage.
      width: widening factor, a multiple of 1/16.
      num_classes: outputs of the classifier.
      dtype: compute dtype; the parameters and the classifier stay float32.
      axis_name: mapped axis (of `pmap` or `shard_map`) over which batch statistics are averaged;
        None for no averaging.
      stage: builds a stage: a builder that takes block, blocks, stride, later and name.

    Raises:
      ModelError: when called, if depth is not 6 n + 4 with n >= 1, width is not a positive multiple
        of 1/16, or the images are not (B, H, W, C).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from paramshare.models import WideResNet
      >>> x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
      >>> model = WideResNet(depth=16, width=1)
      >>> shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), x)
      >>> sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
      175066

    References:
      Zagoruyko & Komodakis, Wide Residual Networks, BMVC 2016, arXiv:1605.07146, in the form that
      Savarese & Maire, ICLR 2019, arXiv:1902.09701, use.
    """

    depth: int = 28
    width: float = 10
    num_classes: int = 10
    dtype: Any = jnp.float32
    axis_name: str | None = None
    stage: Callable[..., nn.Module] = Stage

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array, train: bool = False) -> jax.Array:
        blocks = blocks_per_stage(self.depth)
        channels = check_width(self.width)
        check_images(x_BxHxWxC)
        conv, norm = layers(self, train)
        x = conv(16, 3, name="stem")(x_BxHxWxC)
        for number, (features, stride) in enumerate(
            [(channels, 1), (2 * channels, 2), (4 * channels, 2)], start=1
        ):
            block = functools.partial(PreActivationBlock, conv, norm, features)
            x = self.stage(block, blocks, stride=stride, later=None, name=f"stage{number}")(x)
        x_BxC = jnp.mean(nn.relu(norm(name="bn")(x)), axis=(1, 2), dtype=jnp.float32)
        return nn.Dense(self.num_classes, kernel_init=HE_NORMAL, name="classifier")(x_BxC)


def blocks_per_stage(depth: int) -> int:
    """n of depth = 6 n + 4; `ModelError` if that is not an integer of at least 1."""
    if depth < 10 or (depth - 4) % 6:
        low = max(10, depth - (depth - 4) % 6)
        raise ModelError(
            f"the depth of a wide residual network must be 6 n + 4 (10, 16, 22, ...); got {depth}, "
            f"the nearest are {low} and {low + 6}"
        )
    return (depth - 4) // 6
