"""The loop in one process: its result, its workdir, and networks and data that are passed in."""

import dataclasses
import functools
import json
import os
import re
import shutil
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from paramshare import FilterBasis, Plan, Rule, share
from paramshare.data import ArraySource
from paramshare.storage import StorageError, read_json, write_json
from paramshare.tasks import Augment
from paramshare.training import loop, track
from paramshare.training.checkpoint import CheckpointError, Checkpoints
from paramshare.training.config import ConfigError, Penalty, Schedule
from paramshare.training.evaluation import make_evaluate
from paramshare.training.loop import NonFinite, train
from paramshare.training.metrics import read_metrics
from paramshare.training.result import Result
from paramshare.training.run import prepare
from paramshare.training.workdir import locked
from paramshare.transform.packing import PACKED

ONE = jax.devices()[:1]


def lines_of(workdir, kind):
    return [line for line in read_metrics(workdir / "metrics.jsonl") if line["kind"] == kind]


@pytest.fixture(scope="module")
def finished(config, digits, network, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("loop") / "run"
    config = dataclasses.replace(
        config, epochs=15, optimizer=dataclasses.replace(config.optimizer, learning_rate=0.3)
    )
    return (
        workdir,
        config,
        train(config, workdir, model=network, data=digits, devices=ONE, quiet=True),
    )


def test_it_learns(finished):
    workdir, _, result = finished
    losses = [line["loss"] for line in lines_of(workdir, "epoch")]
    assert len(losses) == 15 and losses[-1] < 0.7 * losses[0]
    assert result.last_score > 0.3  # chance is 0.1


def test_an_epochs_line_has_the_means_of_its_steps(finished):
    workdir, _, _ = finished
    steps = lines_of(workdir, "train")
    for line in lines_of(workdir, "epoch"):
        for name in ("loss", "accuracy"):
            of_epoch = [step[name] for step in steps if line["step"] - 4 < step["step"]][:4]
            assert line[name] == pytest.approx(np.mean(of_epoch), rel=1e-12)


def test_the_selected_epoch_is_the_first_with_the_highest_validation_score(
    finished, digits, network
):
    workdir, config, result = finished
    accuracies = [line["validation_accuracy"] for line in lines_of(workdir, "epoch")]
    assert result.selected.epoch == 1 + int(np.argmax(accuracies))
    assert result.selected.validation == max(accuracies)
    run = prepare(config, model=network, data=digits, devices=ONE)
    with Checkpoints(workdir / "best") as best:
        variables, _ = best.restore(run.shapes.variables)
    evaluate = make_evaluate(run)
    assert evaluate(variables, digits.validation).measures["accuracy"] == max(accuracies)
    assert evaluate(variables, digits.test) == result.selected.test


def test_a_finished_run_returns_its_stored_result(finished, digits, network, monkeypatch):
    """Also from a folder where it cannot write."""
    workdir, config, result = finished
    before = (workdir / "metrics.jsonl").read_bytes()
    monkeypatch.setattr(loop, "locked", None)
    assert train(config, workdir, model=network, data=digits, devices=ONE) == result
    assert (workdir / "metrics.jsonl").read_bytes() == before
    assert Result.read(workdir / "result.json") == result


def test_the_workdir_names_the_network_and_the_data_that_were_passed_in(finished):
    workdir, _, result = finished
    stored = json.loads((workdir / "config.json").read_text())
    assert (stored["model"]["name"], stored["data"]["name"]) == ("Small", "some digits")
    assert (result.model, result.data) == ("Small", "some digits")


def test_another_network_or_other_data_are_refused(finished, digits, make_network):
    workdir, config, _ = finished
    with pytest.raises(ConfigError, match=r"holds a run of another configuration \(model: "):
        train(config, workdir, model=make_network(dtype=np.float16), data=digits, devices=ONE)
    fewer = dataclasses.replace(digits, train=digits.train.take(np.arange(200)))
    with pytest.raises(ConfigError, match=r"\(train: 256 -> 200\)"):
        train(config, workdir, model=make_network(), data=fewer, devices=ONE)


def test_other_data_of_the_same_size_are_refused(finished, digits, network):
    """Nothing is trained then, and the stored result is not returned."""
    workdir, config, _ = finished
    label, image = digits.train.label.copy(), digits.test.input.copy()
    label[7] += 1
    image[3, 0, 0] ^= 1
    for changed in (
        {"train": ArraySource(digits.train.input, label)},
        {"test": ArraySource(image, digits.test.label)},
        {"mean": (digits.mean[0] + 1e-3,)},
    ):
        data = dataclasses.replace(digits, **changed)
        with pytest.raises(ConfigError, match=r"images, labels or statistics .* have changed"):
            train(config, workdir, model=network, data=data, devices=ONE)


FACTOR = 1.0


class Scaled(nn.Module):
    """A network whose code depends on a global."""

    @nn.compact
    def __call__(self, x, train=False):
        return FACTOR * nn.Dense(10)(x.reshape(len(x), -1))


def test_changed_code_of_a_network_is_refused(config, digits, tmp_path, monkeypatch):
    config = dataclasses.replace(config, epochs=1)
    train(config, tmp_path / "run", model=Scaled(), data=digits, devices=ONE, quiet=True)
    monkeypatch.setitem(globals(), "FACTOR", 2.0)
    with pytest.raises(ConfigError, match="the code of the network has changed"):
        train(config, tmp_path / "run", model=Scaled(), data=digits, devices=ONE, quiet=True)
    facts = tmp_path / "run" / "identity.json"  # another jax traces another program
    write_json(facts, read_json(facts, ConfigError, "") | {"jax": "0.9, flax 0.12"})
    train(config, tmp_path / "run", model=Scaled(), data=digits, devices=ONE, quiet=True)
    monkeypatch.setitem(globals(), "FACTOR", 3.0)  # compared again from then on
    with pytest.raises(ConfigError, match="the code of the network has changed"):
        train(config, tmp_path / "run", model=Scaled(), data=digits, devices=ONE, quiet=True)


def test_a_streamed_set_is_known_by_some_of_its_examples(digits, streamed):
    few = digits.test.take(np.arange(20))
    image = few.input.copy()
    image[0] ^= 1
    other = ArraySource(image, few.label)
    first, again, second = (
        dataclasses.replace(digits, test=streamed(source)).digest for source in (few, few, other)
    )
    assert first == again != second


def test_streamed_data_and_no_validation_give_the_same_numbers(
    config, digits, network, tmp_path, streamed
):
    config = dataclasses.replace(config, epochs=1)
    bare = dataclasses.replace(digits, validation=digits.validation.take(np.arange(0)))
    other = dataclasses.replace(
        digits,
        train=streamed(digits.train),
        validation=streamed(digits.validation),
        test=streamed(digits.test),
    )
    held, read = (
        train(config, tmp_path / name, model=network, data=data, devices=ONE, quiet=True)
        for name, data in (("held", bare), ("read", other))
    )
    # The compiled programs differ, so that sums may be rounded differently.
    assert read.last.measures == held.last.measures and read.last.count == held.last.count
    np.testing.assert_allclose(read.last.loss, held.last.loss, rtol=1e-6)
    assert read.selected and held.selected is None and not (tmp_path / "held" / "best").exists()


def test_a_network_that_does_not_fit_the_data_is_refused(config, digits):
    class Fixed(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            return nn.Dense(10)(x.reshape(x.shape[0], 16))

    with pytest.raises(ConfigError, match=r"'Fixed' cannot take inputs of shape \(8, 8, 1\)"):
        prepare(config, model=Fixed(), data=digits, devices=ONE)

    class Few(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            return x.mean((1, 2)) * np.ones((1, 7), np.float32)

    with pytest.raises(ConfigError, match=r"'Few' with .*\(7,\); .* needs .*\(10,\)"):
        prepare(config, model=Few(), data=digits, devices=ONE)


class Killed(BaseException):
    """Simulates a kill: nothing catches it."""


def test_a_kill_between_the_two_saves_loses_nothing(config, digits, network, tmp_path, monkeypatch):
    """The best state is on disk before a checkpoint refers to it."""
    config = dataclasses.replace(
        config, epochs=3, optimizer=dataclasses.replace(config.optimizer, learning_rate=0.3)
    )
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
        result = train(
            config, tmp_path / point, model=network, data=digits, devices=ONE, quiet=True
        )
        assert result.selected == whole.selected and result.last == whole.last


@pytest.fixture
def copied(finished, tmp_path, digits, network):
    """A copy of the finished run without its result, and a function that trains it again."""
    workdir, config, result = finished
    workdir = shutil.copytree(workdir, tmp_path / "copy")
    (workdir / "result.json").unlink()
    options = {"model": network, "data": digits, "devices": ONE, "quiet": True}

    def again(**changes):
        return train(dataclasses.replace(config, **changes), workdir, **options)

    return workdir, result, again


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(copied, capsys):
    workdir, expected, again = copied
    # Of every file: which bytes of a single one are in use depends on how Orbax has written them.
    for data in (workdir / "checkpoints" / "60").rglob("d/*"):
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 4
        data.write_bytes(content)
    result = again()
    assert (result.last, result.selected) == (expected.last, expected.selected)
    (line,) = capsys.readouterr().err.splitlines()
    assert "checkpoints/60 " in line and line.endswith("resuming from step 56 instead")


@pytest.mark.parametrize("damage", ["deleted", "truncated"])
def test_the_last_epoch_is_reported_whatever_happens_to_the_best_one(copied, capsys, damage):
    workdir, expected, again = copied
    for file in [file for file in (workdir / "best").rglob("*") if file.is_file()]:
        file.write_bytes(b"")
    if damage == "deleted":
        shutil.rmtree(workdir / "best")
    result = again()
    assert result.last == expected.last and result.selected is None
    assert "the result has no selected epoch: " in capsys.readouterr().err


def test_a_run_without_its_checkpoints_does_not_start_again(copied, finished, digits, network):
    workdir, expected, again = copied
    shutil.rmtree(workdir / "checkpoints")
    before = (workdir / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match="has trained 15 epochs, but its checkpoints are"):
        again()
    assert (workdir / "metrics.jsonl").read_bytes() == before
    # From nothing, what an earlier run selected is dropped, even at a step of this run.
    (workdir / "metrics.jsonl").unlink()
    shapes = prepare(finished[1], model=network, data=digits, devices=ONE).shapes.variables
    with Checkpoints(workdir / "best", keep=1) as best:
        (step,) = best.steps
        best.drop_after(0)
        best.save(step, jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes), {})
    result = again()
    assert (result.last, result.selected) == (expected.last, expected.selected)


def test_a_run_resumed_on_another_machine_says_what_changed(copied, capsys, monkeypatch):
    workdir, _, again = copied
    again()
    assert not capsys.readouterr().err
    (workdir / "result.json").unlink()
    cores = len(os.sched_getaffinity(0))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(77))
    again()
    (line,) = capsys.readouterr().err.splitlines()
    assert f"is resumed with cores {cores} -> 77: " in line
    (workdir / "result.json").unlink()
    monkeypatch.setattr(track, "OPERATIONS", 99)
    again(ops="xla")
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(r"operations auto, \w+, generation 2 -> xla, \w+, generation 99", line)


def test_two_trainings_do_not_share_a_workdir(copied):
    """The lock of a killed training is free: `test_resume` kills one."""
    workdir, expected, again = copied
    before = (workdir / "metrics.jsonl").read_bytes()
    with (
        locked(workdir),
        pytest.raises(ConfigError, match=rf"is being trained by process {os.getpid()} on .*; wait"),
    ):
        again()
    assert (workdir / "metrics.jsonl").read_bytes() == before
    assert again().last == expected.last
    assert not (workdir / ".lock").exists()


def test_a_loss_that_is_not_finite_ends_the_run_with_its_step(config, digits, network, tmp_path):
    wild = dataclasses.replace(config.optimizer, learning_rate=1e30)
    with pytest.raises(NonFinite, match=r"step \d+: .* was not applied; lower .*") as caught:
        train(
            dataclasses.replace(config, optimizer=wild),
            tmp_path / "run",
            model=network,
            data=digits,
            devices=ONE,
            quiet=True,
        )
    assert caught.value.exit_code == 1


def test_a_disk_without_locks_is_trained_on_with_a_warning(copied, monkeypatch, capsys):
    _, expected, again = copied

    def refuse(*args):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    assert again().last == expected.last
    assert "cannot be locked (Function not implemented)" in capsys.readouterr().err


def test_a_run_killed_before_its_first_checkpoint_starts_again(config, digits, network, tmp_path):
    config = dataclasses.replace(config, epochs=4, checkpoint_every=50)
    options = {"model": network, "data": digits, "devices": ONE, "quiet": True}
    result = train(config, tmp_path / "run", **options)
    (tmp_path / "run" / "result.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / PACKED).write_bytes(b"of other variables")
    again = train(config, tmp_path / "run", **options)
    assert (again.last, again.selected) == (result.last, result.selected)
    assert not (tmp_path / "run" / PACKED).exists()
    assert len(lines_of(tmp_path / "run", "epoch")) == 4


def test_links_out_of_a_workdir_are_not_followed(copied, tmp_path):
    workdir, expected, again = copied
    victim = tmp_path / "victim"
    for name in ("metrics.jsonl", "result.json", "report.html", "learning_curves.png"):
        victim.write_text("mine")
        (workdir / name).unlink(missing_ok=True)
        (workdir / name).symlink_to(victim)
        if name != "result.json":
            assert again().last == expected.last
        (workdir / "result.json").unlink()
        assert victim.read_text() == "mine"
    (workdir / ".lock").symlink_to(victim)
    with pytest.raises(StorageError, match=r"\.lock cannot be written"):
        again()
    assert victim.read_text() == "mine"


def test_a_full_disk_is_one_line_and_the_run_resumes(copied, monkeypatch):
    workdir, expected, again = copied
    shutil.rmtree(workdir / "checkpoints" / "60")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=1000))
        with pytest.raises(CheckpointError, match=r"free some space .*copy are intact"):
            again()
    assert again().last == expected.last


