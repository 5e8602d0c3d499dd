"""IDX folders: read as written, prepared once, again when they change; damage is one line."""

import gzip
import pathlib
import struct

import numpy as np
import pytest

from paramshare.data import ArraySource, DataError, Dataset, Idx, idx_files, reading
from paramshare.tasks import Classification

TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def part(n: int, *shape: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, *(shape or (5, 4))), np.uint8), np.arange(n) % 3


def load(folder: pathlib.Path, data_dir: pathlib.Path, seed: int = 0, **options) -> Dataset:
    return Idx(path=str(folder), data_dir=str(data_dir), **options).load(seed)


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    idx_files.write(tmp_path / "idx", part(20), part(6, seed=1))
    return tmp_path / "idx"


def arrays(source) -> ArraySource:
    assert isinstance(source, ArraySource)
    return source


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 1), (5, 4, 3)])
def test_what_is_written_is_read(tmp_path, compress, shape):
    train, test = part(20, *shape), part(6, *shape, seed=1)
    idx_files.write(tmp_path / "idx", train, test, compress=compress)
    images = load(tmp_path / "idx", tmp_path / "data", validation=0)
    full = (*shape, 1)[:3]
    assert images.input_shape == full
    assert images.task == Classification(3)
    assert images.in_memory and images.mean is not None and images.std is not None
    for source, (image, label) in ((arrays(images.train), train), (arrays(images.test), test)):
        assert np.array_equal(source.input, image.reshape(-1, *full))
        assert np.array_equal(source.label, label)
    assert len(images.validation) == 0
    pixels = train[0].reshape(-1, full[2]).astype(float)
    np.testing.assert_allclose(images.mean, pixels.mean(0), rtol=1e-12)
    np.testing.assert_allclose(images.std, pixels.std(0), rtol=1e-12)


def test_classes_without_images_and_channels_first_are_refused(tmp_path, monkeypatch):
    image, label = part(20)
    idx_files.write(tmp_path / "idx", (image, label + 1), (image, label + 1))
    with pytest.raises(DataError, match="no training example has label 0"):
        load(tmp_path / "idx", tmp_path)
    assert load(tmp_path / "idx", tmp_path, num_classes=5).task == Classification(5)
    monkeypatch.setattr(reading, "MEMORY_LIMIT", 0)
    assert load(tmp_path / "idx", tmp_path, num_classes=5).task == Classification(5)
    with pytest.raises(DataError, match="no training example has label 0"):
        load(tmp_path / "idx", tmp_path)
    with pytest.raises(DataError, match="label 3 must be below num_classes=3"):
        load(tmp_path / "idx", tmp_path, num_classes=3)
    image = np.zeros((20, 3, 8, 8), np.uint8)
    idx_files.write(tmp_path / "first", (image, label), (image, label))
    with pytest.raises(DataError, match=r"looks like \(N, C, H, W\); write it"):
        load(tmp_path / "first", tmp_path)


def test_reading_from_disk_gives_the_same_examples(folder, tmp_path, monkeypatch):
    memory = load(folder, tmp_path, seed=4, validation=0.2)
    monkeypatch.setattr(reading, "MEMORY_LIMIT", 0)
    disk = load(folder, tmp_path, seed=4, validation=0.2)
    assert not disk.in_memory and disk.mean is not None and memory.mean is not None
    assert disk.input_shape == memory.input_shape
    # 16 examples: the sample of at most 1,000 is all of them.
    np.testing.assert_allclose(disk.mean, memory.mean)
    for name in ("train", "validation", "test"):
        one, other = getattr(memory, name), getattr(disk, name)
        assert len(one) == len(other) > 0
        for i in range(len(one)):
            assert np.array_equal(one[i]["input"], other[i]["input"])
            assert one[i]["label"] == other[i]["label"]


def test_folders_do_not_collide_and_a_changed_one_is_noticed(folder, tmp_path):
    data = tmp_path / "data"
    idx_files.write(tmp_path / "other", part(20, seed=7), part(6, seed=8))
    one = arrays(load(folder, data, validation=0).train).input
    other = arrays(load(tmp_path / "other", data, validation=0).train).input
    assert not np.array_equal(one, other)
    assert np.array_equal(arrays(load(folder, data, validation=0).train).input, one)
    idx_files.write(folder, part(20, seed=9), part(6, seed=1))
    changed = arrays(load(folder, data, validation=0).train).input
    assert np.array_equal(changed[..., 0], part(20, seed=9)[0])


