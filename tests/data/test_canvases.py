"""Digits on canvases: boxes surround what is drawn."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from paramshare.data import Canvases, DataError
from paramshare.data.canvases import Drawing
from paramshare.data.idx_files import write

DIGITS = np.random.default_rng(0).integers(0, 256, (5, 8, 8)).astype(np.uint8)


def draw(drawing, seed=0, indices: Sequence[int] = range(30)):
    return drawing.draw(DIGITS, np.arange(5), seed, indices)[:2]


def test_all_ink_is_inside_a_box_and_touches_its_four_sides():
    images, labels = draw(Drawing(size=48, most=3, smallest=8, largest=20))
    assert images.shape == (30, 48, 48, 1) and images.dtype == np.uint8
    for image, boxes, present in zip(images, labels["box"], labels["present"], strict=True):
        outside = image[..., 0].copy()
        for x0, y0, x1, y1 in boxes[present].astype(int):
            inside = image[y0:y1, x0:x1, 0]
            assert all(edge.any() for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))
            outside[y0:y1, x0:x1] = 0
        assert not outside.any() and present[0]
    assert set(labels["present"].sum(axis=1)) == {1, 2, 3}
    assert set(labels["category"][labels["present"]]) == set(range(5))


def test_boxes_do_not_overlap_and_have_their_areas():
    _, labels = draw(Drawing(size=40, most=4, smallest=10, largest=20))
    for boxes in (b[p] for b, p in zip(labels["box"], labels["present"], strict=True)):
        canvas = np.zeros((40, 40), int)
        for x0, y0, x1, y1 in boxes.astype(int):
            canvas[y0:y1, x0:x1] += 1
        assert canvas.max() == 1
    sides = labels["box"][..., 2:] - labels["box"][..., :2]
    np.testing.assert_array_equal(labels["area"], sides.prod(axis=-1))


def test_a_canvas_depends_on_its_seed_and_number_alone():
    drawing = Drawing()
    images, labels = draw(drawing, indices=range(4))
    again, labels_again = draw(drawing, indices=[2])
    np.testing.assert_array_equal(again[0], images[2])
    np.testing.assert_array_equal(labels_again["box"][0], labels["box"][2])
    assert not np.array_equal(draw(drawing, seed=1, indices=[2])[0], again)


def test_the_set_keeps_test_digits_apart(tmp_path):
    """Training digits are squares, test digits are stripes."""
    square, stripe = np.full((2, 8, 8), 255, np.uint8), np.full((2, 8, 8), 255, np.uint8)
    stripe[:, ::2] = 0
    write(tmp_path / "idx", (square, [0, 1]), (stripe, [0, 1]))
    config = Canvases(
        path=str(tmp_path / "idx"),
        data_dir=str(tmp_path / "prepared"),
        examples=20,
        tests=5,
        validation=0.1,
        drawing=Drawing(size=32, most=1),
    )
    data: Any = config.load()
    assert (len(data.train), len(data.validation), len(data.test)) == (20, 2, 5)
    assert data.task.categories == ("0", "1")
    for source, full in ((data.train, True), (data.validation, True), (data.test, False)):
        for example in (source[i] for i in range(len(source))):
            x0, y0, x1, y1 = example["label"]["box"][0].astype(int)
            assert bool((example["input"][y0:y1, x0:x1] > 100).all()) == full
    assert config.load(seed=1).digest == data.digest


def test_digits_are_turned_by_their_angles():
    """The ink of a bar has the direction of its angle."""
    bar = np.zeros((1, 40, 40), np.uint8)
    bar[:, 18:22] = 255
    options: dict[str, Any] = {"size": 64, "most": 1, "smallest": 40, "largest": 40}
    straight, _, none = Drawing(**options).draw(bar, np.array([0]), 0, range(20))
    turned, _, angles = Drawing(turn=80, **options).draw(bar, np.array([0]), 0, range(20))
    assert not none.any() and np.ptp(angles) > 80
    for image, angle in zip(turned, angles[:, 0], strict=True):
        y, x = np.nonzero(image[..., 0] > 100)
        direction = np.linalg.eigh(np.cov(np.stack([x, -y])))[1][:, 1]  # y runs down
        assert abs(direction @ [np.cos(np.radians(angle)), np.sin(np.radians(angle))]) > 0.999
    assert not np.array_equal(straight, turned)


def test_several_tasks_have_the_class_the_centre_and_the_angle():
    drawing = Drawing(size=32, most=1, smallest=10, largest=18, turn=60)
    data: Any = Canvases(task="several", examples=50, tests=5, drawing=drawing).load()
    assert [name for name, _ in data.task.tasks] == ["angle", "digit", "place"]
    for example in (data.train[i] for i in range(50)):
        y, x = np.nonzero(example["input"][..., 0])
        centre = (x.min() + x.max() + 1) / 2, (y.min() + y.max() + 1) / 2
        assert example["label"]["place"].tolist() == list(centre)
        assert abs(example["label"]["angle"][0]) <= 60


def test_blank_digits_are_named():
    with pytest.raises(DataError, match="digit 0, of class 7, has no pixel"):
        Drawing().draw(np.zeros((1, 8, 8), np.uint8), np.array([7]), 0, range(1))


@pytest.mark.parametrize(
    "drawing", [Drawing(most=2, turn=60), Drawing(most=1), Drawing(most=1, turn=91)]
)
def test_several_tasks_need_one_turned_digit(drawing):
    with pytest.raises(DataError, match="needs one digit on a canvas, turned"):
        Canvases(task="several", drawing=drawing)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"size": 40, "turn": 10, "largest": 27}, "largest must be at most 26"),
        ({"smallest": 20, "largest": 10}, "smallest must be at most largest"),
        ({"size": 16}, "largest at most size"),
        ({"most": 0}, "most must be greater"),
    ],
)
def test_drawings_that_cannot_be_made(given, message):
    with pytest.raises(DataError, match=message):
        Drawing(**given)
