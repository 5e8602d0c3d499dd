"""Every recipe runs from its file, on TFDS's mock of its data set: a few images, and otherwise unchanged."""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds

from paramshare.training.config import differences, from_json, load_file, to_json
from paramshare.training.loop import train
from paramshare.training.optimizer import learning_rate

FILES = sorted(p for p in (pathlib.Path(__file__).parents[1] / "experiments").glob("*.py") if "\nconfig = " in p.read_text())


@pytest.fixture(autouse=True)
def _lenient_promotion():
    # optax's schedules multiply integer steps with floats.
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize("file", FILES, ids=[f.stem for f in FILES])
def test_runs_on_mock_data(file, tmp_path):
    config = load_file(file)
    one_step = dataclasses.replace(config, epochs=1, batch_size=4, schedule=dataclasses.replace(config.schedule, warmup_epochs=0.0))
    if config.data.name == "digits":  # no mock needed
        one_step = dataclasses.replace(one_step, data=dataclasses.replace(config.data, train_examples=4))
    with tfds.testing.mock_data(num_examples=5):
        result = train(one_step, tmp_path / "run", devices=jax.devices()[:1], quiet=True)
    assert result["steps"] == 1 and np.isfinite(result["last"]["test"]["loss"])
    # The header's command is that of this file.
    assert f"paramshare train experiments/{file.name} --workdir runs/" in file.read_text().split('"""')[1]


@pytest.mark.parametrize("file", FILES, ids=[f.stem for f in FILES])
def test_is_sound_and_survives_storing(file):
    config = load_file(file)
    config.check()
    assert from_json(to_json(config)) == config
    changed = dataclasses.replace(config, seed=5, data=dataclasses.replace(config.data, validation=0.5))
    assert differences(changed, config) == [f"data.validation: {config.data.validation} -> 0.5", "seed: 0 -> 5"]


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        # spec: 0.1, times 0.2 at epochs 60, 120, 160
        ("cifar10_swrn", {0: 0.1, 59: 0.1, 60: 0.02, 120: 0.004, 160: 0.0008, 199: 0.0008}),
        ("cifar100_swrn", {0: 0.1, 60: 0.02, 120: 0.004, 160: 0.0008}),
        ("imagenet_swrn50_2", {0: 0.1, 30: 0.01, 60: 0.001, 90: 0.0001, 99: 0.0001}),
    ],
)
def test_learning_rates_of_the_recipes(name, rates):
    config = load_file(next(f for f in FILES if f.stem == name))
    rate: Any = learning_rate(config, steps_per_epoch=7)
    for epoch, expected in rates.items():
        assert float(rate(7 * epoch)) == pytest.approx(expected, rel=1e-5)
        assert float(rate(7 * epoch + 6)) == pytest.approx(expected, rel=1e-5)
