"""Detection sets of tensorflow-datasets: the labels that the same images have as a COCO folder."""

import contextlib
import importlib.util
import io
import json
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from paramshare.data import Coco, DataError, Tfds, reading
from paramshare.tasks import Detection

CATEGORIES = ("cat", "bird", "dog")
# Three images of other sizes; boxes as COCO stores them: left, top, width, height.
SIZES = [(40, 20), (16, 32), (24, 24)]
BOXES = [[[4, 2, 20, 10], [1, 1, 5, 5]], [], [[2, 4, 8, 8], [20, 20, 50, 50], [30, 3, 2, 2]]]


def pixels(index: int) -> Image.Image:
    width, height = SIZES[index]
    noise = np.random.default_rng(index).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(noise)


def example(index: int) -> dict:
    (width, height), stream = SIZES[index], io.BytesIO()
    pixels(index).save(stream, "PNG")
    return {
        "image": stream.getvalue(),
        "image/filename": f"{index}.png",
        "objects": [
            {
                "id": 10 * index + i,
                "area": 7 + i,
                # tensorflow-datasets refuses boxes beyond the image.
                "bbox": tfds.features.BBox(
                    ymin=y / height,
                    xmin=x / width,
                    ymax=min((y + h) / height, 1.0),
                    xmax=min((x + w) / width, 1.0),
                ),
                "label": (index + i) % 3,
                "is_crowd": i == 1,
            }
            for i, (x, y, w, h) in enumerate(BOXES[index])
            if x < width
        ],
    }


def prepare(root, splits: dict[str, list[int]], features: dict | None = None) -> str:
    """Prepares a set with the name and the features of coco/2017, without TensorFlow."""
    if features is None:
        features = {
            "image": tfds.features.Image(encoding_format="png"),
            "image/filename": tfds.features.Text(),
            "objects": tfds.features.Sequence(
                {
                    "id": np.int64,
                    "area": np.int64,
                    "bbox": tfds.features.BBoxFeature(),
                    "label": tfds.features.ClassLabel(names=CATEGORIES),
                    "is_crowd": np.bool_,
                }
            ),
        }

    class Stand(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.1.0")
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="2017")]  # noqa: RUF012

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {
                split: iter(
                    (i, {k: v for k, v in example(i).items() if k in features}) for i in indices
                )
                for split, indices in splits.items()
            }

        def _generate_examples(self):
            raise NotImplementedError

    Stand.name = "coco"
    with contextlib.redirect_stderr(io.StringIO()):
        Stand(data_dir=str(root), config="2017").download_and_prepare(file_format="array_record")
    return str(root)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> str:
    root = tmp_path_factory.mktemp("coco")
    return prepare(root, {"train": [0, 1, 2], "validation": [2, 0], "test": [1]})


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """The same images as a folder."""
    root = tmp_path_factory.mktemp("folder")
    for name, indices in (("train", [0, 1, 2]), ("test", [2, 0])):
        (root / name).mkdir()
        annotations = [
            {
                "id": 10 * index + i,
                "image_id": index,
                "category_id": (index + i) % 3,
                "bbox": box,
                "area": 7 + i,
                "iscrowd": int(i == 1),
            }
            for index in indices
            for i, box in enumerate(BOXES[index])
            if box[0] < SIZES[index][0]
        ]
        for index in indices:
            pixels(index).save(root / name / f"{index}.png")
        images = [
            {"id": i, "file_name": f"{i}.png", "width": SIZES[i][0], "height": SIZES[i][1]}
            for i in indices
        ]
        categories = [{"id": k, "name": name} for k, name in enumerate(CATEGORIES)]
        text = {"images": images, "annotations": annotations, "categories": categories}
        (root / f"{name}.json").write_text(json.dumps(text))
    return str(root)


@pytest.mark.parametrize("limit", [2**30, 0], ids=["memory", "disk"])
def test_the_labels_are_those_of_the_folder(data_dir, folder, monkeypatch, limit):
    monkeypatch.setattr(reading, "MEMORY_LIMIT", limit)
    options: dict[str, Any] = {"image_size": 32, "max_boxes": 5, "validation": 0}
    prepared = Tfds("coco/2017", data_dir=data_dir, **options).load()
    plain = Coco(path=folder, **options).load()
    assert prepared.task == plain.task == Detection(CATEGORIES, max_boxes=5)
    assert prepared.in_memory == plain.in_memory == (limit > 0)
    assert prepared.input_shape == plain.input_shape and prepared.mean == plain.mean

    def by_size(source) -> list:  # tensorflow-datasets shuffles its examples
        examples = [source[i] for i in range(len(source))]
        return sorted(examples, key=lambda e: tuple(e["label"]["scale"]))

    assert (len(prepared.train), len(prepared.test)) == (3, 2)
    for name in ("train", "test"):
        sources = (getattr(prepared, name), getattr(plain, name))
        for one, other in zip(*map(by_size, sources), strict=True):
            np.testing.assert_array_equal(one["input"], other["input"])
            assert one["label"].keys() == other["label"].keys()
            for key, value in one["label"].items():
                # Fractions of the image are stored in float32.
                np.testing.assert_allclose(value, other["label"][key], rtol=1e-6, atol=1e-5)
                assert value.dtype == other["label"][key].dtype
    prepared.task.check_labels(
        {k: v[None] for k, v in prepared.train[0]["label"].items()}, prepared.input_shape
    )


def test_the_default_size_and_the_held_out_part(data_dir):
    data = Tfds("coco/2017", data_dir=data_dir, validation=0.3).load()
    assert data.input_shape == (320, 320, 3)
    assert [len(x) for x in (data.train, data.validation, data.test)] == [2, 1, 2]


def test_few_rows_keep_the_largest_single_objects(data_dir):
    data = Tfds("coco/2017", data_dir=data_dir, max_boxes=1, image_size=8, validation=0).load()
    label = [data.test[i]["label"] for i in range(2)]
    assert [x["area"].tolist() for x in label] == [[7], [7]]  # the second of each is a crowd
    assert not any(x["crowd"].any() for x in label)


@pytest.mark.parametrize(
    ("features", "words"),
    [
        ({"objects": {"bbox": tfds.features.BBoxFeature()}}, "have the features bbox; they must"),
        (
            {"objects": {"bbox": tfds.features.BBoxFeature(), "label": np.int64}},
            "has None categories and .* detection needs a ClassLabel and RGB images",
        ),
        ({}, "has the features image; it must have image and label, or image and objects"),
    ],
    ids=["no label", "no names", "no objects"],
)
def test_sets_without_boxes_and_categories_are_refused(tmp_path, features, words):
    features = {
        name: tfds.features.Sequence(x) if name == "objects" else x for name, x in features.items()
    } | {"image": tfds.features.Image(encoding_format="png")}
    empty = prepare(tmp_path, {"train": [1], "validation": [1]}, features)
    with pytest.raises(DataError, match=words):
        Tfds("coco/2017", data_dir=empty).load()


@pytest.mark.skipif(importlib.util.find_spec("tensorflow") is not None, reason="installed")
def test_preparing_coco_needs_tensorflow(tmp_path):
    with pytest.raises(DataError, match=r"preparing it needs TensorFlow"):
        Tfds("coco/2017", data_dir=str(tmp_path / "data")).load()
