"""`paramshare train`: what it prints and stores, and how it refuses bad input."""

import importlib
import importlib.util
import json
import runpy
import shutil
import sys

import chex
import jax
import numpy as np
import pytest

from paramshare.cli import main, run_command
from paramshare.data import Digits
from paramshare.storage import read_json, write_json
from paramshare.training.checkpoint import Checkpoints
from paramshare.training.config import Config, Model
from paramshare.training.derive import begin, load_run, with_arrays_of
from paramshare.training.result import Result
from paramshare.training.run import prepare
from paramshare.training.workdir import claim, stored_config, stored_variables

# One case for each class of error, and for each place that raises.
BAD = {
    "model": (["--model.name", "wrm-28-10"], "nearest: wrn-28-10"),
    "scheme": (["--model.name", "swrn-28-10-0"], "Soft(templates=0)"),
    "data set": (["--data.name", "digitz"], "digitz"),
    "data set's option": (["--data.name", "idx"], "path"),
    "class count": (["--model.num-classes", "7"], "num_classes is 7"),
    "devices": (["--batch-size", "30"], "batch_size is 30"),
    "batch size": (["--batch-size", "128"], "batch_size is 128"),
    "range": (
        ["--optimizer.learning-rate", "nan"],
        "learning_rate must be a finite number, got nan",
    ),
    "type": (["--epochs", "many"], "--epochs: invalid int value: 'many'"),
    "choice": (["--schedule.name", "stairs"], "--schedule.name: invalid choice: 'stairs'"),
    "option": (["--optimizer.learningrate", "1"], "nearest: --optimizer.learning-rate"),
    "augmentation": (["--augment.pad-crop", "9"], "pad_crop"),
    "cluster": (["--distributed"], "--distributed finds no cluster"),
    "seeds": (["--seeds", "0", "1", "--seed", "7"], "--seeds 0 1 and --seed 7"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_before_anything_is_written(
    refused, tmp_path, config_file, options, message
):
    workdir = tmp_path / "workdir"
    assert message in refused("train", config_file, "--workdir", workdir, *options)
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("config = 3", "must set `config`"),
        ("import no_such_module", "ModuleNotFoundError"),
        ("from paramshare.training.config import *\nconfig = Config(epochs='3')", "epochs must be"),
    ],
)
def test_a_configuration_file_that_fails(refused, tmp_path, text, message):
    (tmp_path / "bad.py").write_text(text)
    error = refused("train", tmp_path / "bad.py", "--workdir", tmp_path / "w")
    assert message in error and "bad.py" in error


def test_missing_arguments(refused, tmp_path, config_file):
    assert "no configuration file 'none.py'" in refused("train", "none.py", "--workdir", "w")
    assert "train needs a configuration" in refused("train")
    assert "train needs --workdir" in refused("train", config_file)
    assert "holds no run" in refused("eval", tmp_path)


def test_tensorboard_needs_tensorboardx(refused, tmp_path, config_file, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *args: None if name == "tensorboardX" else find_spec(name, *args),
    )
    workdir = tmp_path / "w"
    assert "pip install" in refused("train", config_file, "--workdir", workdir, "--tensorboard")
    assert not workdir.exists()


def test_training_stores_result_and_pictures(trained):
    result = Result.read(trained / "result.json")
    assert (result.epochs, result.steps, result.last.count) == (2, 4, 355)
    assert result.selected is not None and result.selected.epoch in (1, 2)
    for name in ("learning_curves.png", "similarity.png", "similarity_over_training.png"):
        assert (trained / name).read_bytes()[:4] == b"\x89PNG"
    page = (trained / "report.html").read_text()
    assert result.score.format(result.last_score) in page and 'id="snapshots"' in page
    assert f"{result.counts['trainable']:,}" in page and "has not finished" not in page


def test_a_finished_run_prints_its_result_again(command, config_file, workdir):
    (workdir / "metrics.jsonl").unlink()  # not needed for the result
    printed = command("train", config_file, "--workdir", workdir)
    result = Result.read(workdir / "result.json")
    correct = round(355 * result.last_score)
    assert f"test accuracy  {result.last_score:.2%} ({correct} of 355 examples)" in printed
    assert f"{result.counts['trainable']:,} trainable" in printed
    assert "selected by validation" in printed and "report.html" in printed


