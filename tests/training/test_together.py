"""Networks of several seeds trained in one program: each is what it would have become by itself."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from paramshare.training.checkpoint import Checkpoints
from paramshare.training.config import ConfigError, Optimizer, Schedule
from paramshare.training.data import Augment, from_arrays
from paramshare.training.loop import fit, fit_together
from paramshare.training.metrics import read_metrics
from paramshare.training.run import prepare

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
    workdir = tmp_path_factory.mktemp("alone") / "run"
    return workdir, fit(run_of(SEEDS[0]), workdir, quiet=True)


def of_kind(workdir, kind):
    return [line for line in read_metrics(workdir / "metrics.jsonl") if line["kind"] == kind]


def parameters(run, workdir):
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        return checkpoints.restore(jax.eval_shape(run.init))[0].trainable


def test_a_network_learns_what_it_learns_alone(run_of, together, alone):
    ours, theirs = (of_kind(workdir, "train") for workdir in (together[0][0], alone[0]))
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    # The same order of images, augmentation and initial values; sums run in another order.
    np.testing.assert_allclose([line["loss"] for line in ours], [line["loss"] for line in theirs], rtol=2e-4)
    for a, b in zip(*(jax.tree.leaves(parameters(run_of(SEEDS[0]), place)) for place in (together[0][0], alone[0])), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3)
    ours, theirs = (of_kind(workdir, "similarity") for workdir in (together[0][0], alone[0]))
    assert [line["epoch"] for line in ours] == [line["epoch"] for line in theirs]


def test_seeds_differ(together):
    losses = [tuple(line["loss"] for line in of_kind(workdir, "train")) for workdir in together[0]]
    assert len(set(losses)) == len(SEEDS)


def test_every_network_has_a_workdir_of_its_own(together, alone):
    for workdir, result, seed in zip(*together, SEEDS, strict=True):
        assert json.loads((workdir / "config.json").read_text())["seed"] == seed
        assert json.loads((workdir / "result.json").read_text()) == result
        assert result.keys() == alone[1].keys()
        assert result["selected"]["epoch"] in (1, 2)


def test_what_has_finished_is_not_trained_again(run_of, together, tmp_path):
    workdirs, results = together
    before = [(workdir / "metrics.jsonl").stat().st_mtime_ns for workdir in workdirs]
    again = fit_together([run_of(seed) for seed in (*SEEDS, 5)], [*workdirs, tmp_path / "seed5"], quiet=True)
    assert again[:3] == results
    assert before == [(workdir / "metrics.jsonl").stat().st_mtime_ns for workdir in workdirs]
    assert again[3]["last"] != results[0]["last"]


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


def test_runs_at_different_steps_are_refused(run_of, together, tmp_path):
    state = Checkpoints(together[0][1] / "checkpoints")
    with state as checkpoints:
        found, notes = checkpoints.restore(jax.eval_shape(run_of(SEEDS[1]).init))
    workdirs = [tmp_path / "a", tmp_path / "b"]
    with Checkpoints(workdirs[0] / "checkpoints") as checkpoints:
        checkpoints.save(int(found.step), found, notes, wait=True)
    for name in ("config.json", "identity.json"):
        (workdirs[0] / name).write_text((together[0][1] / name).read_text())
    with pytest.raises(ConfigError, match=r"stand at different steps .*a at \d+, .*b at 0"):
        fit_together([run_of(SEEDS[1]), run_of(7)], workdirs, quiet=True)
