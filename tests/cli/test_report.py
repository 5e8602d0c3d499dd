"""`paramshare similarity` and `report`, on runs that are finished, unfinished and damaged."""

import json
import pathlib
import shutil

import numpy as np
import pytest

from paramshare import similarity
from paramshare.data import Digits
from paramshare.training.config import Config, Model
from paramshare.training.derive import load_run
from paramshare.training.result import Result
from paramshare.training.run import prepare
from paramshare.training.workdir import claim

PICTURES = ("similarity.png", "similarity_over_training.png")


@pytest.fixture(scope="session")
def trained(small_run) -> pathlib.Path:
    """The run that trains fastest: what is tested here does not depend on the network."""
    return small_run


@pytest.fixture(scope="session")
def loaded(trained):
    """The run of `trained`, its variables and their step."""
    return load_run(trained)


def test_report_writes_the_same_page_again(command, trained, workdir):
    (workdir / "report.html").unlink()
    assert command("report", workdir) == f"report         {workdir / 'report.html'}\n"
    assert (workdir / "report.html").read_bytes() == (trained / "report.html").read_bytes()


def test_similarity_prints_and_draws_every_bank(command, loaded, workdir):
    for name in PICTURES:
        (workdir / name).unlink()
    printed = command("similarity", workdir)
    assert "spathnet-4-4-2 on grids, last state, step 4" in printed
    for bank, matrix in similarity(loaded[0].model, loaded[1]).items():
        row = "  ".join(f"{float(entry):.2f}" for entry in matrix[0])
        assert f"\n{bank}\n             0     1     2     3\n0 layer1  {row}\n" in printed
    assert printed.count("similar pairs  of 6: ") == 1
    for name in PICTURES:
        assert f"picture        {workdir / name}" in printed
        assert (workdir / name).read_bytes()[:4] == b"\x89PNG"


def test_similarity_as_json(command, workdir):
    options = ("--checkpoint", "best", "--threshold", "1e-9", "1", "--json")
    printed = json.loads(command("similarity", workdir, *options))
    result = Result.read(workdir / "result.json")
    assert result.selected is not None
    epoch = result.selected.epoch
    assert (printed["model"], printed["checkpoint"]) == ("spathnet-4-4-2", "best")
    assert (printed["epoch"], printed["step"]) == (epoch, 2 * epoch)
    for bank in printed["banks"].values():
        assert bank["layers"] == [f"layer{i}" for i in range(1, 5)] and bank["pairs"] == 6
        assert bank["near"]["1e-09"] == 6
        np.testing.assert_allclose(np.diag(bank["similarity"]), 1, atol=1e-4)


@pytest.mark.parametrize("name", ["similarity", "report"])
def test_a_folder_that_holds_no_run(refused, tmp_path, name):
    assert "holds no run (no config.json)" in refused(name, tmp_path)
    assert not list(tmp_path.iterdir())


def test_thresholds_out_of_range(refused, trained):
    assert "threshold" in refused("similarity", trained, "--threshold", "1.5")
    assert "invalid float value" in refused("similarity", trained, "--threshold", "much")


def test_a_plain_network_has_no_banks(command, refused, tmp_path):
    data = Digits(train_examples=64)
    config = Config(model=Model("wrn-16-1"), data=data, epochs=2, batch_size=32)
    claim(tmp_path / "run", prepare(config))
    assert "`paramshare convert`" in refused("similarity", tmp_path / "run")
    command("report", tmp_path / "run")
    page = (tmp_path / "run" / "report.html").read_text()
    assert "has not finished: 0 of 2 epochs" in page


def test_an_unfinished_run_is_reported_as_far_as_it_is(command, refused, workdir):
    (workdir / "result.json").unlink()
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    finished = [line for line in lines if '"epoch": 2' not in line]
    (workdir / "metrics.jsonl").write_text("\n".join(finished) + '\n{"kind": "epo')
    command("report", workdir)
    assert "has not finished: 1 of 2 epochs" in (workdir / "report.html").read_text()
    shutil.rmtree(workdir / "checkpoints")
    command("report", workdir)
    assert "no checkpoint in" in (workdir / "report.html").read_text()
    assert "no checkpoint in" in refused("similarity", workdir)


def test_lost_metrics(command, workdir):
    (workdir / "metrics.jsonl").unlink()
    command("report", workdir)
    page = (workdir / "report.html").read_text()
    assert "spathnet-4-4-2 on grids" in page and "layer4" in page
    assert "over_training" not in command("similarity", workdir)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("result.json", "{", "result.json cannot be read"),
        ("result.json", '{"last": 3}', "result.json is damaged"),
        ("config.json", "[]", "config.json"),
    ],
)
def test_damage_is_named(refused, workdir, name, text, message):
    (workdir / name).write_text(text)
    assert message in refused("report", workdir)


def test_lost_facts_are_noted(command, refused, workdir):
    (workdir / "identity.json").write_text('{"data": "some"}')
    command("report", workdir)
    assert "identity.json is damaged" in (workdir / "report.html").read_text()
    assert "identity.json is damaged" in refused("similarity", workdir)


def test_files_that_cannot_be_written(refused, workdir):
    for name, command in (("report.html", "report"), ("similarity.png", "similarity")):
        (workdir / name).unlink()
        (workdir / name).mkdir()
        assert f"{name} cannot be written" in refused(command, workdir)


def test_a_run_without_validation_has_no_best_epoch(refused, workdir):
    shutil.rmtree(workdir / "best")
    error = refused("similarity", workdir, "--checkpoint", "best")
    assert "no epoch by validation; use --checkpoint last" in error