def test_a_prepared_folder_that_moved_is_not_prepared_again(folder, tmp_path):
    load(folder, tmp_path / "data")
    before = sorted((tmp_path / "data").rglob("*"))
    load(folder.rename(tmp_path / "elsewhere"), tmp_path / "data")
    assert sorted((tmp_path / "data").rglob("*")) == before
    assert not any("incomplete" in str(path) or "downloads" in str(path) for path in before)


def replace(file: str, data: bytes):
    return lambda folder: (folder / file).write_bytes(data)


def header(*sizes: int, kind: int = 8) -> bytes:
    return struct.pack(f">HBB{len(sizes)}I", 0, kind, len(sizes), *sizes)


WHOLE = header(2, 5, 4) + bytes(40)
DAMAGE = {
    "missing image file": (
        lambda f: (f / TRAIN_IMAGES).unlink(),
        "train-images-idx3-ubyte[.gz] or train-images-idx4-ubyte[.gz] is missing",
    ),
    "missing label file": (
        lambda f: (f / "t10k-labels-idx1-ubyte").unlink(),
        "t10k-labels-idx1-ubyte[.gz] is missing",
    ),
    "truncated": (
        replace(TRAIN_IMAGES, header(20, 5, 4) + bytes(399)),
        "holds 399 bytes but its header says (20, 5, 4), 400 bytes",
    ),
    "too long": (replace(TRAIN_IMAGES, header(20, 5, 4) + bytes(401)), "is too long"),
    "inside the header": (
        replace(TRAIN_IMAGES, header(20, 5, 4)[:-2]),
        "ends inside its header, after 14 of 16 bytes",
    ),
    "empty": (replace(TRAIN_IMAGES, b""), "begins with the bytes (none)"),
    "magic": (replace(TRAIN_IMAGES, b"\x89PNG" + bytes(30)), "begins with the bytes 89 50 4e 47"),
    "floats": (replace(TRAIN_IMAGES, header(20, 5, 4, kind=13) + bytes(1600)), "IDX type 0x0d"),
    "gzip cut": (
        replace(TRAIN_IMAGES, gzip.compress(WHOLE)[:-9]),
        "cannot be read as gzip or IDX (EOFError",
    ),
    "gzip sum": (
        replace(TRAIN_IMAGES, gzip.compress(WHOLE)[:-8] + bytes(8)),
        "cannot be read as gzip or IDX (BadGzipFile",
    ),
    "gzip body": (
        replace(TRAIN_IMAGES, gzip.compress(WHOLE)[:10] + b"\xff" * 30),
        "cannot be read as gzip or IDX (error",
    ),
    "counts": (replace(TRAIN_LABELS, header(19) + bytes(19)), "holds 20 images but"),
    "labels of two dimensions": (
        replace(TRAIN_LABELS, header(20, 1) + bytes(20)),
        "labels must have 1",
    ),
    "images of two dimensions": (
        replace(TRAIN_IMAGES, header(20, 20) + bytes(400)),
        "images must have 3 (N, H, W) or 4",
    ),
    "no images": (replace(TRAIN_IMAGES, header(0, 5, 4)), "holds 20 labels"),
    "unlike parts": (
        replace(TRAIN_IMAGES, header(20, 4, 5) + bytes(400)),
        "train images are (4, 5, 1) but t10k images are (5, 4, 1)",
    ),
    "a folder for a file": (
        lambda f: ((f / TRAIN_LABELS).unlink(), (f / TRAIN_LABELS).mkdir()),
        "train-labels-idx1-ubyte[.gz] is missing",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_raises_one_line_and_leaves_nothing_behind(folder, tmp_path, name):
    damage, words = DAMAGE[name]
    damage(folder)
    with pytest.raises(DataError) as caught:
        load(folder, tmp_path / "data")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "data").exists()


def test_images_and_labels_both_empty(tmp_path):
    idx_files.write(tmp_path, part(0), part(0))
    with pytest.raises(DataError, match="holds no images"):
        idx_files.read(idx_files.find(tmp_path))


@pytest.mark.parametrize(
    ("path", "words"),
    [(None, "pass path"), ("nowhere-at-all", "does not exist"), (__file__, "is not a folder")],
)
def test_paths_are_checked(tmp_path, path, words):
    with pytest.raises(DataError, match=words):
        Idx(path=path, data_dir=str(tmp_path / "data")).load()
    assert not (tmp_path / "data").exists()


def test_the_path_is_stored_absolute(tmp_path, monkeypatch):
    """A run may be resumed from another folder."""
    monkeypatch.chdir(tmp_path)
    assert Idx(path="some/folder").path == str(tmp_path / "some" / "folder")
    assert Idx(path="~/folder").path == str(pathlib.Path.home() / "folder")
