"""COCO folders: boxes and joints are where they were painted, labels are padded."""

import re

import numpy as np
import pytest
from PIL import Image

from paramshare.data import DataError, statistics
from paramshare.data.coco import read_annotations
from paramshare.data.letterbox import FILL, letterbox
from paramshare.tasks import Detection, Pose


def extent(image: np.ndarray, channel: int = 0) -> list[int]:
    """x0, y0, x1, y1 of the pixels whose channel is bright and whose other channels are dark."""
    bright = (image[..., channel] > 127) & (np.delete(image, channel, axis=2).max(axis=2) < 60)
    y, x = np.nonzero(bright)
    return [int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1]


@pytest.mark.parametrize(
    ("width", "height", "size", "shape"),
    [(40, 20, 16, (8, 16)), (20, 40, 16, (16, 8)), (7, 5, 64, (46, 64)), (300, 1, 16, (1, 16))],
)
def test_letterbox_keeps_the_aspect_ratio_at_the_top_left(width, height, size, shape):
    image = np.zeros((height, width, 3), np.uint8)
    canvas, scale = letterbox(image, size)
    inside = np.zeros((size, size), bool)
    inside[: shape[0], : shape[1]] = True
    assert (canvas[inside] == 0).all() and (canvas[~inside] == FILL).all()
    assert canvas.dtype == np.uint8 and scale.dtype == np.float32
    expected = np.array([shape[1] / width, shape[0] / height], np.float32)
    np.testing.assert_array_equal(scale, expected)


def test_the_filling_is_the_mean_that_inputs_are_normalised_by():
    assert tuple(np.round(statistics.IMAGENET[0]).astype(int)) == FILL


def test_letterbox_averages_when_it_shrinks():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255  # taking single pixels would give 0 or 255
    inner = letterbox(stripes, 8)[0][:, 1:-1]  # at the border the filter is cut off
    assert abs(inner.astype(int) - 127).max() <= 2


