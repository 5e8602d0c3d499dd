"""ResNeXt: residual bottlenecks with grouped 3x3 convolutions, for ImageNet and 32x32 images."""

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
    check_images,
    check_stem,
    layers,
    stem_pool,
)

# Filters per group of the `unique` convolutions, and of the `shared` ones of the first stage. The
# `shared` convolutions keep their number of groups, so that theirs doubles with every stage.
FILTERS_PER_GROUP = 4


class GroupedBlock(nn.Module):
    """1x1 to `inner` channels, grouped 3x3 with the stride, 1x1 to `features`, plus a shortcut.

    Each convolution has BN; ReLU follows the first two and the sum.
    """

    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    features: int
    inner: int
    groups: int
    stride: int

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
        r = x_BxHxWxC
        if self.stride != 1 or r.shape[-1] != self.features:
            r = self.norm(name="shortcut_bn")(
                self.conv(self.features, 1, self.stride, name="shortcut")(r)
            )
        h = nn.relu(self.norm(name="bn1")(self.conv(self.inner, 1, name="conv1")(x_BxHxWxC)))
        h = nn.relu(
            self.norm(name="bn2")(
                self.conv(
                    self.inner, 3, self.stride, feature_group_count=self.groups, name="conv2"
                )(h)
            )
        )
        return nn.relu(r + self.norm(name="bn3")(self.conv(self.features, 1, name="conv3")(h)))


class GroupedBasisBlock(nn.Module):
    """A grouped block of stride 1 whose 3x3 is replaced by smaller ones, concatenated, BN and ReLU.

    `filters` has the name, the number of filters and the number of groups of each.
    """

    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    features: int
    inner: int
    filters: tuple[tuple[str, int, int], ...]
    stride: int = 1

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
        h = nn.relu(self.norm(name="bn1")(self.conv(self.inner, 1, name="conv1")(x_BxHxWxC)))
        h = jnp.concatenate(
            [
                self.conv(number, 3, feature_group_count=groups, name=name)(h)
                for name, number, groups in self.filters
            ],
            axis=-1,
        )
        h = nn.relu(self.norm(name="basis_bn")(h))
        return nn.relu(
            x_BxHxWxC + self.norm(name="bn3")(self.conv(self.features, 1, name="conv3")(h))
        )


class ResNeXt(nn.Module):
    """ResNeXt: stem, stages of grouped bottlenecks (strides 1, 2, 2, ...), global mean, classifier.

    The default is ResNeXt50_32x4d. In the first stage the 3x3 of a bottleneck has `groups` times
    `group_width` channels and the output 256; both double with every stage. Parameters are at
    `stem`, `bn`, `stage1/block1/conv1` and so on, `classifier`. A block has
    `conv1, bn1, conv2, bn2, conv3, bn3`; the first one of a stage also has `shortcut, shortcut_bn`.
    With `shared` or `unique` filters, blocks 2.. have `unique, shared, basis_bn` instead of
    `conv2, bn2`.

    Attributes:
      blocks: number of blocks of each stage.
      groups: groups of the 3x3 convolutions.
      group_width: channels of each group in the first stage.
      shared: s; blocks 2.. of stage g (from 0) have s 2^g filters at `shared`, in s / 4 groups. All
        blocks of a stage have the same shape there, so that they can share one kernel. 0 for none.
      unique: u; the same blocks have u 2^g filters at `unique`, in u 2^g / 4 groups. 0 for none.
      num_classes: outputs of the classifier.
      stem: "imagenet" for a 7x7 of stride 2 and a 3x3 max-pool of stride 2, "cifar" for a 3x3. Both
        have 64 channels, BN and ReLU.
      dtype: compute dtype; the parameters and the classifier stay float32.
      axis_name: mapped axis (of `pmap` or `shard_map`) over which batch statistics are averaged;
        None for no averaging.

    Raises:
      ModelError: when called, if an attribute is not legal, the groups do not divide the channels,
        or the images are not (B, H, W, C).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from paramshare.models import ResNeXt
      >>> x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
      >>> resnext50 = ResNeXt(num_classes=100, stem="cifar")
      >>> shapes = jax.eval_shape(lambda x: resnext50.init(jax.random.key(0), x), x)
      >>> sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
      23177124

    References:
      Xie et al., Aggregated Residual Transformations for Deep Neural Networks, CVPR 2017,
      arXiv:1611.05431, as torchvision's resnext50_32x4d.
      Kang & Kim, Deeply Shared Filter Bases, NeurIPS 2021, arXiv:2006.05066: `shared`, `unique`.
    """

    blocks: tuple[int, ...] = (3, 4, 6, 3)
    groups: int = 32
    group_width: int = 4
    shared: int = 0
    unique: int = 0
    num_classes: int = 1000
    stem: str = "imagenet"
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array, train: bool = False) -> jax.Array:
        check_attributes(self)
        check_images(x_BxHxWxC)
        conv, norm = layers(self, train, kernel_init=HE_NORMAL_FAN_OUT)
        size, stride = (7, 2) if self.stem == "imagenet" else (3, 1)
        x = nn.relu(norm(name="bn")(conv(64, size, stride, name="stem")(x_BxHxWxC)))
        if self.stem == "imagenet":
            x = stem_pool(x)
        for g, blocks in enumerate(self.blocks):
            features, inner = 256 * 2**g, self.groups * self.group_width * 2**g
            block = functools.partial(GroupedBlock, conv, norm, features, inner, self.groups)
            later = None
            if filters := basis(self, g):
                later = functools.partial(GroupedBasisBlock, conv, norm, features, inner, filters)
            x = Stage(block, blocks, 1 if g == 0 else 2, later, name=f"stage{g + 1}")(x)
        x_BxC = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
        return nn.Dense(self.num_classes, name="classifier")(x_BxC)


def basis(model: ResNeXt, g: int) -> tuple[tuple[str, int, int], ...]:
    """(name, filters, groups) of the convolutions that replace the 3x3s of stage g, from 0."""
    unique, shared = model.unique * 2**g, model.shared * 2**g
    sizes = dict(
        unique=(unique, unique // FILTERS_PER_GROUP),
        shared=(shared, model.shared // FILTERS_PER_GROUP),
    )
    return tuple((name, *size) for name, size in sizes.items() if size[0])


def check_attributes(model: ResNeXt) -> None:
    """`ModelError` if an attribute is not legal."""
    check_stem(model.stem)
    if not model.blocks or min(*model.blocks, model.groups, model.group_width) < 1:
        raise ModelError(
            "a ResNeXt must have at least one stage, one block per stage, one group and one "
            f"channel per group; got blocks={model.blocks}, groups={model.groups}, "
            f"group_width={model.group_width}"
        )
    for name, filters in dict(shared=model.shared, unique=model.unique).items():
        if filters < 0 or filters % FILTERS_PER_GROUP:
            raise ModelError(
                f"{name}={filters}; the number of filters must be a multiple of "
                f"{FILTERS_PER_GROUP}, or 0 for none"
            )
    for g in range(len(model.blocks)):
        inner = model.groups * model.group_width * 2**g
        for name, _, groups in basis(model, g):
            if inner % groups:
                raise ModelError(
                    f"{name}={getattr(model, name)} makes {groups} groups in stage {g + 1}, which "
                    f"do not divide its {inner} channels; choose another {name}, groups or "
                    "group_width"
                )
