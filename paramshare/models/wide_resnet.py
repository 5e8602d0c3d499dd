"""Wide residual networks: the pre-activation family for 32x32 images."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from paramshare.models.layers import HE_NORMAL, ModelError, check_images, check_width, layers
from paramshare.models.looped import Loop, check_loops, stage


class PreActivationBlock(nn.Module):
    """BN, ReLU, 3x3, BN, ReLU, 3x3, plus a shortcut; where the width changes, that is a 1x1 of the *activated* input."""

    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    features: int
    stride: int

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
        o = nn.relu(self.norm(name="bn1")(x_BxHxWxC))
        r = x_BxHxWxC if x_BxHxWxC.shape[-1] == self.features else self.conv(self.features, 1, self.stride, name="shortcut")(o)
        o = self.conv(self.features, 3, self.stride, name="conv1")(o)
        o = nn.relu(self.norm(name="bn2")(o))
        return r + self.conv(self.features, 3, name="conv2")(o)


class WideResNet(nn.Module):
    """WRN-depth-width for 32x32 images: three stages of pre-activation blocks, 16, 32 and 64 times `width` channels.

    Attributes:
      depth: 6 n + 4, for n blocks a stage.
      width: the widening factor; a fraction is allowed if it gives a whole number of channels, a multiple of 1/16.
      num_classes: outputs of the classifier.
      dtype: compute dtype; parameters, and the classifier, stay float32.
      axis_name: the mapped axis (of `pmap` or `shard_map`) over which batch statistics are averaged; None keeps each device's own.
      loops: for each stage how its blocks 2.. run as a loop, or None; `()` for no loops. See `paramshare.models.looped`.
      unroll: whether loops are unrolled when compiled; None to choose by backend.

    Raises:
      ModelError: when called, if depth is not 6 n + 4 with n >= 1, width is below 1, the images are not (B, H, W, C), or the loops
        do not fit the stages.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from paramshare.models import WideResNet
      >>> x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
      >>> shapes = jax.eval_shape(lambda x: WideResNet(depth=16, width=1).init(jax.random.key(0), x), x)
      >>> sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
      175066

    References:
      Zagoruyko & Komodakis, Wide Residual Networks, BMVC 2016, arXiv:1605.07146; as Savarese & Maire, ICLR 2019, use it.
    """

    depth: int = 28
    width: float = 10
    num_classes: int = 10
    dtype: Any = jnp.float32
    axis_name: str | None = None
    loops: tuple[Loop | None, ...] = ()
    unroll: bool | None = None

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array, train: bool = False) -> jax.Array:
        blocks = blocks_per_stage(self.depth)
        channels = check_width(self.width)
        check_images(x_BxHxWxC)
        check_loops(self, stages=3)
        conv, norm = layers(self, train)
        x = conv(16, 3, name="stem")(x_BxHxWxC)
        for number, (features, stride) in enumerate([(channels, 1), (2 * channels, 2), (4 * channels, 2)], start=1):
            block = functools.partial(PreActivationBlock, conv, norm, features)
            x = stage(self, number, blocks)(block, blocks, stride, name=f"stage{number}")(x)
        x_BxC = jnp.mean(nn.relu(norm(name="bn")(x)), axis=(1, 2), dtype=jnp.float32)
        return nn.Dense(self.num_classes, kernel_init=HE_NORMAL, name="classifier")(x_BxC)


def blocks_per_stage(depth: int) -> int:
    """n of depth = 6 n + 4; `ModelError` if there is no such n >= 1."""
    if depth < 10 or (depth - 4) % 6:
        low = max(10, depth - (depth - 4) % 6)
        raise ModelError(f"a wide residual network has depth 6 n + 4 (10, 16, 22, ...); got {depth}, nearest are {low} and {low + 6}")
    return (depth - 4) // 6
