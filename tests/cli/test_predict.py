"""`paramshare predict`: JSON for each picture, and drawings."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from paramshare.cli import main
from paramshare.report.predictions import draw_prediction
from paramshare.tasks import Detection, Pose


@pytest.fixture
def pictures(loaded, tmp_path) -> list[str]:
    """Ten test digits as colour pictures; more than one batch."""
    run, _, _ = loaded
    files = []
    for number in range(10):
        digit = run.data.test[number]["input"][..., 0]
        Image.fromarray(digit).convert("RGB").save(tmp_path / f"{number}.png")
        files.append(str(tmp_path / f"{number}.png"))
    return files


def test_each_picture_gets_its_class_and_a_drawing(loaded, trained, pictures, tmp_path, capsys):
    run, variables, _ = loaded
    code = main(["predict", str(trained), *pictures, "--output", str(tmp_path / "drawn")])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert code == 0 and [line["image"] for line in lines] == pictures
    inputs = run.data.normalise(jnp.stack([run.data.test[i]["input"] for i in range(10)]))
    logits = run.model.apply(variables, inputs, train=False)
    assert [line["class"] for line in lines] == np.argmax(logits, axis=-1).tolist()
    for line in lines:
        assert line["score"] == line["top5"][0]["score"] and len(line["top5"]) == 5
        with Image.open(line["picture"]) as drawing:
            assert drawing.size[0] > 100


def test_without_pictures_nothing_is_written(trained, pictures, tmp_path, capsys):
    assert main(["predict", str(trained), pictures[0], "--no-pictures"]) == 0
    assert "picture" not in json.loads(capsys.readouterr().out)
    assert not (trained / "predictions").exists()


def test_a_bad_picture_is_named_before_anything_is_written(trained, pictures, tmp_path, capsys):
    (tmp_path / "bad.png").write_text("text")
    folder = tmp_path / "drawn"
    names = [pictures[0], str(tmp_path / "bad.png")]
    assert main(["predict", str(trained), *names, "--output", str(folder)]) == 2
    printed = capsys.readouterr()
    assert "bad.png' cannot be read" in printed.err and not printed.out and not folder.exists()


def test_a_drawing_never_replaces_a_picture(refused, trained, pictures):
    folder = pathlib.Path(pictures[0]).parent
    before = pathlib.Path(pictures[0]).read_bytes()
    assert "would replace a picture" in refused("predict", trained, *pictures, "--output", folder)
    assert pathlib.Path(pictures[0]).read_bytes() == before


def test_boxes_are_given_and_drawn_in_pixels_of_the_picture(tmp_path):
    """A box of a network's input that is half as large as the picture."""
    task = Detection(("cat", "dog"), max_boxes=2)
    prediction = {
        "box": np.array([[10, 5, 20, 15], [0, 0, 0, 0]], np.float32),
        "score": np.array([0.75, 0.0], np.float32),
        "category": np.array([1, 0]),
    }
    description = task.describe(prediction, lambda point: np.asarray(point) * 2)
    assert description == {
        "objects": [{"category": "dog", "score": 0.75, "box": [20.0, 10.0, 40.0, 30.0]}]
    }
    white = np.full((40, 60, 3), 255, np.uint8)
    draw_prediction(white, task, description, tmp_path / "boxes.png")
    with Image.open(tmp_path / "boxes.png") as drawing:
        drawn = np.asarray(drawing.convert("RGB")).astype(int)
    coloured = np.abs(drawn - drawn.mean(axis=-1, keepdims=True)).max(axis=-1) > 40
    rows, columns = np.nonzero(coloured)
    height, width = coloured.shape
    assert columns.min() / width == pytest.approx(20 / 60, abs=0.03)
    assert columns.max() / width == pytest.approx(40 / 60, abs=0.03)
    assert rows.max() / height == pytest.approx(30 / 40, abs=0.03)


def test_joints_are_given_and_drawn_in_pixels_of_the_picture(tmp_path):
    """A limb from (10, 5) to (20, 15) of an input that is half as large as the picture."""
    task = Pose(("left_hip", "left_knee"), limbs=((0, 1),), image_size=(20, 30))
    heatmap = np.zeros((1, 1, 20, 30, 2), np.float32)
    heatmap[0, 0, 5, 10, 0], heatmap[0, 0, 15, 20, 1] = 0.5, 0.25
    prediction = jax.tree.map(
        lambda leaf: np.asarray(leaf[0]), task.predict(jnp.asarray(heatmap), (20, 30, 3))
    )
    description = task.describe(prediction, lambda point: np.asarray(point) * 2)
    assert description == {
        "joints": [
            {"name": "left_hip", "x": 21.0, "y": 11.0, "score": 0.5},
            {"name": "left_knee", "x": 41.0, "y": 31.0, "score": 0.25},
        ]
    }
    white = np.full((40, 60, 3), 255, np.uint8)
    draw_prediction(white, task, description, tmp_path / "pose.png")
    with Image.open(tmp_path / "pose.png") as drawing:
        drawn = np.asarray(drawing.convert("RGB")).astype(int)
    rows, columns = np.nonzero(drawn[..., 2] - drawn[..., 0] > 60)  # blue
    height, width = drawn.shape[:2]
    assert columns.min() / width == pytest.approx(21 / 60, abs=0.04)
    assert columns.max() / width == pytest.approx(41 / 60, abs=0.04)
    assert rows.min() / height == pytest.approx(11 / 40, abs=0.04)
    assert rows.max() / height == pytest.approx(31 / 40, abs=0.04)
