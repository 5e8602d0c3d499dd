"""COCO folders with bad files: each is an error that names file, annotation and remedy."""

import contextlib
import copy
import io
import json
import pathlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from paramshare.data import Coco, DataError, reading


def test_a_folder_is_needed(coco, tmp_path):
    with pytest.raises(DataError, match="'coco' is read from a folder, but path is None; pass"):
        Coco().load()
    with pytest.raises(DataError, match=r"but path is '.*absent'"):
        coco.load(tmp_path / "absent")
    coco.make(tmp_path, train=coco.part(1))
    with pytest.raises(
        DataError, match=r"no annotation file for test \(test.json, .*pass test, the"
    ):
        coco.load(tmp_path)
    with pytest.raises(DataError, match=r"other.json cannot be read .*check the path"):
        coco.load(tmp_path, test="other.json")
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
    "two names": (
        change("categories", 1, name="cat"),
        "category 90 has the name 'cat', as category 3 has; rename one",
    ),
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
        lambda data: data | {"categories": [*data["categories"], {"id": 91, "name": "cow"}]},
        "category 91 is 'cow' in train.json but missing in test.json",
    ),
}


@pytest.fixture(scope="module")
def small(coco, tmp_path_factory) -> pathlib.Path:
    return coco.make(tmp_path_factory.mktemp("small"), train=coco.part(4), test=coco.part(1))


@contextlib.contextmanager
def changed(root: pathlib.Path, edit):
    """The folder with another train.json, for a while."""
    file = root / "train.json"
    before = file.read_text()
    data = edit(json.loads(before))
    file.write_text(data if isinstance(data, str) else json.dumps(data))
    try:
        yield
    finally:
        file.write_text(before)


def refused(coco, words: str, folder: pathlib.Path, **options) -> None:
    with pytest.raises(DataError, match=words) as caught:
        coco.load(folder, validation=0, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("limit", [2**30, 0], ids=["memory", "disk"])
@pytest.mark.parametrize(("edit", "words"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files_are_named(coco, small, monkeypatch, edit, words, limit):
    monkeypatch.setattr(reading, "MEMORY_LIMIT", limit)
    with changed(small, edit):
        refused(coco, words, small)


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
def test_bad_keypoints_are_named(coco, tmp_path, edit, words):
    coco.make(tmp_path, train=coco.people(2), test=coco.people(1))
    with changed(tmp_path, edit):
        refused(coco, words, tmp_path, task="pose")


def test_unreadable_images_are_named(coco, folder, monkeypatch):
    stream = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (20, 40, 3), np.uint8)
    Image.fromarray(noise).save(stream, "PNG")
    for content in (b"", b"no image", stream.getvalue()[:1000]):
        (folder / "train" / "2.png").write_bytes(content)
        words = r"train.json: the image '.*2.png' \(id 12\) cannot be decoded .*; replace"
        refused(coco, words, folder)
    monkeypatch.setattr(reading, "MEMORY_LIMIT", 0)
    data = coco.load(folder, validation=0)  # the header is whole
    with pytest.raises(DataError, match=r"the image '.*2.png' \(id 12\) cannot be decoded"):
        data.train[2]
    coco.paint(folder / "train" / "3.png", (20, 20))  # changed after it was checked
    with pytest.raises(DataError, match=r"the image '.*3.png' \(id 13\) is 20 x 20, but the JSON"):
        data.train[3]
