"""Folders in the format of COCO: boxes and joints where they were painted, bad input named."""

import contextlib
import copy
import io
import json
import pathlib
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image

from paramshare.data import ArraySource, Coco, DataError, Dataset, eval_batches, reading, statistics
from paramshare.data.coco import read_annotations
from paramshare.data.letterbox import FILL, letterbox
from paramshare.tasks import Detection, Pose

RED, BLUE, BLACK = (255, 0, 0), (0, 0, 255), (0, 0, 0)
CATEGORIES = [{"id": 3, "name": "cat"}, {"id": 90, "name": "dog"}, {"id": 7, "name": "bird"}]
PERSON = {"id": 1, "name": "person", "keypoints": ["head", "left", "right"], "skeleton": [[1, 3]]}


def write(file: pathlib.Path, data: Any) -> pathlib.Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(data))
    return file


def paint(
    file: pathlib.Path, size: tuple[int, int], *boxes: Sequence[float], colour=RED, mode="RGB"
) -> None:
    """A black image of this width and height with filled boxes (left, top, width, height)."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    for x, y, w, h in boxes:
        pixels[int(y) : int(y + h), int(x) : int(x + w)] = colour
    Image.fromarray(pixels).convert(mode).save(file)


def part(count: int, categories=CATEGORIES, size=(40, 20)) -> dict[str, Any]:
    """`count` images with a box each, which moves from image to image."""
    return {
        "images": [
            {"id": 10 + i, "file_name": f"{i}.png", "width": size[0], "height": size[1]}
            for i in range(count)
        ],
        "annotations": [
            {
                "id": 500 + i,
                "image_id": 10 + i,
                "category_id": categories[i % len(categories)]["id"],
                "bbox": [2 + i, 4, 12, 8],
                "area": 50.0,
                "iscrowd": 0,
            }
            for i in range(count)
        ],
        "categories": categories,
    }


def make(root: pathlib.Path, **parts: dict[str, Any]) -> pathlib.Path:
    """A folder with a JSON and a folder of images for each part."""
    for name, data in parts.items():
        write(root / f"{name}.json", data)
        for image in data["images"]:
            boxes = [a["bbox"] for a in data["annotations"] if a["image_id"] == image["id"]]
            paint(root / name / image["file_name"], (image["width"], image["height"]), *boxes)
    return root


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    return make(tmp_path / "set", train=part(10), test=part(3))


def load(folder: pathlib.Path, seed: int = 0, **options) -> Dataset:
    return Coco(path=str(folder), **{"image_size": 16, "max_boxes": 4, **options}).load(seed)


def extent(image: np.ndarray, channel: int = 0) -> list[int]:
    """x0, y0, x1, y1 of the pixels whose channel is bright and whose other channels are dark."""
    bright = (image[..., channel] > 127) & (np.delete(image, channel, axis=2).max(axis=2) < 60)
    y, x = np.nonzero(bright)
    return [int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1]


def examples(source) -> list[dict[str, Any]]:
    return [source[i] for i in range(len(source))]


def assert_same(one, other) -> None:
    assert len(one) == len(other)
    for a, b in zip(examples(one), examples(other), strict=True):
        np.testing.assert_array_equal(a["input"], b["input"])
        assert a["label"].keys() == b["label"].keys()
        for name in a["label"]:
            np.testing.assert_array_equal(a["label"][name], b["label"][name])
            assert np.asarray(a["label"][name]).dtype == np.asarray(b["label"][name]).dtype


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
def test_painted_boxes_are_found_where_the_label_says(tmp_path, size):
    w, h = size
    data = part(1, size=size)
    box = [w // 4, h // 4, w // 2, h // 4]
    data["annotations"][0]["bbox"] = box
    example = load(make(tmp_path, train=data, test=data), validation=0, image_size=64).train[0]
    label = example["label"]["box"][0]
    np.testing.assert_allclose(extent(example["input"]), label, atol=1)  # an edge is in a pixel
    original = label / np.tile(example["label"]["scale"], 2)
    expected = [box[0], box[1], box[0] + box[2], box[1] + box[3]]
    np.testing.assert_allclose(original, expected, rtol=1e-6)


def test_labels_are_padded_and_categories_numbered_by_id(folder):
    data = load(folder)
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
    assert load(folder, image_size=None).input_shape == (320, 320, 3)


def test_crowds_areas_clipping_and_images_without_boxes(tmp_path):
    data = part(2)
    one = data["annotations"][0]
    data["annotations"] = [
        {**one, "id": 1, "bbox": [-10, -10, 30, 15], "iscrowd": 1},
        {**one, "id": 2, "bbox": [30.5, 10, 100, 5], "area": None},
        {k: v for k, v in one.items() if k not in ("area", "iscrowd")} | {"bbox": [0, 0, 4, 4]},
    ]
    data = load(make(tmp_path, train=data, test=data), validation=0, image_size=40)
    label = data.train[0]["label"]
    assert label["crowd"].tolist() == [True, False, False, False]
    assert label["box"][:3].tolist() == [[0, 0, 20, 5], [30.5, 10, 40, 15], [0, 0, 4, 4]]
    assert label["area"].tolist() == [50, 9.5 * 5, 16, 0]
    empty = data.train[1]["label"]
    assert (
        not empty["present"].any() and not empty["box"].any() and empty["scale"].tolist() == [1, 1]
    )


def test_boxes_without_area_or_outside_are_counted_and_left_out(tmp_path):
    data = part(3)
    for annotation, box in zip(
        data["annotations"], ([1, 1, 0, 5], [3, 3, 5, -1], [40, 2, 5, 5]), strict=True
    ):
        annotation["bbox"] = box
    data["annotations"].append({**data["annotations"][0], "id": 9, "bbox": [0, 0, 4, 4]})
    file = write(tmp_path / "train.json", data)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        annotations = read_annotations(file)
    assert [str(w.message) for w in caught] == [
        "train.json: left out 2 boxes without area, first annotation 500",
        "train.json: left out 1 box outside their image, first annotation 502",
    ]
    assert annotations.image.tolist() == [0] and len(annotations.pictures) == 3


def test_the_largest_boxes_are_kept_and_crowds_last(tmp_path):
    data = part(1)
    areas = [5, 30, 99, 20, 30]
    data["annotations"] = [
        {**data["annotations"][0], "id": i, "area": area, "iscrowd": int(area == 99)}
        for i, area in enumerate(areas)
    ]
    make(tmp_path, train=data, test=part(1))
    for rows, kept in ((4, [5, 30, 20, 30]), (2, [30, 30]), (1, [30])):
        words = (
            rf"train\.json: 1 image with more than {rows} box(es)?, first '0\.png' with 5; .*most 5"
        )
        with pytest.warns(UserWarning, match=words):
            label = load(tmp_path, validation=0, max_boxes=rows).train[0]["label"]
        assert label["area"][: len(kept)].tolist() == kept and label["present"].all()


@pytest.mark.parametrize(("mode", "kind"), [("L", "png"), ("P", "png"), ("CMYK", "jpg")])
def test_grey_palette_and_cmyk_images_become_rgb(tmp_path, mode, kind):
    data = part(1)
    data["images"][0]["file_name"] = f"x.{kind}"
    make(tmp_path, test=part(1), train=data)
    paint(tmp_path / "train" / f"x.{kind}", (40, 20), [0, 0, 40, 20], colour=(102,) * 3, mode=mode)
    image = load(tmp_path, validation=0).train[0]["input"]
    assert abs(image[:8].astype(int) - 102).max() <= 2


def people(count: int) -> dict[str, Any]:
    """Images of two people each, of which the second one's left side is not labelled."""
    data = part(count, [PERSON])
    for i, first in enumerate(data["annotations"][:]):
        x, y, _, _ = first["bbox"]
        first |= {"keypoints": [x + 1, y + 2, 2, x + 5, y + 4, 1, x + 9, y + 7, 2]}
        second = {**first, "id": 900 + i, "bbox": [20, 1, 8, 18]}
        data["annotations"].append({**second, "keypoints": [21, 3, 2, 0, 0, 0, 26, 17, 2]})
    return data


