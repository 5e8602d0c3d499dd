"""Images of any size on a square canvas, with their aspect ratio kept; on the host, with PIL."""

import math

import numpy as np

from paramshare.data.error import require

FILL = (124, 116, 104)
"""The colour around an image: the mean of ImageNet, rounded, which is near 0 when normalised."""

Square = tuple[int, int, int]  # left, top, side; it may reach beyond the image

_PURPOSE = "a data set whose images vary in size"


def letterbox(image_HxWx3: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """An image resized until its longer side is `size`, at the top left of a square canvas.

    Args:
      image_HxWx3: uint8.
      size: side of the canvas, S.

    Returns:
      The canvas (S, S, 3) uint8, filled with `FILL` where the image does not reach, and the scale
      (2,) float32, so that x_canvas = x_image * scale[0] and y_canvas = y_image * scale[1]. The two
      scales differ slightly, because the resized sides are whole pixels.

    Raises:
      DataError: if pillow is missing.

    Example:
      >>> canvas, scale = letterbox(np.zeros((4, 8, 3), np.uint8), 4)
      >>> canvas[:, 0, 0].tolist(), scale.tolist()
      ([0, 0, 124, 124], [0.5, 0.5])
    """
    pil = require("PIL.Image", "pillow", _PURPOSE)
    height, width = image_HxWx3.shape[:2]
    longer = max(height, width)
    new_width, new_height = (max(round(side * size / longer), 1) for side in (width, height))
    # Antialiased: unlike `transform`, `resize` widens its filter when it shrinks.
    resized = pil.fromarray(image_HxWx3).resize((new_width, new_height), pil.Resampling.BILINEAR)
    canvas = np.full((size, size, 3), FILL, np.uint8)
    canvas[:new_height, :new_width] = np.asarray(resized)
    return canvas, np.array([new_width / width, new_height / height], np.float32)


def square_around(box: np.ndarray, enlarge: float = 1.25) -> Square:
    """The square with the centre of a box whose side is the box's longer side, enlarged.

    Args:
      box: (4,) x0, y0, x1, y1 in pixels.
      enlarge: factor.

    Returns:
      (left, top, side) in whole pixels, so that the centre may move by up to half a pixel.

    Example:
      >>> square_around(np.array([10, 10, 30, 18]))
      (8, 2, 25)
    """
    x0, y0, x1, y1 = map(float, box)
    side = max(math.ceil(enlarge * max(x1 - x0, y1 - y0)), 1)
    return round((x0 + x1 - side) / 2), round((y0 + y1 - side) / 2), side


def crop_square(image_HxWx3: np.ndarray, square: Square, size: int) -> np.ndarray:
    """The part of an image in a square, resampled (bilinear, antialiased).

    Args:
      image_HxWx3: uint8.
      square: as `square_around` returns it.
      size: side of the result, S.

    Returns:
      (S, S, 3) uint8; `FILL` where the square is outside the image.

    Raises:
      DataError: if pillow is missing.

    Example:
      >>> crop_square(np.zeros((4, 4, 3), np.uint8), (-2, 0, 4), 4)[0, :, 0].tolist()
      [124, 124, 0, 0]
    """
    pil = require("PIL.Image", "pillow", _PURPOSE)
    height, width = image_HxWx3.shape[:2]
    left, top, side = square
    canvas = np.full((side, side, 3), FILL, np.uint8)
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + side, width), min(top + side, height)
    if x0 < x1 and y0 < y1:
        canvas[y0 - top : y1 - top, x0 - left : x1 - left] = image_HxWx3[y0:y1, x0:x1]
    return np.asarray(pil.fromarray(canvas).resize((size, size), pil.Resampling.BILINEAR))
