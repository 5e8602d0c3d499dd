"""A task in one file, with ragged labels and a measure that is not a sum.

Images hold up to `most` rectangles. A label is a pytree, boxes padded to one shape with a mask; the
outputs are a pytree too. The score is the average precision, which ranks all predictions of a data
set. Other tests get this module as the fixture `ragged`.
"""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from paramshare.data import Dataset, from_arrays
from paramshare.tasks import Augment, Measure, Task, normalise
from paramshare.tasks.augment import draw, flip


@dataclasses.dataclass(frozen=True)
class Boxes(Task):
    """Up to `most` boxes (left, top, right, bottom) per image, in [0, 1], each in its own slot."""

    most: int = 3

    name: ClassVar[str] = "boxes"
    measures: ClassVar[tuple[Measure, ...]] = (
        Measure("average_precision", "average precision", "AP", format_spec=".3f"),
        Measure("overlap", "mean overlap", "IoU"),
    )
    outputs_per_input: ClassVar[str] = "a box and a confidence for each slot"

    def label_spec(self, input_shape):
        return {
            "box": jax.ShapeDtypeStruct((self.most, 4), jnp.float32),
            "mask": jax.ShapeDtypeStruct((self.most,), jnp.bool_),
        }

    def output_spec(self, input_shape):
        return {
            "box": jax.ShapeDtypeStruct((self.most, 4), jnp.float32),
            "confidence": jax.ShapeDtypeStruct((self.most,), jnp.float32),
        }

    def augment(
        self, key, inputs, labels, config: Augment, mean, std, *, first: int | jax.Array = 0
    ):
        mirrored_B = draw(key, config, inputs.shape, first).mirrored_B
        if mirrored_B is not None:
            inputs = flip(inputs, mirrored_B)
            left, top, right, bottom = jnp.split(labels["box"], 4, axis=-1)
            mirrored_box = jnp.concatenate([1 - right, top, 1 - left, bottom], axis=-1)
            box = jnp.where(mirrored_B[:, None, None], mirrored_box, labels["box"])
            labels = {**labels, "box": box}
        return normalise(inputs, mean, std), labels

    def losses(self, outputs, labels, *, train: bool):
        mask = labels["mask"].astype(jnp.float32)
        distance = jnp.abs(outputs["box"] - labels["box"]).sum(-1)
        return {
            "box": (mask * distance).sum(-1),
            "confidence": optax.sigmoid_binary_cross_entropy(outputs["confidence"], mask).sum(-1),
        }

    def statistics(self, outputs, inputs, labels):
        return {
            "confidence": outputs["confidence"],
            "overlap": overlap(outputs["box"], labels["box"]) * labels["mask"].astype(jnp.float32),
            "mask": labels["mask"],
        }

    def reduce(self, statistics: Any) -> dict[str, float]:
        confidence, covered, mask = (
            np.ravel(statistics[name]) for name in ("confidence", "overlap", "mask")
        )
        ranked = np.argsort(-confidence, kind="stable")
        return {
            "average_precision": average_precision((covered > 0.3)[ranked], int(mask.sum())),
            "overlap": float(covered[mask].mean(dtype=np.float64)),
        }


def overlap(a: jax.Array, b: jax.Array) -> jax.Array:
    """Intersection over union of boxes (..., 4)."""

    def area(box: jax.Array) -> jax.Array:
        return jnp.prod(jnp.maximum(box[..., 2:] - box[..., :2], 0), axis=-1)

    corners = [jnp.maximum(a[..., :2], b[..., :2]), jnp.minimum(a[..., 2:], b[..., 2:])]
    both = area(jnp.concatenate(corners, axis=-1))
    return both / jnp.maximum(area(a) + area(b) - both, 1e-9)


def average_precision(correct: np.ndarray, positives: int) -> float:
    """Mean over all positives of the precision at the rank where each is found; 0 if it is not."""
    precision = np.cumsum(correct) / np.arange(1, len(correct) + 1)
    return float(precision[correct].sum() / positives)


class BoxNet(nn.Module):
    """A network for `Boxes`: one hidden layer."""

    most: int = 3

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Dense(64)(x.reshape(len(x), -1)))
        x = nn.Dense(5 * self.most)(x).reshape(len(x), self.most, 5)
        return {"box": x[..., :4], "confidence": x[..., 4]}


def draw_boxes(count: int, seed: int, most: int = 3) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Images (N, 8, 8, 1) uint8 with one rectangle for each row of slots that is used."""
    rng = np.random.default_rng(seed)
    image = np.zeros((count, 8, 8, 1), np.uint8)
    box, mask = np.zeros((count, most, 4), np.float32), rng.random((count, most)) < 0.6
    for i, slot in np.argwhere(mask):
        left, width = rng.integers(0, 5), rng.integers(2, 4)
        top = slot * 8 // most
        image[i, top : top + 2, left : left + width] = 255
        box[i, slot] = np.array([left, top, left + width, top + 2]) / 8
    return image, {"box": box, "mask": mask}


def dataset(train: int = 256, test: int = 64) -> Dataset:
    """A data set of such images."""
    return from_arrays(
        draw_boxes(train, 0), draw_boxes(test, 1), name="boxes", validation=0.25, task=Boxes()
    )
