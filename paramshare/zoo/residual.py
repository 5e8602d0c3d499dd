"""The plain residual networks whose weights several papers share."""

from typing import Any

from paramshare.models import ModelError, ResNet
from paramshare.models.layers import check_width
from paramshare.models.resnet import BASIC_BLOCKS, BOTTLENECK_BLOCKS


def has_basic_blocks(depth: int, **_: Any) -> bool:
    """Whether the ImageNet network of this depth exists and has basic blocks."""
    return depth in BASIC_BLOCKS


def has_bottlenecks(depth: int, **_: Any) -> bool:
    """Whether the ImageNet network of this depth exists and has bottlenecks."""
    return depth in BOTTLENECK_BLOCKS


def for_imagenet(depth: int, **_: Any) -> bool:
    """Whether an ImageNet network of this depth exists."""
    return has_basic_blocks(depth) or has_bottlenecks(depth)


def for_small_images(depth: int, **_: Any) -> bool:
    """Whether `residual` builds a network for 32x32 images at this depth."""
    return not for_imagenet(depth)


def resnet(depth: int, width: float = 1, **options: Any) -> ResNet:
    """ResNet18, 34, 50, 101 or 152, with 64 times `width` channels in the first stage."""
    k = check_width(width, base=64)
    blocks = {**BASIC_BLOCKS, **BOTTLENECK_BLOCKS}[depth]
    return ResNet(blocks, (k, 2 * k, 4 * k, 8 * k), bottleneck=has_bottlenecks(depth), **options)


def cifar_resnet(depth: int, width: float = 1, **options: Any) -> ResNet:
    """ResNet20, 32, 44, ... for 32x32 images.

    The depth is 6 n + 2, the stages have 16, 32 and 64 times `width` channels, and the shortcuts
    have no parameters.
    """
    k = check_width(width)
    if depth < 8 or (depth - 2) % 6:
        low = max(8, depth - (depth - 2) % 6)
        raise ModelError(
            "the depth of a residual network for 32x32 images must be 6 n + 2 (8, 14, ...); "
            f"got {depth}, the nearest are {low} and {low + 6}"
        )
    blocks, widths = ((depth - 2) // 6,) * 3, (k, 2 * k, 4 * k)
    options = {"stem": "cifar"} | options
    return ResNet(blocks, widths, stem_width=k, shortcut="pad", **options)


def residual(depth: int, **options: Any) -> ResNet:
    """`resnet` at the depths of ImageNet networks, `cifar_resnet` at all others."""
    return (resnet if for_imagenet(depth) else cifar_resnet)(depth, **options)