def test_joints_are_found_where_they_were_painted(tmp_path):
    data = people(2)
    make(tmp_path, train=data, test=data)
    for image, annotation in zip(data["images"], data["annotations"], strict=False):
        x, y = annotation["keypoints"][6:8]
        file = tmp_path / "train" / image["file_name"]
        paint(file, (40, 20), [x, y, 1, 1], colour=BLUE)  # the pixel from x to x + 1
    set_ = load(tmp_path, task="pose", validation=0, image_size=60)
    assert set_.task == Pose(joints=("head", "left", "right"), limbs=((0, 2),))
    assert [int(x["label"]["image"]) for x in examples(set_.train)] == [0, 0, 1, 1]
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


def test_crops_are_square_and_filled_outside_the_image(tmp_path):
    data = people(1)
    data["annotations"] = data["annotations"][:1]
    data["annotations"][0]["bbox"] = [0, 0, 16, 16]  # a square of 20 from -2, -2
    make(tmp_path, train=data, test=data)
    example = load(tmp_path, task="pose", validation=0, image_size=20).train[0]
    assert example["label"]["offset"].tolist() == [-2, -2]
    assert (example["input"][:2] == FILL).all() and (example["input"][:, :2] == FILL).all()
    assert (example["input"][2:18, 2:18] == RED).all() and (example["input"][18:, 2:] == 0).all()


