"""Digits to draw images with: scikit-learn's, MNIST's, those of IDX files or of an array file."""

import pathlib
import zipfile

import numpy as np

from paramshare.data.dataset import Dataset
from paramshare.data.error import DataError
from paramshare.data.sets.digits import Digits
from paramshare.data.sets.idx import Idx
from paramshare.data.sets.tfds import Tfds
from paramshare.data.sources import ArraySource
from paramshare.errors import one_line
from paramshare.tasks import Classification

Part = tuple[np.ndarray, np.ndarray]


def grey_digits(
    path: str | None, data_dir: str | None = None, mnist: bool = False
) -> tuple[dict[str, Part], int]:
    """Grey images of digits, and the number of their classes.

    Args:
      path: a folder of four IDX files, or an .npz file of `image` (N, h, w) or (N, h, w, 1) uint8
        and `label` (N,), of which every fifth example is a test example; None for another source.
      data_dir: where tensorflow-datasets keeps prepared digits.
      mnist: take tensorflow-datasets' MNIST if there is no path, instead of scikit-learn's digits.

    Returns:
      {"train": (images (N, h, w) uint8, labels (N,)), "test": ...}, and the number of classes.

    Raises:
      DataError: if the digits cannot be read, or are not grey images in memory.
    """
    if path is not None and pathlib.Path(path).is_file():
        return _from_file(path)
    name = path or ("mnist" if mnist else "digits")
    data = _load(path, data_dir, mnist)
    parts = {"train": data.train, "test": data.test}
    held = {part: source for part, source in parts.items() if isinstance(source, ArraySource)}
    if len(held) < 2 or data.input_shape[2] != 1:
        raise DataError(
            f"the images of {name!r} have shape {data.input_shape}; grey images that fit into "
            "memory are needed: pass another folder"
        )
    assert isinstance(data.task, Classification)
    digits = {part: (source.input[..., 0], source.label) for part, source in held.items()}
    return digits, data.task.num_classes


def _load(path: str | None, data_dir: str | None, mnist: bool) -> Dataset:
    if path is not None:
        return Idx(path=path, data_dir=data_dir, validation=0.0).load()
    if mnist:
        return Tfds(name="mnist", data_dir=data_dir, validation=0.0).load()
    return Digits(data_dir=data_dir, validation=0.0).load()


def _from_file(path: str) -> tuple[dict[str, Part], int]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            image, label = arrays["image"], arrays["label"]
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise DataError(
            f"path {path!r} cannot be read as an .npz file with arrays image and label "
            f"({one_line(error)}); pass such a file, or a folder of IDX files"
        ) from None
    if image.ndim == 4 and image.shape[3] == 1:
        image = image[..., 0]
    if image.ndim != 3 or image.dtype != np.uint8:
        raise DataError(
            f"image in {path!r} has shape {image.shape} and dtype {image.dtype}; it must be "
            "(N, h, w) uint8"
        )
    if label.shape != image.shape[:1] or label.dtype.kind not in "iu" or not len(label):
        raise DataError(
            f"label in {path!r} has shape {label.shape} and dtype {label.dtype}; it must be "
            f"integers, one for each of the {len(image)} images"
        )
    if label.min() < 0:
        raise DataError(f"label in {path!r} begins at {label.min()}; number the classes from 0")
    test = np.arange(len(image)) % 5 == 4
    label = label.astype(np.int32)
    digits = {"train": (image[~test], label[~test]), "test": (image[test], label[test])}
    return digits, int(label.max()) + 1
