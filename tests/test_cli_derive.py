"""`paramshare fold` and `convert`: what they measure, and the workdirs they make."""

import dataclasses
import json
import pathlib
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest

from paramshare.cli import main
from paramshare.shared import Shared
from paramshare.training.config import Config, ConfigError, Data, Model, Penalty
from paramshare.training.derive import begin, trained, training_images
from paramshare.training.loop import train
from paramshare.training.run import prepare, tied_scheme, tied_text

ONE = jax.devices()[:1]


@pytest.fixture(autouse=True, scope="module")
def _lenient_promotion():
    # optax's schedules multiply integer steps with floats.
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def soft(tmp_path_factory) -> pathlib.Path:
    """A run of two steps; two layers on two templates a stage."""
    workdir = tmp_path_factory.mktemp("runs") / "soft"
    config = Config(
        model=Model("swrn-16-1-2"), data=Data("digits", train_examples=64), penalty=Penalty(recurrence=0.01), epochs=1, batch_size=28
    )
    train(config, workdir, quiet=True)
    return workdir


def command(capsys, *arguments) -> str:
    assert main([str(argument) for argument in arguments]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def refused(capsys, *arguments) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and said.err.startswith("paramshare: ")
    return said.err


def test_folding_makes_a_run_that_goes_on(soft, tmp_path, capsys):
    folded = tmp_path / "folded"
    told = json.loads(command(capsys, "fold", soft, "--threshold", "0.01", "--output", folded, "--json", "--epochs", "2"))
    assert [(bank["groups"], bank["period"]) for bank in told["banks"]] == [([0, 0], 1)] * 3
    run, variables, step = trained(folded)
    assert step == 0 and run.config.epochs == 2
    assert run.config.model == Model("swrn-16-1-2", tied=("stage1=*0,0", "stage2=*0,0", "stage3=*0,0"))
    assert run.config.penalty.recurrence == 0  # no templates are left
    assert told["trainable"]["after"] == run.model.layout.trainable < told["trainable"]["before"]
    # What it measured is what its workdir holds.
    found = json.loads(command(capsys, "eval", folded))
    assert {name: found[name] for name in told["test"]["after"]} == told["test"]["after"]
    assert json.loads((folded / "origin.json").read_text()) == told
    # And the workdir is one like any other.
    assert "another configuration (epochs: 2 -> 3)" in refused(capsys, "train", "--workdir", folded, "--epochs", "3")
    assert "2 epochs" in command(capsys, "train", "--workdir", folded)
    again, after, step = trained(folded)
    assert step == 4 and again.config == run.config
    assert not np.array_equal(after["banks"]["stage1"]["kernels"], variables["banks"]["stage1"]["kernels"])
    said = command(capsys, "fold", folded, "--output", tmp_path / "twice")
    assert said.count("folded already") == 3 and "nothing was folded" in said and not (tmp_path / "twice").exists()


def test_scales_are_dropped_and_statistics_fitted_on_request(soft, tmp_path, capsys):
    plain, fitted = (
        json.loads(
            command(capsys, "fold", soft, "--threshold", "0.01", "--drop-scales", "--json", "--reestimate", n, "--checkpoint", "best")
        )
        for n in (0, 2)
    )
    assert plain["trainable"] == fitted["trainable"] and plain["reestimated_batches"] == 0 and fitted["reestimated_batches"] == 2
    assert [bank["scales"] for bank in plain["banks"]] == [[]] * 3
    assert plain["test"]["before"] == fitted["test"]["before"] and plain["test"]["after"]["loss"] != fitted["test"]["after"]["loss"]


def test_fine_tuning_goes_on_at_once(soft, tmp_path, capsys):
    told = json.loads(command(capsys, "fold", soft, "--threshold", "0.01", "--output", tmp_path / "tuned", "--fine-tune", "1", "--json"))
    run, _, step = trained(tmp_path / "tuned")
    assert step == 2 and run.config.epochs == 1 and run.config.optimizer.learning_rate == pytest.approx(0.01)
    assert told["test"]["fine_tuned"] == json.loads((tmp_path / "tuned" / "result.json").read_text())["last"]["test"]
    assert "--fine-tune 1; give" in refused(capsys, "fold", soft, "--fine-tune", "1")  # nowhere to train


def test_a_report_alone_writes_nothing(soft, capsys):
    before = sorted(str(path) for path in soft.parent.rglob("*"))
    said = command(capsys, "fold", soft, "--threshold", "0.01", "--banks", "stage[12]")
    assert "before" in said and "after" in said and "not asked for" in said
    assert sorted(str(path) for path in soft.parent.rglob("*")) == before


def test_folders_of_others_stay(soft, tmp_path, capsys):
    """Whatever is called nearly as the new workdir."""
    (tmp_path / "new.tmp").mkdir()
    (tmp_path / "new.tmp" / "thesis.txt").write_text("precious")
    command(capsys, "fold", soft, "--threshold", "0.01", "--output", tmp_path / "new")
    assert (tmp_path / "new.tmp" / "thesis.txt").read_text() == "precious"
    assert {path.name for path in tmp_path.iterdir()} == {"new", "new.tmp"}


def test_statistics_are_fitted_where_they_are_synchronised_in_training(soft, tmp_path, capsys):
    run, variables, _ = trained(soft)
    model = dataclasses.replace(run.config.model, sync_batch_norm=True)
    begin(prepare(dataclasses.replace(run.config, model=model)), variables, tmp_path / "sync", {})
    told = json.loads(command(capsys, "fold", tmp_path / "sync", "--threshold", "0.01", "--reestimate", "99", "--json"))
    assert told["reestimated_batches"] == 2  # what there is


def test_conversion_to_and_from_a_dense_network(soft, tmp_path, capsys):
    dense, back = tmp_path / "dense", tmp_path / "back"
    said = json.loads(command(capsys, "convert", soft, "--model", "wrn-16-1", "--output", dense, "--json"))
    assert said["trainable"]["after"] == 175_066 - 288  # images of one channel
    assert said["test"]["after"]["loss"] == pytest.approx(said["test"]["before"]["loss"], rel=1e-4)
    again = command(capsys, "convert", dense, "--model", "swrn-16-1-2", "--output", back)  # two templates for two layers: exact
    assert "train it on with: paramshare train --workdir" in again
    losses = [json.loads(command(capsys, "eval", workdir))["loss"] for workdir in (soft, dense, back)]
    np.testing.assert_allclose(losses, losses[0], rtol=1e-4)
    assert isinstance(trained(back)[0].model, Shared) and not isinstance(trained(dense)[0].model, Shared)
    assert "wrn-16-1 shares nothing, so there is nothing to fold; `paramshare convert" in refused(capsys, "fold", dense)


def test_conversion_to_a_factored_network(soft, tmp_path, capsys):
    """As many filters as there are at most: the same function, by bases and coefficients, with batch norms between them."""
    run = prepare(dataclasses.replace(trained(soft)[0].config, model=Model("resnet14"), penalty=Penalty()))
    begin(run, jax.jit(run.init)().variables, tmp_path / "dense", {})
    said = json.loads(command(capsys, "convert", tmp_path / "dense", "--model", "resnet14-s32u0", "--json"))
    assert [bank["name"] for bank in said["banks"]] == ["stage1", "stage2", "stage3"]
    assert said["test"]["after"]["loss"] == pytest.approx(said["test"]["before"]["loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--threshold", "0"], "above 0 and up to 1"),
        (["--banks", "stage4"], r"'stage4' matches no bank; the banks are"),
        (["--output", "{soft}"], "exists; give --output a folder that does not"),
        (["--reestimate", "-1"], "--reestimate -1; give the number of batches"),
        (["--threshold", "0.01", "--epochs", "0"], "epochs is 0"),
        (["--threshold", "0.01", "--frobnicate"], "no override '--frobnicate'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_requests_are_one_line_and_leave_nothing(soft, tmp_path, capsys, arguments, said):
    output = [] if "--output" in arguments else ["--output", tmp_path / "new"]
    assert said in refused(capsys, "fold", soft, *[argument.format(soft=soft) for argument in arguments], *output)
    assert not (tmp_path / "new").exists()


def test_folders_without_a_run_and_networks_of_other_layers(soft, tmp_path, capsys):
    assert "holds no run" in refused(capsys, "fold", tmp_path)
    assert "holds no run" in refused(capsys, "convert", tmp_path, "--model", "wrn-16-1")
    assert "unknown model" in refused(capsys, "convert", soft, "--model", "wrm-16-1")
    said = refused(capsys, "convert", soft, "--model", "wrn-22-1", "--output", tmp_path / "new")
    assert (
        "the variables are not those of wrn-22-1: params/stage3/block3/conv2/kernel is missing, where that network has (3, 3, 64, 64)"
        in said
    )
    assert not (tmp_path / "new").exists()


def test_a_run_begun_from_another_does_not_start_afresh(soft, tmp_path, capsys):
    run, variables, _ = trained(soft)
    begin(run, variables, tmp_path / "begun", {"command": "fold", "workdir": "there"})
    for checkpoint in (tmp_path / "begun" / "checkpoints").iterdir():
        checkpoint.rename(tmp_path / checkpoint.name)
    assert "was made from there by `paramshare fold`, but its first checkpoint is gone" in refused(
        capsys, "train", "--workdir", tmp_path / "begun"
    )


def test_what_cannot_begin_a_run(soft, tmp_path):
    run, variables, _ = trained(soft)
    with pytest.raises(ConfigError, match="exists"):
        begin(run, variables, tmp_path, {})
    with pytest.raises(ConfigError, match="not those of swrn-16-1-2"):
        begin(run, {**variables, "banks": {}}, tmp_path / "new", {})
    assert not list(tmp_path.iterdir())


def test_training_images_are_whole_batches_normalised(soft):
    run: Any = trained(soft)[0]
    batches = list(training_images(run, 5))
    assert [batch.shape for batch in batches] == [(28, 8, 8, 1)] * 2  # 58 images are left of 64
    wanted = (run.data.train.image[:28].astype(np.float64) - run.data.mean) / run.data.std
    np.testing.assert_allclose(batches[0], wanted, rtol=1e-5, atol=1e-5)
    assert len(list(training_images(run, 1))) == 1


def test_tied_networks_by_name():
    """A hard loop from the start, by configuration alone."""
    model = Model("swrn-22-1-2", tied=("stage2=*0,1,0,1", "stage3=0,0,0,0"))
    run = prepare(Config(model=model, data=Data("digits")), devices=ONE)
    assert isinstance(run.model, Shared)
    assert [str(bank.scheme) for bank in run.model.layout.banks] == [
        "Soft(templates=2)",
        "Tied(groups=(0, 1, 0, 1), scaled=True)",
        "Tied(groups=(0, 0, 0, 0))",
    ]
    for text in model.tied:
        bank, scheme = tied_scheme(text)
        assert run.model.layout[bank].scheme == scheme and tied_text(run.model.layout[bank]) == text


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (Model("wrn-16-1", tied=("stage1=0,0",)), "wrn-16-1 has no banks to tie"),
        (Model("swrn-16-1-2", tied=("stage4=0,0",)), "no bank 'stage4'"),
        (Model("swrn-16-1-2", tied=("stage1=0,0,0",)), "groups to 3 sites, but there are 2"),
        (Model("swrn-16-1-2", tied=("stage1=1,0",)), "1 comes early"),
        (Model("swrn-16-1-2", tied=("stage1",)), r"model.tied holds 'stage1' \(no '='\); write BANK=GROUPS"),
        (Model("swrn-16-1-2", tied=("stage1=a,b",)), "model.tied holds 'stage1=a,b'"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_impossible_ties(model, said):
    with pytest.raises(ConfigError, match=said):
        prepare(Config(model=model, data=Data("digits")), devices=ONE)


def test_exports_run_and_agree(soft, tmp_path, capsys):
    """The folder's own script, in another process, classifies as `eval` does, whatever the form."""
    tied, recurrent = ("stage1=*0,1,0,1", "stage2=0,0,0,0", "stage3=0,1,1,2"), tmp_path / "recurrent"
    run = prepare(dataclasses.replace(trained(soft)[0].config, model=Model("swrn-22-1-2", tied=tied), penalty=Penalty()))
    begin(run, jax.jit(run.init)().variables, recurrent, {})
    images: Any = trained(soft)[0].data.test
    np.save(tmp_path / "images.npy", images.image)
    for workdir, form in ((soft, "trained"), (soft, "baked"), (recurrent, "looped")):
        said = command(capsys, "export", workdir, "--output", tmp_path / form, "--form", form)
        assert "takes uint8 images of 8x8x1, gives 10 logits" in said
        run = [sys.executable, str(tmp_path / form / "run.py"), str(tmp_path / "images.npy")]
        classes = np.array(subprocess.run(run, capture_output=True, text=True, check=True).stdout.split(), int)
        accuracy = json.loads(command(capsys, "eval", workdir))["accuracy"]
        assert np.mean(classes == images.label) == pytest.approx(accuracy, abs=1e-6), form
    assert "there is nothing to loop" in refused(capsys, "export", soft, "--output", tmp_path / "new", "--form", "looped")
    assert "exists; give --output a folder that does not" in refused(capsys, "export", soft, "--output", tmp_path / "baked")
    assert not (tmp_path / "new").exists()
