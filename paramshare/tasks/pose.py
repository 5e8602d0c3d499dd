"""Pose: where the joints of a person are."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from paramshare.tasks.task import Measure, Task


@dataclasses.dataclass(frozen=True)
class Pose(Task):
    """Joints of one person.

    Attributes:
      joints: names of the J joints.
      limbs: pairs of joints, counted from 0, that are drawn as lines.
    """

    joints: tuple[str, ...]
    limbs: tuple[tuple[int, int], ...] = ()

    name: ClassVar[str] = "pose"
    measures: ClassVar[tuple[Measure, ...]] = ()
    outputs_per_input: ClassVar[str] = "one heatmap per joint"

    def label_spec(self, input_shape: tuple[int, ...]) -> dict[str, Any]:
        """Joints, and where the input was cropped from."""
        joints = len(self.joints)
        return {
            "joint": jax.ShapeDtypeStruct((joints, 2), jnp.float32),
            "visible": jax.ShapeDtypeStruct((joints,), jnp.bool_),
            "area": jax.ShapeDtypeStruct((), jnp.float32),
            "box": jax.ShapeDtypeStruct((4,), jnp.float32),
            "scale": jax.ShapeDtypeStruct((2,), jnp.float32),
            "offset": jax.ShapeDtypeStruct((2,), jnp.float32),
            "image": jax.ShapeDtypeStruct((), jnp.int32),
        }