def test_eval_measures_what_training_reported(command, trained):
    """The epoch selected by validation; `test_derive.py` has the last one."""
    printed = json.loads(command("eval", trained, "--checkpoint", "best"))
    selected = Result.read(trained / "result.json").selected
    assert selected is not None and printed["step"] == 2 * selected.epoch
    assert printed["measures"] == selected.test.measures and printed["count"] == 355
    assert printed["loss"] == pytest.approx(selected.test.loss, rel=1e-6)


def test_eval_of_an_empty_split(refused, workdir):
    config = read_json(workdir / "config.json", KeyError, "")
    data = config["data"] | {"validation": 0.0}
    write_json(workdir / "config.json", config | {"data": data})
    error = refused("eval", workdir, "--split", "validation")
    assert "trained on other data or with other code (validation: 144 -> 0)" in error
    (workdir / "identity.json").unlink()
    assert "no validation examples" in refused("eval", workdir, "--split", "validation")


def test_several_seeds_are_trained_together(command, tmp_path, trained, config_file, monkeypatch):
    """Each seed in its own folder; `fit_together` itself has its own tests."""
    from paramshare.cli import train
    from paramshare.training import loop

    calls, result = [], Result.read(trained / "result.json")

    def fit_together(runs, workdirs, profile):
        calls.append([(run.config.seed, workdir) for run, workdir in zip(runs, workdirs)])  # noqa: B905
        return [result] * len(runs)

    monkeypatch.setattr(loop, "fit_together", fit_together)
    monkeypatch.setattr(train, "report", lambda run, workdir, result: print(workdir))
    printed = command("train", config_file, "--workdir", tmp_path, "--seeds", 0, 1)
    assert calls == [[(0, tmp_path / "seed0"), (1, tmp_path / "seed1")]]
    assert printed == f"{tmp_path / 'seed0'}\n{tmp_path / 'seed1'}\n"


def test_only_the_first_process_reports(monkeypatch, loaded, workdir, capsys):
    """`test_distributed` sees it do so; reading a checkpoint waits for no other process."""
    from paramshare.cli import train

    monkeypatch.setattr(jax, "process_index", lambda: 1)
    (workdir / "report.html").unlink()
    train.report(loaded[0], workdir, Result.read(workdir / "result.json"))
    assert not (workdir / "report.html").exists() and not capsys.readouterr().out


def test_only_modules_of_the_extra_are_blamed_on_it(capsys):
    def fail(name: str):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    assert run_command(lambda: fail("jinja2.ext")) == 2
    assert 'pip install "paramshare[train]"' in capsys.readouterr().err
    with pytest.raises(ModuleNotFoundError, match="of_mine"):
        run_command(lambda: fail("of_mine"))


