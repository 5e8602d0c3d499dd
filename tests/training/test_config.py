"""Configurations: what is refused, what is kept, and what was kept before a field was there."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from paramshare.cli import override
from paramshare.models import ModelError
from paramshare.training.config import Config, ConfigError, Model, Optimizer, Penalty, Schedule, differences, from_json, to_json
from paramshare.training.data import from_arrays
from paramshare.training.loop import train
from paramshare.training.run import prepare

# As the version before filter bases, rings and repetition stored it.
OLD = """
{"model": {"name": "swrn-28-10-2", "num_classes": null, "bfloat16": false, "sync_batch_norm": true},
 "data": {"name": "cifar10", "path": null, "data_dir": null, "validation": 0.1, "train_examples": null, "image_size": null},
 "augment": {"flip": true, "pad_crop": 4, "cutout": 0},
 "optimizer": {"name": "sgd", "learning_rate": 0.1, "momentum": 0.9, "nesterov": true, "weight_decay": 0.0005},
 "schedule": {"name": "step", "milestones": [60, 120, 160], "factor": 0.2, "warmup_epochs": 0.0},
 "epochs": 200, "batch_size": 128, "label_smoothing": 0.0, "seed": 3, "mapping": "pmap", "log_every": 50, "validate_every": 1,
 "checkpoint_every": 1, "tensorboard": false}
