"""The loop in one process: what it reports, what it leaves, and networks and images of one's own."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paramshare import FilterBasis, Plan, Rule, share
from paramshare.training.checkpoint import Checkpoints
from paramshare.training.config import ConfigError, Data, Penalty
from paramshare.training.evaluation import make_evaluate
from paramshare.training.loop import train
from paramshare.training.metrics import read_metrics
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


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def test_a_kill_between_the_two_saves_loses_nothing(config, digits, network, tmp_path, monkeypatch):
    """The best state is on disk before a checkpoint says that it is there."""
    config = dataclasses.replace(config, epochs=3, optimizer=dataclasses.replace(config.optimizer, learning_rate=0.3))
    whole = train(config, tmp_path / "whole", model=network, data=digits, devices=ONE, quiet=True)
    for point in ("before best", "between", "after both"):
        save, killed = Checkpoints.save, []

        def dying(self, step, tree, notes, point=point, save=save, killed=killed, **options):
            is_best = self.folder.name == "best"
            dies = not killed and step >= 8 and is_best == (point == "before best")
            if dies and point != "after both":
                killed.append(step)
                raise Killed
            save(self, step, tree, notes, **options)
            if is_best:
                assert (self.folder / str(step)).is_dir()
            if dies:
                killed.append(step)
                raise Killed

        monkeypatch.setattr(Checkpoints, "save", dying)
        with pytest.raises(Killed):
            train(config, tmp_path / point, model=network, data=digits, devices=ONE, quiet=True)
        monkeypatch.setattr(Checkpoints, "save", save)
        found = train(config, tmp_path / point, model=network, data=digits, devices=ONE, quiet=True)
        assert found["selected"] == whole["selected"] and found["last"] == whole["last"]


def test_a_workdir_of_another_network_or_other_images_is_refused(finished, digits, make_network):
    workdir, config, _ = finished
    with pytest.raises(ConfigError, match=r"holds a run of another configuration \(model: "):
        train(config, workdir, model=make_network(dtype=np.float16), data=digits, devices=ONE)
    fewer = dataclasses.replace(digits, train=digits.train.take(np.arange(200)))
    with pytest.raises(ConfigError, match=r"\(data: 256/64/101 images .* -> 200/64/101 images"):
        train(config, workdir, model=make_network(), data=fewer, devices=ONE)


def test_networks_that_sow_draw_noise_and_want_train_to_be_said(config, digits, tmp_path):
    import flax.linen as nn

    class Odd(nn.Module):
        activation: object = functools.partial(nn.gelu)  # printed with an address, which differs from process to process

        @nn.compact
        def __call__(self, x, train):
            x = nn.relu(nn.Conv(4, (3, 3))(x)).mean((1, 2))
            self.sow("losses", "size", (x**2).mean())
            calls = self.variable("calls", "count", lambda: jnp.zeros((), jnp.int32))
            if train:
                x = x + 0.1 * jax.random.normal(self.make_rng("noise"), x.shape)
                calls.value += 1
            return nn.Dense(10)(x)

    result = train(config, tmp_path / "run", model=Odd(), data=digits, devices=ONE, quiet=True)
    assert result["steps"] == 8
    run = prepare(config, model=Odd(), data=digits, devices=ONE)
    assert (
        "0x" in repr(Odd()) and run.identity == prepare(config, model=Odd(activation=Odd().activation), data=digits, devices=ONE).identity
    )
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        state, _ = checkpoints.restore(jax.eval_shape(run.init))
    # Counted once a step; what was sown is not kept.
    assert set(state.collections) == {"calls"} and int(state.collections["calls"]["count"]) == 8


def test_lines_tell_the_penalty_and_the_gradients_of_their_steps(config, digits, make_network, tmp_path):
    """Means over the steps since the last line, and of the largest gradients the largest."""
    rules = Plan(Rule("conv[1-3]/kernel", FilterBasis(6, 2), bank="filters"))
    network = share(make_network(plain=True), rules, jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32))
    config = dataclasses.replace(config, penalty=Penalty(10.0), gradient_flow=True, batch_size=32, epochs=1)
    found = {}
    for every in (1, 4):
        workdir = tmp_path / str(every)
        train(dataclasses.replace(config, log_every=every), workdir, model=network, data=digits, devices=ONE, quiet=True)
        found[every] = [line for line in read_metrics(workdir / "metrics.jsonl") if line["kind"] == "train"]
    steps, lines = found[1], found[4]
    assert [line["step"] for line in lines] == [4, 8]
    measured = ["loss", "accuracy", "gradient_max/filters", "gradient_mean/filters", "orthogonality"]
    assert list(lines[0]) == ["kind", "step", *measured, "learning_rate"]
    for line in lines:
        window = steps[line["step"] - 4 : line["step"]]
        for name in measured:
            over = max if name.startswith("gradient_max") else np.mean
            assert line[name] == pytest.approx(over([step[name] for step in window]), rel=1e-12), name
    assert len({step["gradient_max/filters"] for step in steps}) == 8
