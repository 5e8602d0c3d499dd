"""One split of a prepared builder of images with objects, as a source."""

from typing import Any

import numpy as np

from paramshare.data.error import DataError
from paramshare.data.objects import Objects, clip
from paramshare.data.records import Records, image_shape


class ObjectRecords(Records):
    """The images of a split, with their `Objects` as labels.

    Boxes are clipped to the image, and those without area or outside it left out. They are not
    counted, since that would read all images.

    Args:
      builder: a prepared `tfds.core.DatasetBuilder` with the features `image` and `objects`, which
        are `bbox` (ymin, xmin, ymax, xmax in [0, 1]), `label` and, if there are any, `is_crowd`
        and `area`.
      split: its name.
      name: name of the data set, for messages.

    Raises:
      DataError: if the data set has other features, or cannot be read.
    """

    categories: tuple[str, ...]
    """Names of the categories."""

    def _read_features(self, features: Any) -> None:
        self.image_shape = image_shape(features, "objects", self.name)
        objects = features["objects"]
        names = sorted(getattr(objects, "feature", objects) or ())
        if "bbox" not in names or "label" not in names:
            raise DataError(
                f"the objects of {self.name!r} have the features {', '.join(names) or '(none)'}; "
                "they must have bbox and label: choose another data set"
            )
        self.num_classes = getattr(objects["label"], "num_classes", None)
        if self.num_classes is None or self.image_shape[2] != 3:
            raise DataError(
                f"the data set {self.name!r} has {self.num_classes} categories and images of shape "
                f"{self.image_shape}; detection needs a ClassLabel and RGB images: choose another "
                "data set"
            )
        self.categories = tuple(objects["label"].names)

    def _label(self, record: dict, index: int, shape: tuple[int, ...]) -> Objects:
        objects = record["objects"]
        height, width = shape[:2]
        # tensorflow-datasets has rows first, and fractions of the image.
        relative = np.asarray(objects["bbox"], np.float64).reshape(-1, 4)[:, [1, 0, 3, 2]]
        size = np.array([[width, height]], np.float64)
        box, empty, outside = clip(relative * np.tile(size, 2), size)
        kept = ~(empty | outside)
        category = np.asarray(objects["label"], np.int32).reshape(-1)
        if len(category) and not 0 <= category.min() <= category.max() < len(self.categories):
            raise DataError(
                f"{self._described(record, index)} has categories from {category.min()} to "
                f"{category.max()}, but the data set states {len(self.categories)}; prepare it "
                "again"
            )
        crowd = np.asarray(objects.get("is_crowd", np.zeros(len(box))), bool).reshape(-1)
        area = np.asarray(
            objects.get("area", np.prod(box[:, 2:] - box[:, :2], axis=1)), np.float64
        ).reshape(-1)
        return Objects(box=box[kept], category=category[kept], crowd=crowd[kept], area=area[kept])
