"""RetinaNets on the residual networks of the zoo, with their sharing."""

import functools
from collections.abc import Sequence
from typing import Any

from paramshare.models import ModelError, ResNet, RetinaNet
from paramshare.plan import Plan
from paramshare.rule import Rule
from paramshare.schemes import Soft
from paramshare.zoo.family import DETECTOR_OPTIONS, Family, Network

IMAGE = (512, 512, 3)
WIDTHS = {False: 256, True: 64}  # of pyramid and heads; True: the network is one for 32x32 images


def detectors(classifiers: Sequence[Family]) -> tuple[Family, ...]:
    """Families of RetinaNets on the residual networks among `classifiers`."""
    families = [family for family in classifiers if family.form.startswith("resnet{depth}")]

    def exists(backbone: str, **_: Any) -> bool:
        return _find(families, backbone) is not None

    make = functools.partial(
        Family,
        build=functools.partial(retinanet, families),
        exists=exists,
        input_shape=IMAGE,
        options=DETECTOR_OPTIONS,
        num_classes=80,
    )
    about = "RetinaNet on a residual network, plain or shared"
    return (
        make(
            "retinanet-{backbone}",
            about,
            (
                "retinanet-resnet18",
                "retinanet-resnet50",
                "retinanet-resnet34-s32u1",
                "retinanet-resnet50-sharedpp",
                "retinanet-resnet18-rpg",
                "retinanet-resnet20-s16u1",
            ),
        ),
        make(
            "retinanet-{backbone}-head{width}x{depth}",
            f"{about}; pyramid and heads have this width, heads this many convolutions",
            ("retinanet-resnet20-head64x2",),
        ),
        make(
            "retinanet-{backbone}-towers{tower_templates}",
            f"{about}; the heads' convolutions but the last ones mix so many templates of one bank",
            ("retinanet-resnet34-s32u1-towers2",),
        ),
        make(
            "retinanet-{backbone}-head{width}x{depth}-towers{tower_templates}",
            f"{about}; heads of this width and depth, of so many templates",
            ("retinanet-resnet20-s16u1-head64x4-towers2",),
        ),
    )


def _find(families: Sequence[Family], name: str) -> tuple[Family, dict[str, Any]] | None:
    for family in families:
        arguments = family.parse(name)
        if arguments is not None and family.accepts(arguments):
            return family, arguments
    return None


def retinanet(
    families: Sequence[Family],
    backbone: str,
    num_classes: int,
    width: int | None = None,
    depth: int = 4,
    tower_templates: int | None = None,
    coarsest: str = "output",
    dtype: Any = None,
    **options: Any,
) -> Network:
    """A RetinaNet whose backbone is a named network, shared as that network is.

    Args:
      families: where the backbone's name is looked up.
      backbone: name of a residual network.
      num_classes: classes, without the background.
      width: channels of pyramid and heads; None for 256, or 64 on networks for 32x32 images.
      depth: convolutions of each head, before the last one.
      tower_templates: these convolutions of both heads are mixtures of so many templates of one
        bank; None for kernels of their own.
      coarsest: see `RetinaNet`.
      dtype: compute dtype; None for float32.
      **options: options of the backbone.
    """
    family, arguments = _find(families, backbone) or (None, {})
    if family is None:
        raise ModelError(f"there is no residual network {backbone!r}; take one, such as resnet18")
    options |= {} if dtype is None else {"dtype": dtype}
    network, plan = family.build(**arguments, num_classes=None, **options)
    assert isinstance(network, ResNet)
    small = len(network.blocks) < 4
    model = RetinaNet(
        network,
        num_classes,
        WIDTHS[small] if width is None else width,
        depth,
        coarsest,
        network.dtype,
    )
    rules = [] if plan is None else list(plan.under("backbone").rules)
    if tower_templates is not None:
        towers = r"(classes|boxes)/conv\d+/kernel"
        rules.append(Rule(towers, Soft(tower_templates), bank="towers"))
    return model, Plan(*rules) if rules else None
