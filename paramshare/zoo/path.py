"""Networks of the algorithmic task: Savarese & Maire, ICLR 2019, section 4.3; and the other schemes on the same network."""

from typing import Any

import flax.linen as nn

from paramshare.models import ModelError, PathNet
from paramshare.plan import Plan, Rule
from paramshare.schemes import Ring, Soft, Tied
from paramshare.schemes.interface import Scheme
from paramshare.zoo.family import Family

LAYERS = r"layer\d+/conv/kernel"  # all of one shape, and all alike: one bank serves them
GRIDS = (32, 32, 2)


def _plain(numbers: dict[str, Any], num_classes: int = 1, **options: Any) -> tuple[nn.Module, None]:
    if num_classes != 1:
        raise ModelError(f"num_classes={num_classes}; a path net gives one number a cell: leave it out")
    return PathNet(numbers["depth"], numbers["width"], **options), None


def _shared(scheme: Any, bank: str = "layers") -> Any:
    def build(numbers: dict[str, Any], **options: Any) -> tuple[nn.Module, Plan]:
        found: Scheme = scheme(numbers)
        return _plain(numbers, **options)[0], Plan(Rule(LAYERS, found, bank=bank))

    return build


def _in_turn(numbers: dict[str, Any]) -> Tied:
    depth, period = numbers["depth"], numbers["period"]
    if not 1 <= period <= depth:
        raise ModelError(f"{period} kernels cannot take turns in {depth} layers; take a number from 1 to {depth}")
    return Tied(groups=tuple(layer % period for layer in range(depth)), fan="fan_in")


def _family(form: str, about: str, examples: tuple[str, ...], build: Any) -> Family:
    return Family(form, about, examples, build, input_shape=GRIDS, num_classes=1)


FAMILIES = (
    _family(
        "pathnet-{depth}-{width}",
        "fully convolutional network for shortest paths on grids, of equal layers",
        ("pathnet-20-32", "pathnet-10-16"),
        _plain,
    ),
    _family(
        "spathnet-{depth}-{width}-{templates}",
        "the same with soft sharing, one bank for all layers",
        ("spathnet-20-32-20", "spathnet-10-16-10"),
        _shared(lambda numbers: Soft(numbers["templates"])),
    ),
    _family(
        "pathnet-{depth}-{width}-loop-{period}",
        "the same with so many kernels that take turns: a loop by construction, over so many layers",
        ("pathnet-20-32-loop-1", "pathnet-10-16-loop-1"),
        _shared(_in_turn),
    ),
    _family(
        "pathnet-{depth}-{width}-rpg-{ring_size}",
        "the same with every kernel out of a ring of so many numbers",
        ("pathnet-20-32-rpg-18432", "pathnet-10-16-rpg-2304"),
        _shared(lambda numbers: Ring(numbers["ring_size"]), "ring"),
    ),
)
