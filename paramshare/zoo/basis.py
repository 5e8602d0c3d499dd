"""Deeply shared filter bases: Kang & Kim, NeurIPS 2021."""

from typing import Any

from paramshare.models import DenseNet, MobileNetV2, ModelError, ResNeXt
from paramshare.plan import Plan
from paramshare.rule import Rule
from paramshare.schemes import FilterBasis, Tied
from paramshare.zoo.family import Network
from paramshare.zoo.residual import residual, resnet

LATER = r"block(?!1/)\d+"  # the first block of a stage changes the width and is never shared


def factored_resnet(
    depth: int, shared: int, unique: int, bases: int = 1, **options: Any
) -> Network:
    """A residual network with `bases` filter bases per stage, whose ranks double every stage."""
    model = residual(depth, rank=_rank(shared, unique), **options)
    if max(model.blocks) < 2:
        raise ModelError(
            "a network of one block per stage has nothing to share; the least depth is 14"
        )
    rules = [
        Rule(
            rf"stage{g + 1}/{LATER}/basis\d/kernel",
            FilterBasis(shared * 2**g, unique * 2**g, bases, initial="paper"),
            bank=f"stage{g + 1}",
        )
        for g in range(len(model.blocks) if shared else 0)
    ]
    return model, Plan(*rules) if rules else None


def shared_bottlenecks(depth: int, convolutions: str, **options: Any) -> Network:
    """A bottleneck network whose stages share one kernel for each of the `convolutions` (regex)."""
    rule = Rule(
        rf"(?P<stage>stage\d)/{LATER}/(?P<conv>{convolutions})/kernel",
        Tied(orthonormal=True, initial="paper"),
        bank="{stage}-{conv}",
    )
    return resnet(depth, **options), Plan(rule)


def shared_mobilenet(convolutions: str, **options: Any) -> Network:
    """MobileNetV2 whose stages 3 to 6 share one kernel for each of the `convolutions` (regex)."""
    rule = Rule(
        rf"(?P<stage>stage[3-6])/{LATER}/(?P<conv>{convolutions})/kernel",
        Tied(initial="paper"),
        bank="{stage}-{conv}",
    )
    return MobileNetV2(**options), Plan(rule)


def factored_densenet(shared: int, unique: int, **options: Any) -> Network:
    """DenseNet121 with one filter basis per stage, of one rank in all stages.

    In the paper's public code the layers of stage 4 use the basis of stage 3, and that of stage 4
    is only penalised. Here, as in the paper's text, each stage uses its own.
    """
    model = DenseNet(rank=_rank(shared, unique), **options)
    if not shared:
        return model, None
    scheme = FilterBasis(shared, unique, orthonormal=False, initial="paper")
    return model, Plan(Rule(r"(?P<stage>stage\d)/layer\d+/basis/kernel", scheme, bank="{stage}"))


def shared_resnext(shared: int, unique: int, **options: Any) -> Network:
    """ResNeXt50_32x4d whose stages share one grouped 3x3; each block keeps a smaller one."""
    _rank(shared, unique)
    model = ResNeXt(shared=shared, unique=unique, **options)
    if not shared:
        return model, None
    scheme = Tied(orthonormal=True, initial="paper")
    path = rf"(?P<stage>stage\d)/{LATER}/shared/kernel"
    return model, Plan(Rule(path, scheme, bank="{stage}"))


def _rank(shared: int, unique: int) -> int:
    if shared + unique == 0:
        raise ModelError("s0u0 is a basis without filters; give shared or unique filters")
    return shared + unique
