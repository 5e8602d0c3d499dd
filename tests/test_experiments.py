"""Every recipe runs from its file, on TFDS's mock of its data set: a few images, and otherwise unchanged.

Large networks have a smaller one stand in for them. What that leaves open is settled without arithmetic: the training step of each recipe's
own network is traced at full size.
"""

import dataclasses
import json
import pathlib
import runpy
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds

from paramshare import count
from paramshare.training.config import Config, ConfigError, differences, from_json, load_file, to_json
from paramshare.training.data import CLASSES, Curriculum
from paramshare.training.data.curriculum import fixed_set
from paramshare.training.data.grids import apart
from paramshare.training.loop import train
from paramshare.training.optimizer import learning_rate
from paramshare.training.run import prepare
from paramshare.training.step import make_train_step
from paramshare.zoo import options_of

FILES = sorted(p for p in (pathlib.Path(__file__).parents[1] / "experiments").glob("*.py") if "\nconfig = " in p.read_text())


@pytest.fixture(autouse=True)
def _lenient_promotion():
    # optax's schedules multiply integer steps with floats.
    with jax.numpy_dtype_promotion("standard"):
        yield


SMALLER = {
    "swrn-28-10-2": "swrn-16-1-1",
    "swrn-50-2-2": "swrn-16-1-1",
    "resnet32-s16u1": "resnet14-s8u1",
    "resnet34-s32u1": "resnet14-s8u1",
    "resnet50-sharedpp": "resnet14-s8u1",
    "resnet18-rpg": "resnet8-rpg-1000",
    "resnet16-4-repeat": "resnet16-2-repeat",
    "spathnet-20-32-20": "spathnet-2-4-2",
    "spathnet-10-16-10": "spathnet-2-4-2",
}  # the others run as they are, among them MobileNetV2, whose penalty names its banks


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("file", FILES, ids=[f.stem for f in FILES])
def test_runs_on_mock_data(file, tmp_path):
    config = load_file(file)
    name = SMALLER.get(config.model.name, config.model.name)
    model = dataclasses.replace(config.model, name=name)
    one_step = dataclasses.replace(
        config, model=model, epochs=1, batch_size=4, schedule=dataclasses.replace(config.schedule, warmup_epochs=0.0)
    )
    if name != config.model.name:  # which has other banks
        one_step = dataclasses.replace(one_step, penalty=dataclasses.replace(config.penalty, pools=()))
    if config.data.name == "digits":  # no mock needed
        one_step = dataclasses.replace(one_step, data=dataclasses.replace(config.data, train_examples=4))
    if config.data.name == "grids":  # nor here; one phase, and one test set beyond it
        curriculum = Curriculum(8, windows=(3,), examples=4, tests=2, far_windows=(5,), far_sizes=(), far_densities=())
        one_step = dataclasses.replace(one_step, data=dataclasses.replace(config.data, curriculum=curriculum))
    if config.data.name == "imagenet2012":
        stem = "imagenet" if "stem" in options_of(name) else None  # and not the one for images of this size
        one_step = dataclasses.replace(
            one_step, data=dataclasses.replace(config.data, image_size=64), model=dataclasses.replace(model, stem=stem)
        )
    with tfds.testing.mock_data(num_examples=5):
        result = train(one_step, tmp_path / "run", devices=jax.devices()[:1], quiet=True)
    assert result["steps"] == 1 and np.isfinite(result["last"]["test"]["loss"])
    # The header's command is that of this file.
    assert f"paramshare train experiments/{file.name} --workdir runs/" in file.read_text().split('"""')[1]


# specs: trainable numbers of the recipes' own networks, batch statistics excluded
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
}


@pytest.mark.parametrize("name", TRAINABLE)
def test_the_networks_own_step_is_sound_at_full_size(name):
    config = load_file(of(name))
    # A data set of few problems, where they are drawn: the step does not look at how many there are.
    few = dataclasses.replace(config.data, curriculum=dataclasses.replace(config.data.curriculum, examples=1, tests=1))
    config = dataclasses.replace(config, data=few) if config.data.name == "grids" else config
    with tfds.testing.mock_data(num_examples=5):
        run = prepare(config, devices=jax.devices()[:1])
    state = jax.eval_shape(run.init)
    assert count(state.variables)["trainable"] == TRAINABLE[name]
    data, penalty = run.data, config.penalty
    update = make_train_step(run.model, run.optimizer, config.augment, data.mean, data.std, task=data.task, penalty=penalty)
    step = run.devices.map(update)
    image = jax.ShapeDtypeStruct((1, config.batch_size, *data.image_shape), jnp.uint8)
    places = () if data.task == CLASSES else data.task.outputs(data.num_classes, data.image_shape)
    label = jax.ShapeDtypeStruct((1, config.batch_size, *places), jnp.int32)
    after, metrics = jax.eval_shape(step, state, None, {"image": image, "label": label})
    form = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), after) == form
    assert ("orthogonality" in metrics) == bool(penalty.orthogonality) and data.task.score in metrics
    about = of(name).read_text().split('"""')[1]
    assert "trainable numbers" not in about or f"{TRAINABLE[name]:,} trainable" in " ".join(about.split())


