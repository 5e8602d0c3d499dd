"""`paramshare similarity` and `paramshare report`: what they print and leave, on runs finished, unfinished and damaged."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from paramshare.cli import main
from paramshare.training.config import Config, Data, Model
from paramshare.training.run import prepare
from paramshare.training.workdir import claim

CONFIG = """
from paramshare.training.config import Config, Data, Model

config = Config(model=Model("swrn-16-1-1"), data=Data("digits", train_examples=64), epochs=2, batch_size=32)
"""
PICTURES = ("similarity.png", "similarity_over_training.png")


@pytest.fixture(autouse=True, scope="module")
def _lenient_promotion():
    # optax's schedules multiply integer steps with floats.
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[pathlib.Path, dict[str, bytes]]:
    folder = tmp_path_factory.mktemp("cli-report")
    (folder / "config.py").write_text(CONFIG)
    assert main(["train", str(folder / "config.py"), "--workdir", str(folder / "run")]) == 0
    return folder / "run", {path.name: path.read_bytes() for path in (folder / "run").iterdir() if path.is_file()}


@pytest.fixture
def run(trained, tmp_path) -> pathlib.Path:
    """A copy, to be damaged."""
    return pathlib.Path(shutil.copytree(trained[0], tmp_path / "run"))


def told(capsys, *arguments: str) -> str:
    assert main(arguments) == 0
    return capsys.readouterr().out


def refused(capsys, *arguments: str) -> str:
    """The one line that a refused command prints."""
    try:
        code = main(arguments)
    except SystemExit as stop:  # argparse's own way out
        code = stop.code
    said = capsys.readouterr()
    assert code == 2, said
    assert said.err.count("\n") == 1 and said.err.startswith("paramshare: ") and "Traceback" not in said.err and not said.out
    return said.err


def test_training_leaves_a_report_and_both_pictures(trained):
    _, left = trained
    for name in PICTURES:
        assert left[name][:4] == b"\x89PNG"
    page, result = left["report.html"].decode(), json.loads(left["result.json"])
    assert f"{result['last']['test']['accuracy']:.2%}" in page and f"{result['counts']['trainable']:,}" in page
    assert all(f"stage{i}" in page for i in (1, 2, 3)) and 'id="snapshots"' in page and "has not finished" not in page


def test_report_makes_the_same_page_again(capsys, trained, run):
    (run / "report.html").unlink()
    assert told(capsys, "report", str(run)) == f"report         {run / 'report.html'}\n"
    assert (run / "report.html").read_bytes() == trained[1]["report.html"]


def test_similarity_prints_every_bank_and_draws(capsys, run):
    for name in PICTURES:
        (run / name).unlink()
    said = told(capsys, "similarity", str(run))
    # One template a stage: every two layers use the same kernel up to a scale.
    assert said.count("pairs near 1   of 1: 1 at 0.8, 1 at 0.9, 1 at 0.95, 1 at 0.99") == 3
    for bank in ("stage1", "stage2", "stage3"):
        assert f"\n{bank}\n            0     1\n0 conv1  1.00  1.00\n1 conv2  1.00  1.00\n" in said
    for name in PICTURES:
        assert f"picture        {run / name}" in said and (run / name).read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("checkpoint", ["last", "best"])
def test_similarity_as_json(capsys, run, checkpoint):
    said = json.loads(told(capsys, "similarity", str(run), "--checkpoint", checkpoint, "--threshold", "0.5", "1", "--json"))
    result = json.loads((run / "result.json").read_text())
    epoch = 2 if checkpoint == "last" else result["selected"]["epoch"]
    assert (said["model"], said["checkpoint"], said["epoch"], said["step"]) == ("swrn-16-1-1", checkpoint, epoch, 2 * epoch)
    for bank in said["banks"].values():
        assert bank["layers"] == ["conv1", "conv2"] and bank["pairs"] == 1 and bank["near"] == {"0.5": 1, "1": 1}
        np.testing.assert_allclose(bank["similarity"], np.ones((2, 2)), atol=1e-4)  # four decimals are kept


@pytest.mark.parametrize("command", ["similarity", "report"])
def test_a_folder_that_is_no_run(capsys, tmp_path, command):
    assert "holds no run (no config.json)" in refused(capsys, command, str(tmp_path))
    assert not list(tmp_path.iterdir())
    assert "holds no run" in refused(capsys, command, str(tmp_path / "none"))


@pytest.mark.parametrize("threshold", ["0", "1.5", "-1", "nan"])
def test_thresholds_outside_their_range(capsys, run, threshold):
    assert "threshold=" in refused(capsys, "similarity", str(run), "--threshold", threshold)
    assert "invalid float value" in refused(capsys, "similarity", str(run), "--threshold", "much")


def test_a_plain_network_has_no_banks(capsys, tmp_path):
    """Only begun, not trained: the command does not get that far."""
    config = Config(model=Model("wrn-16-1"), data=Data("digits", train_examples=64), epochs=2, batch_size=32)
    claim(tmp_path / "run", prepare(config))
    said = refused(capsys, "similarity", str(tmp_path / "run"))
    assert "wrn-16-1" in said and "`paramshare convert`" in said and "paramshare.similarity(paramshare.share(model, plan, x)" in said
    told(capsys, "report", str(tmp_path / "run"))
    page = (tmp_path / "run" / "report.html").read_text()
    assert "has not finished: 0 of 2 epochs" in page and "share nothing" in page


def test_an_unfinished_run_is_reported_as_far_as_it_got(capsys, run):
    (run / "result.json").unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(line for line in lines if '"epoch": 2' not in line) + '\n{"kind": "epo')
    told(capsys, "report", str(run))
    page = (run / "report.html").read_text()
    assert "has not finished: 1 of 2 epochs" in page and "Folding" in page and "bank by bank" in page
    shutil.rmtree(run / "checkpoints")
    told(capsys, "report", str(run))
    page = (run / "report.html").read_text()
    assert "no checkpoint in" in page and "Who shares what" in page and "there is no state" in page
    assert "no checkpoint in" in refused(capsys, "similarity", str(run))


DAMAGED = {
    "lost": None,
    "not text": b"\xff\xfe\x00{",
    "not lines of ours": b'[]\n3\n{"a": 1}\n{"kind": "epoch", "step": 1}\n{"kind": "epoch", "step": 1, "epoch": "x", "loss": []}\n',
    "not numbers": b'{"kind": "epoch", "step": 1, "epoch": 1, "loss": NaN, "accuracy": 1, "validation_loss": "x"}\n',
    "no matrices": b'{"kind": "similarity", "step": 1, "epoch": 1, "matrices": {"stage1": [[1], [2, 3]]}}\n',
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_damaged_metrics_are_passed_over(capsys, run, content):
    (run / "metrics.jsonl").unlink()
    if content is not None:
        (run / "metrics.jsonl").write_bytes(content)
    told(capsys, "report", str(run))
    page = (run / "report.html").read_text()
    assert "<h1>swrn-16-1-1 on digits</h1>" in page and "stage3" in page and "nan" not in page
    assert "over_training" not in told(capsys, "similarity", str(run))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"result.json": "{"}, "result.json cannot be read"),
        ({"result.json": '{"last": {"test": {"accuracy": "high", "count": 3}}}'}, "result.json does not hold what a run leaves there"),
        ({"result.json": '{"last": 3}'}, "result.json does not hold what a run leaves there"),
        (("images_per_second", "many"), "result.json does not hold what a run leaves there"),
        (("selected", {"test": {"accuracy": 1, "count": 3}}), "result.json does not hold what a run leaves there"),  # no epoch
        ({"config.json": "[]"}, "not a stored configuration of this version"),
    ],
)
def test_damage_that_leaves_nothing_to_tell(capsys, run, damage, message):
    if isinstance(damage, tuple):  # a name and a value in an else good result
        damage = {"result.json": json.dumps(json.loads((run / "result.json").read_text()) | dict([damage]))}
    for name, text in damage.items():
        (run / name).write_text(text)
    assert message in refused(capsys, "report", str(run))


def test_a_lost_identity_is_noted(capsys, run):
    (run / "identity.json").write_text('{"data": "some"}')
    told(capsys, "report", str(run))
    assert "does not tell the shape of the run" in (run / "report.html").read_text()
    assert "identity.json does not tell the shape" in refused(capsys, "similarity", str(run))


def test_what_cannot_be_written_is_named(capsys, run):
    (run / "report.html").unlink()
    (run / "report.html").mkdir()
    assert "report.html cannot be written" in refused(capsys, "report", str(run))
    (run / "similarity.png").unlink()
    (run / "similarity.png").mkdir()
    assert "similarity.png cannot be written" in refused(capsys, "similarity", str(run))


def test_a_run_without_validation_has_no_best(capsys, run):
    shutil.rmtree(run / "best")
    assert "has chosen no epoch by validation; take --checkpoint last" in refused(capsys, "similarity", str(run), "--checkpoint", "best")