def test_crowds_and_people_without_joints_are_no_examples(tmp_path):
    data = people(3)
    for annotation, change in zip(
        data["annotations"],
        ({"iscrowd": 1}, {"keypoints": [0] * 9}, {"keypoints": None}),
        strict=False,
    ):
        annotation |= change
    set_ = load(make(tmp_path, train=data, test=people(1)), task="pose", validation=0)
    assert [int(x["label"]["image"]) for x in examples(set_.train)] == [0, 1, 2]
    assert not any(x["label"]["visible"][1] for x in examples(set_.train))


def test_whole_images_of_one_person(tmp_path):
    data = people(4)
    make(tmp_path, train=data, test=data)
    with pytest.raises(
        DataError, match=r"train.json: the image '0.png' has 2 people .*person_crop"
    ):
        load(tmp_path, task="pose", person_crop=False)
    data["annotations"] = data["annotations"][:4]
    make(tmp_path, train=data, test=data)
    label = load(tmp_path, task="pose", person_crop=False, validation=0).train[1]["label"]
    assert label["offset"].tolist() == [0, 0]
    np.testing.assert_allclose(label["scale"], 0.4)
    np.testing.assert_allclose(label["joint"][0], np.array([4, 6]) * 0.4, rtol=1e-6)


@pytest.mark.parametrize("task", ["detection", "pose"])
def test_sources_in_memory_and_on_disk_are_equal(tmp_path, monkeypatch, task):
    make(tmp_path, train=people(8), test=people(2))
    options = {"task": task, "validation": 0.25, "train_examples": 5}
    memory = load(tmp_path, seed=3, **options)
    assert isinstance(memory.train, ArraySource) and memory.in_memory
    monkeypatch.setattr(reading, "MEMORY_LIMIT", 0)
    disk = load(tmp_path, seed=3, **options)
    assert not disk.in_memory
    assert (memory.task, memory.mean, memory.std) == (disk.task, disk.mean, disk.std)
    assert memory.input_shape == disk.input_shape == memory.train[0]["input"].shape
    for name in ("train", "validation", "test"):
        assert_same(getattr(memory, name), getattr(disk, name))
    batches = list(eval_batches(disk.test, 3))
    assert sum(int(batch["weight"].sum()) for batch in batches) == len(disk.test)
    disk.task.check_labels(batches[0]["label"], disk.input_shape)


def shown(source) -> list[float]:
    return sorted(round(float(x["label"]["box"][0, 0]), 3) for x in examples(source))


