"""Residual networks with the activation after the sum: basic, bottleneck and factored blocks, for ImageNet and for 32x32 images."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from paramshare.models.layers import HE_NORMAL_FAN_OUT, ModelError, check_images, check_width, layers
from paramshare.models.looped import Loop, check_loops, stage

# Blocks of the four stages, by depth.
BASIC_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
BOTTLENECK_BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}

STEMS = ("imagenet", "cifar")
SHORTCUTS = ("projection", "pad")


class BasicBlock(nn.Module):
    """3x3 (which strides) and 3x3, each with BN; ReLU after the first and after the sum with the shortcut."""

    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    features: int
    stride: int
    pad: bool = False

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
        r = shortcut(self, x_BxHxWxC)
        h = nn.relu(self.norm(name="bn1")(self.conv(self.features, 3, self.stride, name="conv1")(x_BxHxWxC)))
        return nn.relu(r + self.norm(name="bn2")(self.conv(self.features, 3, name="conv2")(h)))


class BottleneckBlock(nn.Module):
    """1x1, 3x3 (which strides), 1x1, each with BN; ReLU after the first two and after the sum with the shortcut."""

    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    features: int
    inner: int
    stride: int
    pad: bool = False

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
        r = shortcut(self, x_BxHxWxC)
        h = nn.relu(self.norm(name="bn1")(self.conv(self.inner, 1, name="conv1")(x_BxHxWxC)))
        h = nn.relu(self.norm(name="bn2")(self.conv(self.inner, 3, self.stride, name="conv2")(h)))
        return nn.relu(r + self.norm(name="bn3")(self.conv(self.features, 1, name="conv3")(h)))


class FactoredBlock(nn.Module):
    """A basic block, without stride, whose 3x3s are each a basis of `rank` 3x3 filters, BN, 1x1 coefficients; ReLU as in a basic block.

    Without `inner_norm` only the batch norm before the sum is left.
    """

    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    features: int
    rank: int
    inner_norm: bool = True

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
        inner = self.norm if self.inner_norm else lambda name: lambda x: x
        h = inner(name="basis_bn1")(self.conv(self.rank, 3, name="basis1")(x_BxHxWxC))
        h = nn.relu(inner(name="bn1")(self.conv(self.features, 1, name="coefficients1")(h)))
        h = inner(name="basis_bn2")(self.conv(self.rank, 3, name="basis2")(h))
        return nn.relu(x_BxHxWxC + self.norm(name="bn2")(self.conv(self.features, 1, name="coefficients2")(h)))


class ResNet(nn.Module):
    """A residual network: stem, stages of blocks (the first with stride 1, the others with 2), global mean, classifier.

    Parameters lie at `stem`, `bn`, `stage1/block1/conv1` and so on, `classifier`. A block has `conv1, bn1, conv2, bn2`, a bottleneck
    `conv3, bn3` too, and `shortcut, shortcut_bn` where there is a projection; a factored block has `basis1, basis_bn1, coefficients1, bn1`
    and the same with 2.

    Attributes:
      blocks: how many, for each stage.
      widths: p of each stage; it leaves p channels, bottlenecks 4 p.
      num_classes: outputs of the classifier.
      bottleneck: blocks of 1x1 to q, 3x3 (which strides), 1x1 to 4 p, with q = `inner` p; otherwise of two 3x3s.
      inner: of bottlenecks; 2 makes a Wide-ResNet-50-2. A fraction is allowed if every q is whole.
      stem: "imagenet" for a 7x7 of stride 2 and a 3x3 max-pool of stride 2, "cifar" for a 3x3.
      stem_width: channels of the stem.
      shortcut: where stride or width change: "projection" for a 1x1 and BN; "pad" for every second pixel, without parameters, and zero
        channels, as many in front as behind.
      rank: if positive, blocks 2.. of a stage are factored: their 3x3s lead to rank 2^g channels (g = 0 in the first stage), then BN, then
        a 1x1 leads to p. Of basic blocks only.
      inner_norm: of factored blocks only; False leaves out all batch norms but the last, to analyse the flow of gradients.
      bias: every convolution but the stem has a bias, and the bias of every batch norm starts at .01, as in learned repetition's networks.
      dtype: compute dtype; parameters, and the classifier, stay float32.
      axis_name: the mapped axis (of `pmap` or `shard_map`) over which batch statistics are averaged; None keeps each device's own.
      loops: for each stage how its blocks 2.. run as a loop, or None; `()` for no loops. See `paramshare.models.looped`.
      unroll: whether loops are unrolled when compiled; None to choose by backend.

    Raises:
      ModelError: when called, if an attribute is none of these, two do not fit each other, or the images are not (B, H, W, C).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from paramshare.models import ResNet
      >>> resnet20 = ResNet((3, 3, 3), (16, 32, 64), num_classes=10, stem="cifar", stem_width=16, shortcut="pad")
      >>> x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
      >>> shapes = jax.eval_shape(lambda x: resnet20.init(jax.random.key(0), x), x)
      >>> sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
      269722

    References:
      He et al., Deep Residual Learning for Image Recognition, CVPR 2016, arXiv:1512.03385; with the 3x3 of a bottleneck striding.
      Zagoruyko & Komodakis, Wide Residual Networks, BMVC 2016, arXiv:1605.07146, section 3.4: `inner`.
      Kang & Kim, Deeply Shared Filter Bases, NeurIPS 2021, arXiv:2006.05066: `rank`.
      Chavan et al., Rescaling CNN through Learnable Repetition of Network Parameters, ICIP 2021, arXiv:2101.05650: `bias`.
    """

    blocks: tuple[int, ...] = BASIC_BLOCKS[18]
    widths: tuple[int, ...] = (64, 128, 256, 512)
    num_classes: int = 1000
    bottleneck: bool = False
    inner: float = 1
    stem: str = "imagenet"
    stem_width: int = 64
    shortcut: str = "projection"
    rank: int = 0
    inner_norm: bool = True
    bias: bool = False
    dtype: Any = jnp.float32
    axis_name: str | None = None
    loops: tuple[Loop | None, ...] = ()
    unroll: bool | None = None

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array, train: bool = False) -> jax.Array:
        check_attributes(self)
        check_images(x_BxHxWxC)
        conv, norm = layers(self, train, kernel_init=HE_NORMAL_FAN_OUT)
        if self.bias:
            norm = functools.partial(norm, bias_init=nn.initializers.constant(0.01))
        size, stride = (7, 2) if self.stem == "imagenet" else (3, 1)
        x = nn.relu(norm(name="bn")(conv(self.stem_width, size, stride, name="stem")(x_BxHxWxC)))
        if self.stem == "imagenet":
            x = nn.max_pool(x, (3, 3), (2, 2), [(1, 1), (1, 1)])  # pyright: ignore[reportArgumentType] (annotated too narrowly)

        conv = functools.partial(conv, bias=self.bias)
        for g, (blocks, p) in enumerate(zip(self.blocks, self.widths, strict=True)):
            block, later = functools.partial(BasicBlock, conv, norm, p, pad=self.shortcut == "pad"), None
            if self.bottleneck:
                block = functools.partial(BottleneckBlock, conv, norm, 4 * p, check_width(self.inner, base=p), pad=self.shortcut == "pad")
            if self.rank:
                later = functools.partial(FactoredBlock, conv, norm, p, self.rank * 2**g, inner_norm=self.inner_norm)
            build = stage(self, g + 1, blocks)
            x = build(block, blocks, stride=1 if g == 0 else 2, later=later, name=f"stage{g + 1}")(x)
        x_BxC = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
        return nn.Dense(self.num_classes, name="classifier")(x_BxC)


def shortcut(block: Any, x_BxHxWxC: jax.Array) -> jax.Array:
    """The input of a block as its output is shaped: itself, or projected, or cut and padded. Called inside the block.

    Raises:
      ModelError: if padding would have to take channels away, or to add an odd number of them.
    """
    extra = block.features - x_BxHxWxC.shape[-1]
    if block.stride == 1 and extra == 0:
        return x_BxHxWxC
    if not block.pad:
        return block.norm(name="shortcut_bn")(block.conv(block.features, 1, block.stride, name="shortcut")(x_BxHxWxC))
    if extra < 0 or extra % 2:
        raise ModelError(
            f"a padded shortcut adds as many channels in front as behind; it cannot lead from {x_BxHxWxC.shape[-1]} channels to "
            f'{block.features}: choose other widths, or shortcut="projection"'
        )
    return jnp.pad(x_BxHxWxC[:, :: block.stride, :: block.stride], ((0, 0), (0, 0), (0, 0), (extra // 2, extra // 2)))


def check_attributes(model: ResNet) -> None:
    """`ModelError` unless there is such a network."""
    if len(model.blocks) != len(model.widths):
        raise ModelError(f"blocks and widths have an entry for each stage; got {len(model.blocks)} and {len(model.widths)} of them")
    check_loops(model, len(model.blocks))
    if not model.blocks or min(*model.blocks, *model.widths, model.stem_width) < 1:
        raise ModelError(
            "a residual network has a stage or more, each of a block or more, and channels everywhere; "
            f"got blocks={model.blocks}, widths={model.widths}, stem_width={model.stem_width}"
        )
    for name, known in (("stem", STEMS), ("shortcut", SHORTCUTS)):
        if getattr(model, name) not in known:
            raise ModelError(f"{name}={getattr(model, name)!r}; the {name} is {' or '.join(map(repr, known))}")
    if not model.bottleneck and model.inner != 1:
        raise ModelError(
            f"inner={model.inner} widens the inside of bottlenecks; basic blocks have none: leave it at 1, or set bottleneck=True"
        )
    if model.rank < 0:
        raise ModelError(
            f"rank={model.rank}; give the number of basis filters in the first stage, or 0 for convolutions that are not factored"
        )
    if model.rank and model.bottleneck:
        raise ModelError(f"rank={model.rank} factors the 3x3s of basic blocks; a bottleneck's are not factored: leave rank at 0")
    for g, p in enumerate(model.widths):
        if model.rank * 2**g > 9 * p:
            raise ModelError(
                f"rank={model.rank} asks for {model.rank * 2**g} basis filters in stage {g + 1}; "
                f"3x3 kernels over its {p} channels have at most {9 * p} independent ones"
            )