def of(name: str) -> pathlib.Path:
    return next(f for f in FILES if f.stem == name)


@pytest.mark.parametrize("file", FILES, ids=[f.stem for f in FILES])
def test_is_sound_and_survives_storing(file):
    config = load_file(file)
    config.check()
    assert from_json(to_json(config)) == config
    changed = dataclasses.replace(config, seed=5, data=dataclasses.replace(config.data, validation=0.5))
    assert differences(changed, config) == [f"data.validation: {config.data.validation} -> 0.5", "seed: 0 -> 5"]


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
    """Spec: 32 x 32, an obstacle with probability .1; five windows, 5,000 examples and 50 epochs each; Adam; the network's 20 layers."""
    config = load_file(of("shortest_paths"))
    curriculum = config.data.curriculum
    assert (config.data.name, curriculum.size, curriculum.density, curriculum.examples) == ("grids", 32, 0.1, 5000)
    assert curriculum.windows == (5, 9, 13, 17, 21) and config.epochs == 250
    assert config.optimizer.name == "adam" and config.model.name == "spathnet-20-32-20"


def test_every_file_is_in_the_tables():
    papers = {f.stem for f in FILES} - {"quickstart", "fashion_mnist"}
    assert papers == set(TRAINABLE)
    configs: list[Config] = [load_file(f) for f in FILES]
    assert set(SMALLER) <= {config.model.name for config in configs}


PATHS = """
from paramshare.training.config import Config, Data, Model, Optimizer, Schedule
from paramshare.training.data import Curriculum

config = Config(
    model=Model("spathnet-3-2-3"),
    data=Data("grids", curriculum=Curriculum(6, 0.1, (2, 4), 16, 3, far_windows=(6,), far_sizes=(8,), far_densities=())),
    optimizer=Optimizer("adam", weight_decay=0.0), schedule=Schedule("constant"), epochs=2, batch_size=8, log_every=1,
)
"""


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--data.validation", "0"], "takes a validation each epoch"),
        (["--validate-every", "2"], "takes a validation each epoch"),
        (["--data.curriculum.far-windows"], "a far window and a far size or more"),
        (["--data.name", "digits"], "a path net on grids is wanted"),
        (["--arms", "gan"], "arms are cnn, scnn3, scnn3r, loop1"),
        (["--processes", "0"], "processes 1 or more"),
    ],
    ids=str,
)
def test_what_cannot_be_compared_is_told_before_anything_is_trained(options, said, tmp_path, monkeypatch):
    (tmp_path / "config.py").write_text(PATHS)
    script, out = pathlib.Path(__file__).parents[1] / "experiments" / "shortest_paths_compare.py", tmp_path / "out"
    monkeypatch.syspath_prepend(script.parent)  # as Python does for a script
    monkeypatch.setattr(sys, "argv", [str(script), str(tmp_path / "config.py"), "--out", str(out), *options])
    with pytest.raises(ConfigError, match=said):
        runpy.run_path(str(script))["main"]()
    assert not out.exists()


