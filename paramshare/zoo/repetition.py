"""Learnable repetition: Chavan et al., ICIP 2021."""

from collections.abc import Callable
from typing import Any

from paramshare.models import VGG, ModelError, ResNet
from paramshare.models.layers import check_width
from paramshare.plan import Plan
from paramshare.rule import Rule
from paramshare.schemes import Repeat
from paramshare.zoo.family import Network

# For each number of convolutions that are kept: the kept ones that are repeated, and by which.
REPEATED = {
    4: {"2_1": ("2_2", "3_1", "3_2", "4_1", "4_2", "5_1", "5_2")},
    5: {"2_1": ("3_1", "4_1", "5_1"), "2_2": ("3_2", "4_2", "5_2")},
    6: {"2_1": ("3_2",), "2_2": ("4_1", "5_1"), "3_1": ("4_2", "5_2")},
    7: {"2_1": ("4_1",), "2_2": ("4_2",), "3_1": ("5_1",), "3_2": ("5_2",)},
    8: {"3_1": ("4_2",), "3_2": ("5_1",), "4_1": ("5_2",)},
    9: {"4_1": ("5_1",), "4_2": ("5_2",)},
    10: {"5_1": ("5_2",)},
}


def repeated_vgg(convolutions: int, **options: Any) -> Network:
    """VGG11 that keeps this many of its ten convolutions; the others repeat kept ones."""
    if convolutions not in REPEATED:
        raise ModelError(
            f"rep-vgg keeps 4 to 10 of VGG11's convolutions (rep-vgg-4 to rep-vgg-10); "
            f"got {convolutions}"
        )
    path = "conv{}/kernel".format
    rules = [
        Rule(
            paths=(path(first), *map(path, later)),
            scheme=Repeat(source=path(first), initial="paper"),
            bank=f"conv{first}",
        )
        for first, later in REPEATED[convolutions].items()
    ]
    return VGG(11, **options), Plan(*rules)


def resnet16(width: float, **options: Any) -> ResNet:
    """A residual network of depth 16 for 32x32 images, with 16 `width` channels in stage 1."""
    k = check_width(width)
    return ResNet((2, 2, 2), (k, 2 * k, 4 * k), stem="cifar", stem_width=16, **options)


def repeated(network: Callable[..., ResNet], width: float, **options: Any) -> Network:
    """A network whose kernels repeat those of the same network of width 1."""
    if width < 1:
        raise ModelError(f"the width of a repeated network must be at least 1; got {width}")
    model, small = (network(width=k, bias=True, **options) for k in (width, 1))
    path = r"stage\d/block\d+/(conv\d|shortcut)/kernel"
    rules = [Rule(path, Repeat(like=small, initial="paper"), bank="repeated")]
    if width > 1:
        # The stem of the small network is as wide as its first stage, which has no shortcut kernel.
        base = (1, 1, small.stem_width, small.widths[0])
        shortcut = Rule(
            paths=("stage1/block1/shortcut/kernel",),
            scheme=Repeat(base=base, initial="paper"),
            bank="repeated-shortcut",
        )
        rules.insert(0, shortcut)
    return model, Plan(*rules)
