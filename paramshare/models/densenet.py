"""Densely connected networks with bottlenecks and compression (DenseNet-BC), for ImageNet and for 32x32 images."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from paramshare.models.layers import HE_NORMAL_FAN_OUT, ModelError, check_images, check_stem, layers


class DenseLayer(nn.Module):
    """BN, ReLU, 1x1 to 4 times `growth`, BN, ReLU, 3x3 to `growth`: new channels, which follow those of the input.

    With a `rank` the 3x3 is factored: a basis of `rank` 3x3 filters, BN, and 1x1 coefficients. No ReLU between basis and coefficients.
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
    """Dense layers at one resolution, named `layer1`, `layer2`, ..."""

    layer: Callable[..., nn.Module]
    layers: int

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
        for number in range(1, self.layers + 1):
            x_BxHxWxC = self.layer(name=f"layer{number}")(x_BxHxWxC)
        return x_BxHxWxC


class Transition(nn.Module):
    """BN, ReLU, 1x1 to half the channels, 2x2 mean-pool."""

    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
        h = nn.relu(self.norm(name="bn")(x_BxHxWxC))
        h = self.conv(x_BxHxWxC.shape[-1] // 2, 1, name="conv")(h)
        return nn.pool(h, 0.0, jax.lax.add, (2, 2), (2, 2), "VALID") / 4  # `avg_pool` divides by a NumPy integer: no strict promotion


class DenseNet(nn.Module):
    """DenseNet-BC: stem, stages of dense layers with transitions between them, BN, ReLU, global mean, classifier.

    The defaults are DenseNet121's. Parameters lie at `stem`, `stem_bn` (with the ImageNet stem), `stage1/layer1/conv1` and so on,
    `transition1/bn`, `transition1/conv` and so on, `bn`, `classifier`; in a layer at `bn1, conv1, bn2, conv2`, or `basis, basis_bn,
    coefficients` in place of `conv2`.

    Attributes:
      blocks: how many layers, for each stage.
      growth: channels that a layer adds; the stem has twice as many.
      rank: if positive, the 3x3 of every layer, whatever its stage, is factored: it leads to `rank` channels, then BN, then a 1x1 leads
        to `growth`.
      num_classes: outputs of the classifier.
      stem: "imagenet" for a 7x7 of stride 2, BN, ReLU and a 3x3 max-pool of stride 2; "cifar" for a 3x3 and nothing after it.
      dtype: compute dtype; parameters, and the classifier, stay float32.
      axis_name: the mapped axis (of `pmap` or `shard_map`) over which batch statistics are averaged; None keeps each device's own.

    Raises:
      ModelError: when called, if an attribute is none of these, or the images are not (B, H, W, C) or too small for the transitions.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from paramshare.models import DenseNet
      >>> x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
      >>> densenet121 = DenseNet(num_classes=100, stem="cifar")
      >>> shapes = jax.eval_shape(lambda x: densenet121.init(jax.random.key(0), x), x)
      >>> sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
      7048548

    References:
      Huang et al., Densely Connected Convolutional Networks, CVPR 2017, arXiv:1608.06993; in the form of torchvision's densenet121.
      Kang & Kim, Deeply Shared Filter Bases, NeurIPS 2021, arXiv:2006.05066: `rank`, and the CIFAR stem without a batch norm.
    """

    blocks: tuple[int, ...] = (6, 12, 24, 16)
    growth: int = 32
    rank: int = 0
    num_classes: int = 1000
    stem: str = "imagenet"
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array, train: bool = False) -> jax.Array:
        check_attributes(self)
        check_images(x_BxHxWxC)
        conv, norm = layers(self, train, kernel_init=HE_NORMAL_FAN_OUT)
        if self.stem == "imagenet":
            x = nn.relu(norm(name="stem_bn")(conv(2 * self.growth, 7, 2, name="stem")(x_BxHxWxC)))
            x = nn.max_pool(x, (3, 3), (2, 2), [(1, 1), (1, 1)])  # pyright: ignore[reportArgumentType] (annotated too narrowly)
        else:
            x = conv(2 * self.growth, 3, name="stem")(x_BxHxWxC)
        check_size(x_BxHxWxC, x, transitions=len(self.blocks) - 1)
        for number, blocks in enumerate(self.blocks, start=1):
            if number > 1:
                x = Transition(conv, norm, name=f"transition{number - 1}")(x)
            x = DenseStage(lambda name: DenseLayer(conv, norm, self.growth, self.rank, name=name), blocks, name=f"stage{number}")(x)
        x_BxC = jnp.mean(nn.relu(norm(name="bn")(x)), axis=(1, 2), dtype=jnp.float32)
        return nn.Dense(self.num_classes, name="classifier")(x_BxC)


def check_attributes(model: DenseNet) -> None:
    """`ModelError` unless there is such a network."""
    check_stem(model.stem)
    if not model.blocks or min(*model.blocks, model.growth) < 1:
        raise ModelError(
            "a dense network has a stage or more, each of a layer or more, and a growth of 1 or more; "
            f"got blocks={model.blocks}, growth={model.growth}"
        )
    if not 0 <= model.rank <= 36 * model.growth:
        raise ModelError(
            f"rank={model.rank}; 3x3 kernels over {4 * model.growth} channels have 1 to {36 * model.growth} independent ones: "
            "give that many basis filters, or 0 for convolutions that are not factored"
        )


def check_size(images_BxHxWxC: jax.Array, x_BxHxWxC: jax.Array, transitions: int) -> None:
    """`ModelError` unless something is left of the stem's output once it is halved at each transition, odd sizes rounded down."""
    if min(x_BxHxWxC.shape[1:3]) < 2**transitions:
        (height, width), (h, w) = images_BxHxWxC.shape[1:3], x_BxHxWxC.shape[1:3]
        raise ModelError(
            f"images of {height}x{width} are too small: the stem makes {h}x{w} of them, and {transitions} transitions need "
            f"{2**transitions} pixels a side or more"
        )
