"""Training records the similarity of the layers every epoch; resuming keeps those lines."""

import dataclasses

import jax
import numpy as np
import pytest

from paramshare import similarity
from paramshare.report.page import write_report
from paramshare.report.record import read_run
from paramshare.training.checkpoint import Checkpoints
from paramshare.training.loop import train
from paramshare.training.metrics import MetricsFile, read_metrics
from paramshare.training.run import prepare
from paramshare.training.workdir import stored_variables

ONE = jax.devices()[:1]


@pytest.fixture(scope="module")
def three(config):
    return dataclasses.replace(config, epochs=3, log_every=100)


@pytest.fixture(scope="module")
def whole(three, digits, network, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("similarity") / "run"
    train(three, workdir, model=network, data=digits, devices=ONE, quiet=True)
    return workdir


def snapshot_lines(workdir) -> list[dict]:
    return [
        line for line in read_metrics(workdir / "metrics.jsonl") if line["kind"] == "similarity"
    ]


def test_a_line_an_epoch_and_one_before_the_first_step(whole, three, digits, network):
    lines, run = snapshot_lines(whole), prepare(three, model=network, data=digits, devices=ONE)
    assert [(line["epoch"], line["step"]) for line in lines] == [
        (i, i * run.steps_per_epoch) for i in range(4)
    ]
    first = run.init().variables
    last, step = stored_variables(whole, run.shapes)
    assert step == run.steps
    for line, variables in ((lines[0], first), (lines[-1], last)):
        expected = similarity(network, variables)
        assert list(line["matrices"]) == list(expected)
        for name, matrix in expected.items():
            # Four decimals, of rows that two compiled programs may round differently.
            np.testing.assert_allclose(line["matrices"][name], matrix, atol=5.1e-5)
    assert lines[0]["matrices"] != lines[-1]["matrices"]


class Killed(BaseException):
    """Simulates a kill: nothing catches it."""


@pytest.mark.parametrize("at", [1, 2])
def test_a_killed_run_has_each_line_once(three, digits, network, whole, tmp_path, monkeypatch, at):
    """Killed before its first checkpoint, or with a line newer than the newest checkpoint."""
    save, saved = Checkpoints.save, []

    def dying(self, step, tree, notes, **options):
        if self.folder.name == "checkpoints":
            saved.append(step)
            if len(saved) == at:
                raise Killed
        save(self, step, tree, notes, **options)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Checkpoints, "save", dying)
        train(three, tmp_path / "run", model=network, data=digits, devices=ONE, quiet=True)
    assert [line["epoch"] for line in snapshot_lines(tmp_path / "run")] == list(range(at + 1))
    train(three, tmp_path / "run", model=network, data=digits, devices=ONE, quiet=True)
    assert snapshot_lines(tmp_path / "run") == snapshot_lines(whole)


@pytest.mark.parametrize(("every", "epochs"), [(2, [0, 2, 3]), (0, [])])
def test_fewer_of_them_or_none(three, digits, network, tmp_path, every, epochs):
    config = dataclasses.replace(three, similarity_every=every)
    train(config, tmp_path / "run", model=network, data=digits, devices=ONE, quiet=True)
    assert [line["epoch"] for line in snapshot_lines(tmp_path / "run")] == epochs
    # The same run, however often similarity is recorded.
    train(three, tmp_path / "run", model=network, data=digits, devices=ONE)


def test_tensorboard_takes_the_lines(tmp_path):
    metrics = MetricsFile(tmp_path, 0, tensorboard=True)
    metrics.write("similarity", 0, epoch=0, matrices={"b": [[1.0]]})
    metrics.close()
    assert [line["matrices"] for line in snapshot_lines(tmp_path)] == [{"b": [[1.0]]}]


def test_the_record_of_a_network_that_was_passed_in(whole, network):
    record = read_run(whole, model=network)
    assert not record.notes and record.layout == network.layout
    assert len(record.snapshots) == 4 and record.now is not None
    np.testing.assert_allclose(
        list(record.now.matrices.values()), list(record.snapshots[-1].matrices.values())
    )
    unknown = read_run(whole)
    assert "Small" in unknown.notes[0] and unknown.layout is None and unknown.result
    page = write_report(unknown, whole).read_text()
    assert unknown.result.score.format(unknown.result.last_score) in page
