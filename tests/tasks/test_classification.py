"""Classification: loss and measures against NumPy's, and the checks of every task."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paramshare.tasks import Augment, AugmentError, Classification, Paths, TaskError

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("classes", [2, 5, 10])
def test_measures_are_those_of_numpy(classes):
    task = Classification(classes)
    output, label = RNG.normal(size=(50, classes)).astype(np.float32), RNG.integers(0, classes, 50)
    ranked = np.argsort(-output, axis=1)
    first, five = ranked[:, 0] == label, (ranked[:, :5] == label[:, None]).any(1)
    statistics = jax.device_get(task.statistics(output, jnp.zeros((50, 1)), label))
    assert task.reduce(statistics) == {"accuracy": first.mean(), "top5": five.mean()}
    assert classes > 5 or five.all()
    assert list(task.reduce(statistics)) == [measure.name for measure in task.measures]
    numerator, denominator = task.batch_measures(jnp.asarray(output), jnp.asarray(label))[
        "accuracy"
    ]
    np.testing.assert_array_equal(numerator, first)
    np.testing.assert_array_equal(denominator, 1)


def test_the_loss_is_cross_entropy_smoothed_in_training_only():
    output, label = RNG.normal(0, 3, (20, 7)), RNG.integers(0, 7, 20)
    logarithms = output - np.log(np.exp(output).sum(1, keepdims=True))
    plain = -logarithms[np.arange(20), label]
    task = Classification(7).with_label_smoothing(0.2)
    for train, expected in ((False, plain), (True, 0.8 * plain - 0.2 * logarithms.mean(1))):
        loss = task.losses(jnp.asarray(output, jnp.float32), label, train=train)["cross_entropy"]
        np.testing.assert_allclose(loss, expected, rtol=1e-5)  # sums of 7 float32
    half = task.losses(jnp.asarray(output, jnp.bfloat16), label, train=False)["cross_entropy"]
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, plain, atol=0.05)  # logits up to 10, rounded to 8 bits


@pytest.mark.parametrize(("task", "shape"), [(Classification(3), (3,)), (Paths(), (4, 5))], ids=str)
def test_tasks_are_hashable_and_check_outputs_and_labels(task, shape):
    assert hash(task) == hash(type(task)(**vars(task)))
    assert task.score == task.measures[0]
    task.check_outputs(jax.ShapeDtypeStruct((1, *shape), jnp.bfloat16), (4, 5, 2))
    with pytest.raises(TaskError, match=rf"\(9,\); the task '{task.name}' needs one output per"):
        task.check_outputs(jax.ShapeDtypeStruct((1, 9), jnp.float32), (4, 5, 2))
    with pytest.raises(TaskError, match="nothing"):
        task.check_outputs({}, (4, 5, 2))
    with pytest.raises(TaskError, match=r"\(7,\) float; the task .* needs .* integer"):
        task.check_labels(np.zeros((2, 7), np.float32), (4, 5, 2))


@pytest.mark.parametrize("label", [-1, 3])
def test_labels_out_of_range_are_refused(label):
    task, labels = Classification(3), np.array([0, label])
    for array in (labels, jnp.asarray(labels)):
        with pytest.raises(TaskError, match="they must be from 0 to 2"):
            task.check_labels(array, (4, 5, 2))
    task.check_labels(jax.ShapeDtypeStruct((2,), jnp.int32), (4, 5, 2))
    task.check_labels(labels[:1], (4, 5, 2))


def test_a_task_without_label_smoothing_refuses_it(ragged):
    task = ragged.Boxes()
    assert task.with_label_smoothing(0.0) is task
    with pytest.raises(TaskError, match=r"is 0\.1, but the task 'boxes' does not support label"):
        task.with_label_smoothing(0.1)


def test_inputs_that_are_no_images_pass_through_unchanged():
    """Such as token ids: no mean, no augmentation, their own dtype."""
    tokens = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)
    task = Classification(3)
    x, _ = task.augment(jax.random.key(0), tokens, jnp.zeros(2), Augment(), None, None)
    assert x is tokens
    with pytest.raises(AugmentError, match=r"inputs have shape \(6,\); only images"):
        task.check_augment(Augment(flip=True), (6,))
