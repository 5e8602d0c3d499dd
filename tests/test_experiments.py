"""The recipes and the studies.

Every recipe's network is built at full size, without arithmetic. One recipe of each kind is run
from its file on TFDS's mock of its data set: a few images, and a smaller network.
"""

import dataclasses
import json
import pathlib
import re
import runpy
import subprocess
import sys
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds

from paramshare import count
from paramshare.cli import run_command
from paramshare.cli.overrides import add_options
from paramshare.cli.parsing import Parser
from paramshare.cli.train import add_own_options
from paramshare.data import Canvases, Coco, Curriculum, Grids
from paramshare.data.grid_problems import smallest_window
from paramshare.data.sets.grids import fixed_set
from paramshare.tasks.keypoints import SIGMAS
from paramshare.training import run as training_run
from paramshare.training.config import (
    ConfigError,
    Model,
    differences,
    from_json,
    load_file,
    to_json,
)
from paramshare.training.loop import train
from paramshare.training.optimizer import learning_rate
from paramshare.training.run import prepare
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


# One recipe of each scheme, data source and task, with a smaller network.
SMALLER = {
    "cifar10_swrn": "swrn-16-0.5-1",
    "cifar10_basis": "resnet14-s8u1",
    "imagenet_rpg": "resnet8-rpg-1000",
    "quickstart": "resnet16-2-repeat",
    "shortest_paths": "spathnet-2-4-2",
    "canvases_retinanet": "retinanet-resnet14-s8u1-head8x1",
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


@pytest.mark.parametrize("name", SMALLER)
def test_runs_on_mock_data(name, tmp_path):
    config = load_file(of(name))
    network = SMALLER[name]
    data: Any = config.data
    if isinstance(data, Grids):
        data = dataclasses.replace(data, curriculum=TINY)
    elif isinstance(data, Canvases):
        data = dataclasses.replace(data, examples=4, tests=2)
    elif data.name == "digits":
        data = dataclasses.replace(data, train_examples=4)
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
    # a ring, and what is private, for 17 joints; the rings are as large as one hourglass
    "pose_small": 190_464 + 38_866,
    "coco_pose": 3_047_424 + 459_490,
}


def test_every_recipe_is_in_the_table():
    assert {file.stem for file in FILES} - {"quickstart", "fashion_mnist"} == set(TRAINABLE)


def prepared(name: str, folder: str = "", monkeypatch: Any = None) -> Any:
    """The run of a recipe, on a mock of its data; its network is traced once at most."""
    config = load_file(of(name))
    if isinstance(config.data, Grids):  # the step does not depend on the number of problems
        curriculum = dataclasses.replace(config.data.curriculum, examples=1, tests=1)
        config = dataclasses.replace(
            config, data=dataclasses.replace(config.data, curriculum=curriculum)
        )

    if isinstance(config.data, Canvases):
        small = dataclasses.replace(config.data, examples=1, tests=1)
        config = dataclasses.replace(config, data=small)
    if isinstance(config.data, Coco):
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=folder))

    def variables(model: Any, name: str, data: Any) -> tuple[Any, str]:
        x = jax.ShapeDtypeStruct((1, *data.input_shape), jnp.float32)
        return jax.eval_shape(lambda x: model.init(jax.random.key(0), x), x), ""

    if monkeypatch:  # else the passes of evaluation and training are traced too
        monkeypatch.setattr(training_run, "check_model", variables)
    with tfds.testing.mock_data(num_examples=5):
        return prepare(config, devices=jax.devices()[:1])


@pytest.mark.parametrize("name", TRAINABLE)
def test_the_network_has_its_published_size(name, people, monkeypatch):
    assert prepared(name, people, monkeypatch).model.layout.trainable == TRAINABLE[name]


def test_the_training_step_is_sound_at_full_size():
    """Of a recipe with penalised pools; recipes of other kinds run on mock data."""
    run = prepared("imagenet_mobilenet")
    config, state = run.config, run.shapes
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


# --- Studies


def study(name: str, monkeypatch, *args: Any) -> dict[str, Any]:
    """The globals of a study, ready for `main()`, as if it were run as a script."""
    script = EXPERIMENTS / "studies" / f"{name}.py"
    monkeypatch.syspath_prepend(script.parent)
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, args)])
    return runpy.run_path(str(script))["main"].__globals__


