"""The loop in one process: what it reports, what it leaves, and networks and images of one's own."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from paramshare.training.checkpoint import Checkpoints
from paramshare.training.config import ConfigError, Data
from paramshare.training.evaluation import make_evaluate
from paramshare.training.loop import train
from paramshare.training.run import prepare

ONE = jax.devices()[:1]


@pytest.fixture(scope="module")
def finished(config, digits, network, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("loop") / "run"
    config = dataclasses.replace(config, epochs=15, optimizer=dataclasses.replace(config.optimizer, learning_rate=0.3))
    return workdir, config, train(config, workdir, model=network, data=digits, devices=ONE, quiet=True)


def test_it_learns(finished):
    workdir, _, result = finished
    losses = [x["loss"] for x in map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines()) if x["kind"] == "epoch"]
    assert len(losses) == 15 and losses[-1] < 0.7 * losses[0]
    assert result["last"]["test"]["accuracy"] > 0.3  # chance is 0.1


def test_the_selected_epoch_is_the_first_with_the_highest_validation_accuracy(finished, digits, network):
    workdir, config, result = finished
    lines = [x for x in map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines()) if x["kind"] == "epoch"]
    accuracies = [line["validation_accuracy"] for line in lines]
    assert result["selected"]["epoch"] == 1 + int(np.argmax(accuracies))
    run = prepare(config, model=network, data=digits, devices=ONE)
    with Checkpoints(workdir / "best") as best:
        variables, _ = best.restore(jax.eval_shape(run.init).variables)
    assert make_evaluate(run)(variables, digits.validation)["accuracy"] == max(accuracies)
    assert make_evaluate(run)(variables, digits.test) == result["selected"]["test"]


def test_a_finished_run_only_tells_its_result_again(finished, digits, network):
    workdir, config, result = finished
    before = (workdir / "metrics.jsonl").read_bytes()
    assert train(config, workdir, model=network, data=digits, devices=ONE) == result
    assert (workdir / "metrics.jsonl").read_bytes() == before


def test_the_workdir_names_ones_own_network_and_images(finished, config, digits, make_network):
    workdir, config, result = finished
    stored = json.loads((workdir / "config.json").read_text())
    assert (stored["model"]["name"], stored["data"]["name"]) == (result["model"], result["data"]) == ("Small", "some digits")
    with pytest.raises(ConfigError, match="a network of your own decides for itself"):
        half = dataclasses.replace(config, model=dataclasses.replace(config.model, bfloat16=True))
        prepare(half, model=make_network(), data=digits, devices=ONE)


def test_without_validation_nothing_is_selected(config, digits, network, tmp_path):
    bare = dataclasses.replace(digits, validation=dataclasses.replace(digits).validation.take(np.arange(0)))
    result = train(dataclasses.replace(config, epochs=1), tmp_path / "run", model=network, data=bare, devices=ONE, quiet=True)
    assert result["selected"] is None and not (tmp_path / "run" / "best").exists()


class Streamed:
    """A source that is not held in memory."""

    def __init__(self, source):
        self.source = source

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        return self.source[index]


def test_a_set_that_is_streamed_trains_to_the_same_numbers(config, digits, network, tmp_path):
    streamed = dataclasses.replace(
        digits, train=Streamed(digits.train), validation=Streamed(digits.validation), test=Streamed(digits.test), in_memory=False
    )
    held, read = (
        train(config, tmp_path / name, model=network, data=data, devices=ONE, quiet=True)
        for name, data in (("held", digits), ("read", streamed))
    )
    assert read["last"] == held["last"]


def test_a_network_that_cannot_take_the_images_is_named(config, digits, make_network):
    import flax.linen as nn

    class Fixed(nn.Module):
        classes: int = 10

        @nn.compact
        def __call__(self, x, train=False):
            return nn.Dense(self.classes)(x.reshape(x.shape[0], 16))

    with pytest.raises(ConfigError, match=r"model 'Fixed' cannot take images of shape \(8, 8, 1\)"):
        prepare(config, model=Fixed(), data=digits, devices=ONE)

    class Few(Fixed):
        def __call__(self, x, train=False):
            return x.mean((1, 2)) * np.ones((1, 7), np.float32)

    with pytest.raises(ConfigError, match=r"gives \(1, 7\) for one image .* wanted, \(1, 10\)"):
        prepare(config, model=Few(), data=digits, devices=ONE)


def test_settings_that_make_no_sense_are_refused(config):
    for part, change, message in [
        ("data", {"validation": 1.0}, r"data.validation is 1.0; it must be in \[0, 1\)"),
        ("schedule", {"milestones": (5, 3)}, r"schedule.milestones is \(5, 3\)"),
        ("schedule", {"warmup_epochs": 9.0}, "schedule.warmup_epochs is 9.0"),
        ("optimizer", {"name": "sdg"}, "optimizer.name is 'sdg'; it must be one of sgd, adam, adamw"),
        ("optimizer", {"momentum": 1.0}, "optimizer.momentum is 1.0"),
    ]:
        with pytest.raises(ConfigError, match=message):
            dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **change)}).check()
    with pytest.raises(ConfigError, match="mapping is 'vmap'"):
        dataclasses.replace(config, mapping="vmap").check()
    with pytest.raises(ConfigError, match="label_smoothing is 1"):
        dataclasses.replace(config, label_smoothing=1, data=Data()).check()
