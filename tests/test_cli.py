"""The command: what it prints, and how it refuses bad input: one line, exit code 2, nothing written."""

import importlib.util
import json
import pathlib

import jax
import numpy as np
import pytest

from paramshare.cli import main

CONFIG = """
from paramshare.training.config import Config, Data, Model

config = Config(model=Model("swrn-16-1-1"), data=Data("digits", train_examples=64), epochs=1, batch_size=32)
"""


@pytest.fixture(autouse=True, scope="module")
def _lenient_promotion():
    # optax's schedules multiply integer steps with floats.
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def config(tmp_path) -> str:
    path = tmp_path / "config.py"
    path.write_text(CONFIG)
    return str(path)


def refused(capsys, *arguments: str) -> str:
    """The one line that a refused command prints."""
    try:
        code = main(arguments)
    except SystemExit as stop:  # argparse's own way out
        code = stop.code
    said = capsys.readouterr()
    assert code == 2, said
    assert said.err.count("\n") == 1 and said.err.startswith("paramshare: ") and "Traceback" not in said.err
    return said.err


BAD = {
    "unknown model": (["--model.name", "wrm-28-10"], "unknown model 'wrm-28-10'; nearest: wrn-28-10"),
    "malformed model": (
        ["--model.name", "swrn-28-10"],
        r"malformed model name 'swrn-28-10'; names are of the form swrn-{depth}-{width}-{templates}",
    ),
    "illegal depth": (["--model.name", "wrn-29-10"], "got 29, nearest are 28 and 34"),
    "no templates": (["--model.name", "swrn-28-10-0"], "Soft(templates=0): templates must be an integer, 1 or more"),
    "unknown set": (["--data.name", "digitz"], "there is no data set 'digitz'; did you mean digits"),
    "IDX without a folder": (["--data.name", "idx"], "path="),
    "class count": (["--model.num-classes", "7"], "model.num_classes is 7, but data set 'digits' has 10 classes"),
    "uneven batch": (["--batch-size", "30"], "batch_size 30 does not divide evenly over 4 devices; try 28 or 32"),
    "batch too large": (["--batch-size", "128"], "batch_size 128 is larger than the 64 training images"),
    "negative rate": (["--optimizer.learning-rate", "-0.1"], "optimizer.learning_rate is -0.1; it must be positive"),
    "rate not a number": (["--optimizer.learning-rate", "nan"], "optimizer.learning_rate is nan"),
    "negative decay": (["--optimizer.weight-decay", "-1"], "optimizer.weight_decay is -1.0"),
    "no epochs": (["--epochs", "0"], "epochs is 0; it must be 1 or more"),
    "not a number": (["--epochs", "many"], "--epochs: invalid literal for int() with base 10: 'many'"),
    "no such choice": (["--schedule.name", "stairs"], "invalid choice 'stairs' for argument '--schedule.name'"),
    "no such override": (["--optimizer.learningrate", "1"], "no override '--optimizer.learningrate'; nearest: --optimizer.learning-rate"),
    "padding too large": (["--augment.pad-crop", "9"], "pad_crop=9 is larger than the images, 8x8"),
    "negative padding": (["--augment.pad-crop", "-1"], "pad_crop"),
    "images of one size": (["--data.image-size", "64"], "image_size=64"),
    "validation of everything": (["--data.validation", "1.5"], "data.validation is 1.5; it must be in [0, 1)"),
}


@pytest.mark.parametrize(("overrides", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_before_anything_is_written(capsys, tmp_path, config, overrides, message):
    workdir = tmp_path / "workdir"
    assert message in refused(capsys, "train", config, "--workdir", str(workdir), *overrides)
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("config = 3", "must set `config` to a paramshare.training.config.Config; found int"),
        ("import nothing_of_this_name", "does not run: ModuleNotFoundError"),
        ("config = (", "does not run: SyntaxError"),
        ("from paramshare.training.config import *\nconfig = Config(depth=3)", "does not run: TypeError"),
    ],
)
def test_a_configuration_that_does_not_run(capsys, tmp_path, text, message):
    (tmp_path / "bad.py").write_text(text)
    assert message in refused(capsys, "train", str(tmp_path / "bad.py"), "--workdir", str(tmp_path / "w"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("model='wrn-16-1'", "model is 'wrn-16-1'; it must be of type Model"),
        ("epochs='3'", "epochs is '3'; it must be of type int"),
        ("epochs=1.5", "epochs is 1.5; it must be of type int"),
        ("label_smoothing=True", "label_smoothing is True; it must be of type float"),
        ("data=Data(train_examples=1.5)", "data.train_examples is 1.5; it must be int or None"),
        ("schedule=Schedule(milestones=[1])", "schedule.milestones is [1]; it must be a tuple of ints"),
        ("mapping='vmap'", "mapping is 'vmap'; it must be one of pmap, shard_map"),
    ],
)
def test_values_of_the_wrong_type(capsys, tmp_path, arguments, message):
    (tmp_path / "bad.py").write_text(f"from paramshare.training.config import *\nconfig = Config({arguments})")
    assert message in refused(capsys, "train", str(tmp_path / "bad.py"), "--workdir", str(tmp_path / "w"))
    assert not (tmp_path / "w").exists()


