"""Pictures of any size as inputs of a network, and the way back to their pixels; on the host."""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterator

import numpy as np

from paramshare.data.crop import centre_box, resample
from paramshare.data.decoding import decode, is_turned
from paramshare.data.error import DataError, require
from paramshare.data.letterbox import crop_square, letterbox, square_around
from paramshare.errors import one_line, warn


@dataclasses.dataclass(frozen=True)
class View:
    """A picture as a network's input.

    Attributes:
      input: (H, W, C) uint8.
      scale: (2,) pixels of the input per pixel of the picture, along x and y.
      offset: (2,) where the input's top left corner is in the picture (x, y).
      size: (2,) width and height of the picture, in pixels.
    """

    input: np.ndarray
    scale: np.ndarray
    offset: np.ndarray
    size: np.ndarray

    def original(self, point: np.ndarray) -> np.ndarray:
        """Points (..., 2) of the input, (x, y), in pixels of the picture.

        Points of what fills up the input, outside of the picture, are moved to its edge.
        """
        return np.clip(np.asarray(point, np.float64) / self.scale + self.offset, 0, self.size)


ViewOf = Callable[[np.ndarray], View]
"""Makes the view of a picture (H, W, 3) uint8."""


def stretched(input_shape: tuple[int, ...]) -> ViewOf:
    """Views that fill the input with the whole picture, whatever its aspect ratio.

    Args:
      input_shape: (H, W, C), with C 1 for grey or 3 for RGB.

    Raises:
      DataError: if inputs are not such images.

    Example:
      >>> view = stretched((8, 8, 1))(np.zeros((16, 4, 3), np.uint8))
      >>> view.input.shape, view.scale.tolist()
      ((8, 8, 1), [2.0, 0.5])
    """
    if len(input_shape) != 3 or input_shape[2] not in (1, 3):
        raise DataError(
            f"inputs have shape {input_shape}; pictures can be given only to networks whose inputs "
            "are (H, W, 1) or (H, W, 3)"
        )
    height, width, channels = input_shape

    def view(image_HxWx3: np.ndarray) -> View:
        pil = require("PIL.Image", "pillow", "pictures")
        picture = pil.fromarray(image_HxWx3).convert("L" if channels == 1 else "RGB")
        pixels = np.asarray(picture.resize((width, height), pil.Resampling.BILINEAR))
        scale = np.array([width / image_HxWx3.shape[1], height / image_HxWx3.shape[0]])
        return View(pixels.reshape(height, width, channels), scale, np.zeros(2), _size(image_HxWx3))

    return view


def letterboxed(size: int) -> ViewOf:
    """Views with the aspect ratio of the picture; see `paramshare.data.letterbox.letterbox`."""

    def view(image_HxWx3: np.ndarray) -> View:
        canvas, scale = letterbox(image_HxWx3, size)
        return View(canvas, scale, np.zeros(2), _size(image_HxWx3))

    return view


def person(size: int) -> ViewOf:
    """Views of pictures of one person, whom `paramshare.data.people` would crop with a margin."""

    def view(image_HxWx3: np.ndarray) -> View:
        height, width = image_HxWx3.shape[:2]
        left, top, side = square = square_around(np.array([0, 0, width, height]))
        pixels = crop_square(image_HxWx3, square, size)
        offset = np.array([left, top], np.float64)
        return View(pixels, np.full(2, size / side), offset, _size(image_HxWx3))

    return view


def centred(size: int, channels: int = 3) -> ViewOf:
    """Views of the centre, as evaluation crops it; see `paramshare.data.crop.CropSource`."""

    def view(image_HxWx3: np.ndarray) -> View:
        left, top, side, _ = box = centre_box(*image_HxWx3.shape[:2])
        pixels = resample(image_HxWx3, box, size)
        if channels == 1:
            pixels = stretched((size, size, 1))(pixels).input
        offset = np.array([left, top], np.float64)
        return View(pixels, np.full(2, size / side), offset, _size(image_HxWx3))

    return view


def _size(image_HxWx3: np.ndarray) -> np.ndarray:
    """(2,) width and height."""
    return np.array(image_HxWx3.shape[1::-1], np.float64)


def read_picture(file: str | os.PathLike[str]) -> np.ndarray:
    """The pixels of a picture file, (H, W, 3) uint8. EXIF orientation is ignored.

    Raises:
      DataError: if the file does not exist or cannot be read.
    """
    with _readable(file):
        return decode(pathlib.Path(file).read_bytes(), 3)


def check_picture(file: str | os.PathLike[str]) -> None:
    """Reads the header of a picture file; warns if it has an EXIF orientation.

    Raises:
      DataError: if the file does not exist or is no picture.
    """
    pil = require("PIL.Image", "pillow", "reading a picture")
    with _readable(file), pil.open(file) as picture:
        if is_turned(picture):
            warn(
                f"{os.fspath(file)!r} has an EXIF orientation, which is ignored: its pixels are "
                "taken as they are stored; rotate them if they should be seen upright"
            )


@contextlib.contextmanager
def _readable(file: str | os.PathLike[str]) -> Iterator[None]:
    if not pathlib.Path(file).is_file():
        raise DataError(f"there is no file {os.fspath(file)!r}; pass the name of a picture")
    try:
        yield
    except DataError as error:
        raise DataError(f"{os.fspath(file)!r}: {error}") from None
    except Exception as error:  # whatever Pillow raises for what it cannot read
        raise DataError(
            f"{os.fspath(file)!r} cannot be read as a picture ({one_line(error)}); pass a JPEG, "
            "PNG or another file that Pillow reads"
        ) from error
