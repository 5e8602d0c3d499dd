"""Crops of photographs of any size, on the host, with PIL.

The recipe of Szegedy et al., "Going deeper with convolutions" (2015), section 6, as most ImageNet
references use it.
"""

import math

import numpy as np

from paramshare.data import order
from paramshare.data.error import DataError, require
from paramshare.data.sources import Example, Source

_AREA, _ASPECT, _TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10
_MARGIN = 256 / 224  # evaluation resizes the shorter side to 256 for a centre crop of 224

Box = tuple[int, int, int, int]  # left, top, width, height


class CropSource:
    """The examples of `source` with images cropped to (size, size, C).

    `source[i]` is the evaluation view: the shorter side resized to size * 256 / 224, then the
    centre. `training_view` is a random resized crop, mirrored with probability 1/2.

    Args:
      source: images of any height and width.
      size: side of the crop.
      channels: C, 1 or 3.

    Raises:
      DataError: if pillow is missing, or size or channels are out of range.
    """

    def __init__(self, source: Source, size: int, channels: int = 3) -> None:
        if size < 1:
            raise DataError(f"image_size is {size}; it must be 1 or more, such as 224")
        if channels not in (1, 3):
            raise DataError(
                f"images have {channels} channels; cropping needs 1 (grey) or 3 (RGB): choose "
                "another data set"
            )
        require("PIL.Image", "pillow", "a data set whose images vary in size")
        self.source, self.size, self.channels = source, size, channels

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        example = self.source[index]
        image = example["input"]
        height, width = image.shape[:2]
        view = resample(image, centre_box(height, width), self.size)
        return {"input": view, "label": example["label"]}

    def __repr__(self) -> str:
        return f"CropSource({self.source!r}, size={self.size})"

    def training_view(self, index: int, seed: int, epoch: int) -> Example:
        """Example `index` as epoch `epoch` sees it: a pure function of the arguments."""
        example = self.source[index]
        image = example["input"]
        height, width = image.shape[:2]
        raw = order.raw(4 * _TRIES + 1, seed, order.CROP, epoch, index)
        draws = (raw >> np.uint64(11)) * 2.0**-53  # uniform on [0, 1)
        view = resample(image, random_box(height, width, draws[1:]), self.size)
        return {
            "input": np.ascontiguousarray(view[:, ::-1]) if draws[0] < 0.5 else view,
            "label": example["label"],
        }


def centre_box(height: int, width: int) -> Box:
    """The central square of side min(height, width) * 224 / 256.

    It is what remains after resizing the shorter side to 256 and cropping the central 224.

    Example:
      >>> centre_box(256, 512)
      (144, 16, 224, 224)
    """
    side = max(round(min(height, width) / _MARGIN), 1)
    return (width - side) // 2, (height - side) // 2, side, side


def random_box(height: int, width: int, draws: np.ndarray) -> Box:
    """A box of 8 to 100 % of the area and aspect 3/4 to 4/3.

    Args:
      height: height of the image.
      width: width of the image.
      draws: (4 * tries,) uniform on [0, 1); four a try: area, aspect, left, top. The first box that
        fits is taken; if none does, the largest central box whose aspect is in range.

    Returns:
      (left, top, width, height), inside the image.

    Example:
      >>> random_box(100, 100, np.array([1.0, 0.5, 0.0, 0.0]))
      (0, 0, 100, 100)
    """
    for area, aspect, left, top in draws.reshape(-1, 4):
        target = height * width * (_AREA[0] + area * (_AREA[1] - _AREA[0]))
        ratio = math.exp(math.log(_ASPECT[0]) + aspect * math.log(_ASPECT[1] / _ASPECT[0]))
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(left * (width - w + 1)), int(top * (height - h + 1)), w, h
    w = min(width, max(round(height * _ASPECT[1]), 1))
    h = min(height, max(round(width / _ASPECT[0]), 1))
    return (width - w) // 2, (height - h) // 2, w, h


def resample(image_HxWxC: np.ndarray, box: Box, size: int) -> np.ndarray:
    """The part of an image in `box`, resampled (bilinear, antialiased) to (size, size, C) uint8."""
    pil = require("PIL.Image", "pillow", "a data set whose images vary in size")
    left, top, width, height = box
    grey = image_HxWxC.shape[-1] == 1
    picture = pil.fromarray(image_HxWxC[..., 0] if grey else image_HxWxC)
    resized = picture.resize(
        (size, size), pil.Resampling.BILINEAR, box=(left, top, left + width, top + height)
    )
    return np.asarray(resized)[..., None] if grey else np.asarray(resized)
