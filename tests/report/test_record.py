"""A workdir is read typed, whatever state the run is in."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from paramshare.measure.snapshots import THRESHOLDS
from paramshare.report.page import html_report
from paramshare.report.record import read_run, snapshot_of
from paramshare.training.checkpoint import CheckpointError, Checkpoints
from paramshare.training.config import Config, ConfigError, Model, to_json
from paramshare.training.optimizer import learning_rate, optimizer
from paramshare.training.state import State
from paramshare.training.workdir import CONFIG, FACTS, RESULT

SETTINGS = Config(model=Model("Small"), epochs=3)
LINES = [
    {"kind": "similarity", "step": 0, "epoch": 0, "matrices": {"stage1": np.eye(3).tolist()}},
    {"kind": "epoch", "step": 4, "epoch": 1, "loss": 1.0, "hits": 0.5},
    {"kind": "epoch", "step": 8, "epoch": 2, "loss": 0.9, "hits": 0.6},
]


@pytest.fixture
def begun(facts, tmp_path) -> pathlib.Path:
    """A run before its first checkpoint."""
    (tmp_path / CONFIG).write_text(to_json(SETTINGS))
    facts.write(tmp_path / FACTS)
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return tmp_path


@pytest.fixture
def trained(begun, variables) -> pathlib.Path:
    """A run after its second epoch."""
    rule = optimizer(SETTINGS, learning_rate(SETTINGS, 1))
    trainable = {name: variables[name] for name in ("banks", "params")}
    state = State(jnp.int32(8), trainable, {}, rule.init(trainable), jnp.bool_(False))
    with Checkpoints(begun / "checkpoints") as checkpoints:
        checkpoints.save(8, state, {}, wait=True)
    return begun


def test_a_finished_run(trained, shared, result, score, facts):
    result.write(trained / RESULT)
    record = read_run(trained, shared)
    assert not record.notes and record.title == "Small on digits" and record.score == score
    assert record.result == result and record.facts == facts and record.config == SETTINGS
    assert record.layout == shared.layout and record.cost and record.cost.plain == 207
    assert [folded.threshold for folded in record.foldings] == list(THRESHOLDS)
    assert len(record.snapshots) == 1 and [line["epoch"] for line in record.epochs] == [1, 2]
    assert record.now and (record.now.epoch, record.now.step) == (2, 8)
    np.testing.assert_allclose(record.now.matrices["stage2"], np.ones((3, 3)))


def test_an_unfinished_run(begun, shared):
    record = read_run(begun, shared)
    assert record.result is None and record.score and record.score.title == "hit rate"
    assert record.layout and record.cost and not record.foldings and record.now is None
    assert "no checkpoint" in record.notes[0]
    assert "has not finished: 2 of 3 epochs" in html_report(record)
    (begun / "metrics.jsonl").unlink()
    assert "metrics.jsonl is missing" in read_run(begun, shared).notes[0]


def test_a_network_without_sharing(begun, shared):
    record = read_run(begun, shared.model)
    assert record.cost and record.layout is None and not record.notes and not record.foldings


def test_a_network_that_has_no_name(begun):
    record = read_run(begun)
    assert "Small" in record.notes[0] and "pass it to read_run" in record.notes[0]
    assert record.score and record.cost is None and len(record.snapshots) == 1
    assert "could not be built" in html_report(record)


def test_lost_facts_are_noted(begun, shared, result):
    (begun / FACTS).write_text('{"data": "some"}')
    record = read_run(begun, shared)
    assert "identity.json" in record.notes[0] and record.score is None and record.cost is None
    result.write(begun / RESULT)
    assert read_run(begun, shared).score == result.score


@pytest.mark.parametrize(
    "damage",
    ["{", "[]", {"score": "accuracy"}, {"images_per_second": "many"}, {"last": {"loss": 1.0}}],
)
def test_a_damaged_result(begun, shared, result, damage):
    if isinstance(damage, dict):
        damage = json.dumps(result.as_json() | damage)
    (begun / RESULT).write_text(damage)
    with pytest.raises(CheckpointError, match=r"result\.json"):
        read_run(begun, shared)


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(ConfigError, match=r"no config\.json"):
        read_run(tmp_path)


@pytest.mark.parametrize(("step", "epoch"), [(0, 0), (4, 1), (7, 1), (8, 2)])
def test_the_epoch_of_a_state(shared, variables, step, epoch):
    snapshot = snapshot_of(shared, variables, step, LINES)
    assert snapshot and (snapshot.step, snapshot.epoch) == (step, epoch)