def test_the_held_out_part_depends_on_the_seed_alone(folder):
    one, same, other = (load(folder, seed, validation=0.4) for seed in (1, 1, 2))
    assert_same(one.validation, same.validation)
    assert (len(one.train), len(one.validation), len(one.test)) == (6, 4, 3)
    assert shown(one.validation) != shown(other.validation)
    assert sorted(shown(one.train) + shown(one.validation)) == shown(
        load(folder, validation=0).train
    )
    fewer = load(folder, 1, validation=0.4, train_examples=2)
    assert_same(one.validation, fewer.validation)
    assert len(fewer.train) == 2 and set(shown(fewer.train)) < set(shown(one.train))
    with pytest.raises(DataError, match="train_examples is 7; it must be from 1 to 6"):
        load(folder, validation=0.4, train_examples=7)


def test_people_of_an_image_are_held_out_together(tmp_path):
    make(tmp_path, train=people(8), test=people(1))
    data = load(tmp_path, task="pose", validation=0.5)
    parts = [{int(x["label"]["image"]) for x in examples(s)} for s in (data.train, data.validation)]
    assert len(data.train) == len(data.validation) == 8 and not parts[0] & parts[1]


def test_the_digest_follows_the_files(folder, monkeypatch):
    for limit in (reading.MEMORY_LIMIT, 0):
        monkeypatch.setattr(reading, "MEMORY_LIMIT", limit)
        before = load(folder).digest
        assert load(folder).digest == before
        paint(folder / "train" / "3.png", (40, 20), [limit > 0, 0, 9, 9], colour=BLUE)
        image = load(folder).digest
        data = json.loads((folder / "train.json").read_text())
        data["annotations"][4]["bbox"][3] += 1
        write(folder / "train.json", data)
        assert len({before, image, load(folder).digest}) == 3


def test_the_fingerprint_covers_all_files_of_a_set_on_disk(tmp_path, monkeypatch):
    """The digest reads only 16 examples of a set outside memory, not the second of 40."""
    monkeypatch.setattr(reading, "MEMORY_LIMIT", 0)
    folder = make(tmp_path, train=part(40, size=(60, 20)), test=part(1))
    digests = [load(folder, validation=0).digest]
    paint(folder / "train" / "1.png", (60, 20), *([i, i, 1, 1] for i in range(20)))
    digests.append(load(folder, validation=0).digest)
    with changed(folder, change("annotations", 1, bbox=[1, 1, 1, 1])):
        digests.append(load(folder, validation=0).digest)
    assert len(set(digests)) == 3 and load(folder, validation=0).digest == digests[1]


def test_images_without_any_annotation_are_a_set(tmp_path):
    data = load(make(tmp_path, train={**part(3), "annotations": []}, test=part(1)), validation=0)
    assert len(data.train) == 3 and not any(
        x["label"]["present"].any() for x in examples(data.train)
    )


def test_usual_names_and_folders(tmp_path):
    train, val, test = part(4), part(2), part(1)
    make(tmp_path / "a", train=train, val=val)  # no test: val is the test part
    assert [len(x) for x in parts(load(tmp_path / "a", validation=0.25))] == [3, 1, 2]
    make(tmp_path / "b", train=train, val=val, test=test)
    assert [len(x) for x in parts(load(tmp_path / "b"))] == [4, 2, 1]
    assert [len(x) for x in parts(load(tmp_path / "b", validation=0))] == [4, 0, 1]
    assert [len(x) for x in parts(load(tmp_path / "b", test="val.json"))] == [3, 1, 2]

    root = make(tmp_path / "c", train2017=train, val2017=val)  # as COCO is unpacked
    for name in ("train2017", "val2017"):
        target = root / "annotations" / f"instances_{name}.json"
        target.parent.mkdir(exist_ok=True)
        (root / f"{name}.json").rename(target)
    assert [len(x) for x in parts(load(root, validation=0))] == [4, 0, 2]
    with pytest.raises(DataError, match=r"no annotation file for train \(train.json, person_key"):
        load(root, task="pose")

    (root / "train2017").rename(root / "images")  # one folder for all images
    (root / "val2017").rename(root / "elsewhere")
    with pytest.raises(
        DataError, match=r"instances_val2017.json: the image .* none of the folders"
    ):
        (root / "images" / "1.png").rename(root / "images" / "7.png")
        load(root, train="annotations/instances_val2017.json", validation=0)
    other = "annotations/instances_val2017.json"
    data = load(root, train=other, test=other, images="elsewhere", validation=0)
    assert [len(x) for x in parts(data)] == [2, 0, 2]


