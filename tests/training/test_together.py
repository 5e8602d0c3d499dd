"""Networks of several seeds trained in one program: each is what it would have become by itself."""

import contextlib
import dataclasses
import json
import pickle
import shutil
import signal

import jax
import numpy as np
import pytest

from paramshare.training import loop
from paramshare.training.checkpoint import Checkpoints
from paramshare.training.config import ConfigError, Optimizer, Schedule
from paramshare.training.data import Augment, from_arrays
from paramshare.training.loop import Interrupted, fit, fit_together
from paramshare.training.metrics import read_metrics
from paramshare.training.run import prepare
from paramshare.training.track import Track

SEEDS = (3, 0, 8)


@pytest.fixture(scope="module")
def run_of(config, network, digits):
    """A run of a seed, with everything random that training has, and whatever else is told."""

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
    """Of the second seed: what is mistaken for the first network's would be the first one's own by chance."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    return workdir, fit(run_of(SEEDS[1]), workdir, quiet=True)


def of_kind(workdir, kind):
    return [line for line in read_metrics(workdir / "metrics.jsonl") if line["kind"] == kind]


def last_state(run, workdir):
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        return checkpoints.restore(jax.eval_shape(run.init))[0]


def timeless(result):
    return {name: value for name, value in result.items() if name not in ("seconds", "images_per_second")}


def stopped_at(step, monkeypatch, *arguments):
    """What `fit_together` raises when it is told to stop after a step."""
    with monkeypatch.context() as patch:
        patch.setattr(loop._Signals, "stop", lambda self, now: signal.SIGTERM if now == step else 0)
        with pytest.raises(Interrupted, match=f"interrupted at step {step} of 8") as stop:
            fit_together(*arguments, quiet=True)
    return stop.value


def test_a_network_learns_what_it_learns_alone(run_of, together, alone):
    places, results = (together[0][1], alone[0]), (together[1][1], alone[1])
    ours, theirs = (of_kind(place, "train") for place in places)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    # The same order of images, augmentation and initial values; sums run in another order.
    np.testing.assert_allclose([line["loss"] for line in ours], [line["loss"] for line in theirs], rtol=2e-4)
    for a, b in zip(*(jax.tree.leaves(last_state(run_of(SEEDS[1]), place).trainable) for place in places), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3)
    ours, theirs = (of_kind(place, "similarity") for place in places)
    assert [line["epoch"] for line in ours] == [line["epoch"] for line in theirs] == [0, 1, 2]
    for line, wanted in zip(ours, theirs, strict=True):
        assert line["matrices"].keys() == wanted["matrices"].keys()
        for bank, matrix in line["matrices"].items():
            np.testing.assert_allclose(matrix, wanted["matrices"][bank], atol=1e-3)
    ours, theirs = (of_kind(place, "epoch") for place in places)
    np.testing.assert_allclose(*([line["validation_loss"] for line in lines] for lines in (ours, theirs)), rtol=2e-4)
    for name in ("last", "selected"):
        ours, theirs = (result[name] for result in results)
        assert ours["epoch"] == theirs["epoch"]
        assert ours["test"]["loss"] == pytest.approx(theirs["test"]["loss"], rel=2e-4)


def test_seeds_differ(run_of, together):
    """In every line, state and result that is kept."""
    found = []
    for workdir, result, seed in zip(*together, SEEDS, strict=True):
        lines = {kind: of_kind(workdir, kind) for kind in ("train", "epoch", "similarity")}
        found += [
            [
                *(line["loss"] for line in lines["train"]),
                *(line["validation_loss"] for line in lines["epoch"]),
                *(str(line["matrices"]) for line in lines["similarity"]),
                *(result[name]["test"]["loss"] for name in ("last", "selected")),
                *(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(last_state(run_of(seed), workdir).trainable["banks"])),
            ]
        ]
    assert all(len(set(values)) == len(SEEDS) for values in zip(*found, strict=True))


def test_every_network_has_a_workdir_of_its_own(together, alone):
    for workdir, result, seed in zip(*together, SEEDS, strict=True):
        assert json.loads((workdir / "config.json").read_text())["seed"] == seed
        assert json.loads((workdir / "result.json").read_text()) == result
        assert result.keys() == alone[1].keys()
        assert result["selected"]["epoch"] in (1, 2)


def test_what_has_finished_is_not_trained_again(run_of, together, alone, tmp_path):
    workdirs, results = together
    before = [(workdir / "metrics.jsonl").stat().st_mtime_ns for workdir in workdirs]
    again = fit_together([run_of(seed) for seed in (*SEEDS, SEEDS[1])], [*workdirs, tmp_path / "new"], quiet=True)
    assert again[:3] == results
    assert before == [(workdir / "metrics.jsonl").stat().st_mtime_ns for workdir in workdirs]
    assert timeless(again[3]) == timeless(alone[1])  # the one that waits is trained by itself


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        (lambda make, images: [make(0), make(1, label_smoothing=0.1)], r"label_smoothing: 0.0 -> 0.1"),
        (lambda make, images: [make(0), make(1, data=images)], "training images of its own"),
        (lambda make, images: [make(0)], "1 runs and 2 workdirs"),
    ],
    ids=["configurations", "images", "workdirs"],
)
def test_what_cannot_be_trained_together_is_refused_before_anything_is_written(run_of, digits, runs, message, tmp_path):
    images = from_arrays(
        (digits.train.image[::-1], digits.train.label[::-1]), (digits.test.image, digits.test.label), name=digits.name, validation=0.2
    )
    with pytest.raises(ConfigError, match=message):
        fit_together(runs(run_of, images), [tmp_path / "a", tmp_path / "b"], quiet=True)
    assert not list(tmp_path.iterdir())


def test_two_networks_want_two_folders(run_of, tmp_path):
    with pytest.raises(ConfigError, match="give each run one of its own"):
        fit_together([run_of(0), run_of(1)], [tmp_path / "a", tmp_path / "a"], quiet=True)


def test_a_group_killed_between_its_checkpoints_goes_on_from_what_all_have(run_of, together, tmp_path, monkeypatch):
    runs, workdirs = [run_of(seed) for seed in SEEDS], [tmp_path / f"seed{seed}" for seed in SEEDS]
    stop = stopped_at(6, monkeypatch, runs, workdirs)
    copy = pickle.loads(pickle.dumps(stop))
    assert (str(copy), copy.signum) == (str(stop), signal.SIGTERM)
    shutil.rmtree(workdirs[1] / "checkpoints" / "6")  # as if the kill had come before it was written; 4, of the first epoch, is left
    # Once more, at an earlier step than the newest: it is saved nevertheless.
    stopped_at(5, monkeypatch, runs, workdirs)
    assert [sorted(place.name for place in (workdir / "checkpoints").glob("[0-9]*")) for workdir in workdirs] == [["4", "5"]] * len(SEEDS)
    found = fit_together(runs, workdirs, quiet=True)
    assert list(map(timeless, found)) == list(map(timeless, together[1]))
    for run, workdir, whole in zip(runs, workdirs, together[0], strict=True):
        ours, theirs = (last_state(run, place) for place in (workdir, whole))
        for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), jax.tree_util.keystr(path)
        for kind in ("train", "epoch", "similarity"):  # no line twice
            assert of_kind(workdir, kind) == of_kind(whole, kind)


def test_notes_of_earlier_versions_are_read(run_of, alone, tmp_path):
    """Once there was no score but the accuracy."""
    workdir = tmp_path / "run"
    shutil.copytree(alone[0], workdir)
    (notes,) = (workdir / "checkpoints" / "8").glob("notes/metadata")
    text = notes.read_text()
    assert text.count('"score"') == text.count('"best_score"') == 1
    notes.write_text(text.replace('"score"', '"accuracy"').replace('"best_score"', '"best_accuracy"'))
    with contextlib.ExitStack() as stack:
        track = Track(run_of(SEEDS[1]), workdir, stack)
        track.start()
    assert dataclasses.asdict(track.progress) == json.loads(text) and track.progress.best_score > 0


def test_runs_at_different_steps_are_refused(run_of, together, tmp_path):
    state = Checkpoints(together[0][1] / "checkpoints")
    with state as checkpoints:
        found, notes = checkpoints.restore(jax.eval_shape(run_of(SEEDS[1]).init))
    workdirs = [tmp_path / "a", tmp_path / "b"]
    with Checkpoints(workdirs[0] / "checkpoints") as checkpoints:
        checkpoints.save(int(found.step), found, notes, wait=True)
    for name in ("config.json", "identity.json"):
        (workdirs[0] / name).write_text((together[0][1] / name).read_text())
    with pytest.raises(ConfigError, match=r"stand at different steps, none kept by all .*a at \d+, .*b at 0"):
        fit_together([run_of(SEEDS[1]), run_of(7)], workdirs, quiet=True)
