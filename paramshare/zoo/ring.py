"""Recurrent parameter generators: Wang et al. 2021."""

from typing import Any

import flax.linen as nn

from paramshare.plan import Plan, Rule
from paramshare.schemes import Ring
from paramshare.zoo.family import LARGE, Family
from paramshare.zoo.residual import cifar_resnet, for_imagenet, resnet

ONE_LAYER = 512 * 512 * 9  # "one convolution layer's worth"


def _ring(numbers: dict[str, Any], ring_size: int | None = None, **options: Any) -> tuple[nn.Module, Plan]:
    """One ring for all convolutions of the stages, 1x1 shortcuts included; stem, batch norms and classifier are outside."""
    build = resnet if for_imagenet(numbers) else cifar_resnet
    size = numbers.get("ring_size", ONE_LAYER) if ring_size is None else ring_size
    return build(numbers["depth"], **options), Plan(Rule(r"stage\d/block\d+/(conv\d|shortcut)/kernel", Ring(size), bank="ring"))


FAMILIES = (
    Family(
        "resnet{depth}-rpg",
        "a residual network whose convolutions all come out of one ring of 2,359,296 numbers",
        ("resnet18-rpg", "resnet34-rpg"),
        _ring,
        for_imagenet,
        LARGE,
        ("dtype", "axis_name", "stem", "ring_size"),
    ),
    Family(
        "resnet{depth}-rpg-{ring_size}",
        "the same with a ring of so many",
        ("resnet34-rpg-50000",),
        _ring,
        for_imagenet,
        LARGE,
        ("dtype", "axis_name", "stem"),
    ),
    Family(
        "resnet{depth}-rpg-{ring_size}",
        "the same of a network for 32x32 images",
        ("resnet20-rpg-10000",),
        _ring,
    ),
)
