"""Recurrent parameter generators: Wang et al. 2021."""

from typing import Any

from paramshare.plan import Plan
from paramshare.rule import Rule
from paramshare.schemes import Ring
from paramshare.zoo.family import Network
from paramshare.zoo.residual import residual

ONE_LAYER = 512 * 512 * 9  # the paper's "one convolution layer's worth"


def ring_resnet(depth: int, ring_size: int = ONE_LAYER, **options: Any) -> Network:
    """A residual network with one ring for all convolutions of its stages, shortcuts included.

    Stem, batch norms and classifier are not shared.
    """
    path = r"stage\d/block\d+/(conv\d|shortcut)/kernel"
    plan = Plan(Rule(path, Ring(ring_size, initial="paper"), bank="ring"))
    return residual(depth, **options), plan
