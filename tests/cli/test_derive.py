"""`paramshare fold`, `convert` and `export`: what they measure, and the workdirs they create."""

import dataclasses
import json
import pathlib
import subprocess
import sys
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from paramshare.data import Digits
from paramshare.shared import Shared
from paramshare.training.config import Config, ConfigError, Model, Penalty
from paramshare.training.derive import (
    begin,
    check_variables,
    convert_variables,
    derive,
    fine_tuning,
    load_run,
    training_inputs,
    with_model,
)
from paramshare.training.result import Evaluation, Result
from paramshare.training.run import prepare

FOLD = ("--threshold", "0.01")  # folds every bank
IMAGES = Config(Model("resnet14"), Digits(train_examples=64), batch_size=28)


@pytest.fixture(scope="module")
def trained(small_run) -> pathlib.Path:
    return small_run


@pytest.fixture(scope="module")
def loaded(trained):
    """The run of `trained`, its variables and their step."""
    return load_run(trained)


@pytest.fixture(scope="module")
def folded(trained, tmp_path_factory):
    """A folded run, fine-tuned for an epoch, and what the command printed."""
    from paramshare.cli import main

    output = tmp_path_factory.mktemp("folded") / "run"
    printed = _printed(
        main, ["fold", trained, *FOLD, "--output", output, "--fine-tune", 1, "--json"]
    )
    return output, json.loads(printed)


def _printed(main, args) -> str:
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main([str(arg) for arg in args]) == 0
    return out.getvalue()


def test_folding_creates_a_run(trained, folded):
    output, printed = folded
    assert [(bank["groups"], bank["period"]) for bank in printed["banks"]] == [([0] * 4, 1)]
    run, _, step = load_run(output)
    assert step == 2 and run.config.epochs == 1
    assert run.config.optimizer.learning_rate == pytest.approx(0.01)
    assert run.config.model == Model("spathnet-4-4-2", tied=("layers=*0,0,0,0",))
    assert run.config.penalty.recurrence == 0  # no mixing coefficients are left
    assert printed["trainable"]["after"] == run.model.layout.trainable
    assert printed["trainable"]["after"] < printed["trainable"]["before"]
    before = Result.read(trained / "result.json").last
    assert printed["test"]["before"]["measures"] == before.measures
    assert printed["test"]["fine_tuned"] == Result.read(output / "result.json").last.as_json()
    origin = json.loads((output / "origin.json").read_text())
    assert origin["test"] == {name: printed["test"][name] for name in ("before", "after")}
    assert origin["workdir"] == str(trained) and origin["step"] == 4


def test_a_folded_run_is_not_folded_twice(command, folded, tmp_path):
    printed = command("fold", folded[0], "--output", tmp_path / "twice")
    assert "nothing was folded" in printed and not (tmp_path / "twice").exists()


def test_a_folded_run_is_a_run_like_any_other(command, refused, folded):
    output = folded[0]
    assert "(epochs: 1 -> 3)" in refused("train", "--workdir", output, "--epochs", 3)
    assert "1 epochs" in command("train", "--workdir", output)


def test_scales_are_dropped_and_statistics_reestimated(command, loaded, trained, tmp_path):
    """More batches are asked for than there are."""
    options = (*FOLD, "--drop-scales", "--reestimate", 99, "--output", tmp_path / "new", "--json")
    printed = json.loads(command("fold", trained, *options))
    assert printed["reestimated_batches"] == 2
    assert [bank["scales"] for bank in printed["banks"]] == [[]]
    before, after = loaded[1]["batch_stats"], load_run(tmp_path / "new")[1]["batch_stats"]
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert old.shape == new.shape and not np.array_equal(old, new)


def test_without_output_nothing_is_written(command, trained):
    before = sorted(str(path) for path in trained.parent.rglob("*"))
    printed = command("fold", trained, *FOLD, "--banks", "lay.*", "--by", "weights")
    assert "before  " in printed and "after  " in printed
    assert sorted(str(path) for path in trained.parent.rglob("*")) == before


