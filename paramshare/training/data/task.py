"""What is asked of a network: the loss of its outputs, and what they are measured by."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import optax


class Task(Protocol):
    """What is asked of a network. Hashable."""

    score: ClassVar[str]
    """The measure that tells good from better, between 0 and 1."""

    def outputs(self, num_classes: int, image_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the network's output for one image."""
        ...

    def loss(self, output: jax.Array, label: jax.Array, smoothing: float = 0.0) -> jax.Array:
        """The loss of each example, (B,)."""
        ...

    def parts(self, output: jax.Array, label: jax.Array) -> dict[str, jax.Array]:
        """What the score is made of, for each example, (B,) each; sums over examples go into `means`."""
        ...

    def more_parts(self, output: jax.Array, image: jax.Array, label: jax.Array) -> dict[str, jax.Array]:
        """What further measures are made of, likewise; of evaluation only."""
        ...

    def means(self, sums: Mapping[str, Any]) -> dict[str, Any]:
        """The score, and further measures where there is something to make them of; from sums over examples, and their `count`."""
        ...


@dataclasses.dataclass(frozen=True)
class Classes:
    """One class an image: label (B,) int, output (B, K) logits, cross entropy. Score: `accuracy`; `top5`, the label among five likeliest.

    Example:
      >>> import jax.numpy as jnp
      >>> from paramshare.training.data.task import Classes
      >>> sums = Classes().parts(jnp.array([[2.0, 1.0], [2.0, 1.0]]), jnp.array([0, 1]))
      >>> sums["correct"].tolist()
      [1.0, 0.0]
    """

    score: ClassVar[str] = "accuracy"

    def outputs(self, num_classes: int, image_shape: tuple[int, ...]) -> tuple[int, ...]:
        """A number a class."""
        return (num_classes,)

    def loss(self, output: jax.Array, label: jax.Array, smoothing: float = 0.0) -> jax.Array:
        """Cross entropy; see `cross_entropy`."""
        return cross_entropy(output, label, smoothing)

    def parts(self, output: jax.Array, label: jax.Array) -> dict[str, jax.Array]:
        """Whether the likeliest class is the label."""
        return {"correct": (jnp.argmax(output, axis=-1) == label).astype(jnp.float32)}

    def more_parts(self, output: jax.Array, image: jax.Array, label: jax.Array) -> dict[str, jax.Array]:
        """Whether one of the five likeliest is."""
        top_Bx5 = jax.lax.top_k(output, min(5, output.shape[-1]))[1]
        return {"correct5": jnp.any(top_Bx5 == label[:, None], axis=-1).astype(jnp.float32)}

    def means(self, sums: Mapping[str, Any]) -> dict[str, Any]:
        """Shares of the examples."""
        names = {"correct": "accuracy", "correct5": "top5"}
        return {name: sums[part] / sums["count"] for part, name in names.items() if part in sums}


