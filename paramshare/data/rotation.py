"""Images turned by any angle."""

from collections.abc import Sequence

import numpy as np

from paramshare.data import order
from paramshare.data.error import require
from paramshare.tasks.augment import FINER

SIDE = 28  # of a digit, in pixels


def rotated(
    digits_Nxhxw: np.ndarray, turn: float, size: int, seed: int, part: int, indices: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Digits, each turned by an angle of its own.

    A digit is resized to 28x28 if it has another size, padded with zeros to the given size (the odd
    row and column below and to the right), enlarged three times, turned around the centre and
    reduced again, each step bilinearly, as `paramshare.tasks.augment.turn` does. Image i is a pure
    function of (digit i, seed, part, i).

    Args:
      digits_Nxhxw: uint8, one for each index.
      turn: angles are uniform between minus and plus this, in degrees.
      size: side of the images, at least 28.
      seed: 0 <= seed < 2**64.
      part: number of the part of the data set.
      indices: numbers of the images.

    Returns:
      Images (N, size, size, 1) uint8, and the angles (N,) in degrees, counterclockwise.

    Example:
      >>> digit = np.zeros((1, 28, 28), np.uint8)
      >>> digit[:, 4:24, 12:16] = 255
      >>> image, angle = rotated(digit, 180, 29, seed=0, part=0, indices=[7])
      >>> image.shape, bool(-180 <= angle[0] <= 180)
      ((1, 29, 29, 1), True)
    """
    pil = require("PIL.Image", "pillow", "rotated digits")
    bilinear = pil.Resampling.BILINEAR
    images = np.zeros((len(indices), size, size, 1), np.uint8)
    angles = np.zeros(len(indices))
    corner = (size - SIDE) // 2
    for place, (digit, index) in enumerate(zip(digits_Nxhxw, indices, strict=True)):
        uniform = (order.raw(1, seed, order.TURN, part, index)[0] >> np.uint64(11)) * 2.0**-53
        angles[place] = (2 * uniform - 1) * turn
        image = pil.fromarray(digit.astype(np.float32))  # not rounded between the steps
        if digit.shape != (SIDE, SIDE):
            image = image.resize((SIDE, SIDE), bilinear)
        padded = pil.new("F", (size, size))
        padded.paste(image, (corner, corner))
        large = padded.resize((FINER * size, FINER * size), bilinear)
        small = large.rotate(angles[place], bilinear).resize((size, size), bilinear)
        images[place, ..., 0] = np.clip(np.rint(np.asarray(small)), 0, 255)
    return images, angles