def test_checkpoints_between_epochs(config, digits, network, tmp_path):
    """A run that lost what came after them ends with the same result."""
    config = dataclasses.replace(config, epochs=2, checkpoint_every=9, checkpoint_steps=3)
    options = {"model": network, "data": digits, "devices": ONE, "quiet": True}
    result = train(config, tmp_path / "run", **options)
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        assert checkpoints.steps == [6, 8]
    lines = lines_of(tmp_path / "run", "epoch")
    (tmp_path / "run" / "result.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "8")
    again = train(config, tmp_path / "run", **options)
    assert (again.last, again.selected) == (result.last, result.selected)
    assert lines_of(tmp_path / "run", "epoch") == lines


class Marked(nn.Module):
    """Its outputs are not finite for an image with a pixel of 255."""

    @nn.compact
    def __call__(self, x, train: bool):
        y = nn.Dense(10)(x.reshape(len(x), -1))
        return jnp.where(jnp.max(x, axis=(1, 2, 3))[:, None] > 3.5, jnp.nan, y)


@pytest.fixture
def marked(config, digits, tmp_path):
    """Trains 3 epochs of 4 steps; one step of each epoch is not finite."""
    train_set = ArraySource(digits.train.input.copy(), digits.train.label)
    train_set.input[7, 4, 4, 0] = 255
    # Of the other pixels the largest, 240, becomes 3.4.
    data = dataclasses.replace(digits, train=train_set, mean=(70.0,), std=(50.0,))
    config = dataclasses.replace(config, epochs=3, augment=Augment())

    def run(name: str, **options):
        changed = dataclasses.replace(config, **options)
        return train(changed, tmp_path / name, model=Marked(), data=data, devices=ONE, quiet=True)

    run.run = lambda **options: prepare(
        dataclasses.replace(config, **options), model=Marked(), data=data, devices=ONE
    )
    return run


def test_updates_that_are_not_finite_can_be_skipped(marked, tmp_path, capsys):
    with pytest.raises(NonFinite, match="was not applied") as caught:
        marked("stop", checkpoint_steps=1)
    failed = int(re.findall(r"step (\d+)", str(caught.value))[0])
    with Checkpoints(tmp_path / "stop" / "checkpoints") as checkpoints:
        assert checkpoints.latest == failed - 1  # the last good state
    skip = functools.partial(marked, "few", non_finite="skip", schedule=Schedule("cosine"))
    with pytest.raises(NonFinite, match="3 updates were not finite, and non_finite_limit is 2"):
        skip(non_finite_limit=2)
    capsys.readouterr()
    result = skip(non_finite_limit=3)  # the same run, resumed
    assert result.steps == 12 and result.skipped == 3
    assert "(3 so far)" in capsys.readouterr().err
    lines = lines_of(tmp_path / "few", "epoch")
    assert lines[-1]["skipped"] == 3
    with Checkpoints(tmp_path / "few" / "checkpoints") as checkpoints:
        state, _ = checkpoints.restore(marked.run(schedule=Schedule("cosine")).shapes)
    assert optax.tree.get(state.optimizer, "count") == 9
    rates = [line["learning_rate"] for line in lines_of(tmp_path / "few", "train")]
    expected = marked.run(schedule=Schedule("cosine")).rate(8)  # it follows the updates
    assert rates[-1] == pytest.approx(float(expected))
    assert len(lines) == 3 and all(np.isfinite(line["loss"]) for line in lines)
    assert lines[-1]["loss"] < lines[0]["loss"]


class Unstable(nn.Module):
    """Its outputs in evaluation are not finite until it was called `until` times in training."""

    until: int

    @nn.compact
    def __call__(self, x, train: bool):
        calls = self.variable("batch_stats", "calls", lambda: jnp.zeros(()))
        y = nn.Dense(10)(x.reshape(len(x), -1))
        if train:
            calls.value += 1
            return y
        return jnp.where(calls.value < self.until, jnp.nan, y)


@pytest.fixture
def unstable(config, digits, tmp_path):
    """Trains 3 epochs of 4 steps."""
    config = dataclasses.replace(config, epochs=3)
    return lambda until: train(
        config, tmp_path / "run", model=Unstable(until), data=digits, devices=ONE, quiet=True
    )


def test_an_evaluation_that_is_not_finite_is_no_result(unstable, tmp_path):
    with pytest.raises(NonFinite, match=r"run has no result: .* the loss of \d+ of \d+") as caught:
        unstable(100)
    assert caught.value.exit_code == 1
    assert sorted(path.name for path in tmp_path.glob("run/*")) == [
        "checkpoints",
        "config.json",
        "identity.json",
        "metrics.jsonl",
    ]
    with pytest.raises(NonFinite, match="has no result"):  # neither if it is run again
        unstable(100)


def test_an_epoch_whose_validation_is_not_finite_is_not_selected(unstable, tmp_path, capsys):
    result = unstable(5)  # of 12 steps: the first validation fails
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("paramshare: validation in epoch 1, step 4: Unstable: the loss of ")
    assert result.selected is not None and result.selected.epoch > 1
    first, *others = lines_of(tmp_path / "run", "epoch")
    assert "validation_loss" not in first and all("validation_loss" in line for line in others)


class Odd(nn.Module):
    """Sows, draws noise, counts its calls, and has a `train` without a default."""

    # Printed with an address, which differs from process to process.
    activation: object = functools.partial(nn.gelu)

    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.Conv(4, (3, 3))(x)).mean((1, 2))
        self.sow("losses", "size", (x**2).mean())
        calls = self.variable("calls", "count", lambda: jnp.zeros((), jnp.int32))
        if train:
            x = x + 0.1 * jax.random.normal(self.make_rng("noise"), x.shape)
            calls.value += 1
        return nn.Dense(10)(x)


