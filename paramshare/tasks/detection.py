"""Detection: which objects are where in an image."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from paramshare.tasks.task import Measure, Task


@dataclasses.dataclass(frozen=True)
class Detection(Task):
    """Boxes and categories of objects.

    Attributes:
      categories: names of the categories.
      max_boxes: rows of a label, M.
    """

    categories: tuple[str, ...]
    max_boxes: int = 100

    name: ClassVar[str] = "detection"
    measures: ClassVar[tuple[Measure, ...]] = ()
    outputs_per_input: ClassVar[str] = "boxes and scores"

    def label_spec(self, input_shape: tuple[int, ...]) -> dict[str, Any]:
        """Boxes padded to M rows."""
        rows = self.max_boxes
        return {
            "box": jax.ShapeDtypeStruct((rows, 4), jnp.float32),
            "category": jax.ShapeDtypeStruct((rows,), jnp.int32),
            "present": jax.ShapeDtypeStruct((rows,), jnp.bool_),
            "crowd": jax.ShapeDtypeStruct((rows,), jnp.bool_),
            "area": jax.ShapeDtypeStruct((rows,), jnp.float32),
            "scale": jax.ShapeDtypeStruct((2,), jnp.float32),
        }
