"""Residual networks: basic, bottleneck and factored blocks, for ImageNet and 32x32 images."""

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
    check_width,
    layers,
    stem_pool,
)

# Number of blocks of the four stages, by depth.
BASIC_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
BOTTLENECK_BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


class BasicBlock(nn.Module):
    """3x3 with the stride, BN, ReLU, 3x3, BN, plus the shortcut, ReLU."""

    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    features: int
    stride: int
    pad: bool = False

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
        r = shortcut(self, x_BxHxWxC)
        h = nn.relu(
            self.norm(name="bn1")(self.conv(self.features, 3, self.stride, name="conv1")(x_BxHxWxC))
        )
        return nn.relu(r + self.norm(name="bn2")(self.conv(self.features, 3, name="conv2")(h)))


class BottleneckBlock(nn.Module):
    """1x1, BN, ReLU, 3x3 with the stride, BN, ReLU, 1x1, BN, plus the shortcut, ReLU."""

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
    """A basic block of stride 1 whose 3x3s are factored: 3x3 to `rank` channels, BN, 1x1.

    Without `inner_norm` only the batch norm before the sum remains.
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
        return nn.relu(
            x_BxHxWxC + self.norm(name="bn2")(self.conv(self.features, 1, name="coefficients2")(h))
        )


class ResNet(nn.Module):
    """A residual network: stem, stages of blocks (strides 1, 2, 2, ...), global mean, classifier.

    Parameters are at `stem`, `bn`, `stage1/block1/conv1` and so on, `classifier`. A basic block has
    `conv1, bn1, conv2, bn2`, a bottleneck `conv3, bn3` too, and `shortcut, shortcut_bn` with a
    projection. A factored block has `basis1, basis_bn1, coefficients1, bn1`, and the same with 2.

    Attributes:
      blocks: number of blocks of each stage.
      widths: p of each stage; basic blocks have p output channels, bottlenecks 4 p.
      num_classes: outputs of the classifier; None for no classifier: the network then returns the
        outputs of all its stages, a tuple of (B, h, w, c), as detectors need them.
      bottleneck: whether a block is a bottleneck, 1x1 to q channels, 3x3, 1x1 to 4 p with
        q = `inner` p, or has two 3x3s.
      inner: the ratio q / p of bottlenecks; 2 for Wide-ResNet-50-2. Every q must be an integer.
      stem: "imagenet" for a 7x7 of stride 2 and a 3x3 max-pool of stride 2, "cifar" for a 3x3.
      stem_width: channels of the stem.
      shortcut: where stride or width change: "projection" for a 1x1 and BN, "pad" for subsampling
        and zero channels, half before and half after, without parameters.
      rank: if positive, blocks 2.. of a stage are factored: 3x3 to rank 2^g channels (g = 0 in the
        first stage), BN, 1x1 to p channels. Basic blocks only.
      inner_norm: whether factored blocks have a batch norm after each convolution; False keeps only
        the last, for studies of the gradient flow.
      bias: whether every convolution but the stem has a bias. Then the biases of all batch norms
        start at 0.01, as in the networks of learned repetition.
      dtype: compute dtype; the parameters and the classifier stay float32.
      axis_name: mapped axis (of `pmap` or `shard_map`) over which batch statistics are averaged;
        None for no averaging.
      stage: builds a stage: a builder that takes block, blocks, stride, later and name.

    Raises:
      ModelError: when called, if an attribute is not legal, two do not fit each other, or the
        images are not (B, H, W, C).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from paramshare.models import ResNet
      >>> options = {"stem": "cifar", "stem_width": 16, "shortcut": "pad"}
      >>> resnet20 = ResNet((3, 3, 3), (16, 32, 64), num_classes=10, **options)
      >>> x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
      >>> shapes = jax.eval_shape(lambda x: resnet20.init(jax.random.key(0), x), x)
      >>> sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
      269722

    References:
      He et al., Deep Residual Learning for Image Recognition, CVPR 2016, arXiv:1512.03385; but the
      3x3 of a bottleneck has the stride, not its first 1x1.
      Zagoruyko & Komodakis, Wide Residual Networks, BMVC 2016, arXiv:1605.07146, section 3.4:
      `inner`.
      Kang & Kim, Deeply Shared Filter Bases, NeurIPS 2021, arXiv:2006.05066: `rank`.
      Chavan et al., Rescaling CNN through Learnable Repetition of Network Parameters, ICIP 2021,
      arXiv:2101.05650: `bias`.
    """

    blocks: tuple[int, ...] = BASIC_BLOCKS[18]
    widths: tuple[int, ...] = (64, 128, 256, 512)
    num_classes: int | None = 1000
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
    stage: Callable[..., nn.Module] = Stage

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array, train: bool = False) -> Any:
        check_attributes(self)
        check_images(x_BxHxWxC)
        conv, norm = layers(self, train, kernel_init=HE_NORMAL_FAN_OUT)
        if self.bias:
            norm = functools.partial(norm, bias_init=nn.initializers.constant(0.01))
        size, stride = (7, 2) if self.stem == "imagenet" else (3, 1)
        x = nn.relu(norm(name="bn")(conv(self.stem_width, size, stride, name="stem")(x_BxHxWxC)))
        if self.stem == "imagenet":
            x = stem_pool(x)

        conv, outputs = functools.partial(conv, bias=self.bias), []
        for g, (blocks, p) in enumerate(zip(self.blocks, self.widths, strict=True)):
            pad, later = self.shortcut == "pad", None
            if self.bottleneck:
                q = check_width(self.inner, base=p)
                block = functools.partial(BottleneckBlock, conv, norm, 4 * p, q, pad=pad)
            else:
                block = functools.partial(BasicBlock, conv, norm, p, pad=pad)
            if self.rank:
                later = functools.partial(
                    FactoredBlock, conv, norm, p, self.rank * 2**g, inner_norm=self.inner_norm
                )
            stride = 1 if g == 0 else 2
            x = self.stage(block, blocks, stride=stride, later=later, name=f"stage{g + 1}")(x)
            outputs.append(x)
        if self.num_classes is None:
            return tuple(outputs)
        x_BxC = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
        return nn.Dense(self.num_classes, name="classifier")(x_BxC)

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels of the image from one place of a stage's output to the next, for each stage."""
        first = 4 if self.stem == "imagenet" else 1
        return tuple(first * 2**g for g in range(len(self.blocks)))


