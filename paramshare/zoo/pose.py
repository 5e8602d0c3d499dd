"""Networks for human pose: stacked hourglasses whose sub-networks share their weights.

Wang et al. 2021 generate all sub-networks of a pose network from one ring. Their network and
schedule are not known to us; the stacked hourglass is our choice.
"""

from typing import Any

from paramshare.models import Hourglass, ModelError
from paramshare.plan import Plan
from paramshare.rule import Rule
from paramshare.schemes import Ring, Tied
from paramshare.zoo.family import STEM_OPTIONS, Family, Network, plain

HOURGLASSES = r"(?P<stage>stage\d+)/hourglass/.+/kernel"


def tied_hourglass(stages: int, width: int, **options: Any) -> Network:
    """All stages have the same kernels: one bank for each kernel of an hourglass."""
    blocks = r"stage\d+/hourglass/(?P<block>\w+)/(?P<conv>conv\d)/kernel"
    tied = Tied(initial="paper")
    plan = Plan(
        Rule(blocks, tied, bank="{block}.{conv}"),
        Rule(r"stage\d+/hourglass/last/kernel", tied, bank="last"),
    )
    return Hourglass(stages, width, **options), plan


def ring_hourglass(stages: int, width: int, ring_size: int, **options: Any) -> Network:
    """One ring for the kernels of all stages' hourglasses."""
    plan = Plan(Rule(HOURGLASSES, Ring(ring_size, initial="paper"), bank="ring"))
    return Hourglass(stages, width, **options), plan


def stage_ring_hourglass(stages: int, width: int, ring_size: int, **options: Any) -> Network:
    """One ring for each stage's hourglass, `ring_size` parameters in all rings together."""
    model = Hourglass(stages, width, **options)
    if stages and ring_size % stages:
        raise ModelError(
            f"the rings of {stages} stages cannot have {ring_size} parameters in total; take a "
            f"multiple of {stages}, such as {ring_size + stages - ring_size % stages}"
        )
    scheme = Ring(ring_size // max(stages, 1), initial="paper")
    return model, Plan(Rule(HOURGLASSES, scheme, bank="{stage}"))


def pose_networks() -> tuple[Family, ...]:
    """Families of stacked hourglasses.

    Shared are the kernels of the hourglasses, the same in every plan. Stem, batch norms, and the
    1x1s to and from the heatmaps stay private.
    """
    shared = "human pose, stacked hourglasses of this width"
    rows = (
        ("", "each with its own weights", ("hourglass2-64",), plain(Hourglass)),
        ("-tied", "all with the same kernels", ("hourglass2-64-tied",), tied_hourglass),
        (
            "-rpg-{ring_size}",
            "all kernels from one ring of this size",
            ("hourglass2-64-rpg-190464", "hourglass2-256-rpg-3047424"),
            ring_hourglass,
        ),
        (
            "-stage-rpg-{ring_size}",
            "kernels from one ring per stage, of this size in total",
            ("hourglass2-64-stage-rpg-190464",),
            stage_ring_hourglass,
        ),
    )
    return tuple(
        Family(
            f"hourglass{{stages}}-{{width}}{suffix}",
            f"{shared}, {about}",
            examples,
            build,
            input_shape=(256, 256, 3),
            options=(*STEM_OPTIONS, "depth"),
            num_classes=17,
        )
        for suffix, about, examples, build in rows
    )