def test_without_a_cluster_there_are_no_several_processes(capsys, tmp_path, config):
    assert "--distributed finds no cluster" in refused(capsys, "train", config, "--workdir", str(tmp_path / "w"), "--distributed")


def test_without_tensorboardx_nothing_is_begun(capsys, tmp_path, config, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "tensorboardX" else find_spec(name, *rest))
    assert "pip install" in refused(capsys, "train", config, "--workdir", str(tmp_path / "w"), "--tensorboard")
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"result.json": b""}, "result.json cannot be read"),
        ({"config.json": b"[]"}, "not a stored configuration of this version"),
        ({"identity.json": b"{"}, "identity.json cannot be read"),
        ({"result.json": None, "checkpoints": b"a file"}, "is a file where a folder of checkpoints should be"),
    ],
)
def test_damage_in_a_workdir_is_told_in_one_line(capsys, trained, tmp_path, damage, message):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(trained / "run", copy)
    for name, content in damage.items():
        if (copy / name).is_dir():
            shutil.rmtree(copy / name)
        if content is None:
            (copy / name).unlink()
        else:
            (copy / name).write_bytes(content)
    assert message in refused(capsys, "train", str(trained / "config.py"), "--workdir", str(copy))


def test_a_lost_metrics_file_or_a_claim_cut_short_do_not_stop_a_run(trained, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(trained / "run", copy)
    (copy / "metrics.jsonl").unlink()
    assert main(["train", str(trained / "config.py"), "--workdir", str(copy)]) == 0
    (tmp_path / "claimed").mkdir()
    (tmp_path / "claimed" / "config.json.tmp").write_text("{")
    assert main(["train", str(trained / "config.py"), "--workdir", str(tmp_path / "claimed")]) == 0


def test_arguments_that_are_missing_or_wrong(capsys, tmp_path, config):
    assert "no configuration file 'none.py'" in refused(capsys, "train", "none.py", "--workdir", "w")
    assert "train needs a configuration" in refused(capsys, "train")
    assert "train needs --workdir" in refused(capsys, "train", config)
    assert "invalid choice: 'trian'" in refused(capsys, "trian")
    assert "COMMAND" in refused(capsys)
    assert "unrecognised argument '--jsn'" in refused(capsys, "summary", "wrn-16-1", "--jsn")
    assert "holds no run (no config.json)" in refused(capsys, "eval", str(tmp_path))
    assert "no model matches 'x*'" in refused(capsys, "models", "x*")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("cli")
    (folder / "config.py").write_text(CONFIG)
    assert main(["train", str(folder / "config.py"), "--workdir", str(folder / "run")]) == 0
    return folder


def test_training_ends_with_accuracy_counts_and_pictures(capsys, trained):
    assert main(["train", str(trained / "config.py"), "--workdir", str(trained / "run")]) == 0  # finished: told again
    said = capsys.readouterr().out
    result = json.loads((trained / "run" / "result.json").read_text())
    assert f"test accuracy  {result['last']['test']['accuracy']:.2%}" in said
    assert f"{result['counts']['trainable']:,} trainable" in said and "chosen by validation" in said
    for name in ("learning_curves.png", "similarity.png"):
        assert (trained / "run" / name).read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(("checkpoint", "key"), [("last", "last"), ("best", "selected")])
def test_eval_finds_the_accuracy_that_training_reported(capsys, trained, checkpoint, key):
    assert main(["eval", str(trained / "run"), "--checkpoint", checkpoint]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["accuracy"] == json.loads((trained / "run" / "result.json").read_text())[key]["test"]["accuracy"]


def test_several_seeds_are_trained_each_in_its_folder(capsys, tmp_path, config, quick_compilation):
    workdir, seeds = tmp_path / "w", ["--seeds", "0", "1"]
    assert "--seeds 0 1 and --seed 7 are both given" in refused(capsys, "train", config, "--workdir", str(workdir), *seeds, "--seed", "7")
    assert not workdir.exists()
    same = ["--data.train-examples", "None", "--data.validation", "0"]  # else each seed draws images of its own
    assert main(["train", config, "--workdir", str(workdir), *seeds, *same, "--model.name", "wrn-10-1", "--batch-size", "1436"]) == 0
    found = [json.loads((workdir / f"seed{seed}" / "result.json").read_text()) for seed in (0, 1)]
    said = capsys.readouterr().out
    assert all(f"{result['last']['test']['accuracy']:.2%}" in said for result in found)
    assert found[0]["last"]["test"]["loss"] != found[1]["last"]["test"]["loss"]


def test_a_workdir_of_another_run_is_left_alone(capsys, trained):
    before = {p: p.read_bytes() for p in (trained / "run").rglob("*") if p.is_file()}
    message = refused(capsys, "train", str(trained / "config.py"), "--workdir", str(trained / "run"), "--epochs", "2", "--seed", "1")
    assert "holds a run of another configuration (epochs: 1 -> 2; seed: 0 -> 1)" in message
    assert "is not empty and holds no run" in refused(capsys, "train", str(trained / "config.py"), "--workdir", str(trained))
    assert {p: p.read_bytes() for p in (trained / "run").rglob("*") if p.is_file()} == before


def test_an_unreadable_checkpoint_is_told_in_one_line(capsys, trained, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(trained / "run", copy)
    (copy / "result.json").unlink()
    for file in [f for f in (copy / "checkpoints").rglob("*") if f.is_file()]:
        file.write_bytes(b"")
    assert "cannot be read" in refused(capsys, "train", str(trained / "config.py"), "--workdir", str(copy))
    assert not (copy / "result.json").exists()


def test_idx_files_missing_or_truncated(capsys, tmp_path, config):
    data = ["--data.name", "idx", "--data.path", str(tmp_path / "idx"), "--data.data-dir", str(tmp_path / "tfds")]
    assert str(tmp_path / "idx") in refused(capsys, "train", config, "--workdir", str(tmp_path / "w"), *data)
    (tmp_path / "idx").mkdir()
    for part in ("train", "t10k"):
        (tmp_path / "idx" / f"{part}-images-idx3-ubyte").write_bytes(bytes([0, 0, 8, 3, 0, 0, 0, 9, 0, 0, 0, 8, 0, 0, 0, 8]) + bytes(100))
        (tmp_path / "idx" / f"{part}-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 9]) + bytes(9))
    assert "train-images-idx3-ubyte" in refused(capsys, "train", config, "--workdir", str(tmp_path / "w"), *data)
    assert not (tmp_path / "w").exists()


def test_a_loss_that_is_not_finite_names_the_step_and_exits_with_1(capsys, tmp_path, config):
    overrides = ["--optimizer.learning-rate", "1e30", "--schedule.name", "constant", "--epochs", "3"]
    assert main(["train", config, "--workdir", str(tmp_path / "w"), *overrides]) == 1
    said = capsys.readouterr().err
    line = [x for x in said.replace("\r", "\n").splitlines() if x.startswith("paramshare: ")]
    assert len(line) == 1 and "step 2: " in line[0] and "the update was not applied" in line[0]
    assert not (tmp_path / "w" / "result.json").exists()


def test_models_and_summary(capsys):
    assert main(["models", "swrn-28-*"]) == 0
    assert "swrn-28-10-2" in capsys.readouterr().out
    assert main(["summary", "swrn-28-10-2"]) == 0
    said = capsys.readouterr().out
    assert "17,125,630" in said and "stage1/block2/conv1" in said and "Soft(templates=2)" in said
    assert main(["summary", "swrn-28-10-2", "--num-classes", "100", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["counts"]["trainable"] == 17_183_320


def test_help_lists_the_overrides(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0
    assert "--optimizer.learning-rate" in said and "Weight decay" not in said.split("--epochs")[0] and "--distributed" in said


def test_tensorboard_on_request(tmp_path, config):
    assert main(["train", config, "--workdir", str(tmp_path / "w"), "--tensorboard"]) == 0
    events = list((tmp_path / "w" / "tensorboard").glob("events*"))
    assert events and np.sum([e.stat().st_size for e in events]) > 100
