"""Transformers: plain ones, and ones whose blocks share the kernels of attention and MLPs.

Embeddings, norms, biases and heads are private to each block in all of them.
"""

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

from paramshare.models import Decoder, ModelError, ViT
from paramshare.plan import Plan
from paramshare.rule import Rule
from paramshare.schemes import Relaxed, Ring, Scheme, Soft, Tied
from paramshare.zoo.family import LARGE, Family, Network, plain

TEXT = (256,)
COMMON = ("dtype", "heads", "dropout", "scan")
VIT_OPTIONS = (*COMMON, "mlp_ratio", "class_token")
DECODER_OPTIONS = (*COMMON, "kv_heads", "mlp_width", "tied", "length")

KERNELS = r"(?P<part>attention|mlp)/(?P<kernel>\w+)/kernel"
ATTENTION = r"(?P<part>attention)/(?P<kernel>query|key|value|out)/kernel"
MLPS = r"(?P<part>mlp)/(?P<kernel>\w+)/kernel"


def transformers() -> Iterator[Family]:
    """Families of vision transformers and decoders: for each, plain and shared in every way."""
    vit = functools.partial(Family, input_shape=LARGE, options=VIT_OPTIONS)
    text = functools.partial(Family, input_shape=TEXT, options=DECODER_OPTIONS, inputs="tokens")
    for family, form, about, build, names in (
        (vit, "vit-{depth}-{width}-{patch}", "vision transformer", ViT, ("vit-12-384-16",)),
        (text, "decoder-{depth}-{width}", "decoder of tokens", Decoder, ("decoder-6-128",)),
    ):
        listed = ("vit-12-192-16", *names, "vit-12-768-16") if build is ViT else names
        model = vision if build is ViT else language
        yield family(form, about, listed, plain(model))
        for suffix, example, how, plan in WAYS:
            yield family(
                f"{form}-{suffix}",
                f"{about}; {how}",
                tuple(f"{name}-{example}" for name in names),
                functools.partial(_shared, model, plan, tuple(re.findall(r"\{(\w+)\}", suffix))),
            )


def vision(depth: int, width: float, patch: int, **options: Any) -> ViT:
    """A vision transformer; vit-12-384-16 is S/16."""
    return ViT(depth, _whole(width), patch=patch, **options)


def language(depth: int, width: float, num_classes: int, **options: Any) -> Decoder:
    """A decoder; the classes are the different tokens."""
    return Decoder(depth, _whole(width), vocabulary=num_classes, **options)


def tied(depth: int, **options: Any) -> Plan:
    """One kernel of each kind for all blocks, as in the Universal Transformer and ALBERT."""
    del depth
    return _banks(KERNELS, Tied(), **options)


def cycled(depth: int, period: int, **options: Any) -> Plan:
    """`period` different blocks, which are used in turn."""
    if not 1 <= period <= depth:
        raise ModelError(
            f"the cycle of a network of {depth} blocks must be 1 to {depth} long; got {period}"
        )
    return _banks(KERNELS, Tied(groups=tuple(i % period for i in range(depth))), **options)


def soft_attention(depth: int, templates: int, **options: Any) -> Plan:
    """A bank of templates for each of query, key, value and out, as matrix-atom sharing has."""
    del depth
    return _banks(ATTENTION, Soft(templates), **options)


def soft_mlp(depth: int, templates: int, **options: Any) -> Plan:
    """A bank of templates for each layer of the MLPs."""
    del depth
    return _banks(MLPS, Soft(templates), **options)


def soft_blocks(depth: int, templates: int, **options: Any) -> Plan:
    """A bank of templates for each layer of attention and MLPs."""
    del depth
    return _banks(KERNELS, Soft(templates), **options)


def ring(depth: int, ring_size: int, **options: Any) -> Plan:
    """One ring for all kernels of the blocks."""
    del depth
    return _banks(KERNELS, Ring(ring_size), "ring", **options)


def relaxed(depth: int, rank: int, **options: Any) -> Plan:
    """One kernel of each kind for all blocks, and a difference of this rank for each block."""
    del depth
    return _banks(KERNELS, Relaxed(Tied(), rank), **options)


# Suffix, that of the listed name, description, and plan.
WAYS: tuple[tuple[str, str, str, Callable[..., Plan]], ...] = (
    ("tied", "tied", "all blocks use the same kernels", tied),
    ("cycle-{period}", "cycle-3", "the blocks use this many sets of kernels in turn", cycled),
    (
        "soft-{templates}",
        "soft-4",
        "soft sharing in the attention, with one bank for each of its four layers",
        soft_attention,
    ),
    (
        "softmlp-{templates}",
        "softmlp-4",
        "soft sharing in the MLPs, with one bank for each of their layers",
        soft_mlp,
    ),
    (
        "softall-{templates}",
        "softall-4",
        "soft sharing in attention and MLPs, with one bank for each of their layers",
        soft_blocks,
    ),
    (
        "rpg-{ring_size}",
        "rpg-100000",
        "all kernels of the blocks come from one ring of this size",
        ring,
    ),
    (
        "relaxed-{rank}",
        "relaxed-4",
        "all blocks use the same kernels, each plus a difference of this rank",
        relaxed,
    ),
)


def _shared(
    model: Callable[..., Any],
    plan: Callable[..., Plan],
    numbers: tuple[str, ...],
    depth: int,
    *,
    scan: bool = False,
    **options: Any,
) -> Network:
    """A network and its plan, which takes the numbers of these names."""
    of_plan = {name: options.pop(name) for name in numbers}
    return model(depth=depth, scan=scan, **options), plan(depth, scan=scan, **of_plan)


def _banks(path: str, scheme: Scheme, bank: str = "{part}.{kernel}", *, scan: bool) -> Plan:
    """A bank for each kernel of a block, or one of this name for all."""
    if scan:
        return Plan(Rule(f"blocks/{path}", scheme, bank=bank, stack_axis=0))
    return Plan(Rule(rf"block\d+/{path}", scheme, bank=bank))


def _whole(width: float) -> int:
    if width != int(width):
        raise ModelError(f"the width of a transformer is a number of features; got {width}")
    return int(width)
