"""The recipes and the launch scripts.

Every recipe's network is built at full size, without arithmetic. Some recipes are run from their
files on TFDS's mock of their data sets, or on a few examples, with smaller networks.
"""

import dataclasses
import pathlib
import re
import subprocess
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds

from paramshare import count
from paramshare.cli.overrides import add_options
from paramshare.cli.parsing import Parser
from paramshare.cli.train import add_own_options
from paramshare.data import Canvases, Coco, Curriculum, Dataset, Grids, RotatedDigits, Text, Tfds
from paramshare.tasks.keypoints import SIGMAS
from paramshare.training.config import (
    Config,
    Model,
    differences,
    from_json,
    load_file,
    to_json,
)
from paramshare.training.loop import train
from paramshare.training.optimizer import learning_rate
from paramshare.training.run import named_network, prepare
from paramshare.training.step import make_train_step
from paramshare.zoo import options_of

EXPERIMENTS = pathlib.Path(__file__).parents[1] / "experiments"
FILES = sorted((EXPERIMENTS / "recipes").glob("*.py"))


@pytest.fixture(autouse=True)
def _lenient_promotion():
    # optax's schedules multiply integer steps with floats.
    with jax.numpy_dtype_promotion("standard"):
        yield


def of(name: str) -> pathlib.Path:
    return next(file for file in FILES if file.stem == name)


# Recipes of two data sources, with smaller networks. Detectors and networks for several tasks are
# trained in training/test_tasks_training.py, every scheme in training/test_checkpoint_schemes.py.
SMALLER = {
    "imagenet_rpg": "resnet8-rpg-1000",
    "shortest_paths": "spathnet-2-4-2",
}
TINY = Curriculum(
    size=8,
    windows=(3,),
    examples=4,
    tests=2,
    far_windows=(5,),
    far_sizes=(),
    far_densities=(),
)


@pytest.fixture(scope="module")
def people(coco, tmp_path_factory) -> str:
    """A folder of people with COCO's joints: a data set for recipes that need a folder."""
    folder = tmp_path_factory.mktemp("people")
    part = coco.standing(5, SIGMAS)
    return str(coco.make(folder, train=part, val=part))


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLER)
def test_runs_on_mock_data(name, tmp_path):
    config = load_file(of(name))
    network = SMALLER[name]
    data: Any = config.data
    if isinstance(data, Grids):
        data = dataclasses.replace(data, curriculum=TINY)
    elif data.name == "imagenet2012":
        data = dataclasses.replace(data, image_size=64)
    # Images of this size would get the other stem.
    stem = "imagenet" if data.name == "imagenet2012" and "stem" in options_of(network) else None
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, name=network, stem=stem),
        data=data,
        penalty=dataclasses.replace(config.penalty, pools=()),
        schedule=dataclasses.replace(config.schedule, warmup_epochs=0.0),
        epochs=1,
        batch_size=4,
    )
    with tfds.testing.mock_data(num_examples=5):
        result = train(config, tmp_path / "run", devices=jax.devices()[:1], quiet=True)
    assert result.steps == 1 and np.isfinite(result.last.loss)


class Pixelwise(nn.Module):
    """Heatmaps of one stage, each a weighted sum of the colours; the network is not the point."""

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array, train: bool = False) -> jax.Array:
        return nn.Dense(len(SIGMAS))(x_BxHxWxC[:, None, ::4, ::4])


def test_a_recipe_of_poses_runs_on_a_folder(people, tmp_path):
    config = load_file(of("pose_small"))
    config = dataclasses.replace(
        config,
        model=Model(),
        data=dataclasses.replace(config.data, path=people, image_size=32),
        schedule=dataclasses.replace(config.schedule, warmup_epochs=0.0),
        epochs=1,
        batch_size=4,
    )
    devices = jax.devices()[:1]
    result = train(config, tmp_path / "run", model=Pixelwise(), devices=devices, quiet=True)
    assert result.steps == 1 and np.isfinite(result.last.loss) and result.score.name == "ap"