GRIDS = """
from paramshare.data import Curriculum, Grids
from paramshare.training.config import Config, Model, Optimizer, Schedule

curriculum = Curriculum(
    6, 0.1, (2, 4), 16, 3, far_windows=(6,), far_sizes=(8,), far_densities=()
)
config = Config(
    model=Model("spathnet-3-2-3"),
    data=Grids(curriculum=curriculum),
    optimizer=Optimizer("adam", weight_decay=0.0),
    schedule=Schedule("constant"),
    epochs=2,
    batch_size=8,
    log_every=1,
)
"""


@pytest.fixture
def grids(tmp_path) -> pathlib.Path:
    (tmp_path / "config.py").write_text(GRIDS)
    return tmp_path / "config.py"


def test_networks_are_compared_on_any_task(grids, tmp_path, monkeypatch, capsys):
    """One command for a task without accuracy; rerun, it reads the finished runs."""
    out = tmp_path / "out"
    args = (grids, "--models", "pathnet-2-2", "--seeds", "0", "1", "--out", out)
    study("compare", monkeypatch, *args)["main"]()
    text = (out / "table.md").read_text()
    assert (
        "test F1, last epoch, mean of 2 seeds" in text and text.strip() in capsys.readouterr().out
    )
    results = [json.loads((out / f"pathnet-2-2-seed{i}/result.json").read_text()) for i in (0, 1)]
    scores = [result["last"]["measures"]["f1"] for result in results]
    assert f"{np.mean(scores):.2%} ({np.std(scores, ddof=1):.2%})" in text
    before = (out / "pathnet-2-2-seed0" / "metrics.jsonl").stat().st_mtime_ns
    study("compare", monkeypatch, *args)["main"]()
    assert (out / "pathnet-2-2-seed0" / "metrics.jsonl").stat().st_mtime_ns == before


def test_networks_are_folded_on_any_task(grids, tmp_path, monkeypatch):
    out = tmp_path / "out"
    args = (grids, "--model", "spathnet-2-2-1", "--seeds", "0", "--out", out, "--thresholds", "0.9")
    study("folding", monkeypatch, *args)["main"]()
    records = json.loads((out / "folding.json").read_text())
    assert [record["fold"] for record in records] == ["not folded", "0.9", "period 2"] * 2
    for record in records[1::3]:  # one template: one kernel, and what is computed stays the same
        assert record["banks"][0]["groups"] == [0, 0] and "tuned" in record
        assert record["after"] == pytest.approx(record["before"], abs=1e-6)
    assert "F1 before" in (out / "table.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data.validation", "0"], "needs a validation after each epoch"),
        (["--data.curriculum.far-windows"], "at least one far window"),
        (["--data.name", "digits"], "needs a path net on grids"),
        (["--arms", "gan"], "the arms are cnn, scnn3, scnn3r, loop1"),
        (["--processes", "0"], "must be 1 or more"),
    ],
    ids=str,
)
def test_bad_comparisons_are_refused_before_training(
    options, message, grids, tmp_path, monkeypatch
):
    main = study("shortest_paths_compare", monkeypatch, grids, "--out", tmp_path / "out", *options)
    with pytest.raises(ConfigError, match=message):
        main["main"]()
    assert not (tmp_path / "out").exists()


