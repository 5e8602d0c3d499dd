"""Soft parameter sharing: Savarese & Maire, ICLR 2019; and its plain wide residual networks."""

from typing import Any

import flax.linen as nn

from paramshare.models import ModelError, ResNet, WideResNet
from paramshare.models.layers import check_width
from paramshare.models.resnet import BOTTLENECK_BLOCKS
from paramshare.models.wide_resnet import blocks_per_stage
from paramshare.plan import Plan, Rule
from paramshare.schemes import Soft
from paramshare.zoo.family import LARGE, Family
from paramshare.zoo.residual import has_bottlenecks


def _wide(numbers: dict[str, Any], **options: Any) -> tuple[nn.Module, None]:
    blocks_per_stage(numbers["depth"])
    check_width(numbers["width"])
    return WideResNet(numbers["depth"], numbers["width"], **options), None


def _soft_wide(numbers: dict[str, Any], **options: Any) -> tuple[nn.Module, Plan]:
    model, _ = _wide(numbers, **options)
    if blocks_per_stage(model.depth) < 2:
        raise ModelError("a network of depth 10 has one block a stage, and the first blocks are never shared; the least depth is 16")
    later = r"(?P<stage>stage\d)/block(?!1/)\d+/conv\d/kernel"
    return model, Plan(Rule(later, Soft(numbers["templates"]), bank="{stage}"))


def _bottleneck(numbers: dict[str, Any], **options: Any) -> tuple[ResNet, None]:
    check_width(numbers["width"], base=64)
    return ResNet(BOTTLENECK_BLOCKS[numbers["depth"]], bottleneck=True, inner=numbers["width"], **options), None


def _soft_bottleneck(numbers: dict[str, Any], **options: Any) -> tuple[nn.Module, Plan]:
    model, _ = _bottleneck(numbers, **options)
    # Three banks a stage, one for each kernel of the bottleneck; more templates than layers would be wasted.
    rules = [
        Rule(
            rf"stage{stage}/block(?!1/)\d+/(?P<conv>conv\d)/kernel",
            Soft(min(numbers["templates"], blocks - 1)),
            bank=f"stage{stage}-{{conv}}",
        )
        for stage, blocks in enumerate(model.blocks, start=1)
    ]
    return model, Plan(*rules)


FAMILIES = (
    Family(
        "wrn-{depth}-{width}",
        "Wide-ResNet bottleneck for ImageNet, depth 50, 101 or 152",
        ("wrn-50-2", "wrn-101-2"),
        _bottleneck,
        has_bottlenecks,
        LARGE,
    ),
    Family(
        "swrn-{depth}-{width}-{templates}",
        "the same with soft sharing, three banks a stage",
        ("swrn-50-2-1", "swrn-50-2-2", "swrn-50-2-3"),
        _soft_bottleneck,
        has_bottlenecks,
        LARGE,
    ),
    Family(
        "wrn-{depth}-{width}",
        "wide residual network for 32x32 images, depth 6 n + 4",
        ("wrn-16-1", "wrn-16-2", "wrn-16-4", "wrn-28-10", "wrn-40-4", "wrn-40-8"),
        _wide,
    ),
    Family(
        "swrn-{depth}-{width}-{templates}",
        "the same with soft sharing, one bank a stage",
        ("swrn-16-1-1", "swrn-16-2-1", "swrn-28-10-1", "swrn-28-10-2", "swrn-28-10-4", "swrn-28-14-2", "swrn-28-18-2", "swrn-40-8-8"),
        _soft_wide,
    ),
)