def parts(data: Dataset):
    return data.train, data.validation, data.test


def test_a_folder_is_needed(tmp_path):
    with pytest.raises(DataError, match="'coco' is read from a folder, but path is None; pass"):
        Coco().load()
    with pytest.raises(DataError, match=r"but path is '.*absent'"):
        load(tmp_path / "absent")
    make(tmp_path, train=part(1))
    with pytest.raises(
        DataError, match=r"no annotation file for test \(test.json, .*pass test, the"
    ):
        load(tmp_path)
    with pytest.raises(DataError, match=r"other.json cannot be read .*check the path"):
        load(tmp_path, test="other.json")
    assert Coco(path="x").path == str(pathlib.Path("x").absolute())


def change(*path, **fields):
    """Changes fields of a record, such as change("annotations", 0, bbox=...); None deletes one."""

    def edit(data: dict[str, Any]) -> Any:
        data = copy.deepcopy(data)
        record: Any = data
        for key in path:
            record = record[key]
        record |= fields
        for name in [name for name, value in fields.items() if value is None]:
            del record[name]
        return data

    return edit


first = ("annotations", 0)
BAD_FILES = {
    "empty": (lambda data: "", "train.json is not valid JSON"),
    "cut": (lambda data: json.dumps(data)[:-9], "train.json is not valid JSON .*restore it"),
    "list": (lambda data: [1], "no images and no annotations and no categories; .*pass another"),
    "key": (change(annotations=None), "train.json has no annotations; .*pass another file"),
    "strings": (change(images=["a"]), "images must be a list of objects with an id"),
    "no category": (change(categories=[]), "has 0 categories and 4 images; .*at least one"),
    "unnamed": (change("categories", 0, name=None), "category 3 has no 'name'; add it"),
    "no id": (change("images", 1, id=None), "image number 2 of images has no 'id'; add it"),
    "image id": (change("images", 1, id=10), "train.json: image 10 appears twice; give"),
    "category id": (change("categories", 1, id=3), "category 3 appears twice; give each"),
    "annotation id": (change("annotations", 1, id=500), "annotation 500 appears twice; give"),
    "text id": (change("categories", 1, id="x"), "category 'x' has the id 'x'; use an integer"),
    "unknown category": (
        change(*first, category_id=4),
        "annotation 500 has the category_id 4, which no category has; add the category or delete",
    ),
    "unknown image": (
        change(*first, image_id=1),
        "annotation 500 has the image_id 1, which no image has; add the image or delete",
    ),
    "no box": (change(*first, bbox=None), "annotation 500 has no 'bbox'; add it"),
    "three numbers": (change(*first, bbox=[1, 2, 3]), r"500 has the bbox \[1, 2, 3\]; it must be"),
    "nan": (change(*first, bbox=[1, 2, 3, np.nan]), r"the bbox \[1, 2, 3, nan\]; .*four finite"),
    "infinite": (change(*first, bbox=[1, 2, np.inf, 1]), "four finite numbers: left, top"),
    "text": (change(*first, bbox=[1, 2, "3", 1]), r"'3', 1\]; it must be four finite numbers"),
    "huge": (change(*first, bbox=[1, 2, 10**400, 1]), "four finite numbers"),
    "area": (change(*first, area=-1), "annotation 500 has the area -1; it must be a number"),
    "crowd": (change(*first, iscrowd=2), "annotation 500 has the iscrowd 2; it must be 0 or 1"),
    "size": (change("images", 0, width=0), r"image 10 \('0.png'\) has the size 0 x 20; both"),
    "no size": (change("images", 0, width=None), "image 10 has no 'width'; add it"),
    "float size": (change("images", 0, width=4.5), "the width 4.5; it must be an integer"),
    "missing image": (
        change("images", 2, file_name="x.png"),
        "train.json: the image 'x.png' is in none of the folders '.*train', '.*images'; put it",
    ),
    "folder as image": (change("images", 2, file_name="."), "the image '.' is in none of the"),
    "other size": (
        change("images", 2, width=41),
        r"the image '.*2.png' \(id 12\) is 40 x 20, but the JSON says 41 x 20; correct the JSON",
    ),
    "turned": (
        change("images", 2, width=20, height=40),
        "is 40 x 20, but the JSON says 20 x 40; rotate its pixels, since EXIF",
    ),
    "other categories": (
        change("categories", 2, name="fish"),
        "category 7 is 'fish' in train.json but 'bird' in test.json; .*correct one of them",
    ),
    "fewer categories": (
        change(categories=[*CATEGORIES, {"id": 91, "name": "cow"}]),
        "category 91 is 'cow' in train.json but missing in test.json",
    ),
}


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> pathlib.Path:
    return make(tmp_path_factory.mktemp("small"), train=part(4), test=part(1))