def test_shortest_paths_are_compared(grids, tmp_path, monkeypatch):
    """What is measured of every arm, its tables and pictures; finished runs are not repeated."""
    out = tmp_path / "out"

    def compare(*names: str, seeds: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        options = ["--arms", *names, "--seeds", *seeds, "--optimizer.learning-rate", "0.02"]
        module = study("shortest_paths_compare", monkeypatch, grids, "--out", out, *options)
        arms = module["arms"](3)
        # One template for all layers folds for certain, as others do after long training.
        arms["scnn1"] = dataclasses.replace(arms["scnn1"], recurrence=0.01)
        monkeypatch.setitem(module, "arms", lambda depth: arms)
        monkeypatch.setitem(module, "MORE", (1.0, 2.0))
        assert run_command(module["main"]) == 0
        for picture in ("curves", "grids", "reach"):
            assert (out / f"{picture}.png").read_bytes()[:4] == b"\x89PNG"
            (out / f"{picture}.png").unlink()
        return json.loads((out / "measured.json").read_text()), module

    records, module = compare("loop1", "scnn3r", "scnn1", seeds="0")
    by_arm = {record["arm"]: record for record in records}
    kernel, private = 9 * 2 * 2, 2 * 2 + 3 * 2 * 2 + 2 + 1
    assert {name: record["trainable"] for name, record in by_arm.items()} == {
        "loop1": kernel + private,
        "scnn3r": 3 * kernel + 3 * 3 + private,
        "scnn1": kernel + 3 + private,
    }
    # Test sets of the curriculum, and their problems with points farther apart than in training.
    kinds = load_file(grids).data.curriculum.kinds()  # pyright: ignore[reportAttributeAccessIssue]
    beyond = [
        f"{kind}, beyond"
        for kind, problems in kinds.items()
        if (smallest_window(fixed_set(problems, "test", 3)[0]) > 4).any()
    ]
    assert beyond
    for record in records:
        assert list(record["tests"]) == [*kinds, *beyond]
        assert [line["phase"] for line in record["epochs"]] == [1, 2]
        assert [step for step, _ in record["steps"]] == [1, 2, 3, 4]
        assert [epoch for epoch, _ in record["similar"]] == [0, 1, 2]
    # Only one template folds after so few steps. The fold changes nothing that is computed.
    assert "tests" not in by_arm["scnn3r"]["fold"] and "fold" not in by_arm["loop1"]
    assert [name for name in by_arm if "longer" in by_arm[name]] == ["loop1", "scnn1"]
    fold, longer = by_arm["scnn1"]["fold"], by_arm["loop1"]["longer"]
    assert (fold["groups"], fold["period"]) == ([0, 0, 0], 1)
    # A loop at its trained depth gives the results of training; deeper ones try all of `HOW`.
    assert [(entry["depth"], entry["how"]) for entry in longer[::2]] == [
        (3, "middle"),
        (6, "middle"),
        (6, "stretch"),
        (6, "last"),
    ]
    for arm, tests in (("scnn1", fold["tests"]), ("loop1", longer[0]["tests"])):
        for kind, test in tests.items():
            expected = by_arm[arm]["tests"][kind]["f1"]
            assert test["f1"] == pytest.approx(expected, abs=1e-6), (arm, kind)
    text = (out / "table.md").read_text()
    deeper, usual = (entry["tests"]["size 8, window 8"]["f1"] for entry in (longer[-1], longer[1]))
    for part in (f"{deeper - usual:+.3f} ± nan)", "Folding at similarity .9", "learning-rate 0.02"):
        assert part in text

    # Differences from a CNN of the same seed; here the loop takes its name.
    pair = [by_arm["loop1"] | {"arm": "cnn"}, by_arm["scnn3r"]]
    against = module["tables"](pair, {"cnn": "CNN", "scnn3r": "SCNN"})
    one, other = ([x["validation"] for x in by_arm[n]["epochs"]] for n in ("scnn3r", "loop1"))
    gains = [a - b for a, b in zip(one, other, strict=True)]  # one epoch per phase
    row = " | ".join(f"{gain:+.3f} ± nan" for gain in [*gains, gains[1]])
    title = "Validation F1 over all epochs of each phase, difference from the CNN of the same seed:"
    assert against.split(title)[1].split("\n\n")[1].splitlines()[2] == f"| SCNN | {row} |"

    # Two seeds: the finished run is read and the other one trained. The interval is Student's.
    metrics = out / "scnn3r-seed0" / "metrics.jsonl"
    before = metrics.stat().st_mtime_ns
    both, _ = compare("scnn3r", seeds="01")
    assert metrics.stat().st_mtime_ns == before and both[0] == by_arm["scnn3r"]
    f1 = [record["tests"]["window 6"]["f1"] for record in both]
    half = abs(f1[1] - f1[0]) / 2 * 12.7062  # quantile of one degree of freedom
    assert f"{np.mean(f1):.3f} ± {half:.3f} |" in (out / "table.md").read_text()


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
