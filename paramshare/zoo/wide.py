"""Soft sharing in wide residual networks: Savarese & Maire, ICLR 2019."""

from typing import Any

from paramshare.models import ModelError, ResNet, WideResNet
from paramshare.models.layers import check_width
from paramshare.models.resnet import BOTTLENECK_BLOCKS
from paramshare.models.wide_resnet import blocks_per_stage
from paramshare.plan import Plan
from paramshare.rule import Rule
from paramshare.schemes import Soft
from paramshare.zoo.family import Network


def soft_wide_resnet(depth: int, width: float, templates: int, **options: Any) -> Network:
    """WRN-depth-width with one bank per stage; the first block of a stage is not shared."""
    if blocks_per_stage(depth) < 2:
        raise ModelError(
            "a network of depth 10 has one block per stage, and the first block is never shared; "
            "the least depth is 16"
        )
    later = r"(?P<stage>stage\d)/block(?!1/)\d+/conv\d/kernel"
    plan = Plan(Rule(later, Soft(templates, initial="paper"), bank="{stage}"))
    return WideResNet(depth, width, **options), plan


def wide_bottleneck(depth: int, width: float, **options: Any) -> ResNet:
    """Wide-ResNet-50-2 and its like: bottlenecks with `width` times as many channels inside."""
    check_width(width, base=64)
    return ResNet(BOTTLENECK_BLOCKS[depth], bottleneck=True, inner=width, **options)


def soft_wide_bottleneck(depth: int, width: float, templates: int, **options: Any) -> Network:
    """The same with three banks per stage, one for each kernel of the bottleneck."""
    model = wide_bottleneck(depth, width, **options)
    rules = [
        Rule(
            rf"stage{stage}/block(?!1/)\d+/(?P<conv>conv\d)/kernel",
            # More templates than layers would add parameters and nothing else.
            Soft(min(templates, blocks - 1), initial="paper"),
            bank=f"stage{stage}-{{conv}}",
        )
        for stage, blocks in enumerate(model.blocks, start=1)
    ]
    return model, Plan(*rules)
