"""Runs of several seeds trained in one program: each gives what it gives alone."""

import dataclasses
import json
import pickle
import shutil
import signal

import jax
import numpy as np
import pytest

from paramshare.data import from_arrays
from paramshare.tasks import Augment
from paramshare.training import loop
from paramshare.training.checkpoint import Checkpoints
from paramshare.training.config import ConfigError, Optimizer, Schedule
from paramshare.training.loop import fit, fit_together
from paramshare.training.metrics import read_metrics
from paramshare.training.result import Result
from paramshare.training.run import prepare
from paramshare.training.signals import Interrupted

SEEDS = (3, 0, 8)


@pytest.fixture(scope="module")
def run_of(config, network, digits):
    """A function of a seed: a run with augmentation, and with other fields changed on request."""

    def run(seed, data=digits, **changes):
        base = dataclasses.replace(
            config,
            seed=seed,
            epochs=2,
            batch_size=64,
            augment=Augment(pad_crop=1, cutout=2),
            optimizer=Optimizer(learning_rate=0.02),
            schedule=Schedule("cosine"),
            log_every=1,
        )
        return prepare(dataclasses.replace(base, **changes), model=network, data=data)

    return run


@pytest.fixture(scope="module")
def together(run_of, tmp_path_factory):
    folder = tmp_path_factory.mktemp("together")
    workdirs = [folder / f"seed{seed}" for seed in SEEDS]
    return workdirs, fit_together([run_of(seed) for seed in SEEDS], workdirs, quiet=True)


