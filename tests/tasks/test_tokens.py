"""Tokens: losses and measures against NumPy's, padding, label smoothing, refusals."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paramshare.tasks import Augment, AugmentError, TaskError, Tokens

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(0, 2, (3, 5, 7)).astype(np.float32)
LABELS = RNG.integers(0, 7, (3, 5)).astype(np.int32)
LABELS[0, 3:] = -1
LABELS[1, :] = -1


def log_probabilities() -> np.ndarray:
    exact = LOGITS.astype(np.float64)
    return exact - np.log(np.exp(exact).sum(-1, keepdims=True))


def taken() -> np.ndarray:
    """The log-probability of each label; NaN for padding."""
    values = np.take_along_axis(log_probabilities(), np.maximum(LABELS, 0)[..., None], 2)[..., 0]
    return np.where(LABELS >= 0, values, np.nan)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_is_a_mean_over_the_tokens_of_a_sequence_smoothed_in_training_only(smoothing):
    task = Tokens(7).with_label_smoothing(smoothing)
    even = np.where(LABELS >= 0, log_probabilities().mean(-1), np.nan)
    smooth = (1 - smoothing) * taken() + smoothing * even
    for train, values in ((True, smooth), (False, taken())):
        loss = task.losses(LOGITS, LABELS, train=train)["cross_entropy"]
        expected = [-np.nanmean(values[0]), 0.0, -np.nanmean(values[2])]
        np.testing.assert_allclose(loss, expected, rtol=1e-5)  # means of 5 float32


def test_measures_weigh_every_token_of_a_set_equally():
    task = Tokens(7, "character")
    statistics = jax.device_get(
        task.statistics(jnp.asarray(LOGITS), jnp.asarray(LABELS), jnp.asarray(LABELS))
    )
    measures = task.reduce(statistics)
    bits = -np.nanmean(taken()) / math.log(2)
    assert measures["bits"] == pytest.approx(bits, rel=1e-6)
    assert measures["perplexity"] == pytest.approx(2**bits, rel=1e-5)
    right = (LOGITS.argmax(-1) == LABELS)[LABELS >= 0]
    assert measures["accuracy"] == pytest.approx(right.mean())
    # In parts, as over several batches, and in training.
    above, below = task.batch_measures(jnp.asarray(LOGITS), jnp.asarray(LABELS))["bits"]
    assert float(above.sum() / below.sum()) == pytest.approx(bits, rel=1e-5)
    nothing = {name: values[1:2] for name, values in statistics.items()}
    assert all(math.isnan(value) for value in task.reduce(nothing).values())


def test_fewer_bits_are_better():
    score = Tokens(7, "character").score
    assert (score.name, score.title) == ("bits", "bits per character")
    assert score.is_better(1.0, 2.0) and not score.is_better(2.0, 1.0)
    accuracy = Tokens(7).measures[2]
    assert accuracy.is_better(0.9, 0.8) and not accuracy.is_better(0.8, 0.9)


def test_equal_logits_need_the_bits_of_the_vocabulary():
    task = Tokens(16)
    statistics = task.statistics(jnp.zeros((1, 5, 16)), *[jnp.asarray(LABELS[2:])] * 2)
    assert task.reduce(jax.device_get(statistics))["bits"] == pytest.approx(4)


def test_shapes():
    task = Tokens(7)
    task.check_outputs(LOGITS, (5,))
    task.check_labels(LABELS, (5,))
    assert task.network_options() == {"num_classes": 7}
    with pytest.raises(TaskError, match=r"\(5, 8\).*needs one output per token and place"):
        task.check_outputs(np.zeros((1, 5, 8)), (5,))
    with pytest.raises(TaskError, match=r"\(4,\) integer.*needs \(5,\) integer"):
        task.check_labels(LABELS[:, :4], (5,))
    with pytest.raises(TaskError, match=r"labels run up to 13; they must be below .* 7"):
        task.check_labels(LABELS + 7, (5,))
    with pytest.raises(TaskError, match="fewer than two different tokens"):
        Tokens(1)


@pytest.mark.parametrize("name", ["flip", "pad_crop", "colour"])
def test_every_augmentation_is_refused(name):
    value = {"flip": True, "pad_crop": 2, "colour": 0.1}[name]
    with pytest.raises(AugmentError, match=f"augment.{name} is .* no images; it must be"):
        Tokens(7).check_augment(Augment(**{name: value}), (5,))
    Tokens(7).check_augment(Augment(), (5,))
