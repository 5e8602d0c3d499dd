"""Networks for shortest paths on grids: Savarese & Maire, ICLR 2019, section 4.3.

The paper has the plain and the soft network; the others share the same network by other schemes.
"""

from typing import Any

from paramshare.models import ModelError, PathNet
from paramshare.plan import Plan
from paramshare.rule import Rule
from paramshare.schemes import Ring, Soft, Tied
from paramshare.schemes.interface import Scheme
from paramshare.zoo.family import Network


def path_net(depth: int, width: int, num_classes: int = 1, **options: Any) -> PathNet:
    """The plain network, which has one output per cell."""
    if num_classes != 1:
        raise ModelError(
            f"num_classes={num_classes}; a path net has one output per cell: leave num_classes out"
        )
    return PathNet(depth, width, **options)


def soft_path_net(depth: int, width: int, templates: int, **options: Any) -> Network:
    """One bank of templates for all layers."""
    return _shared(Soft(templates, initial="paper"), depth, width, **options)


def looped_path_net(depth: int, width: int, period: int, **options: Any) -> Network:
    """`period` kernels, which the layers use in turn."""
    if not 1 <= period <= depth:
        raise ModelError(
            f"the period of a network of {depth} layers must be 1 to {depth}; got {period}"
        )
    groups = tuple(layer % period for layer in range(depth))
    return _shared(Tied(groups=groups, initial="paper"), depth, width, **options)


def ring_path_net(depth: int, width: int, ring_size: int, **options: Any) -> Network:
    """One ring for the kernels of all layers."""
    return _shared(Ring(ring_size, initial="paper"), depth, width, bank="ring", **options)


def _shared(
    scheme: Scheme, depth: int, width: int, bank: str = "layers", **options: Any
) -> Network:
    plan = Plan(Rule(r"layer\d+/conv/kernel", scheme, bank=bank))
    return path_net(depth, width, **options), plan