def test_what_share_measured_does_not_identify_a_network(config, digits, network):
    facts = prepare(config, model=network, data=digits, devices=ONE).facts
    bank = network.layout.banks[0]
    assert bank.sites[0].std

    def changed(**values):
        sites = tuple(dataclasses.replace(site, **values) for site in bank.sites)
        banks = (dataclasses.replace(bank, sites=sites),)
        layout = dataclasses.replace(network.layout, banks=banks)
        model = network.clone(layout=layout)
        return prepare(config, model=model, data=digits, devices=ONE).facts

    assert changed(std=bank.sites[0].std * (1 + 1e-6)) == facts
    assert changed(stack_axis=1) != facts


def test_networks_may_sow_draw_noise_and_keep_state(config, digits, tmp_path):
    result = train(config, tmp_path / "run", model=Odd(), data=digits, devices=ONE, quiet=True)
    assert result.steps == 8
    run = prepare(config, model=Odd(), data=digits, devices=ONE)
    again = Odd(activation=Odd().activation)
    assert "0x" in repr(Odd())
    assert run.facts == prepare(config, model=again, data=digits, devices=ONE).facts
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        state, _ = checkpoints.restore(run.shapes)
    # Counted once per step; what was sown is not kept.
    assert set(state.collections) == {"calls"} and int(state.collections["calls"]["count"]) == 8