"""


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"model": Model(stem="mnist")}, "model.stem is 'mnist'; it must be one of imagenet, cifar or None"),  # type: ignore[arg-type]
        ({"optimizer": Optimizer(clip_norm=0.0)}, "optimizer.clip_norm is 0.0; it must be positive and finite, or None"),
        ({"optimizer": Optimizer(clip_norm=float("inf"))}, "optimizer.clip_norm is inf"),
        ({"optimizer": Optimizer(clip_norm="1")}, "optimizer.clip_norm is '1'; it must be float or None"),  # type: ignore[arg-type]
        ({"optimizer": Optimizer(decay_coefficients=1)}, "optimizer.decay_coefficients is 1; it must be of type bool"),  # type: ignore[arg-type]
        ({"schedule": Schedule("linear")}, "schedule.name is 'linear'; it must be one of step, cosine, exponential, constant"),  # type: ignore[arg-type]
        ({"schedule": Schedule(period=0.0)}, "schedule.period is 0.0; it must be positive and finite"),
        ({"schedule": Schedule(factor=float("inf"))}, "schedule.factor is inf; it must be positive and finite"),
        ({"schedule": Schedule(factors=(0.1, 0.1))}, r"schedule.factors is \(0.1, 0.1\); .* for each of the 3 milestones"),
        ({"schedule": Schedule(factors=(0.1, 0.1, 0.0))}, r"schedule.factors is \(0.1, 0.1, 0.0\)"),
        ({"schedule": Schedule(factors=("a", 0.1, 0.1))}, r"schedule.factors is .*; it must be a tuple of floats"),  # type: ignore[arg-type]
        ({"penalty": Penalty(-1.0)}, "penalty.orthogonality is -1.0; it must be 0 or more, and finite"),
        ({"penalty": Penalty(10.0, pools=("stage[",))}, r"penalty.pools holds 'stage\[', which is no regular expression \("),
        ({"penalty": Penalty(10.0, pools="stage1")}, "penalty.pools is 'stage1'; it must be a tuple of strs"),  # type: ignore[arg-type]
        ({"gradient_flow": 1}, "gradient_flow is 1; it must be of type bool"),
    ],
)
def test_what_makes_no_sense_is_refused(part, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(Config(), **part).check()


RICH = Config(
    model=Model("resnet50-sharedpp", stem="cifar"),
    optimizer=Optimizer(clip_norm=1, decay_coefficients=True),
    schedule=Schedule("step", milestones=(150, 225, 285), factors=(0.1, 0.1, 0.5)),
    penalty=Penalty(10.0, pools=(r"stage\d-conv2", r"stage\d-conv3"), unique=True),
    gradient_flow=True,
    epochs=300,
)


def test_what_is_stored_comes_back():
    RICH.check()
    back = from_json(to_json(RICH))
    assert back == RICH and hash(back) == hash(RICH)  # tuples, not the lists of JSON


def test_a_configuration_stored_before_a_field_was_there_has_its_default():
    old = from_json(OLD)
    old.check()
    assert old == dataclasses.replace(
        Config(), model=Model("swrn-28-10-2", sync_batch_norm=True), data=old.data, augment=old.augment, seed=3
    )
    stored = json.loads(to_json(old))
    for part, values in json.loads(OLD).items():
        assert (values if not isinstance(values, dict) else stored[part] | values) == stored[part]


def test_what_is_logged_makes_no_other_run_and_what_is_trained_does():
    assert differences(dataclasses.replace(RICH, gradient_flow=False, log_every=1, tensorboard=True), RICH) == []
    changed = dataclasses.replace(RICH, penalty=Penalty(), optimizer=Optimizer())
    assert differences(changed, RICH) == [
        "optimizer.decay_coefficients: True -> False",
        "optimizer.clip_norm: 1 -> None",
        "penalty.orthogonality: 10.0 -> 0.0",
        r"penalty.pools: ('stage\\d-conv2', 'stage\\d-conv3') -> ()",
        "penalty.unique: True -> False",
    ]


def test_the_command_line_reaches_them():
    said = (
        "--model.stem cifar --optimizer.clip-norm 1 --optimizer.decay-coefficients --schedule.factors 0.1 0.1 0.5 "
        "--penalty.orthogonality 10 --penalty.pools a b --penalty.unique --gradient-flow"
    )
    found = override(Config(), [str(word) for word in said.split()], "config.py")
    assert found == Config(
        model=Model(stem="cifar"),
        optimizer=Optimizer(clip_norm=1.0, decay_coefficients=True),
        schedule=Schedule(factors=(0.1, 0.1, 0.5)),
        penalty=Penalty(10.0, ("a", "b"), unique=True),
        gradient_flow=True,
    )
    assert override(
        found, ["--model.stem", "None", "--optimizer.clip-norm", "None", "--penalty.pools"], "config.py"
    ) == dataclasses.replace(
        found,
        model=Model(),
        optimizer=Optimizer(decay_coefficients=True),
        penalty=Penalty(10.0, (), unique=True),
    )


@pytest.fixture(scope="module")
def images():
    """A function of a side: twenty images of that size, in colour."""

    def make(side: int):
        image, label = np.zeros((20, side, side, 3), np.uint8), np.arange(20) % 10
        return from_arrays((image, label), (image, label), num_classes=10, mean=(0.0,) * 3, std=(1.0,) * 3)

    return make


@pytest.mark.parametrize(
    ("stem", "side", "wanted"),
    [(None, 32, "cifar"), (None, 64, "imagenet"), ("imagenet", 32, "imagenet"), ("cifar", 64, "cifar")],
)
def test_the_stem_is_that_of_the_images_size_or_the_one_asked_for(images, stem, side, wanted):
    run = prepare(Config(model=Model("resnet18-rpg", stem=stem)), data=images(side), devices=jax.devices()[:1])
    model = run.model.model  # type: ignore[attr-defined]
    assert model.stem == wanted


def test_a_stem_is_refused_where_there_is_no_choice(images, network, digits):
    with pytest.raises(ModelError, match="swrn-16-1-1 has no option 'stem'"):
        prepare(Config(model=Model("swrn-16-1-1", stem="cifar")), data=images(32), devices=jax.devices()[:1])
    with pytest.raises(ConfigError, match=r"model\.stem and model\.tied are for networks by name"):
        prepare(Config(model=Model(stem="cifar")), model=network, data=digits, devices=jax.devices()[:1])


@pytest.mark.parametrize(
    ("name", "penalty", "message"),
    [
        ("resnet20", Penalty(10.0), r"penalty.orthogonality is 10.0 with model 'resnet20': .*without banks of filters"),
        ("swrn-16-1-1", Penalty(10.0), "without banks of filters"),
        ("resnet20-s8u1", Penalty(10.0, ("stage1", "conv.*")), r"'conv\.\*' matches no bank; the banks are \['stage1'.*; or set it to 0"),
    ],
)
def test_a_penalty_without_its_banks_is_refused_before_anything_is_written(images, tmp_path, name, penalty, message):
    with pytest.raises(ConfigError, match=message):
        train(Config(model=Model(name), penalty=penalty), tmp_path / "run", data=images(32), devices=jax.devices()[:1])
    assert not (tmp_path / "run").exists()
