"""Sets by name: digits, TFDS's own under its mock and as prepared files, and every way of asking wrongly."""

import io
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from paramshare.training.data import ArraySource, DataError, Example, eval_batches, load, prepared, train_batches


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("prepared"))


class Nothing:
    """A source that is no `ArraySource`."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Example:
        raise IndexError(index)


def held(source) -> ArraySource:
    assert isinstance(source, ArraySource)
    return source


def test_digits_are_those_of_scikit_learn(data_dir, capfd):
    from sklearn.datasets import load_digits

    images = load("digits", data_dir=data_dir, validation=0)
    assert capfd.readouterr() == ("", "")  # standard output belongs to the caller
    assert (len(images.train), len(images.test), images.num_classes, images.image_shape) == (1442, 355, 10, (8, 8, 1))
    pixels, label = load_digits(return_X_y=True)
    scaled = [
        np.round(row.reshape(8, 8, 1) * 255 / 16).astype(np.uint8).tobytes() + bytes([c]) for row, c in zip(pixels, label, strict=True)
    ]
    found = [row.tobytes() + bytes([c]) for s in map(held, (images.train, images.test)) for row, c in zip(s.image, s.label, strict=True)]
    assert sorted(found) == sorted(scaled)
    assert held(images.train).image.max() == 255


def test_digits_split_is_stratified_and_fixed(data_dir):
    images = load("digits", data_dir=data_dir, validation=0)
    test, train = np.bincount(held(images.test).label), np.bincount(held(images.train).label)
    assert np.array_equal(test, (test + train) // 5)  # every fifth of each class
    assert np.array_equal(held(load("digits", data_dir=data_dir, seed=9).test).image, held(images.test).image)


def test_division_depends_on_the_seed_only(data_dir):
    one, same, other = (load("digits", data_dir=data_dir, seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(held(one.validation).image, held(same.validation).image)
    assert not np.array_equal(held(one.validation).label, held(other.validation).label)
    few = load("digits", data_dir=data_dir, train_examples=100)
    assert len(few.train) == 100
    assert np.array_equal(held(few.validation).image, held(one.validation).image)


def prepare_and_count(path: str) -> int:
    return len(load("digits", data_dir=path, validation=0).train)


def test_two_processes_may_prepare_at_once(tmp_path):
    program = f"from paramshare.training.data import load; print(len(load('digits', data_dir={str(tmp_path)!r}, validation=0).train))"
    started = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=120)[0].strip() for process in started] == ["1442", "1442"]
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_dir()) == ["1.0.0", "digits"]


def test_the_second_of_two_finds_what_the_first_prepared(tmp_path, tmp_path_factory, monkeypatch):
    from paramshare.training.data.builders.digits import Digits

    original = Digits._split_generators

    def slower(self, dl_manager):  # another process finishes while this one is still preparing
        monkeypatch.setattr(Digits, "_split_generators", original)
        Digits(data_dir=str(tmp_path)).download_and_prepare(file_format="array_record", download_dir=tmp_path_factory.mktemp("x"))
        return original(self, dl_manager)

    monkeypatch.setattr(Digits, "_split_generators", slower)
    assert prepare_and_count(str(tmp_path)) == 1442
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_dir()) == [
        "1.0.0",
        "digits",
    ]


def test_cifar_under_tfds_mock():
    with tfds.testing.mock_data(num_examples=20):
        images = load("cifar10", validation=0.2)
    assert (len(images.train), len(images.validation), len(images.test)) == (16, 4, 20)
    assert (images.image_shape, images.num_classes, images.in_memory) == ((32, 32, 3), 10, True)
    assert images.mean == (125.3, 123.0, 113.9)


def test_imagenet_under_tfds_mock():
    with tfds.testing.mock_data(num_examples=20):
        images = load("imagenet2012", validation=0.2, image_size=32)
        assert (len(images.train), len(images.validation), len(images.test)) == (16, 4, 20)
        assert (images.image_shape, images.num_classes, images.in_memory) == ((32, 32, 3), 1000, False)
        stream = train_batches(images.train, 4, 0, 0)
        assert next(stream)["image"].shape == (4, 32, 32, 3)
        stream.close()  # type: ignore[attr-defined]
        assert sum(batch["weight"].sum() for batch in eval_batches(images.test, 8)) == 20


def picture(kind: str, height: int, width: int, value: int, mode: str = "RGB") -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.new(mode, (width, height), value if mode == "L" else (value,) * 3).save(stream, kind)
    return stream.getvalue()


def write_as(name: str, root: pathlib.Path, splits: dict[str, list[dict]], file_format: str = "array_record") -> None:
    """Prepares a set with the real builder's features, names and version, but with these examples; no TensorFlow needed, for the pictures
    are encoded already. The mock decodes nothing; this does."""
    real = tfds.builder(name, data_dir=str(root))
    assert isinstance(real.info.features, tfds.features.FeaturesDict)
    features = dict(real.info.features)

    class Stand(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = real.version

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {split: iter(enumerate(examples)) for split, examples in splits.items()}

        def _generate_examples(self):
            raise NotImplementedError

    Stand.name = name
    prepared_stand = Stand(data_dir=str(root))
    prepared_stand.download_and_prepare(file_format=file_format)


def cifar(n: int) -> list[dict]:
    return [{"id": f"x{i}", "image": picture("PNG", 32, 32, i), "label": i % 10} for i in range(n)]


def test_prepared_cifar_is_decoded_without_tensorflow(tmp_path):
    write_as("cifar10", tmp_path, {"train": cifar(30), "test": cifar(7)})
    images = load("cifar10", data_dir=str(tmp_path), validation=0.1)
    assert (len(images.train), len(images.validation), len(images.test)) == (27, 3, 7)
    for source in map(held, (images.train, images.validation, images.test)):
        assert (source.image == source.image[:, :1, :1, :1]).all()
        assert np.array_equal(source.image[:, 0, 0, 0] % 10, source.label)
    assert sorted(held(images.test).image[:, 0, 0, 0]) == list(range(7))


def test_prepared_imagenet_is_divided_by_its_convention(tmp_path):
    modes = {1: ("JPEG", "L"), 2: ("PNG", "RGBA")}  # ImageNet has a few of each

    def photographs(n, label):
        kinds = [modes.get(i, ("JPEG", "RGB")) for i in range(n)]
        return [
            {"file_name": f"{i}", "image": picture(kind, 20 + i, 30, 9 * i, mode), "label": label} for i, (kind, mode) in enumerate(kinds)
        ]

    write_as("imagenet2012", tmp_path, {"train": photographs(20, 1), "validation": photographs(6, 2), "test": photographs(3, -1)})
    images = load("imagenet2012", data_dir=str(tmp_path), validation=0.25, image_size=16)
    assert (len(images.train), len(images.validation), len(images.test)) == (15, 5, 6)
    assert {images.test[i]["label"] for i in range(6)} == {2}
    assert {images.validation[i]["label"] for i in range(5)} == {1}
    parts = (images.train, images.validation, images.test)
    assert {part[i]["image"].shape for part in parts for i in range(len(part))} == {(16, 16, 3)}


def test_own_validation_split_is_used(tmp_path):
    write_as("cifar10", tmp_path, {"train": cifar(30), "validation": cifar(4), "test": cifar(7)})
    images = load("cifar10", data_dir=str(tmp_path), validation=0.5)
    assert (len(images.train), len(images.validation), len(images.test)) == (30, 4, 7)
    disk = load("cifar10", data_dir=str(tmp_path), validation=0.5, memory_limit=0)
    assert (len(disk.train), len(disk.validation), len(disk.test)) == (30, 4, 7)
    assert len(load("cifar10", data_dir=str(tmp_path), validation=0, memory_limit=0).validation) == 0


@pytest.mark.parametrize(
    ("splits", "words"),
    [
        ({"train": cifar(3)}, "has the splits train; train and test"),
        ({"train": cifar(3), "test": [{**cifar(1)[0], "label": -1}]}, "unlabelled"),
    ],
)
def test_unfit_splits_are_told(tmp_path, splits, words):
    write_as("cifar10", tmp_path, splits)
    with pytest.raises(DataError, match=words):
        load("cifar10", data_dir=str(tmp_path))


@pytest.mark.parametrize("file", ["cifar10-train.array_record-00000-of-00001", "dataset_info.json"])
def test_a_damaged_prepared_set_is_told(tmp_path, file):
    write_as("cifar10", tmp_path, {"train": cifar(30), "test": cifar(7)})
    path = next(tmp_path.rglob(file))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=r"cannot be (read|opened) .*delete") as told:
        load("cifar10", data_dir=str(tmp_path))
    assert "\n" not in str(told.value)


def test_image_size_is_for_varying_sizes(data_dir):
    with pytest.raises(DataError, match=r"image_size=32 .* those of 'digits' are \(8, 8, 1\)"):
        load("digits", data_dir=data_dir, image_size=32)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cifar1", "there is no data set 'cifar1'; did you mean cifar10, cifar100"),
        ("didgits", "did you mean digits"),
        ("zzzzzzzz", "pass digits, idx, cifar10"),
        ("", "there is no data set ''"),
        ("cifar10/huge", "cannot be opened .*; check its name and configuration"),
    ],
)
def test_unknown_names_are_told(tmp_path, name, words):
    with pytest.raises(DataError, match=words) as told:
        load(name, data_dir=str(tmp_path / "data"))
    assert "\n" not in str(told.value)
    assert not (tmp_path / "data").exists()


def test_sets_without_image_and_label_are_told():
    with (
        tfds.testing.mock_data(num_examples=2),
        pytest.raises(DataError, match=r"'imdb_reviews' has the features label, text; image and label"),
    ):
        load("imdb_reviews")


def test_missing_tensorflow_is_told_before_anything_is_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr(prepared.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError) as told:
        load("mnist", data_dir=str(tmp_path / "data"))
    assert 'needs TensorFlow, which is not installed; run `pip install "paramshare[tfds]"`, then the same command again' in str(told.value)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("module", "name"), [("tensorflow_datasets", "digits"), ("grain", "grain"), ("sklearn", "scikit-learn"), ("PIL", "pillow")]
)
def test_missing_packages_are_told(tmp_path, monkeypatch, module, name):
    from paramshare.training.data import crop
    from paramshare.training.data.error import require

    for loaded in [m for m in sys.modules if m == module or m.startswith(f"{module}.")]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, module, None)
    calls = {
        "tensorflow_datasets": lambda: load("digits", data_dir=str(tmp_path / "data")),
        "sklearn": lambda: load("digits", data_dir=str(tmp_path / "data")),
        "grain": lambda: train_batches(Nothing(), 1, 0, 0),
        "PIL": lambda: crop.CropSource(Nothing(), 8),
    }
    package = {"tensorflow_datasets": "tensorflow-datasets"}.get(module, name)
    with pytest.raises(DataError, match=rf'needs {package}, which is not installed; run `pip install "{package}"`'):
        calls[module]()
    assert not (tmp_path / "data").exists()
    assert require("math", "math", "arithmetic")


def test_a_data_dir_that_is_a_file_is_told(tmp_path):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "inside"):
        with pytest.raises(DataError, match=r"cannot be written to .*; pass a data_dir that can be written"):
            load("digits", data_dir=str(place))


def test_a_read_only_data_dir_is_told_and_left_as_it_was(tmp_path, monkeypatch):
    def refuse(path, *arguments, **keywords):
        if str(path).startswith(str(tmp_path / "data")):
            raise PermissionError(13, "Permission denied", str(path))
        return mkdir(path, *arguments, **keywords)

    mkdir = os.mkdir
    monkeypatch.setattr(os, "mkdir", refuse)  # permissions do not bind root, who runs tests in containers
    with pytest.raises(DataError, match=r"cannot be written to .*Permission denied.*; pass a data_dir that can be written"):
        load("digits", data_dir=str(tmp_path / "data"))
    assert not (tmp_path / "data").exists()


def test_a_failure_half_way_leaves_nothing_behind(tmp_path, monkeypatch):
    from paramshare.training.data.builders.digits import Digits

    def fails(self, image, label):
        yield 0, {"image": image[0], "label": int(label[0])}
        raise RuntimeError("power cut\nsecond line")

    monkeypatch.setattr(Digits, "_generate_examples", fails)
    with pytest.raises(DataError, match=r"cannot be prepared in .*power cut.*; mend that") as told:
        load("digits", data_dir=str(tmp_path / "data"))
    assert "\n" not in str(told.value)
    assert not (tmp_path / "data").exists()
