"""Digits on canvases: images with several small objects at known places."""

import math
from collections.abc import Sequence
from typing import Annotated

import numpy as np
import pydantic

from paramshare.data import order
from paramshare.data.error import DataError, require
from paramshare.tasks.config import Count, checked_dataclass

TRIES = 20  # places tried for one digit before it is left out
INK = 32  # grey level from which a pixel belongs to a digit


@checked_dataclass(DataError)
class Drawing:
    """How canvases are drawn: one to `most` digits of random classes, sizes and places.

    Digits do not overlap: one that finds no free place after 20 tries is left out, but never the
    first. Canvas i of a part is a pure function of (seed, part, i).

    Raises:
      DataError: if a value is out of range, or the digits do not fit on the canvas.
    """

    size: Count = 64
    """Side of a canvas, in pixels."""
    most: Count = 4
    """Largest number of digits on one canvas."""
    smallest: Annotated[int, pydantic.Field(ge=8)] = 12
    """Smallest side of the square that a digit is resized to."""
    largest: Annotated[int, pydantic.Field(ge=8)] = 28
    """Largest side."""
    turn: Annotated[float, pydantic.Field(ge=0, le=180)] = 0.0
    """Digits are turned by random angles between minus and plus this, in degrees."""

    def __post_init__(self) -> None:
        if not self.smallest <= self.largest <= self.size:
            raise ValueError(
                f"digits have sides of {self.smallest} to {self.largest} pixels on canvases of "
                f"{self.size}; smallest must be at most largest, and largest at most size"
            )
        most = int((self.size - 2) / math.sqrt(2))  # pillow may round up on either side
        if self.turn and self.largest > most:
            raise ValueError(
                f"turned digits with sides of {self.largest} pixels may not fit on canvases of "
                f"{self.size}; largest must be at most {most}"
            )

    def draw(
        self, digits: np.ndarray, classes: np.ndarray, seed: int, indices: Sequence[int]
    ) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]:
        """The canvases with these indices.

        Args:
          digits: (N, h, w) uint8, bright digits on black.
          classes: (N,) their classes.
          seed: 0 <= seed < 2**64; canvases of different seeds differ.
          indices: numbers of the canvases.

        Returns:
          Images (n, size, size, 1) uint8; labels as `paramshare.tasks.Detection` has them, with
          `most` rows, where a box is the smallest one around the pixels of its digit; and the
          angles (n, most) by which digits are turned counterclockwise, in degrees.

        Raises:
          DataError: if a digit is blank.

        Example:
          >>> digits = np.full((1, 8, 8), 255, np.uint8)
          >>> images, labels, _ = Drawing(most=1).draw(digits, np.array([7]), 0, range(2))
          >>> x0, y0, x1, y1 = labels["box"][0, 0].astype(int)
          >>> bool(images[0, y0:y1, x0:x1].all()), int(labels["category"][0, 0])
          (True, 7)
        """
        pil = require("PIL.Image", "pillow", "canvases")
        count = len(indices)
        image = np.zeros((count, self.size, self.size), np.uint8)
        box = np.zeros((count, self.most, 4), np.float32)
        angle = np.zeros((count, self.most), np.float32)
        category = np.zeros((count, self.most), np.int32)
        present = np.zeros((count, self.most), bool)
        for place, index in enumerate(indices):
            drawn = 1 + self.most * (2 + 2 * TRIES)
            raw = order.raw(drawn + self.most, seed, order.CANVAS, index)
            draws = (raw >> np.uint64(11)) * 2.0**-53  # uniform on [0, 1)
            number, row = 1 + int(draws[0] * self.most), 0
            parts = draws[1:drawn].reshape(self.most, -1)[:number]
            for one, turn in zip(parts, draws[drawn:], strict=False):
                which = int(one[0] * len(digits))
                side = self.smallest + int(one[1] * (self.largest - self.smallest + 1))
                digit = pil.fromarray(digits[which]).resize((side, side), pil.Resampling.BILINEAR)
                degrees = (2 * turn - 1) * self.turn
                if self.turn:
                    digit = digit.rotate(degrees, pil.Resampling.BILINEAR, expand=True)
                pixels = np.asarray(digit)
                height, width = pixels.shape
                ink_y, ink_x = np.nonzero(pixels >= INK)
                if not len(ink_x):
                    raise DataError(
                        f"digit {which}, of class {classes[which]}, has no pixel of {INK} or more; "
                        "leave blank digits out"
                    )
                limits = ink_x.min(), ink_y.min(), ink_x.max() + 1, ink_y.max() + 1
                for u, v in one[2:].reshape(TRIES, 2):
                    x, y = int(u * (self.size - width + 1)), int(v * (self.size - height + 1))
                    there = np.array(limits) + np.array([x, y, x, y])
                    if not np.any(_touch(there, box[place, :row])):
                        area = image[place, y : y + height, x : x + width]
                        np.maximum(area, np.where(pixels >= INK, pixels, 0), out=area)
                        box[place, row], category[place, row] = there, classes[which]
                        present[place, row], angle[place, row] = True, degrees
                        row += 1
                        break
        sides = box[..., 2:] - box[..., :2]
        labels = {
            "area": sides[..., 0] * sides[..., 1],
            "box": box,
            "category": category,
            "crowd": np.zeros_like(present),
            "present": present,
            "scale": np.ones((count, 2), np.float32),
        }
        return image[..., None], labels, angle


def _touch(box: np.ndarray, others_Nx4: np.ndarray) -> np.ndarray:
    """Whether a box overlaps each of the others, or is next to it."""
    return np.all((box[:2] <= others_Nx4[:, 2:]) & (others_Nx4[:, :2] <= box[2:]), axis=1)
