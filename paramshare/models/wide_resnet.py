"""Wide residual networks: the pre-activation family for 32x32 images, and the ImageNet bottleneck."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from paramshare.models.layers import HE_NORMAL, HE_NORMAL_FAN_OUT, ModelError, Stage, layers


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


class BottleneckBlock(nn.Module):
    """1x1, 3x3 (which strides), 1x1, each with BN; ReLU after the first two and after the sum with the shortcut."""

    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    features: int
    inner: int
    stride: int

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
        r = x_BxHxWxC
        if self.stride != 1 or r.shape[-1] != self.features:
            r = self.norm(name="shortcut_bn")(self.conv(self.features, 1, self.stride, name="shortcut")(r))
        h = nn.relu(self.norm(name="bn1")(self.conv(self.inner, 1, name="conv1")(x_BxHxWxC)))
        h = nn.relu(self.norm(name="bn2")(self.conv(self.inner, 3, self.stride, name="conv2")(h)))
        return nn.relu(r + self.norm(name="bn3")(self.conv(self.features, 1, name="conv3")(h)))


class WideResNet(nn.Module):
    """WRN-depth-width for 32x32 images: three stages of pre-activation blocks, 16, 32 and 64 times `width` channels.

    Attributes:
      depth: 6 n + 4, for n blocks a stage.
      width: the widening factor; a fraction is allowed if it gives a whole number of channels, a multiple of 1/16.
      num_classes: outputs of the classifier.
      dtype: compute dtype; parameters, and the classifier, stay float32.
      axis_name: the mapped axis (of `pmap` or `shard_map`) over which batch statistics are averaged; None keeps each device's own.

    Raises:
      ModelError: when called, if depth is not 6 n + 4 with n >= 1, width is below 1, or the images are not (B, H, W, C).

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

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array, train: bool = False) -> jax.Array:
        blocks = blocks_per_stage(self.depth)
        channels = check_width(self.width)
        check_images(x_BxHxWxC)
        conv, norm = layers(self, train)
        x = conv(16, 3, name="stem")(x_BxHxWxC)
        for number, (features, stride) in enumerate([(channels, 1), (2 * channels, 2), (4 * channels, 2)], start=1):
            block = functools.partial(PreActivationBlock, conv, norm, features)
            x = Stage(block, blocks, stride, name=f"stage{number}")(x)
        x_BxC = jnp.mean(nn.relu(norm(name="bn")(x)), axis=(1, 2), dtype=jnp.float32)
        return nn.Dense(self.num_classes, kernel_init=HE_NORMAL, name="classifier")(x_BxC)


class WideBottleneckResNet(nn.Module):
    """Wide-ResNet-50-2 and its relatives for ImageNet: bottlenecks whose inner 3x3 is `width` times as wide as a ResNet's.

    Attributes:
      depth: 50, 101 or 152.
      width: the widening factor of the inner channels.
      num_classes: outputs of the classifier.
      dtype: compute dtype; parameters, and the classifier, stay float32.
      axis_name: as in `WideResNet`.

    Raises:
      ModelError: when called, if depth or width is not a legal one, or the images are not (B, H, W, C).

    References:
      Zagoruyko & Komodakis, Wide Residual Networks, BMVC 2016, arXiv:1605.07146, section 3.4.
    """

    depth: int = 50
    width: int = 2
    num_classes: int = 1000
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array, train: bool = False) -> jax.Array:
        if self.depth not in BOTTLENECK_BLOCKS:
            raise ModelError(f"a bottleneck network has depth {', '.join(map(str, BOTTLENECK_BLOCKS))}; got {self.depth}")
        check_width(self.width, base=64)
        check_images(x_BxHxWxC)
        conv, norm = layers(self, train, kernel_init=HE_NORMAL_FAN_OUT)
        x = nn.relu(norm(name="bn")(conv(64, 7, 2, name="stem")(x_BxHxWxC)))
        x = nn.max_pool(x, (3, 3), (2, 2), [(1, 1), (1, 1)])  # pyright: ignore[reportArgumentType] (annotated too narrowly)
        for number, blocks in enumerate(BOTTLENECK_BLOCKS[self.depth]):
            inner = 64 * 2**number
            block = functools.partial(BottleneckBlock, conv, norm, 4 * inner, int(inner * self.width))
            x = Stage(block, blocks, stride=1 if number == 0 else 2, name=f"stage{number + 1}")(x)
        x_BxC = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
        return nn.Dense(self.num_classes, name="classifier")(x_BxC)


BOTTLENECK_BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


def blocks_per_stage(depth: int) -> int:
    """n of depth = 6 n + 4; `ModelError` if there is no such n >= 1."""
    if depth < 10 or (depth - 4) % 6:
        low = max(10, depth - (depth - 4) % 6)
        raise ModelError(f"a wide residual network has depth 6 n + 4 (10, 16, 22, ...); got {depth}, nearest are {low} and {low + 6}")
    return (depth - 4) // 6


def check_width(width: float, base: int = 16) -> int:
    """`base` channels, widened; `ModelError` unless that is a whole number, 1 or more."""
    channels = base * width
    if channels < 1 or channels != int(channels):
        raise ModelError(f"a widening factor is positive and a multiple of 1/{base}; got {width}")
    return int(channels)


def check_images(x_BxHxWxC: jax.Array) -> None:
    """`ModelError` unless the input is a batch of images with channels last."""
    if x_BxHxWxC.ndim != 4 or 0 in x_BxHxWxC.shape[1:]:
        raise ModelError(f"images must be of shape (batch, height, width, channels); got {x_BxHxWxC.shape}")