@pytest.mark.parametrize("package", ["tasks", "training", "report"])
def test_a_bare_install_names_the_extra(monkeypatch, package):
    file = importlib.import_module(f"paramshare.{package}").__file__
    monkeypatch.delitem(sys.modules, "paramshare.tasks")
    monkeypatch.setitem(sys.modules, "pydantic", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "paramshare\[train\]"'):
        runpy.run_path(str(file))


DAMAGE = {
    "result": ({"result.json": b""}, "result.json cannot be read"),
    "configuration": ({"config.json": b"[]"}, "config.json"),
    "facts": ({"identity.json": b"{"}, "identity.json cannot be read"),
    "checkpoints": ({"result.json": None, "checkpoints": b"a file"}, "must be a folder"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_workdir_is_named(refused, config_file, workdir, damage, message):
    for name, content in damage.items():
        if (workdir / name).is_dir():
            shutil.rmtree(workdir / name)
        if content is None:
            (workdir / name).unlink()
        else:
            (workdir / name).write_bytes(content)
    assert message in refused("train", config_file, "--workdir", workdir)


def test_an_unreadable_checkpoint_is_named(refused, config_file, workdir):
    (workdir / "result.json").unlink()
    for file in [path for path in (workdir / "checkpoints").rglob("*") if path.is_file()]:
        file.write_bytes(b"")
    assert "cannot be read" in refused("train", config_file, "--workdir", workdir)
    assert not (workdir / "result.json").exists()


def test_a_workdir_of_another_run_is_left_alone(refused, config_file, workdir):
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    options = ["--epochs", "3", "--seed", "1"]
    error = refused("train", config_file, "--workdir", workdir, *options)
    assert "another configuration (epochs: 2 -> 3; seed: 0 -> 1)" in error
    assert "holds no run" in refused("train", config_file, "--workdir", workdir.parent)
    assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == before


def test_a_run_can_start_from_another_one(
    command, refused, config_file, trained, tmp_path, monkeypatch
):
    """Training itself would take no notice of where the first state comes from."""
    from paramshare.cli import train
    from paramshare.training import loop

    finished = Result.read(trained / "result.json")
    monkeypatch.setattr(loop, "fit_together", lambda runs, workdirs, **_: [finished] * len(runs))
    monkeypatch.setattr(train, "report", lambda run, workdir, result: None)
    command("export", trained, "--output", tmp_path / "exported")
    sources = {"more": trained, "again": tmp_path / "exported" / "variables.npz"}
    run = prepare(stored_config(trained), devices=jax.devices()[:1])
    expected, step = stored_variables(trained, run.shapes)
    assert step > 0
    for name, source in sources.items():
        words = [config_file, "--workdir", tmp_path / name, "--init-from", source, "--epochs", 1]
        command("train", *words)
        with Checkpoints(tmp_path / name / "checkpoints") as checkpoints:
            first, _ = checkpoints.restore(run.shapes, 0)
        chex.assert_trees_all_equal(first.variables, expected)
        command("train", *words)  # as to resume it
    words = ["train", config_file, "--workdir", tmp_path / "more", "--init-from"]
    assert "did not start from" in refused(*words, tmp_path)
    words = ["train", config_file, "--workdir", tmp_path / "new", "--init-from"]
    other = refused(*words, trained, "--model.name", "swrn-16-2-1")
    assert "holds another network (model.name: swrn-16-1-2 -> swrn-16-2-1)" in other
    other = refused(*words, sources["again"], "--model.name", "swrn-16-2-1")
    assert "the variables do not fit swrn-16-2-1" in other
    assert "holds no run" in refused(*words, tmp_path)
    assert "cannot be read" in refused(*words, tmp_path / "nothing.npz")
    only = (*words, trained, "--init-only")
    other = refused(*only, "banks/.*", "--model.name", "swrn-16-2-1")
    assert "banks/stage1/templates is (2, 2304) in the variables to start from, but" in other
    other = refused(*only, "banks/stage1")
    assert "'banks/stage1' matches no array of swrn-16-1-2, such as 'banks/stage1/temp" in other
    assert not (tmp_path / "new").exists()
    assert "need --init-from" in refused(*words[:-1], "--init-checkpoint", "best")
    other = refused(*words, sources["again"], "--init-checkpoint", "best")
    assert "is not a workdir; leave it out" in other

    (tmp_path / "empty").mkdir()  # such as a volume that was just mounted
    (tmp_path / "link").symlink_to(trained)
    words = ["train", config_file, "--workdir", tmp_path / "empty", "--epochs", 1, "--init-from"]
    words = [*words, tmp_path / "link", "--init-checkpoint", "best"]
    command(*words)
    with Checkpoints(tmp_path / "empty" / "checkpoints") as checkpoints:
        first, _ = checkpoints.restore(run.shapes, 0)
    chex.assert_trees_all_equal(first.variables, stored_variables(trained, run.shapes, "best")[0])
    command(*words[:-4], "--init-from", trained, "--init-checkpoint", "best")
    assert "did not start from these variables" in refused(*words[:-2])
    assert "did not start from these variables" in refused(*words, "--init-only", "banks/.*")


def test_a_run_can_start_from_a_part_of_another_one(loaded):
    run, variables, _ = loaded
    taken, paths, count = with_arrays_of(run, variables, ["banks/.*", ".*/classifier/bias"])
    assert len(paths) == 4 and count == len(jax.tree.leaves(variables))
    initial = run.init().variables
    for (path, leaf), first, last in zip(
        jax.tree_util.tree_leaves_with_path(taken),
        jax.tree.leaves(initial),
        jax.tree.leaves(variables),
        strict=True,
    ):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        np.testing.assert_array_equal(leaf, last if name in paths else first)


CANVASES = """
from paramshare.data import Canvases
from paramshare.data.canvases import Drawing
from paramshare.training.config import Config, Model

drawing = Drawing(size=32, most=1, smallest=8, largest=9)
data = Canvases(examples=4, tests=2, drawing=drawing)
config = Config(Model("retinanet-resnet8-head8x1"), data, epochs=1, batch_size=4)
"""


@pytest.mark.slow
def test_a_detector_can_start_from_a_classifier(command, refused, trained, tmp_path, monkeypatch):
    from paramshare.cli import train
    from paramshare.training import loop

    (tmp_path / "canvases.py").write_text(CANVASES)
    run = prepare(Config(Model("resnet8"), Digits(train_examples=64), seed=3, batch_size=28))
    begin(run, run.init().variables, tmp_path / "resnet8", {})
    classifier = load_run(tmp_path / "resnet8")[1]
    result = Result.read(trained / "result.json")
    monkeypatch.setattr(loop, "fit_together", lambda runs, workdirs, **_: [result])
    monkeypatch.setattr(train, "report", lambda run, workdir, result: None)
    words = ["train", tmp_path / "canvases.py", "--workdir", tmp_path / "new", "--init-from"]
    assert "exclude each other" in refused(
        *words, tmp_path / "resnet8", "--init-into", "backbone", "--init-only", "params/.*"
    )
    assert "need --init-from RUN" in refused(*words[:-1], "--init-into", "backbone")
    other = refused(*words, tmp_path / "resnet8", "--init-into", "trunk")
    assert "no submodule 'trunk'; the modules are backbone, boxes, classes, pyramid" in other
    assert not (tmp_path / "new").exists()

    printed = command(*words, tmp_path / "resnet8", "--init-into", "backbone")
    assert "arrays of backbone are those of" in printed
    assert "left out       params/classifier/bias, params/classifier/kernel" in printed
    run, first, step = load_run(tmp_path / "new")
    initial = run.init().variables
    inside = {k: v for k, v in classifier["params"].items() if k != "classifier"}
    chex.assert_trees_all_equal(first["params"]["backbone"], inside)
    chex.assert_trees_all_equal(first["params"]["pyramid"], initial["params"]["pyramid"])
    origin = read_json(tmp_path / "new" / "origin.json", KeyError, "")
    assert step == 0 and origin["into"] == "backbone" and len(origin["left_out"]) == 2
    command(*words, tmp_path / "resnet8", "--init-into", "backbone")  # as to resume it
    assert "did not start from these variables" in refused(*words, tmp_path / "resnet8")


def test_facts_of_another_network_are_refused(refused, config_file, workdir):
    facts = read_json(workdir / "identity.json", KeyError, "")
    write_json(workdir / "identity.json", facts | {"test": 12})
    assert "(test: 12 -> 355)" in refused("train", config_file, "--workdir", workdir)


@pytest.mark.parametrize(
    ("file", "before", "after"),
    [
        ("config.json", '"epochs": 2', '"epochs": 3'),
        ("identity.json", '"test": 355', '"test": 354'),
        ("result.json", '"count": 355', '"count": 354'),
    ],
)
def test_a_file_that_was_changed_is_refused(
    refused, config_file, workdir, file, before, after, monkeypatch
):
    from paramshare.cli import train

    monkeypatch.setattr(train, "report", lambda run, workdir, result: None)
    text = (workdir / file).read_text()
    assert before in text
    (workdir / file).write_text(text.replace(before, after, 1))
    error = refused("train", config_file, "--workdir", workdir)
    assert f"{file} has changed since it was written; restore it" in error
    lines = [line for line in text.splitlines() if '"sha256"' not in line]
    (workdir / file).write_text("\n".join(lines).replace(",\n}", "\n}"))  # an older version's
    assert main(["train", str(config_file), "--workdir", str(workdir)]) == 0


def test_a_claim_that_was_cut_short_is_completed(loaded, tmp_path):
    run = loaded[0]
    (tmp_path / ".config.json-0123abcd").write_text("{")
    claim(tmp_path, run)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "identity.json"]
    assert stored_config(tmp_path) == run.config
    (tmp_path / "identity.json").unlink()  # as its error message advises
    claim(tmp_path, run)
    assert (tmp_path / "identity.json").is_file()
    assert prepare(stored_config(tmp_path), devices=jax.devices()[:1]).facts == run.facts