@pytest.mark.usefixtures("quick_compilation")
def test_shortest_paths_are_compared(tmp_path, monkeypatch, capsys):
    """In small: what is measured of every arm, its tables and pictures; and that runs are not repeated."""
    (tmp_path / "config.py").write_text(PATHS)
    script, out = pathlib.Path(__file__).parents[1] / "experiments" / "shortest_paths_compare.py", tmp_path / "out"
    monkeypatch.syspath_prepend(script.parent)  # as Python does for a script
    main = runpy.run_path(str(script))["main"]
    monkeypatch.setitem(main.__globals__, "MORE", (1.0, 2.0))
    arms = main.__globals__["arms"](3)
    arms["scnn1"] = dataclasses.replace(arms["scnn1"], recurrence=0.01)  # folds for certain, as such networks do after long training
    monkeypatch.setitem(main.__globals__, "arms", lambda depth: arms)

    def compare(*arms: str, seeds: str) -> list[dict[str, Any]]:
        options = ["--arms", *arms, "--seeds", *seeds, "--optimizer.learning-rate", "0.02"]
        monkeypatch.setattr(sys, "argv", [str(script), str(tmp_path / "config.py"), "--out", str(out), *options])
        main()
        for name in ("curves", "grids", "reach"):
            assert (out / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
            (out / f"{name}.png").unlink()
        return json.loads((out / "measured.json").read_text())

    # Points farther apart than in the last phase
    kinds = Curriculum(6, 0.1, (2, 4), 16, 3, far_windows=(6,), far_sizes=(8,), far_densities=()).kinds()
    beyond = [kind for kind, grids in kinds.items() if (apart(fixed_set(grids, "test", 3)[0]) > 4).any()]
    assert beyond
    found = {record["arm"]: record for record in compare("loop1", "scnn3r", "scnn1", seeds="0")}
    kernel, private = 9 * 2 * 2, 2 * 2 + 3 * 2 * 2 + 2 + 1
    trainable = {"loop1": kernel + private, "scnn3r": 3 * kernel + 3 * 3 + private, "scnn1": kernel + 3 + private}
    assert {name: record["trainable"] for name, record in found.items()} == trainable
    for record in found.values():
        assert list(record["tests"])[:5] == ["window 2", "window 4", "window 6", "size 8", "size 8, window 8"]
        assert set(list(record["tests"])[5:]) == {f"{kind}, beyond" for kind in beyond}
        assert [line["phase"] for line in record["epochs"]] == [1, 2] and record["steps_per_epoch"] == 2
        assert [step for step, _ in record["steps"]] == [1, 2, 3, 4] and [epoch for epoch, _ in record["similar"]] == [0, 1, 2]
    assert "fold" in found["scnn3r"] and "tests" not in found["scnn3r"]["fold"] and "fold" not in found["loop1"]  # after so few steps
    assert [name for name in found if "longer" in found[name]] == ["loop1", "scnn1"]
    # One template for all layers: they fold into one kernel, and what they compute stays.
    folded = found["scnn1"]["fold"]
    assert (folded["groups"], folded["period"], folded["similarity"]) == ([0, 0, 0], 1, pytest.approx(1))
    # A loop as deep as it was trained is what was tested before; deeper ones are measured in every way.
    longer = found["loop1"]["longer"]
    assert [(e["depth"], e["how"]) for e in longer[::2]] == [(3, "middle"), (6, "middle"), (6, "stretch"), (6, "last")]
    for tests in (folded["tests"], longer[0]["tests"]):
        arm = "scnn1" if tests is folded["tests"] else "loop1"
        assert set(tests) <= set(found[arm]["tests"])
        for kind, test in tests.items():
            assert test["f1"] == pytest.approx(found[arm]["tests"][kind]["f1"], abs=1e-6), (arm, kind)
    text = (out / "tables.md").read_text()
    more, usual = (entry["tests"]["size 8, window 8"]["f1"] for entry in (longer[-1], longer[1]))  # both with statistics gathered anew
    for part in (
        f"{more - usual:+.3f} ± nan) |",
        "Trainable numbers",
        "Folding at similarity .9",
        "after training, hard loop, run for more iterations",
        "after training, SCNN, k = 1, run for more iterations",
        "learning-rate 0.02",
    ):
        assert part in text
    assert text.strip() in capsys.readouterr().out

    # Beside a CNN of the same seed, here the loop under its name, everything is told as a difference.
    against = main.__globals__["tables"]([found["loop1"] | {"arm": "cnn"}, found["scnn3r"]], {"cnn": "CNN", "scnn3r": "SCNN"})
    one, other = ([line["validation_f1"] for line in found[name]["epochs"]] for name in ("scnn3r", "loop1"))  # an epoch a phase
    differences = [a - b for a, b in zip(one, other, strict=True)]
    row = " | ".join(f"{difference:+.3f} ± nan" for difference in [*differences, differences[1]])
    title = "Validation F1 over all epochs of each phase less that of the CNN of the same seed:"
    assert against.split(title)[1].split("\n\n")[1].splitlines()[2] == f"| SCNN | {row} |"

    # Of two seeds: the run that has finished is read, the other one trained. There is no loop among them.
    metrics = out / "scnn1-seed0" / "metrics.jsonl"
    before = metrics.stat().st_mtime_ns
    again = compare("scnn1", seeds="01")
    assert metrics.stat().st_mtime_ns == before and again[0] == found["scnn1"] and [record["seed"] for record in again] == [0, 1]
    f1 = [record["tests"]["window 6"]["f1"] for record in again]
    half = abs(f1[1] - f1[0]) / 2 * 12.7062  # Student's t of one degree of freedom
    assert f"{np.mean(f1):.3f} ± {half:.3f} |" in (out / "tables.md").read_text()
