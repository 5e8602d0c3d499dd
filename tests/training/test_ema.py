"""The exponential moving average of the variables."""

import dataclasses

import jax
import numpy as np
import pytest

from paramshare.training.config import ConfigError
from paramshare.training.evaluation import make_evaluate
from paramshare.training.loop import fit
from paramshare.training.metrics import read_metrics
from paramshare.training.run import prepare
from paramshare.training.step import make_train_step
from paramshare.training.workdir import stored_variables

ONE = jax.devices()[:1]
DECAY = 0.6


def test_it_is_the_average_of_the_variables_after_each_applied_step(config, digits, network):
    config = dataclasses.replace(config, ema=DECAY, non_finite="skip")
    run = prepare(config, model=network, data=digits, devices=ONE)
    step, state = run.devices.map(make_train_step(run, 0)), run.init()
    expected = jax.device_get(state.variables)
    for number in range(6):
        batch = digits.train.take(np.arange(64)).arrays
        before = jax.device_get(state.ema)
        if number == 3:  # the update is skipped
            batch = batch | {"input": np.full((64, 8, 8, 1), np.nan, np.float32)}
        state, _ = step(run.devices.place(state), None, run.devices.cut(batch))
        if number == 3:
            jax.tree.map(np.testing.assert_array_equal, state.ema, before)
            continue
        rate = min(DECAY, (1 + number) / (10 + number))
        expected = jax.tree.map(
            lambda old, new, rate=rate: rate * old + (1 - rate) * np.asarray(new),
            expected,
            state.variables,
        )
    for actual, leaf in zip(jax.tree.leaves(state.ema), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(actual, leaf, rtol=1e-4, atol=1e-6)


def test_it_is_validated_stored_and_tested(config, digits, network, tmp_path):
    run = prepare(dataclasses.replace(config, ema=DECAY), model=network, data=digits, devices=ONE)
    result = fit(run, tmp_path / "run", quiet=True)
    epochs = [line for line in read_metrics(tmp_path / "run/metrics.jsonl") if "epoch" in line]
    epochs = [line for line in epochs if line["kind"] == "epoch"]
    average, step = stored_variables(tmp_path / "run", run.shapes, "ema")
    evaluate = make_evaluate(run)
    validation, test = (evaluate(average, x) for x in (run.data.validation, run.data.test))
    assert epochs[-1]["ema_validation_accuracy"] == validation.measures["accuracy"]
    assert epochs[-1]["ema_validation_loss"] == validation.loss
    assert result.ema == test != result.last and step == run.steps

    plain = prepare(config, model=network, data=digits, devices=ONE)
    with pytest.raises(ConfigError, match="keeps no moving average"):
        stored_variables(tmp_path / "run", plain.shapes, "ema")
