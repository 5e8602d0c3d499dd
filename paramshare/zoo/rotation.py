"""Networks for rotated digits: Chavan et al., ICIP 2021, rotated MNIST and equivariance.

The paper has the baseline, the equivariant and the repeated networks. The others show how much of
the gain comes from width, from copying, and from learned transforms.
"""

import math
from typing import Any

from paramshare.models import ModelError, RotNet
from paramshare.models.rot_net import CONVOLUTIONS
from paramshare.plan import Plan
from paramshare.rule import Rule
from paramshare.schemes import Repeat, Ring, Steerable
from paramshare.schemes.repetition_transform import Transform
from paramshare.zoo.family import Network

BASELINE = (22, 33, 45, 45, 67, 90)
FIELDS = (16, 24, 32, 32, 48, 64)  # of C4; larger groups have fewer, and about as many parameters
FACTORS = {4: 1.0, 8: math.sqrt(0.5), 16: 0.5}
KERNELS = r"conv\d/kernel"


def rot_net(**options: Any) -> RotNet:
    """The plain baseline."""
    return RotNet(BASELINE, **options)


def equivariant_rot_net(order: int, **options: Any) -> Network:
    """A network with steerable kernels over C_order and about as many parameters."""
    widths = tuple(order * round(FACTORS[_checked(order)] * fields) for fields in FIELDS)
    rules = (
        Rule(r"conv1/kernel", Steerable(order, lifting=True, initial="paper"), bank="lifting"),
        Rule(KERNELS, Steerable(order, initial="paper"), bank="steerable"),
    )
    return RotNet(widths, order=order, **options), Plan(*rules)


def wide_rot_net(order: int, **options: Any) -> RotNet:
    """A plain network as wide as the repeated one."""
    return RotNet(_widths(order), **options)


def repeated_rot_net(order: int, transform: Transform = "swish", **options: Any) -> Network:
    """A network as wide as the equivariant one whose kernels repeat the baseline's."""
    small = RotNet(BASELINE, bias=True, **options)
    scheme = Repeat(like=small, transform=transform, initial="paper")
    return wide_rot_net(order, bias=True, **options), Plan(Rule(KERNELS, scheme, bank="repeated"))


def ring_rot_net(order: int, **options: Any) -> Network:
    """A network as wide as the equivariant one; a ring of the baseline's size for all kernels."""
    inputs = (1, *BASELINE)
    size = sum(side**2 * inputs[i] * BASELINE[i] for i, (side, _) in enumerate(CONVOLUTIONS))
    return wide_rot_net(order, **options), Plan(
        Rule(KERNELS, Ring(size, initial="paper"), bank="ring")
    )


def _widths(order: int) -> tuple[int, ...]:
    """As in the paper's code: the widths of C_order before they are rounded to fields, cut off."""
    factor = order * FACTORS[_checked(order)]
    return tuple(math.floor(factor * fields + 1e-6) for fields in FIELDS)


def _checked(order: int) -> int:
    if order not in FACTORS:
        raise ModelError(f"the group of a rotnet must be c4, c8 or c16; got c{order}")
    return order