def test_conversion_to_and_from_a_plain_network(command, refused, trained, tmp_path):
    plain, shared = tmp_path / "plain", tmp_path / "shared"
    printed = json.loads(
        command("convert", trained, "--model", "pathnet-4-4", "--output", plain, "--json")
    )
    assert printed["trainable"]["after"] == 4 * (9 * 4 * 4 + 2 * 4) + 2 * 4 + 4 + 1
    test = printed["test"]
    assert test["after"]["loss"] == pytest.approx(test["before"]["loss"], rel=1e-4)
    # What two templates made, two templates make: exact.
    text = command("convert", plain, "--model", "spathnet-4-4-2", "--output", shared)
    assert f"train it with: paramshare train --workdir {shared}" in text
    after = json.loads((shared / "origin.json").read_text())["test"]["after"]
    assert after["loss"] == pytest.approx(test["before"]["loss"], rel=1e-4)
    assert isinstance(load_run(shared)[0].model, Shared)
    assert "`paramshare convert" in refused("fold", plain)
    assert "nothing to bake" in refused("export", plain, "--output", "new", "--form", "baked")


@pytest.mark.slow
def test_conversion_to_a_factored_network():
    """With as many filters as possible the kernels are exact."""
    run, target = prepare(IMAGES), prepare(with_model(IMAGES, name="resnet14-s32u0"))
    variables, report = convert_variables(run, run.init().variables, target)
    check_variables(target, variables)
    assert report is not None
    assert [bank.name for bank in report.banks] == ["stage1", "stage2", "stage3"]
    assert max(bank.kernel_error for bank in report.banks) < 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--threshold", "0"], "threshold"),
        (["--banks", "stage4"], "'stage4'"),
        (["--output", "{trained}"], "give --output a folder that does not exist"),
        (["--reestimate", "-1"], "--reestimate is -1"),
        (["--threshold", "0.01", "--epochs", "0"], "epochs must be"),
        (["--threshold", "0.01", "--frobnicate"], "no option '--frobnicate'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_options_leave_nothing(refused, trained, tmp_path, options, message):
    output = [] if "--output" in options else ["--output", tmp_path / "new"]
    args = [option.format(trained=trained) for option in options]
    assert message in refused("fold", trained, *args, *output)
    assert not (tmp_path / "new").exists()


def test_what_cannot_be_converted(refused, trained, tmp_path):
    assert "--fine-tune is 1" in refused("fold", trained, "--fine-tune", 1)
    assert "holds no run" in refused("convert", tmp_path, "--model", "pathnet-4-4")
    assert "unknown model" in refused("convert", trained, "--model", "pathnut-4-4")
    error = refused("convert", trained, "--model", "pathnet-5-4", "--output", tmp_path / "new")
    assert "params/layer5/conv/kernel is missing" in error
    assert not (tmp_path / "new").exists()


def test_a_derived_run_without_its_checkpoint_does_not_start_again(refused, loaded, tmp_path):
    run, variables, _ = loaded
    begin(run, variables, tmp_path / "run", {"command": "fold", "workdir": "there"})
    for checkpoint in (tmp_path / "run" / "checkpoints").iterdir():
        checkpoint.rename(tmp_path / checkpoint.name)
    error = refused("train", "--workdir", tmp_path / "run")
    assert "was made from there by `paramshare fold`" in error


def test_variables_and_folders_that_cannot_start_a_run(loaded, tmp_path):
    run, variables, _ = loaded
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="exists"):
        begin(run, variables, tmp_path, {})
    with pytest.raises(ConfigError, match="do not fit spathnet-4-4-2"):
        begin(run, {**variables, "banks": {}}, tmp_path / "new", {})
    with pytest.raises(ConfigError, match="needs a workdir"):
        derive(run, variables, run, variables, fine_tune=True)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_derived_run_is_resumed_on_request(loaded, tmp_path, monkeypatch):
    """As studies do: the source is evaluated once, and an existing workdir is continued."""
    run, variables, _ = loaded
    before, after = (Evaluation(1.0, 7, {"f1": value}) for value in (0.5, 0.25))
    monkeypatch.setattr(
        "paramshare.training.derive.make_evaluate", lambda run: lambda variables, source: after
    )
    options: Any = {"workdir": tmp_path / "w", "before": before}
    first = derive(run, variables, run, variables, **options)
    assert (first.before, first.after, first.fine_tuned) == (before, after, None)
    again = derive(run, variables, run, variables, **options, resume=True)
    assert again.as_json() == first.as_json()
    with pytest.raises(ConfigError, match="exists"):
        derive(run, variables, run, variables, **options)


