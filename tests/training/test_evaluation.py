"""Evaluation counts every example exactly once, whatever the batch size and the number of devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paramshare.training.data import ArraySource, normalise
from paramshare.training.data.task import cross_entropy
from paramshare.training.evaluation import make_evaluate
from paramshare.training.run import prepare


@pytest.mark.parametrize("mapping", ["pmap", "shard_map"])
@pytest.mark.parametrize(("batch_size", "devices"), [(4, 1), (64, 1), (6, 4), (64, 3), (256, 4)])
def test_equals_one_pass_over_all_examples(digits, config, network, mapping, batch_size, devices):
    run = prepare(
        dataclasses.replace(config, batch_size=batch_size, mapping=mapping), model=network, data=digits, devices=jax.devices()[:devices]
    )
    variables = jax.jit(run.init)().variables
    evaluate = make_evaluate(run)
    logits = np.asarray(network.apply(variables, normalise(digits.test.image, digits.mean, digits.std)))
    for n in (1, 7, 64, 101):
        found = evaluate(variables, ArraySource(digits.test.image[:n], digits.test.label[:n]))
        assert found["count"] == n
        assert found["accuracy"] == np.mean(logits[:n].argmax(-1) == digits.test.label[:n])
        ranks = (logits[:n] > np.take_along_axis(logits[:n], digits.test.label[:n, None], 1)).sum(-1)
        assert found["top5"] == np.mean(ranks < 5)
        np.testing.assert_allclose(found["loss"], cross_entropy(jnp.asarray(logits[:n]), digits.test.label[:n]).mean(), rtol=1e-5)


def test_an_empty_source_counts_nothing(digits, config, network):
    run = prepare(config, model=network, data=digits, devices=jax.devices()[:1])
    empty = ArraySource(digits.test.image[:0], digits.test.label[:0])
    assert make_evaluate(run)(jax.jit(run.init)().variables, empty)["count"] == 0
