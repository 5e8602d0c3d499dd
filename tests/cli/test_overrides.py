"""Options that override the configuration: every field has one, with help, type and default."""

import dataclasses

import pytest

from paramshare.cli import override
from paramshare.cli.errors import CommandError
from paramshare.data import Digits
from paramshare.training.config import Config, ConfigError, Model, Schedule

BASE = Config(
    model=Model(stem="cifar", bfloat16=True, tied=("stage2=0,1",)), data=Digits(train_examples=64)
)


def changed(words: str, config: Config = BASE) -> dict:
    """The fields that options change, by section."""

    def differ(before, after):
        return {
            field.name: differ(a, b) if dataclasses.is_dataclass(b) else b
            for field in dataclasses.fields(after)
            if (a := getattr(before, field.name)) != (b := getattr(after, field.name))
        }

    return differ(config, override(config, words.split()))


@pytest.mark.parametrize(
    ("words", "fields"),
    [
        ("", {}),
        ("--epochs 3 --seed=5", {"epochs": 3, "seed": 5}),
        ("--optimizer.learning-rate 1e-3", {"optimizer": {"learning_rate": 0.001}}),
        ("--optimizer.clip-norm 1", {"optimizer": {"clip_norm": 1.0}}),
        ("--model.no-bfloat16 --tensorboard", {"model": {"bfloat16": False}, "tensorboard": True}),
        ("--optimizer.no-nesterov", {"optimizer": {"nesterov": False}}),
        ("--model.stem None --model.num-classes 7", {"model": {"stem": None, "num_classes": 7}}),
        ("--data.train-examples None", {"data": {"train_examples": None}}),
        (
            "--schedule.milestones 60 120 --schedule.name cosine",
            {"schedule": {"milestones": (60, 120), "name": "cosine"}},
        ),
        ("--model.tied --epochs 3", {"model": {"tied": ()}, "epochs": 3}),
        ("--model.tied stage1=*0,0 stage2=0,0", {"model": {"tied": ("stage1=*0,0", "stage2=0,0")}}),
    ],
)
def test_options_change_their_fields(words, fields):
    assert changed(words) == fields


def test_every_field_has_an_option_with_help(capsys):
    from paramshare.cli import main

    assert main(["train", "--help"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    config = Config()
    sections = [
        ("", config),
        *((f"{f.name}.", getattr(config, f.name)) for f in dataclasses.fields(config)),
    ]
    for prefix, section in sections:
        for field in dataclasses.fields(section) if dataclasses.is_dataclass(section) else ():
            if not dataclasses.is_dataclass(getattr(section, field.name)):
                assert f"--{prefix}{field.name}".replace("_", "-") in printed
    assert "--distributed" in printed and "--model.no-bfloat16" in printed
    assert "Highest learning rate of the schedule. (default: 0.1)" in printed


def test_help_shows_the_options_of_the_named_data_set(capsys):
    from paramshare.cli import main

    assert main(["train", "--data.name", "idx", "--help"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "--data.path" in printed and "(default: idx)" in printed
    assert (
        "Data set: canvases, coco, digits, grids, idx" in printed
    )  # "arrays" cannot be loaded by name


def test_the_data_sets_name_decides_which_options_there_are(tmp_path):
    config = override(BASE, ["--data.path", str(tmp_path), "--data.name", "idx"])
    assert config.data.name == "idx" and str(getattr(config.data, "path")) == str(tmp_path)  # noqa: B009
    assert getattr(config.data, "train_examples") == 64  # noqa: B009 (kept)
    with pytest.raises(CommandError, match=r"no option '--data\.path'"):
        override(BASE, ["--data.path", str(tmp_path)])
    assert override(BASE, ["--data.name", "digits"]) == BASE
    assert override(BASE, ["--data.name", "cifar10"]).data.name == "cifar10"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--optimizer.learningrate 1", r"nearest: --optimizer\.learning-rate"),
        ("--epochs 1.5", "--epochs: invalid int value: '1.5'"),
        ("--epochs None", "--epochs: invalid int value: 'None'"),
        ("--epochs", "--epochs: expected one argument"),
        ("--schedule.name stairs", r"--schedule\.name: invalid choice: 'stairs'"),
        ("--tensorboard yes", "unrecognised argument 'yes'"),
        ("--epoch 3", "no option '--epoch'"),
    ],
)
def test_bad_options(words, message):
    with pytest.raises(CommandError, match=message):
        override(BASE, words.split())


def test_values_out_of_range_are_refused_by_the_configuration():
    with pytest.raises(ConfigError, match=r"epochs must be .* got 0"):
        override(BASE, ["--epochs", "0"])
    assert override(Config(schedule=Schedule("cosine")), []).schedule.name == "cosine"
