"""`paramshare compress`: what it measures, stores, resumes and refuses."""

import contextlib
import io
import itertools
import json
import shutil
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest

from paramshare.cli import main
from paramshare.data import Curriculum, Grids
from paramshare.schemes import Compressed
from paramshare.shared import Shared
from paramshare.tasks import Paths
from paramshare.training.checkpoint import Checkpoints
from paramshare.training.config import Config, Model
from paramshare.training.derive import begin, load_run
from paramshare.training.loop import train
from paramshare.training.result import Result
from paramshare.training.run import prepare
from paramshare.training.workdir import stored_config
from paramshare.transform.compress import finalise
from paramshare.transform.packing import PACKED, load_packed

DATA = Grids(curriculum=Curriculum(6, 0.1, (4,), 80, 7, (), (), ()), validation=0.2)
OPTIONS = ("--bits", 3, "--prune", 0.5, "--fine-tune", 2)


@pytest.fixture(autouse=True, scope="module")
def _programs(equal_runs_share_programs):
    """Some runs are trained twice."""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The workdir of a run at step 0: what is tested does not depend on how well it is trained."""
    config = Config(Model("pathnet-2-4-rpg-160"), DATA, epochs=1, batch_size=32, seed=1)
    run, workdir = prepare(config), tmp_path_factory.mktemp("source") / "run"
    begin(run, run.init().variables, workdir, {})
    return workdir


@pytest.fixture(scope="module")
def compressed(source, tmp_path_factory):
    """A compressed run, fine-tuned for two epochs, and what the command printed."""
    output = tmp_path_factory.mktemp("compressed") / "run"
    words = ["compress", source, *OPTIONS, "--output", output, "--json"]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main([str(word) for word in words]) == 0
    return output, json.loads(out.getvalue())


def test_a_compressed_run_is_fine_tuned_and_packed(source, compressed):
    output, printed = compressed
    run, variables, step = load_run(output)
    assert step == 4 and stored_config(output).compression.bits == 3
    assert all(isinstance(bank.scheme, Compressed) for bank in run.model.layout.banks)
    assert printed["test"]["fine_tuned"] == Result.read(output / "result.json").last.as_json()
    start = load_run(source)[1]["banks"]
    for bank in printed["banks"]:
        (values,) = jax.tree.leaves(variables["banks"][bank["name"]])
        (first,) = jax.tree.leaves(start[bank["name"]])
        # Trained in floating point, with momentum and decay; what was pruned is still 0.
        zero, smallest = np.asarray(values == 0), np.argsort(np.abs(first).ravel())
        assert zero.sum() == bank["zeros"] == values.size // 2 and bank["levels"] == 9
        assert zero.ravel()[smallest[: values.size // 2]].all()
        assert len(np.unique(values)) > 9


def test_the_packed_file_is_what_the_report_says(compressed):
    """Its size, and its numbers: those of the network that was evaluated."""
    output, printed = compressed
    sizes = printed["bytes"]["packed"]
    assert (output / PACKED).stat().st_size == sizes["total"]
    run, variables, _ = load_run(output)
    assert isinstance(run.model, Shared)
    final = finalise(run.model, variables)[1]
    packed = load_packed(output / PACKED)
    stored, expected = (jax.tree_util.tree_leaves_with_path(v) for v in (packed, final))
    for (path, a), (other, b) in zip(
        sorted(stored, key=str), sorted(expected, key=str), strict=True
    ):
        assert str(path) == str(other)
        np.testing.assert_array_equal(a, b)
    numbers = sum(bank["parameters"] for bank in printed["banks"])
    # Half of the numbers of 3 bits, 1 bit that tells where, and a codebook of 8 numbers.
    assert sizes["banks"] == -(-numbers * 3 // 16) + numbers // 8 + 8 * 4
    assert printed["bytes"]["arrays"]["banks"] == 4 * numbers


def test_it_is_a_run_like_any_other(command, compressed, tmp_path):
    """Evaluated, reported, resumed; and exported, packed, for a process without paramshare."""
    output, printed = compressed
    measured = json.loads(command("eval", output))
    assert measured["loss"] == pytest.approx(printed["test"]["fine_tuned"]["loss"], rel=1e-6)
    command("report", output)
    assert "Compressed(" in (output / "report.html").read_text()
    command("export", output, "--output", tmp_path / "new")
    assert (tmp_path / "new" / PACKED).read_bytes() == (output / PACKED).read_bytes()
    assert not (tmp_path / "new" / "variables.npz").exists()
    test: Any = load_run(output)[0].data.test
    np.save(tmp_path / "images.npy", test.input)
    files = [str(tmp_path / name) for name in ("new/run.py", "images.npy", "outputs.npz")]
    subprocess.run([sys.executable, *files], check=True)
    found = np.load(files[2])["output"] > 0
    f1 = 2 * np.sum(found & (test.label > 0)) / (np.sum(found) + np.sum(test.label > 0))
    assert 0 < f1 == pytest.approx(measured["measures"]["f1"], abs=1e-6)


def test_killed_fine_tuning_resumes_with_the_same_command(command, refused, compressed, source):
    """As if it had been killed after the first epoch, without a result or a packed file.

    Training writes the packed file, whichever command resumes it.
    """
    output, printed = compressed
    content = (output / PACKED).read_bytes()
    words = ["compress", source, *OPTIONS, "--output", output]

    def kill():
        (output / PACKED).unlink()
        (output / "result.json").unlink()
        shutil.rmtree(output / "checkpoints" / "4")

    kill()
    again = json.loads(command(*words, "--json"))
    assert again == printed
    assert (output / PACKED).read_bytes() == content
    kill()
    train(load_run(output)[0].config, output, quiet=True)
    assert (output / PACKED).read_bytes() == content
    error = refused(*words, "--method", "uniform")
    assert "was begun with other options (compression.method: 'kmeans' -> 'uniform')" in error


def test_pruned_gradually_then_quantised(command, refused, source, tmp_path, monkeypatch):
    """No zeros before fine-tuning, all of them afterwards; quantising keeps them.

    Scores fall from one evaluation to the next: the first that may be selected is the best.
    """
    scores = (0.9**count for count in itertools.count())
    names = [measure.name for measure in Paths.measures]
    reduce = lambda self, statistics: dict.fromkeys(names, next(scores))  # noqa: E731
    monkeypatch.setattr(Paths, "reduce", reduce)
    pruned = tmp_path / "pruned"
    options = (
        "--prune",
        0.75,
        "--gradual",
        "--fine-tune",
        2,
        "--validate-steps",
        1,
        "--banks",
        "r.*",
        "--ema",
        0.9,
    )
    printed = json.loads(command("compress", source, *options, "--output", pruned, "--json"))
    zeros = [bank["zeros"] / bank["parameters"] for bank in printed["banks"]]
    assert zeros == [0.75]
    _, selected, step = load_run(pruned, "best")  # not of an epoch that was pruned less
    (values,) = jax.tree.leaves(selected["banks"])
    assert np.mean(np.asarray(values) == 0) == 0.75 and step == 2
    run = prepare(stored_config(pruned))
    with Checkpoints(pruned / "checkpoints") as checkpoints:
        (average,) = jax.tree.leaves(checkpoints.restore(run.shapes)[0].ema["banks"])
    assert np.mean(np.asarray(average) == 0) == 0.75
    test = printed["test"]
    assert test["after"]["loss"] == pytest.approx(test["before"]["loss"], rel=1e-6)
    text = command("compress", pruned, "--bits", 8, "--banks", "r.*")
    assert "(75.0%)" in text and "packed  " in text and "after  " in text
    assert "name the same banks" in refused("compress", pruned, "--bits", 4)
    assert "is compressed; fold the run" in refused("fold", pruned)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "nothing to do; give --bits, --prune or both"),
        ("--bits 1", "--bits is 1; it must be from 2 to 8"),
        ("--bits 9", "--bits is 9"),
        ("--prune 1", "--prune is 1; it must be a fraction in [0, 1)"),
        ("--prune -0.5", "--prune is -0.5"),
        ("--prune nan", "--prune is nan"),
        ("--gradual --prune 0.5", "needs --prune and --fine-tune"),
        ("--bits 4 --banks stage4", "'stage4' matches no bank; the banks are"),
        ("--bits 4 --banks (", "regular expression"),
        ("--bits 4 --output {source}", "give --output a folder that does not exist"),
        ("--bits 4 --method best", "--method"),
        ("--bits 4 --epochs 0", "epochs must be"),
    ],
)
def test_bad_options_leave_nothing(refused, source, tmp_path, options, message):
    words = [word.format(source=source) for word in options.split()]
    output = [] if "--output" in words else ["--output", tmp_path / "new"]
    assert message in refused("compress", source, *words, *output)
    assert not (tmp_path / "new").exists()


def test_what_cannot_be_compressed(refused, compressed, tmp_path):
    assert "already" in refused("compress", compressed[0], "--bits", 2)
    run = prepare(Config(Model("pathnet-2-4"), DATA, epochs=1, batch_size=32))
    begin(run, run.init().variables, tmp_path / "plain", {})
    error = refused("compress", tmp_path / "plain", "--bits", 4)
    assert "pathnet-2-4 shares no weights, so it has no banks to compress" in error
