"""Training keeps how similar the layers are, epoch by epoch; resuming keeps those lines as it keeps the others."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from paramshare import similarity
from paramshare.training.checkpoint import Checkpoints
from paramshare.training.config import ConfigError
from paramshare.training.loop import train
from paramshare.training.metrics import MetricsFile, read_metrics
from paramshare.training.report import images_of, read_run, snapshot_of, variables_of, write_report
from paramshare.training.run import prepare
from paramshare.training.workdir import claim

ONE = jax.devices()[:1]


@pytest.fixture(scope="module")
def three(config):
    return dataclasses.replace(config, epochs=3, log_every=100)


@pytest.fixture(scope="module")
def whole(three, digits, network, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("similarity") / "run"
    train(three, workdir, model=network, data=digits, devices=ONE, quiet=True)
    return workdir


def kept(workdir) -> list[dict]:
    return [line for line in read_metrics(workdir / "metrics.jsonl") if line["kind"] == "similarity"]


def test_a_line_an_epoch_and_one_before_the_first_step(whole, three, digits, network):
    lines, run = kept(whole), prepare(three, model=network, data=digits, devices=ONE)
    assert [(line["epoch"], line["step"]) for line in lines] == [(i, i * run.steps_per_epoch) for i in range(4)]
    first = jax.jit(run.init)().variables
    last, step = variables_of(whole, three, network, digits.image_shape)
    assert step == run.steps
    for line, variables in ((lines[0], first), (lines[-1], last)):
        wanted = similarity(network, variables)
        assert list(line["matrices"]) == list(wanted)
        for name, matrix in wanted.items():
            # Four decimals; of rows that one compiled program and another may round differently.
            np.testing.assert_allclose(line["matrices"][name], matrix, atol=5.1e-5)
    assert lines[0]["matrices"] != lines[-1]["matrices"]


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


@pytest.mark.parametrize("at", [1, 2])
def test_a_killed_run_has_each_line_once(three, digits, network, whole, tmp_path, monkeypatch, at):
    """Killed before its first checkpoint, or with a line on disk that is newer than the newest checkpoint."""
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
    assert [line["epoch"] for line in kept(tmp_path / "run")] == list(range(at + 1))
    train(three, tmp_path / "run", model=network, data=digits, devices=ONE, quiet=True)
    assert kept(tmp_path / "run") == kept(whole)


@pytest.mark.parametrize(("every", "epochs"), [(2, [0, 2, 3]), (0, [])])
def test_fewer_of_them_or_none(three, digits, network, tmp_path, every, epochs):
    config = dataclasses.replace(three, similarity_every=every)
    train(config, tmp_path / "run", model=network, data=digits, devices=ONE, quiet=True)
    assert [line["epoch"] for line in kept(tmp_path / "run")] == epochs
    train(three, tmp_path / "run", model=network, data=digits, devices=ONE)  # the same run, however often it is looked at


def test_a_wrong_spacing_is_refused(three):
    with pytest.raises(ConfigError, match="similarity_every is -1; it must be 1 or more, or 0 for none"):
        dataclasses.replace(three, similarity_every=-1).check()


def test_a_plain_network_that_has_just_begun(three, digits, make_network, tmp_path):
    plain = make_network(plain=True)
    claim(tmp_path / "run", prepare(three, model=plain, data=digits, devices=ONE))
    record = read_run(tmp_path / "run", model=plain)
    assert record.layout is None and record.cost and record.result is None and not record.foldings and not record.snapshots
    assert record.notes == ("metrics.jsonl is missing, or holds no whole line.",)


def test_tensorboard_takes_the_lines(tmp_path):
    metrics = MetricsFile(tmp_path, 0, tensorboard=True)
    metrics.write("similarity", 0, epoch=0, matrices={"b": [[1.0]]})
    metrics.close()
    assert [line["matrices"] for line in kept(tmp_path)] == [{"b": [[1.0]]}]


def test_the_report_of_a_network_of_ones_own(whole, network):
    record = read_run(whole, model=network)
    assert not record.notes and record.layout == network.layout and len(record.snapshots) == 4 and len(record.foldings) == 4
    assert record.now and images_of(whole) == ((8, 8, 1), 10)
    np.testing.assert_allclose(list(record.now.matrices.values()), list(record.snapshots[-1].matrices.values()))
    unknown = read_run(whole)
    assert "cannot be built by its name" in unknown.notes[0] and "Small" in unknown.notes[0]
    assert unknown.layout is None and len(unknown.snapshots) == 4
    assert unknown.result
    page = write_report(unknown, whole).read_text()
    assert f"{unknown.result['last']['test']['accuracy']:.2%}" in page and "could not be built" in page


def test_a_state_knows_its_epoch(whole, three, network, digits):
    variables, step = variables_of(whole, three, network, digits.image_shape, "best")
    chosen = json.loads((whole / "result.json").read_text())["selected"]["epoch"]
    found = snapshot_of(network, variables, step, read_metrics(whole / "metrics.jsonl"))
    assert found and found.epoch == chosen