@pytest.fixture(scope="module")
def alone(run_of, tmp_path_factory):
    """The second seed alone: mistaking it for the first one must not go unnoticed."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    return workdir, fit(run_of(SEEDS[1]), workdir, quiet=True)


def of_kind(workdir, kind):
    return [line for line in read_metrics(workdir / "metrics.jsonl") if line["kind"] == kind]


def last_state(run, workdir):
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        return checkpoints.restore(run.shapes)[0]


def timeless(result):
    return dataclasses.replace(result, seconds=0.0, images_per_second=None)


def stopped_at(step, monkeypatch, *arguments):
    """What `fit_together` raises when it is stopped after a step."""
    with monkeypatch.context() as patch:
        patch.setattr(loop.Signals, "stop", lambda self, now: signal.SIGTERM if now == step else 0)
        with pytest.raises(Interrupted, match=f"interrupted at step {step} of 8") as stop:
            fit_together(*arguments, quiet=True)
    return stop.value


def test_a_network_learns_what_it_learns_alone(run_of, together, alone):
    places, results = (together[0][1], alone[0]), (together[1][1], alone[1])
    ours, theirs = (of_kind(place, "train") for place in places)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    # The same order of images, augmentation and initial values; sums run in another order.
    np.testing.assert_allclose(
        [line["loss"] for line in ours], [line["loss"] for line in theirs], rtol=2e-4
    )
    for a, b in zip(
        *(jax.tree.leaves(last_state(run_of(SEEDS[1]), place).trainable) for place in places),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, atol=1e-3)
    ours, theirs = (of_kind(place, "similarity") for place in places)
    assert [line["epoch"] for line in ours] == [line["epoch"] for line in theirs] == [0, 1, 2]
    for line, expected in zip(ours, theirs, strict=True):
        assert line["matrices"].keys() == expected["matrices"].keys()
        for bank, matrix in line["matrices"].items():
            np.testing.assert_allclose(matrix, expected["matrices"][bank], atol=1e-3)
    ours, theirs = (of_kind(place, "epoch") for place in places)
    np.testing.assert_allclose(
        *([line["validation_loss"] for line in lines] for lines in (ours, theirs)), rtol=2e-4
    )
    ours, theirs = results
    assert ours.selected.epoch == theirs.selected.epoch
    assert ours.selected.test.loss == pytest.approx(theirs.selected.test.loss, rel=2e-4)
    assert ours.last.loss == pytest.approx(theirs.last.loss, rel=2e-4)


def test_seeds_differ(run_of, together):
    """In every line, state and result."""
    per_seed = []
    for workdir, result, seed in zip(*together, SEEDS, strict=True):
        lines = {kind: of_kind(workdir, kind) for kind in ("train", "epoch", "similarity")}
        per_seed += [
            [
                *(line["loss"] for line in lines["train"]),
                *(line["validation_loss"] for line in lines["epoch"]),
                *(str(line["matrices"]) for line in lines["similarity"]),
                result.last.loss,
                result.selected.test.loss,
                *(
                    np.asarray(leaf).tobytes()
                    for leaf in jax.tree.leaves(
                        last_state(run_of(seed), workdir).trainable["banks"]
                    )
                ),
            ]
        ]
    assert all(len(set(values)) == len(SEEDS) for values in zip(*per_seed, strict=True))


def test_every_run_has_its_workdir(together):
    for workdir, result, seed in zip(*together, SEEDS, strict=True):
        assert json.loads((workdir / "config.json").read_text())["seed"] == seed
        assert Result.read(workdir / "result.json") == result
        assert result.selected.epoch in (1, 2)


def test_finished_runs_are_not_trained_again(run_of, together, alone, tmp_path):
    workdirs, results = together
    before = [(workdir / "metrics.jsonl").stat().st_mtime_ns for workdir in workdirs]
    again = fit_together(
        [run_of(seed) for seed in (*SEEDS, SEEDS[1])], [*workdirs, tmp_path / "new"], quiet=True
    )
    assert again[:3] == results
    assert before == [(workdir / "metrics.jsonl").stat().st_mtime_ns for workdir in workdirs]
    assert timeless(again[3]) == timeless(alone[1])  # the remaining one is trained alone


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        (
            lambda make, images: [make(0), make(1, label_smoothing=0.1)],
            r"label_smoothing: 0.0 -> 0.1",
        ),
        (lambda make, images: [make(0), make(1, data=images)], "depends on the seed"),
        (lambda make, images: [make(0)], "1 runs need 1 different workdirs"),
    ],
    ids=["configurations", "data", "workdirs"],
)
def test_runs_that_differ_are_refused_before_anything_is_written(
    run_of, digits, runs, message, tmp_path
):
    images = from_arrays(
        (digits.train.input[::-1], digits.train.label[::-1]),
        (digits.test.input, digits.test.label),
        name=digits.name,
        validation=0.2,
    )
    with pytest.raises(ConfigError, match=message):
        fit_together(runs(run_of, images), [tmp_path / "a", tmp_path / "b"], quiet=True)
    assert not list(tmp_path.iterdir())


def test_two_runs_need_two_workdirs(run_of, tmp_path):
    with pytest.raises(ConfigError, match="2 runs need 2 different workdirs"):
        fit_together([run_of(0), run_of(1)], [tmp_path / "a", tmp_path / "a"], quiet=True)


def test_a_group_killed_between_its_checkpoints_resumes_from_a_common_step(
    run_of, together, tmp_path, monkeypatch
):
    runs, workdirs = [run_of(seed) for seed in SEEDS], [tmp_path / f"seed{seed}" for seed in SEEDS]
    stop = stopped_at(6, monkeypatch, runs, workdirs)
    copy = pickle.loads(pickle.dumps(stop))
    assert (str(copy), copy.signum) == (str(stop), signal.SIGTERM)
    assert copy.exit_code == stop.exit_code == 143
    # As if the kill had come before it was written; step 4, of the first epoch, remains.
    shutil.rmtree(workdirs[1] / "checkpoints" / "6")
    # Stopped again, at an earlier step than the newest: it is saved nevertheless.
    stopped_at(5, monkeypatch, runs, workdirs)
    assert [
        sorted(place.name for place in (workdir / "checkpoints").glob("[0-9]*"))
        for workdir in workdirs
    ] == [["4", "5"]] * len(SEEDS)
    results = fit_together(runs, workdirs, quiet=True)
    assert list(map(timeless, results)) == list(map(timeless, together[1]))
    for run, workdir, whole in zip(runs, workdirs, together[0], strict=True):
        ours, theirs = (last_state(run, place) for place in (workdir, whole))
        for (path, a), b in zip(
            jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True
        ):
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), jax.tree_util.keystr(path)
        for kind in ("train", "epoch", "similarity"):  # no line twice
            assert of_kind(workdir, kind) == of_kind(whole, kind)


def test_runs_at_different_steps_are_refused(run_of, together, tmp_path):
    stored = Checkpoints(together[0][1] / "checkpoints")
    with stored as checkpoints:
        state, notes = checkpoints.restore(jax.eval_shape(run_of(SEEDS[1]).init))
    workdirs = [tmp_path / "a", tmp_path / "b"]
    with Checkpoints(workdirs[0] / "checkpoints") as checkpoints:
        checkpoints.save(int(state.step), state, notes, wait=True)
    for name in ("config.json", "identity.json"):
        (workdirs[0] / name).write_text((together[0][1] / name).read_text())
    with pytest.raises(ConfigError, match=r"saved in every workdir \(.*a at \d+, .*b at 0"):
        fit_together([run_of(SEEDS[1]), run_of(7)], workdirs, quiet=True)
