"""Objects in images: boxes, clipped to the image, letterboxed with it and padded to one shape."""

from typing import TypedDict

import numpy as np

from paramshare.data.error import DataError, require
from paramshare.data.letterbox import letterbox
from paramshare.data.sources import Example, Source

_THIN = 0.01  # pixels; a thinner box could have no area in float32


class Objects(TypedDict):
    """The n objects of an image, in its own pixels."""

    box: np.ndarray
    """(n, 4) float64: x0, y0, x1, y1."""
    category: np.ndarray
    """(n,) int32, from 0."""
    crowd: np.ndarray
    """(n,) bool: whether the box is around a group of objects that are not separated."""
    area: np.ndarray
    """(n,) float64, in square pixels; smaller than the box where a mask was drawn."""


class DetectionLabel(TypedDict):
    """The label of one image of a detection set, padded with 0 and False to M rows."""

    box: np.ndarray
    """(M, 4) float32: x0, y0, x1, y1 in pixels of the input."""
    category: np.ndarray
    """(M,) int32."""
    present: np.ndarray
    """(M,) bool: whether the row holds an object."""
    crowd: np.ndarray
    """(M,) bool."""
    area: np.ndarray
    """(M,) float32, in square pixels of the original image."""
    scale: np.ndarray
    """(2,) float32: x_input = x_original * scale[0], y_input = y_original * scale[1]."""


class DetectionSource:
    """The images of `source`, letterboxed to (size, size, 3), with labels of one shape.

    Args:
      source: images (H, W, 3) of any height and width, whose labels are `Objects`.
      size: side of the inputs.
      max_boxes: rows of a label, M. Of an image with more objects the largest are kept, and groups
        (`crowd`) only where single objects leave rows.

    Raises:
      DataError: if pillow is missing, or size or max_boxes are out of range.

    Example:
      >>> box = np.array([[0.0, 0.0, 4.0, 8.0]])
      >>> one = Objects(box=box, category=np.array([2]), crowd=np.array([False]), area=np.ones(1))
      >>> source = [{"input": np.zeros((8, 16, 3), np.uint8), "label": one}]
      >>> label = DetectionSource(source, size=8, max_boxes=2)[0]["label"]
      >>> label["box"].tolist(), label["present"].tolist()
      ([[0.0, 0.0, 2.0, 4.0], [0.0, 0.0, 0.0, 0.0]], [True, False])
    """

    def __init__(self, source: Source, size: int, max_boxes: int = 100) -> None:
        if size < 1 or max_boxes < 1:
            raise DataError(
                f"image_size is {size} and max_boxes {max_boxes}; both must be 1 or more, such as "
                "320 and 100"
            )
        require("PIL.Image", "pillow", "a data set whose images vary in size")
        self.source, self.size, self.max_boxes = source, size, max_boxes

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        example = self.source[index]
        canvas, scale = letterbox(example["input"], self.size)
        return {"input": canvas, "label": detection_label(example["label"], scale, self.max_boxes)}

    def __repr__(self) -> str:
        return f"DetectionSource({self.source!r}, size={self.size}, max_boxes={self.max_boxes})"


def detection_label(objects: Objects, scale: np.ndarray, max_boxes: int) -> DetectionLabel:
    """Objects scaled with their image and padded.

    Args:
      objects: n objects in pixels of the original image.
      scale: (2,) float32, as `letterbox` returns it.
      max_boxes: rows of the label, M; if n > M, the largest objects are kept, groups last.

    Example:
      >>> box = np.array([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 9.0, 9.0]])
      >>> objects = Objects(box=box, category=np.array([5, 6, 7]),
      ...                   crowd=np.array([False, False, True]), area=np.array([1.0, 16.0, 81.0]))
      >>> detection_label(objects, np.ones(2, np.float32), 2)["category"].tolist()
      [5, 6]
    """
    order = np.lexsort((-objects["area"], objects["crowd"]))
    kept = np.sort(order[:max_boxes])  # in the order of the file
    n = len(kept)
    label = DetectionLabel(
        box=np.zeros((max_boxes, 4), np.float32),
        category=np.zeros(max_boxes, np.int32),
        present=np.arange(max_boxes) < n,
        crowd=np.zeros(max_boxes, bool),
        area=np.zeros(max_boxes, np.float32),
        scale=scale,
    )
    label["box"][:n] = objects["box"][kept] * np.tile(scale, 2)
    label["category"][:n] = objects["category"][kept]
    label["crowd"][:n] = objects["crowd"][kept]
    label["area"][:n] = objects["area"][kept]
    return label


def clip(box_Nx4: np.ndarray, size_Nx2: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes clipped to their images.

    Args:
      box_Nx4: x0, y0, x1, y1 in pixels.
      size_Nx2: width and height of each box's image, or (1, 2) for all of them.

    Returns:
      The clipped boxes (N, 4); which boxes have no area (N,); and which others are outside their
      image (N,). A box less than a hundredth of a pixel wide or high counts as without area.

    Example:
      >>> box = np.array([[-5.0, 2.0, 4.0, 9.0], [1.0, 1.0, 1.0, 5.0], [9.0, 1.0, 12.0, 5.0]])
      >>> clipped, empty, outside = clip(box, np.array([[8, 8]]))
      >>> clipped[0].tolist(), empty.tolist(), outside.tolist()
      ([0.0, 2.0, 4.0, 8.0], [False, True, False], [False, False, True])
    """
    limit_Nx4 = np.concatenate([size_Nx2, size_Nx2], axis=1)
    clipped_Nx4 = np.clip(box_Nx4, 0, limit_Nx4)
    empty_N = _thin(box_Nx4)
    return clipped_Nx4, empty_N, _thin(clipped_Nx4) & ~empty_N


def _thin(box_Nx4: np.ndarray) -> np.ndarray:
    return np.min(box_Nx4[:, 2:] - box_Nx4[:, :2], axis=1) < _THIN
