"""People in images: one example for each person whose joints are labelled."""

from typing import TypedDict

import numpy as np

from paramshare.data.coco import Annotations
from paramshare.data.coco_images import CocoImages
from paramshare.data.error import DataError
from paramshare.data.letterbox import crop_square, letterbox, square_around
from paramshare.data.sources import Example


class PoseLabel(TypedDict):
    """The label of one person; x_original = x_input / scale[0] + offset[0], and so for y."""

    joint: np.ndarray
    """(J, 2) float32: x, y in pixels of the input; 0 where the joint is not labelled."""
    visible: np.ndarray
    """(J,) bool: whether the joint is labelled, hidden ones included."""
    area: np.ndarray
    """() float32, in square pixels of the original image."""
    box: np.ndarray
    """(4,) float32: x0, y0, x1, y1 in pixels of the original image."""
    scale: np.ndarray
    """(2,) float32."""
    offset: np.ndarray
    """(2,) float32."""
    image: np.ndarray
    """() int32: index of the image in the file."""


class PoseSource:
    """One example for each annotation that has a labelled joint and is no group of people.

    Args:
      images: images and annotations, read with `keypoints=True`.
      size: side of the inputs, S.
      person_crop: crops a square around the person's box, enlarged by 1.25, and resamples it to
        (S, S). False letterboxes the whole image, which must show one person.

    Attributes:
      image: (N,) index of each example's image.
      fingerprint: the hash of the files.

    Raises:
      DataError: if no joints are labelled, or without `person_crop` an image does not have exactly
        one person with labelled joints.
    """

    def __init__(self, images: CocoImages, size: int, *, person_crop: bool = True) -> None:
        if size < 1:
            raise DataError(f"image_size is {size}; it must be 1 or more, such as 256")
        self.images, self.size, self.person_crop = images, size, person_crop
        self.fingerprint = images.fingerprint
        annotations = images.annotations
        if annotations.keypoints is None:
            raise DataError(
                f"{annotations.file.name} was read without keypoints; pass keypoints=True to "
                "read_annotations"
            )
        self._keypoints = annotations.keypoints
        labelled = (self._keypoints[:, :, 2] > 0).any(axis=1) & ~annotations.objects["crowd"]
        self._rows = np.flatnonzero(labelled)
        self.image = annotations.image[self._rows]
        if not len(self._rows):
            raise DataError(
                f"{annotations.file} has no person with a labelled keypoint; pass another file, or "
                "task=detection to use its boxes"
            )
        if not person_crop:
            _check_single(annotations, self.image)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        row, place = self._rows[index], int(self.image[index])
        annotations, image = self.images.annotations, self.images.picture(place)
        box = annotations.objects["box"][row]
        if self.person_crop:
            square = square_around(box)
            view = crop_square(image, square, self.size)
            scale = np.full(2, self.size / square[2], np.float32)
            offset = np.array(square[:2], np.float32)
        else:
            view, scale = letterbox(image, self.size)
            offset = np.zeros(2, np.float32)
        keypoint_Jx3 = self._keypoints[row]
        visible_J = keypoint_Jx3[:, 2] > 0
        joint_Jx2 = np.where(visible_J[:, None], (keypoint_Jx3[:, :2] - offset) * scale, 0)
        label = PoseLabel(
            joint=joint_Jx2.astype(np.float32),
            visible=visible_J,
            area=np.array(annotations.objects["area"][row], np.float32),
            box=box.astype(np.float32),
            scale=scale,
            offset=offset,
            image=np.array(place, np.int32),
        )
        return {"input": view, "label": label}

    def __repr__(self) -> str:
        return f"PoseSource({self.images!r}, {len(self)} people, size={self.size})"


def _check_single(annotations: Annotations, image: np.ndarray) -> None:
    counts = np.bincount(image, minlength=len(annotations.pictures))
    for place in np.flatnonzero(counts != 1)[:1]:
        raise DataError(
            f"{annotations.file.name}: the image {annotations.pictures[place].file!r} has "
            f"{counts[place]} people with labelled keypoints, but with person_crop=False each "
            "image must have exactly one; leave it out of the JSON, or pass person_crop=True"
        )
