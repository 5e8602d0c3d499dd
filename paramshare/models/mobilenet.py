"""MobileNetV2: inverted residuals with linear bottlenecks, for ImageNet and for 32x32 images."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from paramshare.models.layers import (
    HE_NORMAL_FAN_OUT,
    ModelError,
    Stage,
    check_form,
    check_images,
    check_stem,
    layers,
)

# Expansion, channels and number of blocks of each stage; strides of the first blocks by stem.
STAGES = ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1))
STRIDES = {"imagenet": (1, 2, 2, 2, 1, 2, 1), "cifar": (1, 2, 2, 2, 1, 1, 1)}
HEAD = 1280


class InvertedResidual(nn.Module):
    """1x1 to `expansion` times the channels, depthwise 3x3 with the stride, 1x1 to `features`.

    Each convolution has BN; `relu` follows the first two. An `expansion` of 0 leaves the first out.
    With stride 1 the input is added if the width does not change. If it does, and `projection` is
    set, a 1x1 and BN of the input are added.
    """

    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    relu: Callable[[jax.Array], jax.Array]
    expansion: int
    features: int
    stride: int
    projection: bool = False

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
        channels = x_BxHxWxC.shape[-1]
        inner, h = channels, x_BxHxWxC
        if self.expansion:
            inner = self.expansion * channels
            h = self.relu(self.norm(name="bn1")(self.conv(inner, 1, name="expand")(h)))
        h = self.relu(
            self.norm(name="bn2")(
                self.conv(inner, 3, self.stride, feature_group_count=inner, name="depthwise")(h)
            )
        )
        h = self.norm(name="bn3")(self.conv(self.features, 1, name="project")(h))
        if self.stride == 1 and channels == self.features:
            return x_BxHxWxC + h
        if self.stride == 1 and self.projection:
            return (
                self.norm(name="shortcut_bn")(
                    self.conv(self.features, 1, name="shortcut")(x_BxHxWxC)
                )
                + h
            )
        return h


class MobileNetV2(nn.Module):
    """MobileNetV2 at width 1: stem, seven stages, a 1x1 head of 1280 channels, mean, classifier.

    Parameters are at `stem`, `stem_bn`, `stage1/block1/expand` and so on, `head`, `head_bn`,
    `classifier`. A block has `expand, bn1, depthwise, bn2, project, bn3`, and
    `shortcut, shortcut_bn` with a projection.

    Attributes:
      num_classes: outputs of the classifier.
      stem: "imagenet" for a 3x3 of stride 2. "cifar" for a 1x1 over the image padded by one pixel
        of zeros (32 pixels become 34), stride 1 in stage 6, and a projection where a block of
        stride 1 changes the width.
      form: "paper", as in the public code of the paper on shared filter bases: ReLU in the blocks,
        ReLU6 in stem and head, which have a bias, and an expansion from 32 channels to 32 in the
        block of stage 1. "torchvision": ReLU6 everywhere, no bias, and no expansion in stage 1.
      dropout: rate of dropout after the global mean; None for 0.2 with the ImageNet stem
        (torchvision's rate) and 0 with the CIFAR stem.
      dtype: compute dtype; the parameters and the classifier stay float32.
      axis_name: mapped axis (of `pmap` or `shard_map`) over which batch statistics are averaged;
        None for no averaging.

    Raises:
      ModelError: when called, if the stem is unknown, dropout is not in [0, 1), or the images are
        not (B, H, W, C).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from paramshare.models import MobileNetV2
      >>> x = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
      >>> shapes = jax.eval_shape(lambda x: MobileNetV2().init(jax.random.key(0), x), x)
      >>> shapes["params"]["stage3"]["block2"]["expand"]["kernel"].shape
      (1, 1, 32, 192)
      >>> sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
      3507272

    References:
      Sandler et al., MobileNetV2: Inverted Residuals and Linear Bottlenecks, CVPR 2018,
      arXiv:1801.04381, table 2.
      Kang & Kim, Deeply Shared Filter Bases, NeurIPS 2021, arXiv:2006.05066: the two stems.
    """

    num_classes: int = 1000
    stem: str = "imagenet"
    form: str = "paper"
    dropout: float | None = None
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array, train: bool = False) -> jax.Array:
        check_stem(self.stem)
        check_form(self.form)
        paper = self.form == "paper"
        imagenet = self.stem == "imagenet"
        dropout = (0.2 if imagenet else 0.0) if self.dropout is None else self.dropout
        if not 0 <= dropout < 1:
            raise ModelError(f"dropout={dropout}; the rate must be at least 0 and below 1")
        check_images(x_BxHxWxC)
        conv, norm = layers(self, train, kernel_init=HE_NORMAL_FAN_OUT)
        x = x_BxHxWxC if imagenet else jnp.pad(x_BxHxWxC, ((0, 0), (1, 1), (1, 1), (0, 0)))
        size, stride = (3, 2) if imagenet else (1, 1)
        x = nn.relu6(norm(name="stem_bn")(conv(32, size, stride, paper, name="stem")(x)))
        block = functools.partial(
            InvertedResidual, conv, norm, nn.relu if paper else nn.relu6, projection=not imagenet
        )
        for number, ((expansion, features, blocks), stride) in enumerate(
            zip(STAGES, STRIDES[self.stem], strict=True), start=1
        ):
            if number == 1 and not paper:
                expansion = 0
            x = Stage(
                functools.partial(block, expansion, features), blocks, stride, name=f"stage{number}"
            )(x)
        x = nn.relu6(norm(name="head_bn")(conv(HEAD, 1, bias=paper, name="head")(x)))
        x_BxC = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
        x_BxC = nn.Dropout(dropout, deterministic=not train)(x_BxC)
        return nn.Dense(self.num_classes, name="classifier")(x_BxC)
