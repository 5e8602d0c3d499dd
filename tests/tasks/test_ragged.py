"""A task with ragged labels and a measure that is not a sum is one file: `ragged.py`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paramshare.data import DataError, eval_batches, from_arrays, train_batches
from paramshare.tasks import Augment, TaskError


@pytest.fixture(scope="module")
def data(ragged):
    return ragged.dataset()


def perfect(labels: dict[str, Any]) -> dict[str, Any]:
    return {"box": labels["box"], "confidence": jnp.where(labels["mask"], 3.0, -3.0)}


def test_batches_keep_the_structure_of_labels(data):
    batch = next(train_batches(data.train, 8, seed=0, start_step=0))
    assert {name: (x.shape, x.dtype) for name, x in batch["label"].items()} == {
        "box": ((8, 3, 4), np.float32),
        "mask": ((8, 3), np.bool_),
    }
    assert (data.input_shape, data.task.score.name) == ((8, 8, 1), "average_precision")


def test_losses_have_names_and_one_value_an_example(data):
    batch = next(train_batches(data.train, 8, seed=0, start_step=0))
    losses = data.task.losses(perfect(batch["label"]), batch["label"], train=True)
    assert {name: loss.shape for name, loss in losses.items()} == {"box": (8,), "confidence": (8,)}
    assert float(losses["box"].max()) == 0
    moved = {**batch["label"], "box": batch["label"]["box"] + batch["label"]["mask"][..., None]}
    boxes = batch["label"]["mask"].sum(-1)
    worse = data.task.losses(perfect(moved), batch["label"], train=True)["box"]
    np.testing.assert_allclose(worse, 4 * boxes, rtol=1e-6)


def test_average_precision_ranks_the_whole_set(data):
    def measure(outputs_of) -> dict[str, float]:
        parts = [
            data.task.statistics(outputs_of(batch["label"]), batch["input"], batch["label"])
            for batch in eval_batches(data.test, 16)
        ]
        return data.task.reduce(jax.tree.map(lambda *x: np.concatenate(x), *parts))

    assert measure(perfect) == pytest.approx({"average_precision": 1, "overlap": 1})
    # Confidence of the same predictions: worst order of empty slots first.
    reversed_order = measure(lambda y: {**perfect(y), "confidence": -perfect(y)["confidence"]})
    mask = np.concatenate([batch["label"]["mask"] for batch in eval_batches(data.test, 16)])
    empty, full = (~mask).sum(), mask.sum()
    expected = np.mean(np.arange(1, full + 1) / (empty + np.arange(1, full + 1)))
    assert reversed_order["average_precision"] == pytest.approx(expected)
    # No mean over batches gives that: within a batch, fewer empty slots come first.
    halves = np.split(mask, 2)
    means = [
        np.mean(np.arange(1, h.sum() + 1) / ((~h).sum() + np.arange(1, h.sum() + 1)))
        for h in halves
    ]
    assert abs(np.mean(means) - expected) > 1e-4


def test_images_and_boxes_are_mirrored_together(data):
    batch = next(train_batches(data.train, 64, seed=0, start_step=0))
    augment = jax.jit(
        lambda key, x, y: data.task.augment(key, x, y, Augment(flip=True), (0.0,), (1.0,))
    )
    x, labels = augment(jax.random.key(0), batch["input"], batch["label"])
    mirrored = (np.asarray(x) != batch["input"]).any((1, 2, 3))
    assert 15 < mirrored.sum() < 49
    boxes = np.asarray(labels["box"] * 8).round().astype(int)
    for image, box, mask in zip(np.asarray(x), boxes, batch["label"]["mask"], strict=True):
        covered = np.zeros((8, 8), bool)
        for left, top, right, bottom in box[mask]:
            covered[top:bottom, left:right] = True
        np.testing.assert_array_equal(image[..., 0] > 0, covered)


def test_labels_and_outputs_of_another_shape_are_refused(data, ragged):
    image, label = ragged.draw_boxes(20, 0)
    with pytest.raises(DataError, match=r"train: the label of one input is .*\(2, 4\).*needs"):
        part = image, {name: x[:, :2] for name, x in label.items()}
        from_arrays(part, part, task=data.task)
    with pytest.raises(TaskError, match="a box and a confidence for each slot"):
        data.task.check_outputs({"box": np.zeros((1, 3, 4))}, data.input_shape)
    data.task.check_outputs(perfect(label), data.input_shape)