# specs: trainable parameters of the recipes' networks, without batch statistics
TRAINABLE = {
    "cifar10_swrn": 17_125_630,
    "cifar100_swrn": 17_183_320,
    "imagenet_swrn50_2": 57_807_728,
    "cifar10_basis": 197_258,
    "cifar100_basis": 7_726_676,
    "imagenet_basis": 18_262_056,
    "imagenet_mobilenet": 3_243_080,
    "imagenet_rpg": 2_891_304,
    "cifar10_rpg": 2_359_296 + 16_458,
    "cifar100_rpg": 2_359_296 + 62_628,
    "cifar10_vgg_repeat": 568_746,
    "cifar10_resnet16_repeat": 183_498,
    "shortest_paths": 186_097,
    "shortest_paths_reduced": 2 * 16 + 10 * (9 * 16 * 16 + 2 * 16 + 10) + 16 + 1,
    # the stages of resnet20-s16u1, a 7x7 stem, pyramid and heads of width 64
    "canvases_retinanet": 572_582,
    # of one category; each further one adds an output to nine anchors
    "detection_small": 574_591 - 2 * 9 * (9 * 64 + 1),
    "coco_retinanet": 26_544_948 - 79 * 9 * (9 * 256 + 1),
    # a ring, and what is private, for 17 joints; the rings are as large as one hourglass
    "pose_small": 190_464 + 38_866,
    "coco_pose": 3_047_424 + 459_490,
    "rotated_digits": 304_154,
    "rotated_digits_small": 304_154,
    # a ring; stem, norms and classifiers of three networks with 10, 2 and 1 outputs
    # one block of 12 D^2, and what is private: patches, positions, norms and biases, a head
    "cifar10_vit": 12 * 64**2 + 49 * 64 + 64 * 64 + 6 * 13 * 64 + 2 * 64 + 65 * 10,
    # one block, norms, an embedding and a head for the 256 bytes; shakespeare has 65 characters
    "shakespeare": 4 * 128**2 + 3 * 352 * 128 + 13 * 128 + 2 * 256 * 128,
    "several_tasks": 9_000 + 3 * (9 * 16 + 32 + 4 * (16 + 32 + 64)) + 13 * 65,
}


def test_every_recipe_is_in_the_table():
    assert {file.stem for file in FILES} - {"quickstart", "fashion_mnist"} == set(TRAINABLE)


def on_mock_data(name: str, folder: str = "") -> tuple[Config, Dataset]:
    """The configuration of a recipe, and a mock of its data."""
    config = load_file(of(name))
    data: Any = config.data
    if isinstance(data, Grids):  # the network does not depend on the number of problems
        curriculum = dataclasses.replace(data.curriculum, examples=1, tests=1)
        data = dataclasses.replace(data, curriculum=curriculum)
    if isinstance(data, Canvases | RotatedDigits):
        data = dataclasses.replace(data, examples=1, tests=1)
    if isinstance(data, Coco):
        data = dataclasses.replace(data, path=folder)
    if isinstance(data, Tfds):  # the mock has few images
        data = dataclasses.replace(data, train_examples=None)
    if isinstance(data, Text):  # the characters are those of the text
        data = dataclasses.replace(data, unit="bytes")
    with tfds.testing.mock_data(num_examples=5):
        return config, data.load()


@pytest.mark.parametrize("name", TRAINABLE)
def test_the_network_has_its_published_size(name, people):
    config, data = on_mock_data(name, people)
    model: Any = named_network(config, data.task.network_options(), data.input_shape)
    assert model.layout.trainable == TRAINABLE[name]


@pytest.mark.slow
def test_the_training_step_is_sound_at_full_size():
    """Of a recipe with penalised pools; recipes of other kinds run on mock data."""
    config = load_file(of("imagenet_mobilenet"))
    with tfds.testing.mock_data(num_examples=5):
        run = prepare(config, devices=jax.devices()[:1])
    state = run.shapes
    assert count(state.variables)["trainable"] == TRAINABLE["imagenet_mobilenet"]
    step = run.devices.map(make_train_step(run, config.seed))
    label = run.task.label_spec(run.data.input_shape)
    batch = {
        "input": jax.ShapeDtypeStruct((1, config.batch_size, *run.data.input_shape), jnp.uint8),
        "label": jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((1, config.batch_size, *leaf.shape), leaf.dtype),
            label,
        ),
    }
    after, metrics = jax.eval_shape(step, state, None, batch)
    assert shapes(after) == shapes(state)
    assert "orthogonality" in metrics and config.penalty.orthogonality
    assert run.task.score.name in metrics