def test_lines_report_penalty_and_gradients_of_their_steps(config, digits, make_network, tmp_path):
    """Means over the steps since the last line; of the largest gradients the maximum."""
    rules = Plan(Rule("conv[1-3]/kernel", FilterBasis(6, 2), bank="basis"))
    network = share(
        make_network(plain=True), rules, jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)
    )
    config = dataclasses.replace(
        config, penalty=Penalty(10.0), gradient_flow=True, batch_size=32, epochs=1
    )
    logged_lines = {}
    for every in (1, 4):
        workdir = tmp_path / str(every)
        logged = dataclasses.replace(config, log_every=every)
        train(logged, workdir, model=network, data=digits, devices=ONE, quiet=True)
        logged_lines[every] = lines_of(workdir, "train")
    steps, lines = logged_lines[1], logged_lines[4]
    assert [line["step"] for line in lines] == [4, 8]
    measured = ["loss", "accuracy", "gradient_max/basis", "gradient_mean/basis", "orthogonality"]
    assert list(lines[0]) == ["kind", "step", *measured, "learning_rate"]
    for line in lines:
        window = steps[line["step"] - 4 : line["step"]]
        for name in measured:
            over = max if name.startswith("gradient_max") else np.mean
            expected = over([step[name] for step in window])
            assert line[name] == pytest.approx(expected, rel=1e-12), name
    assert len({step["gradient_max/basis"] for step in steps}) == 8
