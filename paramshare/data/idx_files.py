"""IDX, the file format of MNIST: a magic number, the sizes, then the bytes.

The magic number is four bytes: 0, 0, the type of the elements (8 for unsigned bytes) and the number
of dimensions. One big-endian 32-bit size for each dimension follows, then the elements, the last
dimension fastest. Files may be compressed with gzip, with any name.

Reference: Y. LeCun, C. Cortes, C. Burges, "The MNIST database of handwritten digits".
"""

import gzip
import hashlib
import math
import os
import pathlib
import struct
import zlib

import numpy as np

from paramshare.data.dataset import looks_channels_first
from paramshare.data.error import DataError
from paramshare.errors import one_line

_STEMS = {
    "train": ("train-images-idx", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx", "t10k-labels-idx1-ubyte"),
}
Folder = dict[str, tuple[pathlib.Path, pathlib.Path]]


def find(path: str | os.PathLike[str]) -> Folder:
    """The image and label file of each part of a folder.

    Args:
      path: a folder with train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte
        and t10k-labels-idx1-ubyte, each with or without .gz; idx4 instead of idx3 for images with
        channels.

    Returns:
      {"train": (images, labels), "test": (images, labels)}.

    Raises:
      DataError: if the folder or a file is missing.
    """
    folder = pathlib.Path(path).expanduser()
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise DataError(
            f"path {str(folder)!r} {what}; pass the folder that holds "
            "train-images-idx3-ubyte[.gz] and the three other files"
        )

    def first(*names: str) -> pathlib.Path:
        for name in names:
            for candidate in (folder / name, folder / f"{name}.gz"):
                if candidate.is_file():
                    return candidate
        raise DataError(
            f"{' or '.join(f'{name}[.gz]' for name in names)} is missing from path "
            f"{str(folder)!r}; put it there, or pass another folder"
        )

    return {
        part: (first(f"{images}3-ubyte", f"{images}4-ubyte"), first(labels))
        for part, (images, labels) in _STEMS.items()
    }


def digest(folder: Folder) -> str:
    """The SHA-256 of the four files' bytes, in hexadecimal."""
    total = hashlib.sha256()
    for files in folder.values():
        for file in files:
            try:
                with open(file, "rb") as stream:
                    total.update(hashlib.file_digest(stream, "sha256").digest())
            except OSError as error:
                raise DataError(
                    f"{str(file)!r} cannot be read ({one_line(error)}); check its permissions"
                ) from error
    return total.hexdigest()


def decode(file: str | os.PathLike[str]) -> np.ndarray:
    """The array in one IDX file of unsigned bytes: uint8, of the sizes that the file states.

    Raises:
      DataError: if the file cannot be read or is not a complete IDX file of unsigned bytes.
    """
    place = repr(str(file))
    try:
        data = pathlib.Path(file).read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{place} cannot be read as gzip or IDX ({one_line(error)}); it is damaged: "
            "download it again"
        ) from error
    if len(data) < 4 or data[:2] != b"\0\0":
        raise DataError(
            f"{place} begins with the bytes {data[:4].hex(' ') or '(none)'}; an IDX file begins "
            "with 00 00: pass an IDX file"
        )
    kind, dimensions = data[2], data[3]
    if kind != 8:
        raise DataError(
            f"{place} holds elements of IDX type 0x{kind:02x}; they must be unsigned bytes, 0x08: "
            "convert it"
        )
    start = 4 + 4 * dimensions
    if len(data) < start:
        raise DataError(
            f"{place} ends inside its header, after {len(data)} of {start} bytes; it is truncated: "
            "download it again"
        )
    sizes = struct.unpack(f">{dimensions}I", data[4:start])
    if len(data) - start != math.prod(sizes):
        what = "truncated" if len(data) - start < math.prod(sizes) else "too long"
        raise DataError(
            f"{place} holds {len(data) - start} bytes but its header says {sizes}, "
            f"{math.prod(sizes)} bytes; it is {what}: download it again"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(sizes)


def read(folder: Folder) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images and labels of both parts.

    Args:
      folder: as for `find`.

    Returns:
      {"train": (image, label), "test": (image, label)}; image (N, H, W, C) uint8, label (N,) uint8.

    Raises:
      DataError: if a file is damaged or empty, has the wrong number of dimensions, or does not fit
        the other files.
    """
    parts = {}
    for part, (image_file, label_file) in folder.items():
        image, label = decode(image_file), decode(label_file)
        if image.ndim not in (3, 4):
            raise DataError(
                f"{str(image_file)!r} has {image.ndim} dimensions {image.shape}; images must have "
                "3 (N, H, W) or 4 (N, H, W, C)"
            )
        if image.ndim == 4 and looks_channels_first(image.shape):
            raise DataError(
                f"{str(image_file)!r} has shape {image.shape}, which looks like (N, C, H, W); "
                "write it as (N, H, W, C)"
            )
        if label.ndim != 1:
            raise DataError(
                f"{str(label_file)!r} has {label.ndim} dimensions {label.shape}; labels must have "
                "1, one byte for each image"
            )
        if len(image) != len(label):
            raise DataError(
                f"{str(image_file)!r} holds {len(image)} images but {str(label_file)!r} holds "
                f"{len(label)} labels; they must be of one set"
            )
        if not image.size:
            raise DataError(
                f"{str(image_file)!r} holds no images (its sizes are {image.shape}); pass at least "
                "one"
            )
        parts[part] = (image if image.ndim == 4 else image[..., None], label)
    shapes = {part: image.shape[1:] for part, (image, _) in parts.items()}
    if shapes["train"] != shapes["test"]:
        raise DataError(
            f"train images are {shapes['train']} but t10k images are {shapes['test']}; the files "
            "must be of one set"
        )
    return parts


def write(
    folder: str | os.PathLike[str], train: tuple, test: tuple, *, compress: bool = False
) -> None:
    """Writes images (N, H, W) or (N, H, W, C) uint8 and labels (N,) as four files for `find`.

    The folder is created if it does not exist.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     part = np.zeros((2, 4, 4), np.uint8), [0, 1]
      ...     write(folder, part, part)
      ...     read(find(folder))["test"][0].shape
      (2, 4, 4, 1)
    """
    root = pathlib.Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    for part, arrays in (("train", train), ("test", test)):
        images, labels = (np.ascontiguousarray(a, dtype=np.uint8) for a in arrays)
        for name, array in (
            (f"{_STEMS[part][0]}{images.ndim}-ubyte", images),
            (_STEMS[part][1], labels),
        ):
            data = (
                struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()
            )
            (root / (f"{name}.gz" if compress else name)).write_bytes(
                gzip.compress(data, mtime=0) if compress else data
            )