@contextlib.contextmanager
def changed(root: pathlib.Path, edit):
    """The folder with another train.json, for a while."""
    file = root / "train.json"
    before = file.read_text()
    data = edit(json.loads(before))
    file.write_text(data if isinstance(data, str) else json.dumps(data))
    yield
    file.write_text(before)


def refused(words: str, folder: pathlib.Path, **options) -> None:
    with pytest.raises(DataError, match=words) as caught:
        load(folder, validation=0, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("limit", [2**30, 0], ids=["memory", "disk"])
@pytest.mark.parametrize(("edit", "words"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files_are_named(small, monkeypatch, edit, words, limit):
    monkeypatch.setattr(reading, "MEMORY_LIMIT", limit)
    with changed(small, edit):
        refused(words, small)


BAD_POSES = {
    "count": (change(*first, keypoints=[1, 2, 2]), "500 has 3 numbers as keypoints; .*9 numbers"),
    "visibility": (change(*first, keypoints=[1, 2, 3] * 3), "the visibility 3; it must be 0 .not"),
    "nan": (change(*first, keypoints=[np.nan, 2, 2] * 3), "they must be finite numbers"),
    "skeleton": (
        change("categories", 0, skeleton=[[0, 1]]),
        r"category 1 has the skeleton \[\[0, 1\]\]; .*pairs of keypoints, numbered from 1 to 3",
    ),
    "no keypoints": (change("categories", 0, keypoints=None), "0 categories with keypoints; pose"),
    "other joints": (
        change("categories", 0, keypoints=["a", "b", "c"]),
        "keypoints are a, b, c in train.json but head, left, right in test.json; .*correct",
    ),
    "nobody": (
        lambda data: data | {"annotations": []},
        "train.json has no person with a labelled keypoint; pass another file",
    ),
}


@pytest.mark.parametrize(("edit", "words"), BAD_POSES.values(), ids=BAD_POSES)
def test_bad_keypoints_are_named(tmp_path, edit, words):
    make(tmp_path, train=people(2), test=people(1))
    with changed(tmp_path, edit):
        refused(words, tmp_path, task="pose")


def test_unreadable_images_are_named(folder, monkeypatch):
    stream = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (20, 40, 3), np.uint8)
    Image.fromarray(noise).save(stream, "PNG")
    for content in (b"", b"no image", stream.getvalue()[:1000]):
        (folder / "train" / "2.png").write_bytes(content)
        refused(r"train.json: the image '.*2.png' \(id 12\) cannot be decoded .*; replace", folder)
    monkeypatch.setattr(reading, "MEMORY_LIMIT", 0)
    data = load(folder, validation=0)  # the header is whole
    with pytest.raises(DataError, match=r"the image '.*2.png' \(id 12\) cannot be decoded"):
        data.train[2]
    paint(folder / "train" / "3.png", (20, 20))  # changed after it was checked
    with pytest.raises(DataError, match=r"the image '.*3.png' \(id 13\) is 20 x 20, but the JSON"):
        data.train[3]
