"""The plain residual networks that several papers share parameters of."""

from typing import Any

from paramshare.models import ModelError, ResNet
from paramshare.models.layers import check_width
from paramshare.models.resnet import BASIC_BLOCKS, BOTTLENECK_BLOCKS
from paramshare.zoo.family import LARGE, Family

IMAGENET_DEPTHS = (*BASIC_BLOCKS, *BOTTLENECK_BLOCKS)


def for_imagenet(numbers: dict[str, Any]) -> bool:
    """Whether a depth is one of the four-stage networks'."""
    return numbers["depth"] in IMAGENET_DEPTHS


def has_basic_blocks(numbers: dict[str, Any]) -> bool:
    """Whether a depth is one of the four-stage networks' of basic blocks."""
    return numbers["depth"] in BASIC_BLOCKS


def has_bottlenecks(numbers: dict[str, Any]) -> bool:
    """Whether a depth is one of the four-stage networks' of bottlenecks."""
    return numbers["depth"] in BOTTLENECK_BLOCKS


def resnet(depth: int, width: float = 1, **options: Any) -> ResNet:
    """ResNet18, 34, 50, 101 or 152, with so many times 64 channels in the first stage."""
    k = check_width(width, base=64)
    blocks = {**BASIC_BLOCKS, **BOTTLENECK_BLOCKS}[depth]
    return ResNet(blocks, (k, 2 * k, 4 * k, 8 * k), bottleneck=depth in BOTTLENECK_BLOCKS, **options)


def cifar_resnet(depth: int, width: float = 1, **options: Any) -> ResNet:
    """ResNet20, 32, 44, ... for 32x32 images: 6 n + 2, stages of 16, 32 and 64 channels (times `width`), shortcuts without parameters."""
    k = check_width(width)
    if depth < 8 or (depth - 2) % 6:
        low = max(8, depth - (depth - 2) % 6)
        raise ModelError(
            f"a residual network for 32x32 images has depth 6 n + 2 (8, 14, ...); got {depth}, nearest are {low} and {low + 6}"
        )
    return ResNet(((depth - 2) // 6,) * 3, (k, 2 * k, 4 * k), stem="cifar", stem_width=k, shortcut="pad", **options)


FAMILIES = (
    Family(
        "resnet{depth}",
        "residual network for ImageNet, depth 18, 34, 50, 101 or 152; or for small images, with stem=cifar",
        ("resnet18", "resnet34", "resnet50", "resnet101"),
        lambda numbers, **options: (resnet(**numbers, **options), None),
        for_imagenet,
        LARGE,
        ("dtype", "axis_name", "stem"),
    ),
    Family(
        "resnet{depth}-x{width}",
        "the same, so many times as wide; the stem keeps its width",
        ("resnet18-x2", "resnet18-x4"),
        lambda numbers, **options: (resnet(**numbers, **options), None),
        for_imagenet,
        LARGE,
        ("dtype", "axis_name", "stem"),
    ),
    Family(
        "resnet{depth}",
        "residual network for 32x32 images, depth 6 n + 2",
        ("resnet20", "resnet32", "resnet44", "resnet56", "resnet110"),
        lambda numbers, **options: (cifar_resnet(**numbers, **options), None),
    ),
    Family(
        "resnet{depth}-x{width}",
        "the same, so many times as wide, the stem too",
        ("resnet20-x0.75",),
        lambda numbers, **options: (cifar_resnet(**numbers, **options), None),
    ),
)