@pytest.mark.parametrize("size", [(40, 20), (20, 40), (37, 53), (8, 8)])
def test_painted_boxes_are_found_where_the_label_says(coco, tmp_path, size):
    w, h = size
    data = coco.part(1, size=size)
    box = [w // 4, h // 4, w // 2, h // 4]
    data["annotations"][0]["bbox"] = box
    example = coco.load(
        coco.make(tmp_path, train=data, test=data), validation=0, image_size=64
    ).train[0]
    label = example["label"]["box"][0]
    np.testing.assert_allclose(extent(example["input"]), label, atol=1)  # an edge is in a pixel
    original = label / np.tile(example["label"]["scale"], 2)
    expected = [box[0], box[1], box[0] + box[2], box[1] + box[3]]
    np.testing.assert_allclose(original, expected, rtol=1e-6)


def test_labels_are_padded_and_categories_numbered_by_id(coco, folder):
    data = coco.load(folder)
    assert data.task == Detection(categories=("cat", "bird", "dog"), max_boxes=4)
    assert (data.input_shape, data.in_memory, len(data.validation)) == ((16, 16, 3), True, 1)
    label = data.test[1]["label"]
    dtypes = {name: (value.shape, value.dtype) for name, value in label.items()}
    assert dtypes == {
        "box": ((4, 4), np.float32),
        "category": ((4,), np.int32),
        "present": ((4,), bool),
        "crowd": ((4,), bool),
        "area": ((4,), np.float32),
        "scale": ((2,), np.float32),
    }
    assert [int(data.test[i]["label"]["category"][0]) for i in range(3)] == [0, 2, 1]
    assert label["present"].tolist() == [True, False, False, False]
    assert label["area"].tolist() == [50, 0, 0, 0] and label["category"][1:].tolist() == [0] * 3
    np.testing.assert_allclose(label["box"], [[1.2, 1.6, 6, 4.8], *np.zeros((3, 4))], rtol=1e-6)
    assert read_annotations(folder / "train.json").category_ids == (3, 7, 90)
    assert coco.load(folder, image_size=None).input_shape == (320, 320, 3)


def test_crowds_areas_clipping_and_images_without_boxes(coco, tmp_path):
    data = coco.part(2)
    one = data["annotations"][0]
    data["annotations"] = [
        {**one, "id": 1, "bbox": [-10, -10, 30, 15], "iscrowd": 1},
        {**one, "id": 2, "bbox": [30.5, 10, 100, 5], "area": None},
        {k: v for k, v in one.items() if k not in ("area", "iscrowd")} | {"bbox": [0, 0, 4, 4]},
    ]
    data = coco.load(coco.make(tmp_path, train=data, test=data), validation=0, image_size=40)
    label = data.train[0]["label"]
    assert label["crowd"].tolist() == [True, False, False, False]
    assert label["box"][:3].tolist() == [[0, 0, 20, 5], [30.5, 10, 40, 15], [0, 0, 4, 4]]
    assert label["area"].tolist() == [50, 9.5 * 5, 16, 0]
    empty = data.train[1]["label"]
    assert (
        not empty["present"].any() and not empty["box"].any() and empty["scale"].tolist() == [1, 1]
    )


def test_boxes_without_area_or_outside_are_counted_and_left_out(coco, tmp_path, capsys):
    data = coco.part(3)
    for annotation, box in zip(
        data["annotations"], ([1, 1, 0, 5], [3, 3, 5, -1], [40, 2, 5, 5]), strict=True
    ):
        annotation["bbox"] = box
    data["annotations"].append({**data["annotations"][0], "id": 9, "bbox": [0, 0, 4, 4]})
    file = coco.write(tmp_path / "train.json", data)
    annotations = read_annotations(file)
    assert capsys.readouterr().err.splitlines() == [
        "paramshare: train.json: left out 2 boxes without area, first annotation 500",
        "paramshare: train.json: left out 1 box outside their image, first annotation 502",
    ]
    assert annotations.image.tolist() == [0] and len(annotations.pictures) == 3


def test_areas_of_0_are_those_of_the_boxes_and_whole_floats_are_integers(coco, tmp_path, capsys):
    data = coco.part(3)
    data["annotations"][1]["area"] = 0
    coco.make(tmp_path, train=data, test=coco.part(1))
    data["images"][2] |= {"width": 40.0, "height": 20.0}
    coco.write(tmp_path / "train.json", data)
    label = coco.load(tmp_path, validation=0).train
    assert "train.json: 1 annotation with the area 0, first 501; the areas" in (
        capsys.readouterr().err
    )
    assert [label[i]["label"]["area"][0] for i in range(3)] == [50, 12 * 8, 50]


@pytest.mark.parametrize(("orientation", "turned"), [(1, False), (3, True)])
def test_images_that_viewers_turn_are_a_warning(coco, tmp_path, capsys, orientation, turned):
    coco.make(tmp_path, train=coco.part(2), test=coco.part(1))
    file, exif = tmp_path / "train" / "1.png", Image.Exif()
    exif[0x0112] = orientation
    with Image.open(file) as image:
        pixels = image.copy()
    pixels.save(file, exif=exif)
    coco.load(tmp_path, validation=0)
    warned = "train.json: 1 image with an EXIF orientation, first" in capsys.readouterr().err
    assert warned == turned


def test_the_largest_boxes_are_kept_and_crowds_last(coco, tmp_path, capsys):
    data = coco.part(1)
    areas = [5, 30, 99, 20, 30]
    data["annotations"] = [
        {**data["annotations"][0], "id": i, "area": area, "iscrowd": int(area == 99)}
        for i, area in enumerate(areas)
    ]
    coco.make(tmp_path, train=data, test=coco.part(1))
    for rows, kept in ((4, [5, 30, 20, 30]), (2, [30, 30]), (1, [30])):
        words = (
            rf"train\.json: 1 image with more than {rows} box(es)?, first '0\.png' with 5; .*most 5"
        )
        label = coco.load(tmp_path, validation=0, max_boxes=rows).train[0]["label"]
        assert re.search(words, capsys.readouterr().err)
        assert label["area"][: len(kept)].tolist() == kept and label["present"].all()


@pytest.mark.parametrize(("mode", "kind"), [("L", "png"), ("P", "png"), ("CMYK", "jpg")])
def test_grey_palette_and_cmyk_images_become_rgb(coco, tmp_path, mode, kind):
    data = coco.part(1)
    data["images"][0]["file_name"] = f"x.{kind}"
    coco.make(tmp_path, test=coco.part(1), train=data)
    coco.paint(
        tmp_path / "train" / f"x.{kind}", (40, 20), [0, 0, 40, 20], colour=(102,) * 3, mode=mode
    )
    image = coco.load(tmp_path, validation=0).train[0]["input"]
    assert abs(image[:8].astype(int) - 102).max() <= 2


def test_joints_are_found_where_they_were_painted(coco, tmp_path):
    data = coco.people(2)
    coco.make(tmp_path, train=data, test=data)
    for image, annotation in zip(data["images"], data["annotations"], strict=False):
        x, y = annotation["keypoints"][6:8]
        file = tmp_path / "train" / image["file_name"]
        coco.paint(file, (40, 20), [x, y, 1, 1], colour=coco.BLUE)  # the pixel from x to x + 1
    set_ = coco.load(tmp_path, task="pose", validation=0, image_size=60)
    assert set_.task == Pose(joints=("head", "left", "right"), limbs=((0, 2),), image_size=(60, 60))
    assert [int(x["label"]["image"]) for x in coco.examples(set_.train)] == [0, 0, 1, 1]
    for person in (0, 2):
        example = set_.train[person]
        label = example["label"]
        # 12 x 8, enlarged to a square of 15: 4 input pixels for one of the image
        assert label["scale"].tolist() == [4, 4] and label["visible"].all()
        found = extent(example["input"], channel=2)[:2]
        np.testing.assert_allclose(found, label["joint"][2], atol=2)
        original = label["joint"] / label["scale"] + label["offset"]
        keypoints = np.reshape(data["annotations"][person // 2]["keypoints"], (3, 3))
        np.testing.assert_allclose(original, keypoints[:, :2], rtol=1e-5)
    second = set_.train[1]["label"]
    assert second["visible"].tolist() == [True, False, True]
    assert second["joint"][1].tolist() == [0, 0] and second["box"].tolist() == [20, 1, 28, 19]
    assert second["area"] == 50 and second["area"].dtype == np.float32


def test_crops_are_square_and_filled_outside_the_image(coco, tmp_path):
    data = coco.people(1)
    data["annotations"] = data["annotations"][:1]
    data["annotations"][0]["bbox"] = [0, 0, 16, 16]  # a square of 20 from -2, -2
    coco.make(tmp_path, train=data, test=data)
    example = coco.load(tmp_path, task="pose", validation=0, image_size=20).train[0]
    assert example["label"]["offset"].tolist() == [-2, -2]
    assert (example["input"][:2] == FILL).all() and (example["input"][:, :2] == FILL).all()
    assert (example["input"][2:18, 2:18] == coco.RED).all() and (
        example["input"][18:, 2:] == 0
    ).all()


def test_crowds_and_people_without_joints_are_no_examples(coco, tmp_path):
    data = coco.people(3)
    for annotation, change in zip(
        data["annotations"],
        ({"iscrowd": 1}, {"keypoints": [0] * 9}, {"keypoints": None}),
        strict=False,
    ):
        annotation |= change
    set_ = coco.load(
        coco.make(tmp_path, train=data, test=coco.people(1)), task="pose", validation=0
    )
    assert [int(x["label"]["image"]) for x in coco.examples(set_.train)] == [0, 1, 2]
    assert not any(x["label"]["visible"][1] for x in coco.examples(set_.train))


def test_whole_images_of_one_person(coco, tmp_path):
    data = coco.people(4)
    coco.make(tmp_path, train=data, test=data)
    with pytest.raises(
        DataError, match=r"train.json: the image '0.png' has 2 people .*person_crop"
    ):
        coco.load(tmp_path, task="pose", person_crop=False)
    data["annotations"] = data["annotations"][:4]
    coco.make(tmp_path, train=data, test=data)
    label = coco.load(tmp_path, task="pose", person_crop=False, validation=0).train[1]["label"]
    assert label["offset"].tolist() == [0, 0]
    np.testing.assert_allclose(label["scale"], 0.4)
    np.testing.assert_allclose(label["joint"][0], np.array([4, 6]) * 0.4, rtol=1e-6)
