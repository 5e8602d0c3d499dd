"""Configurations: what is refused, what is stored, and what is built from them."""

import dataclasses
import json
from typing import Any

import jax
import numpy as np
import pytest

from paramshare.data import Digits, from_arrays
from paramshare.models import ModelError
from paramshare.tasks import Augment
from paramshare.training.config import (
    Config,
    ConfigError,
    Model,
    Optimizer,
    Penalty,
    Schedule,
    differences,
    from_json,
    load_file,
    to_json,
)
from paramshare.training.loop import train
from paramshare.training.run import prepare

ONE = jax.devices()[:1]


@pytest.mark.parametrize(
    ("section", "fields", "message"),
    [
        (Config, {"epochs": 0}, r"epochs must be .* 1, got 0"),
        (Config, {"epoch": 3}, "epoch"),
        (Config, {"seed": 2**31}, "seed must be"),
        (Config, {"label_smoothing": 1.0}, "label_smoothing must be less than 1"),
        (Config, {"similarity_every": -1}, "similarity_every must be"),
        (Config, {"gradient_flow": 1}, "gradient_flow must be a valid boolean, got 1"),
        (Config, {"mapping": "vmap"}, "mapping must be 'pmap' or 'shard_map'"),
        (Config, {"optimizer": Schedule()}, "optimizer must be an instance of Optimizer"),
        (Model, {"stem": "mnist"}, "stem must be 'imagenet' or 'cifar', got 'mnist'"),
        (Optimizer, {"name": "sdg"}, "name must be 'sgd', 'adam' or 'adamw', got 'sdg'"),
        (Optimizer, {"learning_rate": float("nan")}, "learning_rate must be .*, got nan"),
        (Optimizer, {"momentum": 1.0}, "momentum must be less than 1"),
        (Optimizer, {"weight_decay": float("inf")}, "weight_decay must be .*, got inf"),
        (Optimizer, {"clip_norm": 0.0}, "clip_norm must be greater than 0, got 0.0"),
        (Optimizer, {"clip_norm": "1"}, "clip_norm must be a valid number, got '1'"),
        (Schedule, {"period": 0.0}, "period must be greater than 0"),
        (Schedule, {"factors": (0.1, "a", 0.1)}, "factors.1 must be a valid number, got 'a'"),
        (Schedule, {"factors": (0.1, 0.1, 0.0)}, "factors.2 must be greater than 0"),
        (Penalty, {"orthogonality": -1.0}, "orthogonality must be .*, got -1.0"),
        (Penalty, {"pools": "stage1"}, "pools must be a valid tuple, got 'stage1'"),
    ],
)
def test_a_value_out_of_range_or_of_another_type_is_refused(section, fields, message):
    with pytest.raises(ConfigError, match=message) as caught:
        section(**fields)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(section(), **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"schedule": Schedule(factors=(0.1, 0.1))},
            r"schedule.factors is \(0.1, 0.1\); .* each of the 3 milestones",
        ),
        ({"schedule": Schedule(milestones=(5, 3))}, r"schedule.milestones is \(5, 3\)"),
        ({"schedule": Schedule(milestones=(0, 3))}, r"schedule.milestones is \(0, 3\)"),
        (
            {"schedule": Schedule(warmup_epochs=9.0), "epochs": 8},
            "schedule.warmup_epochs is 9.0; it must be at most epochs, 8",
        ),
        (
            {"penalty": Penalty(10.0, pools=("stage[",))},
            r"penalty.pools holds 'stage\[\'; it must be a regular expression",
        ),
    ],
)
def test_fields_that_contradict_each_other_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        Config(**fields).check()


RICH = Config(
    model=Model("resnet50-sharedpp", stem="cifar", tied=("a=0,1",)),
    data=Digits(validation=0.2, train_examples=100),
    augment=Augment(pad_crop=1),
    optimizer=Optimizer(clip_norm=1, decay_coefficients=True),
    schedule=Schedule("step", milestones=(150, 225, 285), factors=(0.1, 0.1, 0.5)),
    penalty=Penalty(10.0, pools=(r"stage\d-conv2", r"stage\d-conv3"), unique=True),
    gradient_flow=True,
    epochs=300,
)


def test_json_is_read_back_as_the_same_configuration():
    RICH.check()
    back = from_json(to_json(RICH))
    assert back == RICH and hash(back) == hash(RICH)  # tuples, not the lists of JSON
    assert type(back.data) is Digits
    assert json.loads(to_json(back)) == json.loads(to_json(RICH))


def test_a_field_that_was_not_stored_takes_its_default():
    stored = json.loads(to_json(RICH))
    for section, name in (("model", "tied"), ("optimizer", "clip_norm"), ("data", "validation")):
        del stored[section][name]
    del stored["penalty"], stored["epochs"]
    assert from_json(json.dumps(stored)) == dataclasses.replace(
        RICH,
        model=dataclasses.replace(RICH.model, tied=()),
        data=Digits(train_examples=100),
        optimizer=dataclasses.replace(RICH.optimizer, clip_norm=None),
        penalty=Penalty(),
        epochs=200,
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "JSON"),
        ("[]", "must be"),
        ('{"epochs": "3"}', "epochs must be a valid integer, got '3'"),
        ('{"depth": 3}', "depth"),
        ('{"optimizer": {"learning_rate": -1}}', "optimizer.learning_rate must be greater than 0"),
        ('{"data": {"kind": "digits", "validation": 2}}', "validation must be less than 1"),
        ('{"data": {"kind": "digits", "colour": 2}}', "colour"),
        ('{"data": {"kind": "letters"}}', "'letters'"),
        ('{"data": 3}', "data"),
        ('{"augment": {"flip": 1}}', "augment.flip must be a valid boolean"),
    ],
)
def test_json_of_something_else_is_refused(text, message):
    with pytest.raises(ConfigError, match=rf"not a configuration of this version.*{message}") as e:
        from_json(text)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "must set `config` .* got NoneType"),
        ("config = 1 / 0", "fails with ZeroDivisionError"),
        ("raise SystemExit", "fails with SystemExit"),
        ("import sys\nsys.exit(0)", "fails with SystemExit: 0"),
        (
            "from paramshare.training.config import *\nconfig = Config(epochs=0)",
            "config.py: .*epochs must be",
        ),
    ],
)
def test_a_file_without_a_configuration_is_refused(tmp_path, text, message):
    (tmp_path / "config.py").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_file(tmp_path / "config.py")
    with pytest.raises(ConfigError, match="no configuration file"):
        load_file(tmp_path / "other.py")