def test_training_inputs_are_whole_batches_normalised(loaded):
    run: Any = loaded[0]
    batches = list(training_inputs(run, 5))
    assert [batch.shape for batch in batches] == [(28, 6, 6, 2)] * 2  # of 64 examples
    expected = (run.data.train.input[:28].astype(np.float64) - run.data.mean) / run.data.std
    np.testing.assert_allclose(batches[0], expected, rtol=1e-5, atol=1e-5)
    assert len(list(training_inputs(run, 1))) == 1


def test_configurations_of_derived_runs():
    config = Config(
        model=Model("swrn-16-1-2"),
        data=Digits(train_examples=64),
        penalty=Penalty(recurrence=0.5),
        batch_size=28,
    )
    assert with_model(config, name="swrn-16-1-1").penalty == config.penalty
    assert with_model(config, name="wrn-16-1").penalty == Penalty()
    tuned = fine_tuning(config, 3)
    assert tuned.epochs == 3 and tuned.schedule.name == "cosine" and tuned.data == config.data


def test_an_export_agrees_with_eval(command, refused, trained, loaded, tmp_path):
    """The exported script, in another process, computes what training measured."""
    test: Any = loaded[0].data.test
    np.save(tmp_path / "images.npy", test.input)
    printed = command("export", trained, "--output", tmp_path / "new")
    assert "takes input (uint8 6x6x2), gives output (float32 6x6)" in printed
    files = [str(tmp_path / name) for name in ("new/run.py", "images.npy", "outputs.npz")]
    subprocess.run([sys.executable, *files], check=True)
    found, label = np.load(files[2])["output"] > 0, test.label > 0
    f1 = 2 * np.sum(found & label) / (np.sum(found) + np.sum(label))
    assert 0 < f1 == pytest.approx(Result.read(trained / "result.json").last_score, abs=1e-6)
    assert "exists" in refused("export", trained, "--output", tmp_path / "new")
    error = refused("export", trained, "--output", tmp_path / "other", "--form", "looped")
    assert "only the stages of a shared" in error and not (tmp_path / "other").exists()


def test_other_forms_compute_the_same(command, tmp_path):
    tied = ("stage1=*0,1,0,1", "stage2=0,0,0,0", "stage3=0,1,1,2")
    model = Model("swrn-22-1-2", tied=tied)
    run = prepare(dataclasses.replace(IMAGES, model=model))
    variables = run.init().variables
    begin(run, variables, tmp_path / "run", {})
    test: Any = run.data.test
    images = np.asarray(test.input[:4])
    expected: Any = run.model.apply(variables, run.data.normalise(jnp.asarray(images)))
    for form in ("baked", "looped"):
        output = tmp_path / form
        command("export", tmp_path / "run", "--output", output, "--form", form)
        program = jax.export.deserialize(bytearray((output / "program.jaxexport").read_bytes()))
        outputs = program.call(dict(np.load(output / "variables.npz")), images)
        np.testing.assert_allclose(outputs, expected, rtol=1e-3, atol=1e-4, err_msg=form)
