"""Shortest paths: which cells of a grid lie on a shortest path between two points."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from paramshare.tasks.augment import Augment, AugmentError, Draws, flip
from paramshare.tasks.task import Measure, Task


@dataclasses.dataclass(frozen=True)
class Paths(Task):
    """Which cells of a grid lie on a shortest path: labels (B, H, W) of 0 and 1, outputs logits.

    Images (B, H, W, 2) hold obstacles and the two points, as `paramshare.data.grid_problems` draws
    them. The loss is the binary cross entropy, averaged over the cells of a grid. A cell is
    predicted if its logit is positive.

    Measures: `f1`, the score, 2 TP / (2 TP + FP + FN) over the cells of all grids together, since
    few cells are on a path; and the fractions of grids in which all cells are right (`exact`), free
    predicted cells connect the two points (`connected`), and they do so in the fewest possible
    steps (`shortest`), so that a shortest path can be read off.

    F1 is the paper's measure (Savarese & Maire, ICLR 2019); the loss and the other measures are
    this library's.

    Attributes:
      label_smoothing: moves targets by this fraction towards one half in training.

    Example:
      >>> task = Paths()
      >>> right, cells = task.batch_measures(
      ...     jnp.array([[[1.0, 1.0, -1.0]]]), jnp.array([[[1, 0, 0]]])
      ... )["f1"]
      >>> float(right[0] / cells[0])
      0.6666666865348816
    """

    label_smoothing: float = 0.0

    name: ClassVar[str] = "paths"
    measures: ClassVar[tuple[Measure, ...]] = (
        Measure("f1", "F1", "f1"),
        Measure("exact", "exact", "exact", fraction_of_examples=True),
        Measure("connected", "connected", "connected", fraction_of_examples=True),
        Measure("shortest", "shortest", "shortest", fraction_of_examples=True),
    )
    outputs_per_input: ClassVar[str] = "one output per cell"

    def label_spec(self, input_shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        """1 on the cells of shortest paths, else 0."""
        return jax.ShapeDtypeStruct(tuple(input_shape[:2]), jnp.uint8)

    def output_spec(self, input_shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        """A logit for each cell."""
        return jax.ShapeDtypeStruct(tuple(input_shape[:2]), jnp.float32)

    def with_label_smoothing(self, smoothing: float) -> "Paths":
        """The same task with targets moved towards one half."""
        return dataclasses.replace(self, label_smoothing=smoothing)

    def check_augment(self, config: Augment, input_shape: tuple[int, ...]) -> None:
        """Refuses what would cut a path off: only flips keep a problem and its answer together."""
        super().check_augment(config, input_shape)
        for name in ("turn", "pad_crop", "cutout", "colour", "zoom"):
            default = getattr(Augment(), name)
            if getattr(config, name) != default:
                raise AugmentError(
                    f"augment.{name} is {getattr(config, name)}, but the task {self.name!r} has a "
                    f"label for each cell, which it would not change; it must be {default}"
                )

    def move_labels(
        self, draws: Draws, labels: Any, config: Augment, shape: tuple[int, ...]
    ) -> Any:
        """Mirrors labels with their images."""
        return labels if draws.mirrored_B is None else flip(labels, draws.mirrored_B)

    def losses(self, outputs: Any, labels: Any, *, train: bool) -> dict[str, jax.Array]:
        """Binary cross entropy in float32, averaged over cells."""
        smoothing = self.label_smoothing if train else 0.0
        target = labels.astype(jnp.float32) * (1 - smoothing) + 0.5 * smoothing
        loss_BxHxW = optax.sigmoid_binary_cross_entropy(outputs.astype(jnp.float32), target)
        return {"cross_entropy": jnp.mean(loss_BxHxW, axis=(1, 2))}

    def batch_measures(self, outputs: Any, labels: Any) -> dict[str, tuple[jax.Array, jax.Array]]:
        """F1."""
        cells = {name: n.astype(jnp.float32) for name, n in _count(outputs, labels).items()}
        return {"f1": (2 * cells["both"], cells["predicted"] + cells["labelled"])}

    def statistics(self, outputs: Any, inputs: jax.Array, labels: Any) -> dict[str, jax.Array]:
        """Counts of cells, and what is right in each grid."""
        predicted, labelled = outputs > 0, labels > 0
        points = inputs[..., 1] > 0
        steps_B = _steps(predicted & (inputs[..., 0] == 0), points)
        return {
            **_count(outputs, labels),
            "exact": jnp.all(predicted == labelled, axis=(1, 2)),
            "connected": steps_B >= 0,
            "shortest": (steps_B >= 0) & (steps_B == _steps(labelled, points)),
        }

    def reduce(self, statistics: Any) -> dict[str, float]:
        """F1 over all cells, and fractions of the grids."""
        cells = {
            name: float(np.sum(statistics[name], dtype=np.float64))
            for name in ("both", "predicted", "labelled")
        }
        # A path has at least two cells: the denominator is not 0.
        f1 = 2 * cells["both"] / (cells["predicted"] + cells["labelled"])
        fractions = ("exact", "connected", "shortest")
        return {"f1": f1} | {name: float(np.mean(statistics[name])) for name in fractions}


def _count(outputs: Any, labels: Any) -> dict[str, jax.Array]:
    """Cells that are predicted, on a path, and both, (B,) int32 each."""
    predicted, labelled = outputs > 0, labels > 0
    cells = {"both": predicted & labelled, "predicted": predicted, "labelled": labelled}
    return {name: jnp.sum(mask, axis=(1, 2), dtype=jnp.int32) for name, mask in cells.items()}


def _steps(open_BxHxW: jax.Array, points_BxHxW: jax.Array) -> jax.Array:
    """Steps through open cells from one point to the other, (B,) int; -1 where there is no way."""
    flat = points_BxHxW.reshape(len(points_BxHxW), -1)
    first = jax.nn.one_hot(jnp.argmax(flat, axis=1), flat.shape[1], dtype=jnp.bool_).reshape(
        points_BxHxW.shape
    )
    goal = points_BxHxW & ~first & open_BxHxW

    def spread(cells: jax.Array) -> jax.Array:
        rows = jnp.pad(cells, ((0, 0), (1, 1), (0, 0)))
        columns = jnp.pad(cells, ((0, 0), (0, 0), (1, 1)))
        return cells | rows[:, 2:] | rows[:, :-2] | columns[:, :, 2:] | columns[:, :, :-2]

    def step(state: tuple[jax.Array, jax.Array, jax.Array, jax.Array]):
        number, reached, steps, _ = state
        neighbours = spread(reached) & open_BxHxW
        arrived = jnp.any(neighbours & goal, axis=(1, 2)) & (steps < 0)
        return (
            number + 1,
            neighbours,
            jnp.where(arrived, number + 1, steps),
            jnp.any(neighbours & ~reached),
        )

    start = (
        jnp.zeros((), jnp.int32),
        first & open_BxHxW,
        jnp.full(len(flat), -1, jnp.int32),
        jnp.ones((), jnp.bool_),
    )
    return jax.lax.while_loop(lambda state: state[3], step, start)[2]
