"""Prepared data sets: digits, those of tensorflow-datasets, and every failure in one line."""

import contextlib
import io
import os
import pathlib
import re
import shutil
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from paramshare.data import (
    ArraySource,
    DataError,
    Digits,
    Example,
    Tfds,
    crop,
    eval_batches,
    prepared,
    reading,
    train_batches,
)
from paramshare.data.error import require
from paramshare.data.sets.builders.digits import DigitsBuilder
from paramshare.data.sets.tfds import published
from paramshare.tasks import Classification


class Empty:
    """A source that is no `ArraySource`."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Example:
        raise IndexError(index)


def arrays(source) -> ArraySource:
    assert isinstance(source, ArraySource)
    return source


def sizes(data) -> tuple[int, int, int]:
    return len(data.train), len(data.validation), len(data.test)


def test_digits_are_those_of_scikit_learn(prepared_digits):
    from sklearn.datasets import load_digits

    data, _, printed = prepared_digits
    assert printed == ""  # standard output belongs to the caller
    assert sizes(data) == (1442, 0, 355)
    assert (data.task, data.input_shape) == (Classification(10), (8, 8, 1))
    pixels, label = load_digits(return_X_y=True)
    expected = [
        np.round(row.reshape(8, 8, 1) * 255 / 16).astype(np.uint8).tobytes() + bytes([c])
        for row, c in zip(pixels, label, strict=True)
    ]
    rows = [
        row.tobytes() + bytes([c])
        for source in map(arrays, (data.train, data.test))
        for row, c in zip(source.input, source.label, strict=True)
    ]
    assert sorted(rows) == sorted(expected)
    assert arrays(data.train).input.max() == 255


def test_digits_split_is_stratified_and_fixed(digits, data_dir):
    test, train = (np.bincount(arrays(part).label) for part in (digits.test, digits.train))
    assert np.array_equal(test, (test + train) // 5)  # every fifth of each class
    other = Digits(data_dir=data_dir).load(seed=9)
    assert np.array_equal(arrays(other.test).input, arrays(digits.test).input)


def test_the_validation_part_depends_on_the_seed_only(data_dir):
    one, same, other = (Digits(data_dir=data_dir).load(seed) for seed in (0, 0, 1))
    assert np.array_equal(arrays(one.validation).input, arrays(same.validation).input)
    assert not np.array_equal(arrays(one.validation).label, arrays(other.validation).label)
    few = Digits(data_dir=data_dir, train_examples=100).load()
    assert len(few.train) == 100
    assert np.array_equal(arrays(few.validation).input, arrays(one.validation).input)


def test_the_second_of_two_reads_what_the_first_prepared(tmp_path, tmp_path_factory, monkeypatch):
    original = DigitsBuilder._split_generators

    def slower(self, dl_manager):  # another process finishes while this one is still preparing
        monkeypatch.setattr(DigitsBuilder, "_split_generators", original)
        DigitsBuilder(data_dir=str(tmp_path)).download_and_prepare(
            file_format="array_record", download_dir=tmp_path_factory.mktemp("x")
        )
        return original(self, dl_manager)

    monkeypatch.setattr(DigitsBuilder, "_split_generators", slower)
    assert len(Digits(data_dir=str(tmp_path), validation=0).load().train) == 1442
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_dir()) == ["1.0.0", "digits"]


def test_cifar_under_tfds_mock():
    with tfds.testing.mock_data(num_examples=20):
        data = Tfds("cifar10", validation=0.2).load()
    assert sizes(data) == (16, 4, 20)
    assert (data.input_shape, data.task, data.in_memory) == (
        (32, 32, 3),
        Classification(10),
        True,
    )
    assert data.mean == (125.3, 123.0, 113.9)


def test_imagenet_under_tfds_mock():
    with tfds.testing.mock_data(num_examples=20):
        data = Tfds("imagenet2012", validation=0.2, image_size=32).load()
        assert sizes(data) == (16, 4, 20)
        assert (data.input_shape, data.task, data.in_memory) == (
            (32, 32, 3),
            Classification(1000),
            False,
        )
        stream = train_batches(data.train, 4, 0, 0)
        batch = next(stream)
        assert (batch["input"].shape, batch["label"].dtype) == ((4, 32, 32, 3), np.int32)
        stream.close()  # type: ignore[attr-defined]
        assert sum(batch["weight"].sum() for batch in eval_batches(data.test, 8)) == 20


def test_published_constants():
    assert published("cifar10") == ((125.3, 123.0, 113.9), (63.0, 62.1, 66.7))
    assert published("cifar100") == ((129.3, 124.1, 112.4), (68.2, 65.4, 70.4))
    constants = published("imagenet2012")
    assert constants is not None
    np.testing.assert_allclose(
        np.array(constants) / 255, ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )


def picture(kind: str, height: int, width: int, value: int, mode: str = "RGB") -> bytes:
    stream = io.BytesIO()
    Image.new(mode, (width, height), value if mode == "L" else (value,) * 3).save(stream, kind)
    return stream.getvalue()


def write_as(name: str, root: pathlib.Path, splits: dict[str, list[dict]]) -> None:
    """Prepares a set with the features, name and version of the real one, but with these examples.

    It needs no TensorFlow, since the pictures are encoded. Unlike the mock, it decodes them.
    """
    real = tfds.builder(name, data_dir=str(root))
    assert isinstance(real.info.features, tfds.features.FeaturesDict)
    features = dict(real.info.features)

    class Stand(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = real.version

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {split: iter(enumerate(examples)) for split, examples in splits.items()}

        def _generate_examples(self):
            raise NotImplementedError

    Stand.name = name
    with contextlib.redirect_stderr(io.StringIO()):
        Stand(data_dir=str(root)).download_and_prepare(file_format="array_record")


def cifar(n: int) -> list[dict]:
    return [{"id": f"x{i}", "image": picture("PNG", 32, 32, i), "label": i % 10} for i in range(n)]


@pytest.fixture(scope="module")
def prepared_cifar(tmp_path_factory) -> pathlib.Path:
    """A folder with a prepared cifar10 of 30 and 7 examples; not to be changed."""
    root = tmp_path_factory.mktemp("cifar")
    write_as("cifar10", root, {"train": cifar(30), "test": cifar(7)})
    return root


def test_prepared_cifar_is_decoded_without_tensorflow(prepared_cifar):
    data = Tfds("cifar10", data_dir=str(prepared_cifar), validation=0.1).load()
    assert sizes(data) == (27, 3, 7)
    for source in map(arrays, (data.train, data.validation, data.test)):
        assert (source.input == source.input[:, :1, :1, :1]).all()
        assert np.array_equal(source.input[:, 0, 0, 0] % 10, source.label)
    assert sorted(arrays(data.test).input[:, 0, 0, 0]) == list(range(7))


def test_prepared_imagenet_is_divided_by_its_convention(tmp_path):
    modes = {1: ("JPEG", "L"), 2: ("PNG", "RGBA")}  # ImageNet has a few of each

    def photographs(n, label):
        kinds = [modes.get(i, ("JPEG", "RGB")) for i in range(n)]
        return [
            {"file_name": f"{i}", "image": picture(kind, 20 + i, 30, 9 * i, mode), "label": label}
            for i, (kind, mode) in enumerate(kinds)
        ]

    write_as(
        "imagenet2012",
        tmp_path,
        {"train": photographs(20, 1), "validation": photographs(6, 2), "test": photographs(3, -1)},
    )
    data = Tfds("imagenet2012", data_dir=str(tmp_path), validation=0.25, image_size=16).load()
    assert sizes(data) == (15, 5, 6)
    assert {int(data.test[i]["label"]) for i in range(6)} == {2}
    assert {int(data.validation[i]["label"]) for i in range(5)} == {1}
    parts = (data.train, data.validation, data.test)
    assert {part[i]["input"].shape for part in parts for i in range(len(part))} == {(16, 16, 3)}


def test_validation_split_of_the_set_is_used(tmp_path, monkeypatch):
    write_as("cifar10", tmp_path, {"train": cifar(30), "validation": cifar(4), "test": cifar(7)})
    config = Tfds("cifar10", data_dir=str(tmp_path), validation=0.5)
    assert sizes(config.load()) == (30, 4, 7)
    monkeypatch.setattr(reading, "MEMORY_LIMIT", 0)
    assert sizes(config.load()) == (30, 4, 7)
    without = Tfds("cifar10", data_dir=str(tmp_path), validation=0)
    assert sizes(without.load()) == (30, 0, 7)


def test_other_decoders_are_never_asked(tmp_path, monkeypatch):
    """tensorflow-datasets decodes with OpenCV where it is installed, and differently."""

    def refuse(self, encoded):
        raise AssertionError

    monkeypatch.setattr(tfds.features.Image, "decode_example_np", refuse)
    palette = Image.new("RGB", (32, 32), (10, 200, 30)).quantize(4)
    stream = io.BytesIO()
    palette.save(stream, "PNG")
    odd = [{"id": f"x{i}", "image": stream.getvalue(), "label": i % 10} for i in range(20)]
    write_as("cifar10", tmp_path, {"train": odd, "test": cifar(7)})
    data = Tfds("cifar10", data_dir=str(tmp_path)).load()
    assert (arrays(data.train).input == (10, 200, 30)).all()


def test_an_unreadable_image_is_named(tmp_path):
    def photographs(n: int) -> list[dict]:
        return [
            {"file_name": f"n{i}.JPEG", "image": picture("JPEG", 20, 20, i), "label": 1}
            for i in range(n)
        ]

    for file, data in (("n3.JPEG", b"\xff\xd8"), ("n4.JPEG", picture("JPEG", 90, 90, 1)[:700])):
        root = tmp_path / file
        bad = [row | {"image": data} if row["file_name"] == file else row for row in photographs(6)]
        write_as("imagenet2012", root, {"train": photographs(20), "validation": bad})
        read = Tfds("imagenet2012", data_dir=str(root), image_size=16).load()
        with pytest.raises(DataError) as caught:
            [read.test[i] for i in range(6)]
        words = (
            rf"example \d \('{file}'\) of the validation split of 'imagenet2012' in .*replace it"
        )
        assert re.search(words, str(caught.value))


@pytest.mark.parametrize(
    ("splits", "words"),
    [
        ({"train": cifar(3)}, "has the splits train; it must have train and test"),
        ({"train": cifar(3), "test": [{**cifar(1)[0], "label": -1}]}, "unlabelled"),
    ],
    ids=["splits", "labels"],
)
def test_unsuitable_splits_are_refused(tmp_path, splits, words):
    write_as("cifar10", tmp_path, splits)
    with pytest.raises(DataError, match=words):
        Tfds("cifar10", data_dir=str(tmp_path)).load()


@pytest.mark.parametrize("file", ["cifar10-train.array_record-00000-of-00001", "dataset_info.json"])
def test_damaged_prepared_data_are_reported(prepared_cifar, tmp_path, file):
    shutil.copytree(prepared_cifar, tmp_path, dirs_exist_ok=True)
    path = next(tmp_path.rglob(file))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=r"cannot be (read|opened) .*delete") as caught:
        Tfds("cifar10", data_dir=str(tmp_path)).load()
    assert "\n" not in str(caught.value)


def test_image_size_is_for_images_of_varying_size(prepared_cifar):
    with pytest.raises(DataError, match=r"image_size is 16, .* 'cifar10' have shape \(32, 32, 3\)"):
        Tfds("cifar10", data_dir=str(prepared_cifar), image_size=16).load()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cifar1", "there is no data set 'cifar1'; did you mean cifar10, cifar100"),
        ("didgits", "did you mean digits"),
        ("zzzzzzzzzzzz", "choose one of .*digits, grids, idx"),
        ("", "there is no data set ''"),
        ("cifar10/huge", "cannot be opened .*; check its name and configuration"),
    ],
)
def test_unknown_names_are_refused(tmp_path, name, words):
    with pytest.raises(DataError, match=words) as caught:
        Tfds(name, data_dir=str(tmp_path / "data")).load()
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "data").exists()


def test_sets_without_image_and_label_are_refused():
    with (
        tfds.testing.mock_data(num_examples=2),
        pytest.raises(DataError, match=r"'imdb_reviews' has the features label, text; it must"),
    ):
        Tfds("imdb_reviews").load()


def test_missing_tensorflow_is_reported_before_anything_is_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr(prepared.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r'not installed; run `pip install "paramshare\[tfds\]"`'):
        Tfds("mnist", data_dir=str(tmp_path / "data")).load()
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("module", "package"),
    [
        ("tensorflow_datasets", "tensorflow-datasets"),
        ("grain", "grain"),
        ("sklearn", "scikit-learn"),
        ("PIL", "pillow"),
    ],
)
def test_missing_packages_are_reported(tmp_path, monkeypatch, module, package):
    for loaded in [m for m in sys.modules if m == module or m.startswith(f"{module}.")]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, module, None)
    calls = {
        "tensorflow_datasets": lambda: Digits(data_dir=str(tmp_path / "data")).load(),
        "sklearn": lambda: Digits(data_dir=str(tmp_path / "data")).load(),
        "grain": lambda: train_batches(Empty(), 1, 0, 0),
        "PIL": lambda: crop.CropSource(Empty(), 8),
    }
    words = rf'needs {package}, which is not installed; run `pip install "paramshare\[train\]"`'
    with pytest.raises(DataError, match=words):
        calls[module]()
    assert not (tmp_path / "data").exists()
    assert require("math", "math", "arithmetic")


def test_a_data_dir_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "inside"):
        with pytest.raises(DataError, match=r"cannot be written to .*; pass a data_dir that can"):
            Digits(data_dir=str(place)).load()


def test_a_read_only_data_dir_is_left_as_it_was(tmp_path, monkeypatch):
    mkdir = os.mkdir

    def refuse(path, *args, **kwargs):
        if str(path).startswith(str(tmp_path / "data")):
            raise PermissionError(13, "Permission denied", str(path))
        return mkdir(path, *args, **kwargs)

    # Permissions do not bind root, who runs tests in containers.
    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(DataError, match=r"cannot be written to .*Permission denied"):
        Digits(data_dir=str(tmp_path / "data")).load()
    assert not (tmp_path / "data").exists()


def test_a_failure_half_way_leaves_nothing_behind(tmp_path, monkeypatch):
    def fails(self, image, label):
        yield 0, {"image": image[0], "label": int(label[0])}
        raise RuntimeError("power cut\nsecond line")

    monkeypatch.setattr(DigitsBuilder, "_generate_examples", fails)
    with pytest.raises(DataError, match=r"cannot be prepared in .*power cut.*; fix the") as caught:
        Digits(data_dir=str(tmp_path / "data")).load()
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "data").exists()