def shapes(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


@pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])
def test_recipe_is_documented_and_survives_storing(file):
    config = load_file(file)
    config.check()
    assert from_json(to_json(config)) == config
    before: Any = config.data
    data = dataclasses.replace(before, validation=0.5)
    assert differences(dataclasses.replace(config, seed=5, data=data), config) == [
        f"data.validation: {before.validation} -> 0.5",
        "seed: 0 -> 5",
    ]
    docstring = " ".join(file.read_text().split('"""')[1].split())
    assert f"paramshare train experiments/recipes/{file.name} --workdir runs/" in docstring
    assert not re.search(r"\b(TIME|RESULT|TODO)\b", docstring)
    if "trainable parameters" in docstring:
        assert f"{TRAINABLE[file.stem]:,} trainable parameters" in docstring


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        # spec: 0.1, times 0.2 at epochs 60, 120, 160
        ("cifar10_swrn", {0: 0.1, 59: 0.1, 60: 0.02, 120: 0.004, 160: 0.0008, 199: 0.0008}),
        ("cifar100_swrn", {0: 0.1, 60: 0.02, 120: 0.004, 160: 0.0008}),
        ("imagenet_swrn50_2", {0: 0.1, 30: 0.01, 60: 0.001, 90: 0.0001, 99: 0.0001}),
        # spec of filter bases: after 150 and 225; 60, 100 and 140; the last one halves
        ("cifar10_basis", {0: 0.1, 149: 0.1, 150: 0.01, 225: 0.001, 299: 0.001}),
        ("cifar100_basis", {0: 0.1, 149: 0.1, 150: 0.01, 225: 0.001, 299: 0.001}),
        ("imagenet_basis", {0: 0.1, 59: 0.1, 60: 0.01, 100: 0.001, 140: 0.0001, 149: 0.0001}),
        ("imagenet_mobilenet", {0: 0.1, 149: 0.1, 150: 0.01, 225: 0.001, 285: 0.0005, 299: 0.0005}),
        ("cifar10_rpg", {0: 0.1, 60: 0.01, 120: 0.001, 160: 0.0001}),
        ("cifar100_rpg", {0: 0.1, 60: 0.01, 120: 0.001, 160: 0.0001}),
        # spec of repetition: times 0.2 every 60 of 200
        ("cifar10_vgg_repeat", {0: 0.1, 59: 0.1, 60: 0.02, 120: 0.004, 180: 0.0008, 199: 0.0008}),
        ("cifar10_resnet16_repeat", {0: 0.1, 60: 0.02, 120: 0.004, 180: 0.0008}),
        # spec of the algorithmic task: .01, with Adam; that it stays so is ours
        ("shortest_paths", {0: 0.01, 49: 0.01, 50: 0.01, 125: 0.01, 249: 0.01}),
        ("shortest_paths_reduced", {0: 0.01, 40: 0.01, 79: 0.01}),
        # Lin et al. 2017: 90,000 steps of 16 images are 12 epochs; after 60,000 and 80,000
        ("coco_retinanet", {1: 0.01, 7: 0.01, 8: 1e-3, 10: 1e-3, 11: 1e-4}),
        # Xiao et al. 2018
        ("coco_pose", {0: 1e-3, 89: 1e-3, 90: 1e-4, 120: 1e-5, 139: 1e-5}),
    ],
)
def test_learning_rates_of_the_recipes(name, rates):
    config = load_file(of(name))
    rate: Any = learning_rate(config, steps_per_epoch=7)
    for epoch, expected in rates.items():
        assert float(rate(7 * epoch)) == pytest.approx(expected, rel=1e-5)
        assert float(rate(7 * epoch + 6)) == pytest.approx(expected, rel=1e-5)


def test_the_ring_papers_rate_falls_at_every_step():
    """Spec: 0.1 * 0.1^(epoch / 45), 90 epochs."""
    rate: Any = learning_rate(load_file(of("imagenet_rpg")), steps_per_epoch=7)
    for step in (0, 1, 100, 315, 629):
        assert float(rate(step)) == pytest.approx(0.1 * 0.1 ** (step / 7 / 45), rel=1e-5)


def test_the_curriculum_of_shortest_paths():
    """Spec: grids of 32 x 32, five windows, 5,000 examples and 50 epochs each; Adam; 20 layers."""
    config = load_file(of("shortest_paths"))
    assert isinstance(config.data, Grids)
    curriculum = config.data.curriculum
    assert (curriculum.size, curriculum.density, curriculum.examples) == (32, 0.1, 5000)
    assert curriculum.windows == (5, 9, 13, 17, 21) and config.epochs == 250
    assert config.optimizer.name == "adam" and config.model.name == "spathnet-20-32-20"


LAUNCH = sorted((EXPERIMENTS / "launch").iterdir())


@pytest.mark.parametrize("file", LAUNCH, ids=lambda file: file.name)
def test_launch_examples_have_options_that_exist(file):
    """Of the command itself: those of gcloud and Slurm come before it."""
    parser = Parser()
    add_own_options(parser)
    text = "\n".join(x for x in file.read_text().splitlines() if not x.startswith("#"))
    words = re.findall(r"[\w./-]+", re.split(r"paramshare\W+train", text)[1])
    recipe = next(word for word in words if word.endswith(".py"))
    add_options(parser, load_file(EXPERIMENTS.parent / recipe))
    options = [word for word in words if word.startswith("--")]
    assert "--workdir" in options
    for option in options:
        assert option in parser._option_string_actions, option
    if file.suffix == ".sh":
        subprocess.run(["bash", "-n", file], check=True)