@dataclasses.dataclass(frozen=True)
class Paths:
    """Which cells of a grid lie on a shortest path between two points: label (B, H, W) of 0 and 1, output (B, H, W) logits.

    The loss is the binary cross entropy, the mean over a grid's cells. A cell is predicted where its logit is positive. Score: `f1`,
    2 TP / (2 TP + FP + FN) over the cells of all grids together (cells on a path are few). Also the shares of grids of which `exact` all
    cells are right; `connected` the two points are joined by cells that are predicted and free; `shortest` in as few steps as
    can be, so that a shortest path can be read off.

    Images are those of `paramshare.training.data.grids`: obstacles, and the two points. The measure is the paper's (Savarese & Maire,
    ICLR 2019), the loss and the other measures are this library's.

    Example:
      >>> import jax.numpy as jnp
      >>> from paramshare.training.data.task import Paths
      >>> sums = Paths().parts(jnp.array([[[1.0, 1.0, -1.0]]]), jnp.array([[[1, 0, 0]]]))
      >>> Paths().means({name: float(value[0]) for name, value in sums.items()} | {"count": 1.0})
      {'f1': 0.6666666666666666}
    """

    score: ClassVar[str] = "f1"

    def outputs(self, num_classes: int, image_shape: tuple[int, ...]) -> tuple[int, ...]:
        """A number a cell."""
        return tuple(image_shape[:2])

    def loss(self, output: jax.Array, label: jax.Array, smoothing: float = 0.0) -> jax.Array:
        """Binary cross entropy in float32, the mean over cells; `smoothing` moves targets that far towards one half."""
        target = label.astype(jnp.float32) * (1 - smoothing) + 0.5 * smoothing
        return jnp.mean(optax.sigmoid_binary_cross_entropy(output.astype(jnp.float32), target), axis=(1, 2))

    def parts(self, output: jax.Array, label: jax.Array) -> dict[str, jax.Array]:
        """Cells predicted rightly, cells predicted, and cells that are on a path."""
        found, wanted = output > 0, label > 0
        counts = {"both": found & wanted, "found": found, "wanted": wanted}
        return {name: jnp.sum(cells, axis=(1, 2), dtype=jnp.float32) for name, cells in counts.items()}

    def more_parts(self, output: jax.Array, image: jax.Array, label: jax.Array) -> dict[str, jax.Array]:
        """Whether all cells are right, and whether what is predicted joins the points, and how."""
        found, wanted = output > 0, label > 0
        points = image[..., 1] > 0
        steps = _steps(found & (image[..., 0] == 0), points)
        flags = {
            "exact": jnp.all(found == wanted, axis=(1, 2)),
            "connected": steps >= 0,
            "shortest": (steps >= 0) & (steps == _steps(wanted, points)),
        }
        return {name: flag.astype(jnp.float32) for name, flag in flags.items()}

    def means(self, sums: Mapping[str, Any]) -> dict[str, Any]:
        """F1 over all cells, and shares of the grids."""
        f1 = 2 * sums["both"] / (sums["found"] + sums["wanted"])  # a path has two cells at least
        return {"f1": f1} | {name: sums[name] / sums["count"] for name in ("exact", "connected", "shortest") if name in sums}


def _steps(open_BxHxW: jax.Array, points_BxHxW: jax.Array) -> jax.Array:
    """How many steps through open cells lead from one point to the other, (B,) int; -1 where there is no way."""
    flat = points_BxHxW.reshape(len(points_BxHxW), -1)
    first = jax.nn.one_hot(jnp.argmax(flat, axis=1), flat.shape[1], dtype=jnp.bool_).reshape(points_BxHxW.shape)
    goal = points_BxHxW & ~first & open_BxHxW

    def spread(cells: jax.Array) -> jax.Array:
        rows, columns = jnp.pad(cells, ((0, 0), (1, 1), (0, 0))), jnp.pad(cells, ((0, 0), (0, 0), (1, 1)))
        return cells | rows[:, 2:] | rows[:, :-2] | columns[:, :, 2:] | columns[:, :, :-2]

    def step(state: tuple[jax.Array, jax.Array, jax.Array, jax.Array]):
        number, seen, steps, _ = state
        more = spread(seen) & open_BxHxW
        arrived = jnp.any(more & goal, axis=(1, 2)) & (steps < 0)
        return number + 1, more, jnp.where(arrived, number + 1, steps), jnp.any(more & ~seen)

    start = (jnp.zeros((), jnp.int32), first & open_BxHxW, jnp.full(len(flat), -1, jnp.int32), jnp.ones((), jnp.bool_))
    return jax.lax.while_loop(lambda state: state[3], step, start)[2]


def cross_entropy(logits_BxK: jax.Array, label_B: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """Cross entropy of each example, in float32; `smoothing` is the share of the target spread over all classes (Szegedy et al. 2016)."""
    log_p_BxK = jax.nn.log_softmax(logits_BxK.astype(jnp.float32))
    of_label_B = -jnp.take_along_axis(log_p_BxK, label_B[:, None], axis=-1)[:, 0]
    if not smoothing:
        return of_label_B
    return (1 - smoothing) * of_label_B - smoothing * jnp.mean(log_p_BxK, axis=-1)


CLASSES = Classes()  # what sets are asked for unless they say otherwise
