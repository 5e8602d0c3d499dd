"""Learnable repetition: Chavan et al., ICIP 2021."""

import functools
from typing import Any

import flax.linen as nn

from paramshare.models import VGG, ModelError, ResNet
from paramshare.models.layers import check_width
from paramshare.plan import Plan, Rule
from paramshare.schemes import Repeat
from paramshare.zoo.family import LARGE, Family
from paramshare.zoo.residual import resnet

# Which convolutions of the ten repeat which, by the number of the small network.
REPEATED = {
    4: {"2_1": ("2_2", "3_1", "3_2", "4_1", "4_2", "5_1", "5_2")},
    5: {"2_1": ("3_1", "4_1", "5_1"), "2_2": ("3_2", "4_2", "5_2")},
    6: {"2_1": ("3_2",), "2_2": ("4_1", "5_1"), "3_1": ("4_2", "5_2")},
    7: {"2_1": ("4_1",), "2_2": ("4_2",), "3_1": ("5_1",), "3_2": ("5_2",)},
    8: {"3_1": ("4_2",), "3_2": ("5_1",), "4_1": ("5_2",)},
    9: {"4_1": ("5_1",), "4_2": ("5_2",)},
    10: {"5_1": ("5_2",)},
}


def _repeated_vgg(numbers: dict[str, Any], **options: Any) -> tuple[nn.Module, Plan]:
    repeated = REPEATED.get(numbers["convolutions"])
    if repeated is None:
        raise ModelError(
            f"there are rep-vgg-4 to rep-vgg-10, which make VGG11's ten convolutions of the first ones; got {numbers['convolutions']}"
        )
    path = "conv{}/kernel".format
    rules = [
        Rule(paths=(path(first), *map(path, later)), scheme=Repeat(source=path(first)), bank=f"conv{first}")
        for first, later in repeated.items()
    ]
    return VGG(11, **options), Plan(*rules)


def _resnet16(width: float, **options: Any) -> ResNet:
    k = check_width(width)  # channels of the first stage
    return ResNet((2, 2, 2), (k, 2 * k, 4 * k), stem="cifar", stem_width=16, **options)


def _repeated(network: Any) -> Any:
    """Each kernel of the stages repeats the kernel that it has in the network of width 1."""

    def build(numbers: dict[str, Any], **options: Any) -> tuple[nn.Module, Plan]:
        width = numbers["width"]
        if width < 1:
            raise ModelError(f"a repeated network is at least as wide as the one that it repeats; got width {width}")
        model, small = (network(width=k, bias=True, **options) for k in (width, 1))
        rules = [Rule(r"stage\d/block\d+/(conv\d|shortcut)/kernel", Repeat(like=small), bank="repeated")]
        if width > 1:  # the small network needs no first shortcut: its stem is as wide as its first stage
            base = (1, 1, small.stem_width, small.widths[0])
            rules.insert(0, Rule(paths=("stage1/block1/shortcut/kernel",), scheme=Repeat(base=base), bank="repeated-shortcut"))
        return model, Plan(*rules)

    return build


FAMILIES = (
    Family(
        "vgg{depth}",
        "VGG11 for 32x32 images, ten 3x3 convolutions; or its first depth - 1",
        tuple(f"vgg{depth}" for depth in range(4, 12)),
        lambda numbers, **options: (VGG(numbers["depth"], **options), None),
    ),
    Family(
        "rep-vgg-{convolutions}",
        "VGG11 whose later convolutions repeat earlier ones",
        tuple(f"rep-vgg-{n}" for n in REPEATED),
        _repeated_vgg,
    ),
    Family(
        "resnet16-{width}",
        "residual network of depth 16 and of that width, for 32x32 images",
        ("resnet16-1", "resnet16-2", "resnet16-4", "resnet16-8"),
        lambda numbers, **options: (_resnet16(**numbers, **options), None),
    ),
    Family(
        "resnet16-{width}-repeat",
        "the same, every kernel repeating one of resnet16-1",
        ("resnet16-1-repeat", "resnet16-4-repeat", "resnet16-8-repeat", "resnet16-10-repeat"),
        _repeated(_resnet16),
    ),
    Family(
        "resnet18-x{width}-repeat",
        "the same, every kernel repeating one of resnet18",
        ("resnet18-x1-repeat", "resnet18-x2-repeat", "resnet18-x4-repeat"),
        _repeated(functools.partial(resnet, 18)),
        input_shape=LARGE,
        options=("dtype", "axis_name", "stem"),
    ),
)
