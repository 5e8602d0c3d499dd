"""Stacked hourglasses: a cascade of equal sub-networks that refine heatmaps of joints."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from paramshare.models.layers import (
    HE_NORMAL_FAN_OUT,
    ModelError,
    check_images,
    check_stem,
    layers,
    nearest,
)

SMALL = nn.initializers.normal(0.001)  # heatmaps are 0 almost everywhere
MOST_STAGES, MOST_DEPTH = 64, 10


class Residual(nn.Module):
    """BN, ReLU, 1x1 to half the channels, BN, ReLU, 3x3, BN, ReLU, 1x1, plus the shortcut."""

    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    features: int

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
        h = x_BxHxWxC
        for number, (features, size) in enumerate(
            ((self.features // 2, 1), (self.features // 2, 3), (self.features, 1)), start=1
        ):
            h = nn.relu(self.norm(name=f"bn{number}")(h))
            h = self.conv(features, size, name=f"conv{number}")(h)
        if x_BxHxWxC.shape[-1] != self.features:
            x_BxHxWxC = self.conv(self.features, 1, name="shortcut")(x_BxHxWxC)
        return x_BxHxWxC + h


class Stem(nn.Module):
    """7x7 with stride 2, BN, ReLU, and three residual blocks; with `pool`, a pool after the first.

    Channels grow from a quarter of `features` over a half to all of them.
    """

    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    features: int
    pool: bool

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
        x = self.conv(self.features // 4, 7, 2, name="conv")(x_BxHxWxC)
        x = nn.relu(self.norm(name="bn")(x))
        x = Residual(self.conv, self.norm, self.features // 2, name="block1")(x)
        if self.pool:
            x = half(x)
        x = Residual(self.conv, self.norm, self.features // 2, name="block2")(x)
        return Residual(self.conv, self.norm, self.features, name="block3")(x)


class SubNetwork(nn.Module):
    """One hourglass: `depth` times down to half the resolution and up again, with skips.

    A residual block and a 1x1 with BN and ReLU follow, as in the paper.
    """

    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    features: int
    depth: int

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
        def block(name: str, x: jax.Array) -> jax.Array:
            return Residual(self.conv, self.norm, self.features, name=name)(x)

        x, skips = x_BxHxWxC, []
        for level in range(1, self.depth + 1):
            skips.append(block(f"skip{level}", x))
            x = block(f"down{level}", half(x))
        x = block("bottom", x)
        for level in range(self.depth, 0, -1):
            skip = skips.pop()
            x = skip + nearest(block(f"up{level}", x), skip.shape[1:3])
        x = self.conv(self.features, 1, name="last")(block("after", x))
        return nn.relu(self.norm(name="bn")(x))


class Stage(nn.Module):
    """An hourglass, its heatmaps and, unless it is the last one, the input of the next stage."""

    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    features: int
    joints: int
    depth: int
    last: bool

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = SubNetwork(self.conv, self.norm, self.features, self.depth, name="hourglass")(x_BxHxWxC)
        heatmap = self.conv(self.joints, 1, bias=True, kernel_init=SMALL, name="predict")(y)
        if self.last:
            return y, heatmap
        merged = self.conv(self.features, 1, name="merge_features")(y)
        merged = merged + self.conv(self.features, 1, name="merge_heatmaps")(heatmap)
        return x_BxHxWxC + merged, heatmap


class Hourglass(nn.Module):
    r"""Stacked hourglasses: every stage refines the heatmaps of the one before.

    Parameters are under `stem` and, for each stage, `stage1/hourglass` (blocks `skip1`, `down1`,
    ..., `bottom`, ..., `up1`, `after`, and `last`), `stage1/predict`, the 1x1 to the heatmaps, and,
    of all stages but the last, `stage1/merge_features` and `stage1/merge_heatmaps`, the 1x1s that
    add features and heatmaps to the input of the next stage. The hourglasses of all stages have the
    same shapes, so that one bank can serve them all:
    `Rule(r"stage\d+/hourglass/.+/kernel", Ring(size), bank="ring")`.

    Differences from the paper: the first convolution has a quarter of the width, as the paper's
    64 of 256 channels, at any width; feature maps of odd size are pooled with their last row or
    column repeated.

    Attributes:
      stages: sub-networks in a row, 1 to 64.
      width: channels, a multiple of 4.
      num_classes: heatmaps, one per joint.
      depth: times that an hourglass halves the resolution, 1 to 10.
      stem: "imagenet" for heatmaps of a quarter of the images' resolution, or "cifar", without the
        pool, for half of it.
      dtype: compute dtype; the parameters and the heatmaps stay float32.
      axis_name: mapped axis (of `pmap` or `shard_map`) over which batch statistics are averaged;
        None for no averaging.

    Raises:
      ModelError: when called, if an attribute is not legal or the images are not (B, H, W, C).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from paramshare.models import Hourglass
      >>> images = jax.ShapeDtypeStruct((1, 256, 256, 3), jnp.float32)
      >>> init = lambda x: Hourglass(stages=2).init_with_output(jax.random.key(0), x)
      >>> heatmaps, variables = jax.eval_shape(init, images)
      >>> heatmaps.shape, sorted(variables["params"])
      ((1, 2, 64, 64, 17), ['stage1', 'stage2', 'stem'])

    References:
      Newell, Yang & Deng, "Stacked Hourglass Networks for Human Pose Estimation", ECCV 2016,
      arXiv:1603.06937.
    """

    stages: int = 8
    width: int = 256
    num_classes: int = 17
    depth: int = 4
    stem: str = "imagenet"
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array, train: bool = False) -> jax.Array:
        """Heatmaps of all stages, (B, S, h, w, J) float32."""
        check_attributes(self)
        check_images(x_BxHxWxC)
        conv, norm = layers(self, train, HE_NORMAL_FAN_OUT)
        x = Stem(conv, norm, self.width, self.stem == "imagenet", name="stem")(x_BxHxWxC)
        heatmaps = []
        for number in range(1, self.stages + 1):
            x, heatmap = Stage(
                conv,
                norm,
                self.width,
                self.num_classes,
                self.depth,
                last=number == self.stages,
                name=f"stage{number}",
            )(x)
            heatmaps.append(heatmap.astype(jnp.float32))
        return jnp.stack(heatmaps, axis=1)


def half(x_BxHxWxC: jax.Array) -> jax.Array:
    """The 2x2 max-pool of stride 2; odd sizes are rounded up.

    On CPU the gradient of a maximum over an axis is much faster than that of `nn.max_pool`.

    Example:
      >>> half(jnp.arange(6.0).reshape(1, 2, 3, 1))[0, :, :, 0].tolist()
      [[4.0, 5.0]]
    """
    batch, height, width, channels = x_BxHxWxC.shape
    if height % 2 or width % 2:
        padding = ((0, 0), (0, height % 2), (0, width % 2), (0, 0))
        return half(jnp.pad(x_BxHxWxC, padding, mode="edge"))
    return x_BxHxWxC.reshape(batch, height // 2, 2, width // 2, 2, channels).max(axis=(2, 4))


def check_attributes(model: Hourglass) -> None:
    """`ModelError` if an attribute is not legal."""
    for name, most in (("stages", MOST_STAGES), ("depth", MOST_DEPTH)):
        if not 1 <= getattr(model, name) <= most:
            raise ModelError(
                f"{name} of an hourglass network must be 1 to {most}; got {getattr(model, name)}"
            )
    if model.width < 4 or model.width % 4:
        raise ModelError(
            f"the width of an hourglass network must be a multiple of 4; got {model.width}"
        )
    if model.num_classes < 1:
        raise ModelError(
            f"num_classes={model.num_classes}; an hourglass network must have at least one joint"
        )
    check_stem(model.stem)
