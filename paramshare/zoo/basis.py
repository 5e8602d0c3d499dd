"""Deeply shared filter bases: Kang & Kim, NeurIPS 2021."""

from typing import Any

import flax.linen as nn

from paramshare.models import DenseNet, MobileNetV2, ModelError, ResNeXt
from paramshare.plan import Plan, Rule
from paramshare.schemes import FilterBasis, Tied
from paramshare.zoo.family import LARGE, Family
from paramshare.zoo.residual import cifar_resnet, for_imagenet, has_basic_blocks, has_bottlenecks, resnet

LATER = r"block(?!1/)\d+"  # the first block of a stage changes the width, and is never shared


def _rank(numbers: dict[str, Any]) -> int:
    rank = numbers["shared"] + numbers["unique"]
    if not rank:
        raise ModelError("a basis of no filters, s0u0; give shared or unique filters")
    return rank


def _basis_plan(numbers: dict[str, Any], stages: int, bases: int = 1) -> Plan | None:
    """One bank a stage, whose ranks double from stage to stage."""
    s, u = numbers["shared"], numbers["unique"]
    if not s:
        return None
    paths = {g: rf"stage{g + 1}/{LATER}/basis\d/kernel" for g in range(stages)}
    return Plan(*(Rule(paths[g], FilterBasis(s * 2**g, u * 2**g, bases), bank=f"stage{g + 1}") for g in paths))


def _factored(numbers: dict[str, Any], bases: int = 1, **options: Any) -> tuple[nn.Module, Plan | None]:
    if for_imagenet(numbers):
        model = resnet(numbers["depth"], rank=_rank(numbers), **options)
    else:
        model = cifar_resnet(numbers["depth"], rank=_rank(numbers), **options)
    if max(model.blocks) < 2:
        raise ModelError("a network of one block a stage has nothing to share; the least depth is 14")
    return model, _basis_plan(numbers, len(model.blocks), bases)


def _double(numbers: dict[str, Any], **options: Any) -> tuple[nn.Module, Plan | None]:
    return _factored(numbers, bases=2, **options)


def _shared_bottleneck(convolutions: str) -> Any:
    def build(numbers: dict[str, Any], **options: Any) -> tuple[nn.Module, Plan]:
        rule = Rule(rf"(?P<stage>stage\d)/{LATER}/(?P<conv>{convolutions})/kernel", Tied(orthonormal=True), bank="{stage}-{conv}")
        return resnet(numbers["depth"], **options), Plan(rule)

    return build


def _mobilenet(convolutions: str | None) -> Any:
    def build(numbers: dict[str, Any], **options: Any) -> tuple[nn.Module, Plan | None]:
        rule = rf"(?P<stage>stage[3-6])/{LATER}/(?P<conv>{convolutions})/kernel"
        return MobileNetV2(**options), Plan(Rule(rule, Tied(), bank="{stage}-{conv}")) if convolutions else None

    return build


def _densenet(numbers: dict[str, Any], **options: Any) -> tuple[nn.Module, Plan | None]:
    if not numbers:
        return DenseNet(**options), None
    s, u = numbers["shared"], numbers["unique"]
    scheme = FilterBasis(s, u, orthonormal=False) if s else None
    plan = Plan(Rule(r"(?P<stage>stage\d)/layer\d+/basis/kernel", scheme, bank="{stage}")) if scheme else None
    return DenseNet(rank=_rank(numbers), **options), plan


def _resnext(numbers: dict[str, Any], **options: Any) -> tuple[nn.Module, Plan | None]:
    if not numbers:
        return ResNeXt(**options), None
    _rank(numbers)
    rule = Rule(rf"(?P<stage>stage\d)/{LATER}/shared/kernel", Tied(orthonormal=True), bank="{stage}")
    return ResNeXt(shared=numbers["shared"], unique=numbers["unique"], **options), Plan(rule) if numbers["shared"] else None


STEM = ("dtype", "axis_name", "stem")
FACTORED = ("resnet{depth}-s{shared}u{unique}", "resnet{depth}-s{shared}u{unique}-double")
SHARED = "filter bases shared within a stage: s shared filters, u unique ones, doubling from stage to stage"

FAMILIES = (
    Family(
        FACTORED[0],
        f"ImageNet's networks of basic blocks with {SHARED}",
        ("resnet34-s8u1", "resnet34-s16u1", "resnet34-s32u1", "resnet34-s16u0", "resnet34-s0u16"),
        _factored,
        has_basic_blocks,
        LARGE,
        (*STEM, "inner_norm"),
    ),
    Family(
        FACTORED[1],
        "the same with two bases a stage, for first and for second convolutions",
        ("resnet34-s32u1-double", "resnet34-s48u1-double"),
        _double,
        has_basic_blocks,
        LARGE,
        (*STEM, "inner_norm"),
    ),
    Family(
        FACTORED[0],
        f"networks for 32x32 images with {SHARED}",
        ("resnet20-s16u1", "resnet32-s8u1", "resnet32-s16u1", "resnet56-s8u1", "resnet56-s16u1"),
        _factored,
        lambda numbers: not for_imagenet(numbers),
        options=("dtype", "axis_name", "inner_norm"),
    ),
    Family(
        FACTORED[1],
        "the same with two bases a stage",
        ("resnet32-s16u1-double", "resnet56-s16u1-double"),
        _double,
        lambda numbers: not for_imagenet(numbers),
        options=("dtype", "axis_name", "inner_norm"),
    ),
    Family(
        "resnet{depth}-shared",
        "bottleneck networks whose stages share one 3x3",
        ("resnet50-shared", "resnet101-shared"),
        _shared_bottleneck("conv2"),
        has_bottlenecks,
        LARGE,
        STEM,
    ),
    Family(
        "resnet{depth}-sharedpp",
        "and one 1x1 expansion",
        ("resnet50-sharedpp", "resnet101-sharedpp"),
        _shared_bottleneck("conv[23]"),
        has_bottlenecks,
        LARGE,
        STEM,
    ),
    Family("mobilenetv2", "MobileNetV2", ("mobilenetv2",), _mobilenet(None), input_shape=LARGE, options=STEM),
    Family(
        "mobilenetv2-shared",
        "the same; stages 3 to 6 share one 1x1 expansion each",
        ("mobilenetv2-shared",),
        _mobilenet("expand"),
        input_shape=LARGE,
        options=STEM,
    ),
    Family(
        "mobilenetv2-sharedpp",
        "and one 1x1 projection",
        ("mobilenetv2-sharedpp",),
        _mobilenet("expand|project"),
        input_shape=LARGE,
        options=STEM,
    ),
    Family("densenet121", "DenseNet121", ("densenet121",), _densenet, input_shape=LARGE, options=STEM),
    Family(
        "densenet121-s{shared}u{unique}",
        "the same with filter bases shared within a dense block, of equal ranks",
        ("densenet121-s16u1",),
        _densenet,
        input_shape=LARGE,
        options=STEM,
    ),
    Family("resnext50", "ResNeXt50_32x4d", ("resnext50",), _resnext, input_shape=LARGE, options=STEM),
    Family(
        "resnext50-s{shared}u{unique}",
        f"the same with {SHARED}",
        ("resnext50-s64u4",),
        _resnext,
        input_shape=LARGE,
        options=STEM,
    ),
)