def test_only_fields_that_change_training_make_another_run():
    logged = dataclasses.replace(RICH, gradient_flow=False, log_every=1, tensorboard=True)
    assert differences(logged, RICH) == []
    changed = dataclasses.replace(
        RICH, penalty=Penalty(), optimizer=Optimizer(), data=Digits(validation=0.2)
    )
    assert differences(changed, RICH) == [
        "data.train_examples: 100 -> None",
        "optimizer.decay_coefficients: True -> False",
        "optimizer.clip_norm: 1.0 -> None",
        "penalty.orthogonality: 10.0 -> 0.0",
        r"penalty.pools: ('stage\\d-conv2', 'stage\\d-conv3') -> ()",
        "penalty.unique: True -> False",
    ]


@pytest.fixture(scope="module")
def images():
    """A function of a side: twenty images of that size, in colour."""

    def make(side: int):
        image, label = np.zeros((20, side, side, 3), np.uint8), np.arange(20) % 10
        return from_arrays(
            (image, label), (image, label), num_classes=10, mean=(0.0,) * 3, std=(1.0,) * 3
        )

    return make


@pytest.mark.parametrize(
    ("stem", "side", "expected"),
    [(None, 32, "cifar"), (None, 64, "imagenet"), ("imagenet", 32, "imagenet")],
)
def test_the_stem_follows_the_size_of_the_images_unless_it_is_set(images, stem, side, expected):
    run = prepare(Config(model=Model("resnet18-rpg", stem=stem)), data=images(side), devices=ONE)
    assert run.model.model.stem == expected  # type: ignore[attr-defined]


def test_options_of_the_network_are_refused_where_they_do_not_apply(images, network, digits):
    with pytest.raises(ModelError, match="swrn-16-1-1 has no option 'stem'"):
        prepare(Config(model=Model("swrn-16-1-1", stem="cifar")), data=images(32), devices=ONE)
    with pytest.raises(ConfigError, match=r"model.num_classes is 7; .* must be 10 or None"):
        prepare(Config(model=Model(num_classes=7)), data=images(32), devices=ONE)
    cases: Any = ({"stem": "cifar"}, {"form": "paper"}, {"bfloat16": True}, {"tied": ("a=0",)})
    for fields in cases:
        with pytest.raises(ConfigError, match=f"model.{next(iter(fields))} is .* that you pass"):
            prepare(Config(model=Model(**fields)), model=network, data=digits, devices=ONE)


def test_a_tasks_own_label_smoothing_is_kept(digits, network):
    task = dataclasses.replace(digits.task, label_smoothing=0.1)
    data = dataclasses.replace(digits, task=task)
    for smoothing in (0.0, 0.1):
        run = prepare(Config(label_smoothing=smoothing), model=network, data=data, devices=ONE)
        assert run.task == task
    with pytest.raises(ConfigError, match=r"label_smoothing is 0\.2, .* must be 0 or 0\.1"):
        prepare(Config(label_smoothing=0.2), model=network, data=data, devices=ONE)


@pytest.mark.parametrize(
    ("name", "penalty", "message"),
    [
        ("resnet20", Penalty(10.0), r"penalty.orthogonality is 10.0 with model 'resnet20': "),
        ("swrn-16-1-1", Penalty(10.0), "penalty.orthogonality is 10.0"),
        ("resnet20-s8u1", Penalty(10.0, ("stage1", "conv.*")), r"'conv\.\*'.*; or set it to 0"),
        ("resnet20-s8u1", Penalty(recurrence=0.1), "penalty.recurrence is 0.1"),
    ],
)
def test_a_penalty_without_its_banks_is_refused_before_anything_is_written(
    images, tmp_path, name, penalty, message
):
    with pytest.raises(ConfigError, match=message):
        train(
            Config(model=Model(name), penalty=penalty),
            tmp_path / "run",
            data=images(32),
            devices=ONE,
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "notes"),
    [
        ({"epochs": 200}, []),
        ({"epochs": 130}, ["schedule.milestones (160,): the run ends after 130 epochs"]),
        ({"schedule": Schedule("cosine")}, []),
        ({"schedule": Schedule("cosine", milestones=(5,))}, ["schedule.milestones (5,)"]),
        (
            {"schedule": Schedule("constant", period=3.0, factor=0.5)},
            ["schedule.factor 0.5", "schedule.period 3.0"],
        ),
        (
            {"optimizer": Optimizer("adam", momentum=0.5, nesterov=False)},
            ["optimizer.momentum 0.5", "optimizer.nesterov False"],
        ),
        (
            {"penalty": Penalty(pools=("stage1",), unique=True)},
            ["penalty.pools ('stage1',)", "penalty.unique True"],
        ),
        ({"penalty": Penalty(1.0, pools=("stage1",), unique=True)}, []),
    ],
    ids=str,
)
def test_settings_without_effect(changes, notes):
    assert Config(**{"epochs": 200} | changes).without_effect() == notes
