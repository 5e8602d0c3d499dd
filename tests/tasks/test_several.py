"""Regression against NumPy, and several tasks against each task alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paramshare.tasks import (
    Augment,
    AugmentError,
    Classification,
    Detection,
    Pose,
    Regression,
    Several,
    TaskError,
)
from paramshare.tasks.augment import draw, move
from paramshare.training.config import ConfigError
from paramshare.training.losses import smoothed

RNG = np.random.default_rng(0)
SHAPE = (8, 8, 1)
PLACE = Regression(("x", "y"), mean=(4.0, 2.0), scale=2.0)


def test_regression_measures_are_those_of_numpy():
    output, true = (RNG.normal(size=(40, 2)).astype(np.float32) for _ in range(2))
    predicted = np.array([4, 2]) + 2 * output
    result = PLACE.reduce(jax.device_get(PLACE.statistics(output, jnp.zeros((40, *SHAPE)), true)))
    assert list(result) == [measure.name for measure in PLACE.measures] == ["r2", "mae/x", "mae/y"]
    mae = np.abs(predicted - true).mean(0)
    r2 = 1 - ((predicted - true) ** 2).mean(0) / true.var(0)
    assert list(result.values()) == pytest.approx([r2.mean(), *mae], rel=1e-5)
    above, below = PLACE.batch_measures(jnp.asarray(output), jnp.asarray(true))["mae/y"]
    assert float(above.sum() / below.sum()) == pytest.approx(mae[1], rel=1e-5)


def test_r2_is_one_for_the_truth_zero_for_the_mean_and_nan_for_a_constant():
    true = np.arange(12.0, dtype=np.float32).reshape(6, 2)
    for predicted, expected in ((true, 1.0), (np.broadcast_to(true.mean(0), (6, 2)), 0.0)):
        assert PLACE.reduce({"predicted": predicted, "true": true})["r2"] == expected
    assert np.isnan(PLACE.reduce({"predicted": true, "true": np.ones((6, 2))})["r2"])


def test_the_regression_loss_is_hubers_of_the_standardised_error():
    output, true = np.array([[0.0, 3.0]]), np.array([[5.0, 2.0]])  # errors -0.5 and 3 scales
    loss = PLACE.losses(jnp.asarray(output), jnp.asarray(true), train=True)["huber"]
    np.testing.assert_allclose(loss, [(0.5 * 0.25 + (3 - 0.5)) / 2], rtol=1e-6)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (((),), "at least one"),
        ((("x", "x"),), "no name twice"),
        ((("x", "y"), (1.0,)), "mean has 1 numbers for 2 values"),
        ((("x",), 0.0, 0.0), "scale is 0.0; it must be positive"),
        ((("x",), np.nan), "mean is nan; it must be finite"),
        (("xy",), "must be a tuple of names"),
        ((("x",), 0.0, 1.0, True), "a point has two values"),
    ],
)
def test_regressions_that_make_no_sense(given, message):
    with pytest.raises(TaskError, match=message):
        Regression(*given)


def test_regression_refuses_labels_that_are_not_finite():
    with pytest.raises(TaskError, match="label of example 1 is"):
        PLACE.check_labels(np.array([[0, 0], [np.inf, 0]], np.float32), SHAPE)


@pytest.mark.parametrize(
    "config",
    [Augment(flip=True), Augment(pad_crop=2), Augment(zoom=(1, 2)), Augment(turn=5)],
)
def test_augmentation_that_may_change_the_values_is_refused(config):
    with pytest.raises(AugmentError, match="it may change x, y"):
        PLACE.check_augment(config, SHAPE)
    with pytest.raises(AugmentError, match="it may change x, y"):
        several().check_augment(config, SHAPE)
    Regression(("age",), invariant=True).check_augment(config, SHAPE)
    PLACE.check_augment(Augment(cutout=2, colour=0.1), SHAPE)


def several():
    return Several({"place": PLACE, "digit": Classification(3)})


def test_losses_and_measures_are_those_of_each_task():
    task, count = several(), 30
    outputs = {"place": RNG.normal(size=(count, 2)), "digit": RNG.normal(size=(count, 3))}
    labels = {"place": RNG.normal(size=(count, 2)), "digit": RNG.integers(0, 3, count)}
    outputs, labels = jax.tree.map(jnp.asarray, (outputs, labels))
    task.check_outputs(outputs, SHAPE)
    inputs = jnp.zeros((count, *SHAPE))
    losses = task.losses(outputs, labels, train=True)
    measures = task.reduce(jax.device_get(task.statistics(outputs, inputs, labels)))
    assert list(measures) == [measure.name for measure in task.measures]
    scores = []
    for name, one in (("digit", Classification(3)), ("place", PLACE)):
        for key, value in one.losses(outputs[name], labels[name], train=True).items():
            np.testing.assert_array_equal(losses.pop(f"{name}/{key}"), value)
        alone = one.reduce(jax.device_get(one.statistics(outputs[name], inputs, labels[name])))
        assert {key: measures[f"{name}/{key}"] for key in alone} == alone
        scores.append(alone[one.score.name])
    assert not losses
    assert measures["mean"] == np.mean(scores) and task.score.name == "mean"
    assert set(task.batch_measures(outputs, labels)) < set(measures)


def test_the_order_of_tasks_does_not_matter():
    other = Several({"digit": Classification(3), "place": PLACE})
    assert several() == other and hash(several()) == hash(other)
    assert list(several().network_options()["num_classes"]) == ["digit", "place"]


def test_labels_move_as_each_task_moves_them():
    boxes = Detection(("cat",), max_boxes=2)
    task = Several({"boxes": boxes, "digit": Classification(3)})
    config, shape = Augment(flip=True), (4, *SHAPE)
    label = jax.tree.map(
        lambda leaf: jnp.ones((4, *leaf.shape), leaf.dtype), boxes.label_spec(SHAPE)
    )
    label["box"] = jnp.broadcast_to(jnp.array([1.0, 2, 3, 4]), (4, 2, 4))
    draws = draw(jax.random.key(0), config, shape)
    moved = task.move_labels(draws, {"boxes": label, "digit": jnp.arange(4)}, config, shape)
    alone = boxes.move_labels(draws, label, config, shape)
    np.testing.assert_array_equal(moved["boxes"]["box"], alone["box"])
    assert {5.0, 1.0} == set(np.asarray(alone["box"])[:, 0, 0].tolist())  # mirrored, and not
    np.testing.assert_array_equal(moved["digit"], jnp.arange(4))


def test_label_smoothing_reaches_the_tasks_that_have_it():
    smooth = several().with_label_smoothing(0.1)
    assert dict(smooth.tasks) == {
        "place": PLACE,
        "digit": Classification(3).with_label_smoothing(0.1),
    }
    with pytest.raises(TaskError, match="does not support label smoothing"):
        Several({"place": PLACE}).with_label_smoothing(0.1)


def test_a_tasks_own_label_smoothing_is_not_replaced():
    own = Several({"digit": Classification(3, label_smoothing=0.2), "place": PLACE})
    assert smoothed(own, 0.0) == own and smoothed(own, 0.2) == own
    with pytest.raises(ConfigError, match=r"label_smoothing is 0\.1, but the task has 0\.2"):
        smoothed(own, 0.1)
    assert smoothed(several(), 0.1) == several().with_label_smoothing(0.1)


def test_points_move_with_the_image_and_are_given_in_pixels_of_the_picture():
    point = Regression(("x", "y"), mean=4.0, scale=4.0, point=True)
    config, shape = Augment(flip=True, turn=90, zoom=(0.5, 2)), (6, *SHAPE)
    draws = draw(jax.random.key(0), config, shape)
    labels = jnp.asarray(RNG.uniform(0, 8, (6, 2)), jnp.float32)
    point.check_augment(config, SHAPE)
    moved = point.move_labels(draws, labels, config, shape)
    np.testing.assert_array_equal(moved, move(draws, labels[:, None], config, (8, 8))[:, 0])
    np.testing.assert_array_equal(PLACE.move_labels(draws, labels, config, shape), labels)
    shown = point.describe(np.array([2.0, 3.0]), lambda p: 10 * p + 1)
    assert shown == {"x": 21, "y": 31}
    assert PLACE.describe(np.array([2.0, 3.0]), lambda p: 10 * p + 1) == {"x": 2, "y": 3}


def test_the_heatmap_is_that_of_the_task_that_has_one():
    pose = Pose(("left_hand", "right_hand"), flip_test=False)
    task, heatmaps = Several({"a": PLACE, "pose": pose}), jnp.zeros((1, 2, 4, 4, 2))
    outputs = {"a": jnp.zeros((1, 2)), "pose": heatmaps.at[0, 1, 2, 3, 1].set(5.0)}
    found = task.heatmap(outputs)
    assert found is not None and found.shape == (1, 4, 4) and found[0, 2, 3] == 5
    assert Several({"a": PLACE}).heatmap(outputs) is None


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ({}, "at least one"),
        ([PLACE], "must be a `Task`"),
        ({1: 2}, "must be a `Task`"),
        ((("a", PLACE), ("a", PLACE)), "no name twice"),
        ({"a/b": PLACE}, "letters, digits and underscores"),
        ({"image": PLACE}, "named 'image'; predictions have an entry of that name already"),
        ({"a": "place"}, "must be a `Task`"),
        ({"a": Pose(("left_hand", "right_hand"))}, "flip_test=False"),
    ],
)
def test_tasks_that_do_not_go_together(tasks, message):
    with pytest.raises(TaskError, match=message):
        Several(tasks)


def test_outputs_and_labels_must_have_the_names_of_the_tasks():
    task = several()
    with pytest.raises(TaskError, match=r"outputs of the network must be a dict .*got \(2, 3\)"):
        task.check_outputs(jnp.zeros((2, 3)), SHAPE)
    with pytest.raises(TaskError, match=r"labels must be a dict .*got \['digit'\]"):
        task.check_labels({"digit": np.zeros(2, np.int32)}, SHAPE)
    with pytest.raises(TaskError, match="one output per value"):
        task.check_outputs({"digit": jnp.zeros((1, 3)), "place": jnp.zeros((1, 3))}, SHAPE)