def shortcut(block: Any, x_BxHxWxC: jax.Array) -> jax.Array:
    """A block's input in the shape of its output: unchanged, projected, or subsampled and padded.

    Must be called inside the block.

    Raises:
      ModelError: if padding would have to remove channels, or to add an odd number of them.
    """
    extra = block.features - x_BxHxWxC.shape[-1]
    if block.stride == 1 and extra == 0:
        return x_BxHxWxC
    if not block.pad:
        return block.norm(name="shortcut_bn")(
            block.conv(block.features, 1, block.stride, name="shortcut")(x_BxHxWxC)
        )
    if extra < 0 or extra % 2:
        raise ModelError(
            f"a padded shortcut adds an even number of channels; it cannot lead from "
            f"{x_BxHxWxC.shape[-1]} channels to {block.features}: choose other widths, or "
            'shortcut="projection"'
        )
    return jnp.pad(
        x_BxHxWxC[:, :: block.stride, :: block.stride],
        ((0, 0), (0, 0), (0, 0), (extra // 2, extra // 2)),
    )


def check_attributes(model: ResNet) -> None:
    """`ModelError` if an attribute is not legal or two do not fit each other."""
    if len(model.blocks) != len(model.widths):
        raise ModelError(
            "blocks and widths must have an entry for each stage; got "
            f"{len(model.blocks)} and {len(model.widths)} entries"
        )
    if not model.blocks or min(*model.blocks, *model.widths, model.stem_width) < 1:
        raise ModelError(
            "a residual network must have at least one stage, one block per stage and one channel "
            f"everywhere; got blocks={model.blocks}, widths={model.widths}, "
            f"stem_width={model.stem_width}"
        )
    check_stem(model.stem)
    if model.shortcut not in ("projection", "pad"):
        raise ModelError(f"shortcut={model.shortcut!r}; the shortcut must be 'projection' or 'pad'")
    if not model.bottleneck and model.inner != 1:
        raise ModelError(
            f"inner={model.inner} widens bottlenecks only; leave it at 1, or set bottleneck=True"
        )
    if model.rank < 0:
        raise ModelError(
            f"rank={model.rank}; the number of basis filters in the first stage must be positive, "
            "or 0 for convolutions that are not factored"
        )
    if model.rank and model.bottleneck:
        raise ModelError(
            f"rank={model.rank} factors basic blocks only; leave it at 0, or set bottleneck=False"
        )
    for g, p in enumerate(model.widths):
        if model.rank * 2**g > 9 * p:
            raise ModelError(
                f"rank={model.rank} means {model.rank * 2**g} basis filters in stage {g + 1}; the "
                f"rank of 3x3 kernels over its {p} channels is at most {9 * p}"
            )


def is_factored(model: nn.Module) -> bool:
    """Whether a model is a `ResNet` of factored blocks."""
    return isinstance(model, ResNet) and model.rank > 0
