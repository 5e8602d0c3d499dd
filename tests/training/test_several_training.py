"""Several tasks on one ring train, predict and weight their losses."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from paramshare.cli import main
from paramshare.data import Canvases
from paramshare.data.canvases import Drawing
from paramshare.report.predictions import draw_examples
from paramshare.tasks import Several, Task
from paramshare.training.config import Config, ConfigError, Model, Optimizer
from paramshare.training.derive import load_run
from paramshare.training.evaluation import make_evaluate
from paramshare.training.loop import train
from paramshare.training.metrics import read_metrics
from paramshare.training.run import prepare

DATA = Canvases(
    task="several",
    examples=64,
    tests=16,
    drawing=Drawing(size=16, most=1, smallest=8, largest=9, turn=60),
)
CONFIG = Config(
    model=Model("heads-resnet8-rpg-1000"),
    data=DATA,
    optimizer=Optimizer("adam", 0.003, weight_decay=0.0),
    epochs=2,
    batch_size=32,
    log_every=1,
    loss_weights=("place=4", "digit/cross_entropy=0.5"),
)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("several") / "run"
    return workdir, train(CONFIG, workdir, quiet=True)


def test_losses_are_weighted_in_training_and_evaluation(ran):
    _, result = ran
    run = prepare(dataclasses.replace(CONFIG, loss_weights=()))
    variables = run.init().variables
    plain = make_evaluate(run)(variables, run.data.test)
    heavy = make_evaluate(prepare(CONFIG))(variables, run.data.test)
    factors = {"angle/huber": 1, "digit/cross_entropy": 0.5, "place/huber": 4}
    assert set(plain.losses) == set(factors)
    for name, factor in factors.items():
        assert heavy.losses[name] == pytest.approx(factor * plain.losses[name], rel=1e-6)
    assert plain.measures == heavy.measures and set(result.last.losses) == set(factors)
    for line in read_metrics(ran[0] / "metrics.jsonl"):
        if line["kind"] == "train":
            parts = sum(line[f"loss/{name}"] for name in factors)
            assert line["loss"] == pytest.approx(parts, rel=1e-5)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (("place",), "'place'; it must be NAME=WEIGHT"),
        (("place=-1",), "with a positive weight"),
        (("place=nan",), "with a positive weight"),
        (("place=1", "place=2"), "'place' twice"),
        (("box=1",), "names 'box', but the losses .* are angle/huber, digit/cross_entropy"),
    ],
)
def test_weights_that_cannot_be_used(weights, message):
    with pytest.raises(ConfigError, match=message):
        prepare(dataclasses.replace(CONFIG, loss_weights=weights))


def test_pictures_of_test_examples_are_drawn_where_the_task_can(ran, tmp_path):
    run, variables, _ = load_run(ran[0])
    assert draw_examples(run, variables, tmp_path / "some.png", count=3)
    with Image.open(tmp_path / "some.png") as picture:
        assert picture.width > 2 * picture.height
    mute = dataclasses.replace(run, task=Mute())
    assert not draw_examples(mute, variables, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


class Mute(Several):
    """Describes nothing."""

    def __init__(self):
        task = prepare(CONFIG).task
        assert isinstance(task, Several)
        super().__init__(task.tasks)

    describe = Task.describe


def test_predictions_of_all_tasks_are_printed_and_drawn(ran, tmp_path, capsys):
    image, _, _ = DATA.drawing.draw(np.full((1, 8, 8), 200, np.uint8), np.array([0]), 0, range(1))
    Image.fromarray(image[0, ..., 0]).save(tmp_path / "one.png")
    assert (
        main(
            ["predict", str(ran[0]), str(tmp_path / "one.png"), "--output", str(tmp_path / "drawn")]
        )
        == 0
    )
    (line,) = [json.loads(x) for x in capsys.readouterr().out.splitlines() if x.startswith("{")]
    assert set(line) >= {"angle", "digit", "place"}
    assert set(line["place"]) == {"x", "y"} and 0 <= line["digit"]["class"] <= 9
