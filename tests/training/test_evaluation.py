"""Evaluation counts every example once, for any batch size and any number of devices."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from paramshare.data import ArraySource
from paramshare.tasks import Classification, TaskError, normalise
from paramshare.training.evaluation import make_evaluate
from paramshare.training.run import prepare


@pytest.mark.parametrize(
    ("mapping", "batch_size", "devices"),
    [("pmap", 4, 1), ("pmap", 6, 4), ("shard_map", 64, 3), ("shard_map", 256, 4)],
)
def test_equals_one_pass_over_all_examples(digits, config, network, mapping, batch_size, devices):
    # Label smoothing is for training only.
    config = dataclasses.replace(
        config, batch_size=batch_size, mapping=mapping, label_smoothing=0.5
    )
    run = prepare(config, model=network, data=digits, devices=jax.devices()[:devices])
    variables = run.init().variables
    evaluate = make_evaluate(run)
    inputs, labels = digits.test.input, digits.test.label
    logits = np.asarray(network.apply(variables, normalise(inputs, digits.mean, digits.std)))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    ranks = (logits > np.take_along_axis(logits, labels[:, None], 1)).sum(-1)
    for n in (1, 7, 64, 101):
        result = evaluate(variables, ArraySource(inputs[:n], labels[:n]))
        assert result.count == n
        assert result.measures == {
            "accuracy": np.mean(ranks[:n] == 0),
            "top5": np.mean(ranks[:n] < 5),
        }
        np.testing.assert_allclose(result.loss, losses[:n].mean(), rtol=1e-5)
        assert list(result.losses.values()) == [result.loss]


def test_other_measures_than_declared_are_refused(digits, config, network):
    class Other(Classification):
        def reduce(self, statistics):
            return {"accurate": 1.0}

    data = dataclasses.replace(digits, task=Other(10))
    run = prepare(config, model=network, data=data, devices=jax.devices()[:1])
    evaluate, few = make_evaluate(run), digits.test.take(np.arange(3))
    with pytest.raises(TaskError, match=r"returns \['accurate'\]; .* \['accuracy', 'top5'\]"):
        evaluate(run.init().variables, few)


def test_an_empty_source_counts_nothing(digits, config, network):
    run = prepare(config, model=network, data=digits, devices=jax.devices()[:1])
    empty = ArraySource(digits.test.input[:0], digits.test.label[:0])
    result = make_evaluate(run)(run.init().variables, empty)
    assert result.count == 0 and result.measures == {"accuracy": 0.0, "top5": 0.0}
