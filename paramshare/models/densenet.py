"""Densely connected networks (DenseNet-BC), for ImageNet and for 32x32 images."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from paramshare.models.layers import (
    HE_NORMAL_FAN_OUT,
    ModelError,
    check_form,
    check_images,
    check_stem,
    layers,
    stem_pool,
)


class DenseLayer(nn.Module):
    """BN, ReLU, 1x1 to 4 times `growth`, BN, ReLU, 3x3 to `growth`; appends these to the input.

    With a positive `rank` the 3x3 is factored: a basis of `rank` 3x3 filters, BN, and 1x1
    coefficients. There is no ReLU between basis and coefficients.
    """

    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    growth: int
    rank: int = 0

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
        h = self.conv(4 * self.growth, 1, name="conv1")(nn.relu(self.norm(name="bn1")(x_BxHxWxC)))
        h = nn.relu(self.norm(name="bn2")(h))
        if self.rank:
            h = self.norm(name="basis_bn")(self.conv(self.rank, 3, name="basis")(h))
            h = self.conv(self.growth, 1, name="coefficients")(h)
        else:
            h = self.conv(self.growth, 3, name="conv2")(h)
        return jnp.concatenate([x_BxHxWxC, h], axis=-1)


class DenseStage(nn.Module):
    """Dense layers at one resolution, named `layer1`, `layer2`, ...; `layer` builds one by name."""

    layer: Callable[..., nn.Module]
    layers: int

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
        for number in range(1, self.layers + 1):
            x_BxHxWxC = self.layer(name=f"layer{number}")(x_BxHxWxC)
        return x_BxHxWxC


class Transition(nn.Module):
    """BN, ReLU if `relu` is set, 1x1 to half the channels, 2x2 mean-pool."""

    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    relu: bool = False

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
        h = self.norm(name="bn")(x_BxHxWxC)
        h = nn.relu(h) if self.relu else h
        h = self.conv(x_BxHxWxC.shape[-1] // 2, 1, name="conv")(h)
        # Not `avg_pool`: it divides by a NumPy integer, which strict dtype promotion refuses.
        return nn.pool(h, 0.0, jax.lax.add, (2, 2), (2, 2), "VALID") / 4


class DenseNet(nn.Module):
    """DenseNet-BC: stem, stages of dense layers and transitions, BN, ReLU, mean, classifier.

    The default is DenseNet121. Parameters are at `stem`, `stem_bn` (ImageNet stem only),
    `stage1/layer1/conv1` and so on, `transition1/bn`, `transition1/conv` and so on, `bn`,
    `classifier`. A layer has `bn1, conv1, bn2, conv2`; a factored one has
    `basis, basis_bn, coefficients` instead of `conv2`.

    Attributes:
      blocks: number of layers of each stage.
      growth: channels that a layer adds; the stem has twice as many.
      rank: if positive, the 3x3 of every layer is factored, with the same rank in all stages: 3x3
        to `rank` channels, BN, 1x1 to `growth` channels.
      num_classes: outputs of the classifier.
      stem: "imagenet" for a 7x7 of stride 2, BN, ReLU and a 3x3 max-pool of stride 2; "cifar" for a
        3x3 alone.
      form: "paper" for transitions without ReLU, as in the public code of the paper on shared
        filter bases; "torchvision" for BN, ReLU, 1x1, mean-pool. The parameters are the same.
      dtype: compute dtype; the parameters and the classifier stay float32.
      axis_name: mapped axis (of `pmap` or `shard_map`) over which batch statistics are averaged;
        None for no averaging.

    Raises:
      ModelError: when called, if an attribute is not legal, or the images are not (B, H, W, C) or
        too small for the transitions.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from paramshare.models import DenseNet
      >>> x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
      >>> densenet121 = DenseNet(num_classes=100, stem="cifar")
      >>> shapes = jax.eval_shape(lambda x: densenet121.init(jax.random.key(0), x), x)
      >>> sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
      7048548

    References:
      Huang et al., Densely Connected Convolutional Networks, CVPR 2017, arXiv:1608.06993.
      Kang & Kim, Deeply Shared Filter Bases, NeurIPS 2021, arXiv:2006.05066: `rank`, and the CIFAR
      stem without a batch norm.
    """

    blocks: tuple[int, ...] = (6, 12, 24, 16)
    growth: int = 32
    rank: int = 0
    num_classes: int = 1000
    stem: str = "imagenet"
    form: str = "paper"
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array, train: bool = False) -> jax.Array:
        check_attributes(self)
        check_images(x_BxHxWxC)
        conv, norm = layers(self, train, kernel_init=HE_NORMAL_FAN_OUT)
        if self.stem == "imagenet":
            x = nn.relu(norm(name="stem_bn")(conv(2 * self.growth, 7, 2, name="stem")(x_BxHxWxC)))
            x = stem_pool(x)
        else:
            x = conv(2 * self.growth, 3, name="stem")(x_BxHxWxC)
        check_size(x_BxHxWxC, x, transitions=len(self.blocks) - 1)
        for number, blocks in enumerate(self.blocks, start=1):
            if number > 1:
                relu = self.form == "torchvision"
                x = Transition(conv, norm, relu, name=f"transition{number - 1}")(x)
            x = DenseStage(
                lambda name: DenseLayer(conv, norm, self.growth, self.rank, name=name),
                blocks,
                name=f"stage{number}",
            )(x)
        x_BxC = jnp.mean(nn.relu(norm(name="bn")(x)), axis=(1, 2), dtype=jnp.float32)
        return nn.Dense(self.num_classes, name="classifier")(x_BxC)


def check_attributes(model: DenseNet) -> None:
    """`ModelError` if an attribute is not legal."""
    check_stem(model.stem)
    check_form(model.form)
    if not model.blocks or min(*model.blocks, model.growth) < 1:
        raise ModelError(
            "a dense network must have at least one stage, one layer per stage and a growth of 1; "
            f"got blocks={model.blocks}, growth={model.growth}"
        )
    if not 0 <= model.rank <= 36 * model.growth:
        raise ModelError(
            f"rank={model.rank}; the rank of 3x3 kernels over {4 * model.growth} channels must be "
            f"1 to {36 * model.growth}, or 0 for convolutions that are not factored"
        )


def check_size(images_BxHxWxC: jax.Array, x_BxHxWxC: jax.Array, transitions: int) -> None:
    """`ModelError` if the stem's output is too small to be halved by each transition."""
    if min(x_BxHxWxC.shape[1:3]) < 2**transitions:
        (height, width), (h, w) = images_BxHxWxC.shape[1:3], x_BxHxWxC.shape[1:3]
        raise ModelError(
            f"images of {height}x{width} are too small: the stem's output is {h}x{w}, and "
            f"{transitions} transitions need at least {2**transitions} pixels per side"
        )
