"""One split of a prepared builder, as a source."""

from typing import Any

import numpy as np

from paramshare.training.data.error import DataError, one_line
from paramshare.training.data.image_set import Example

_CHUNK = 4096  # records read at once: many to spare calls, few to spare memory


class Records:
    """The examples of a split, read by index from disk.

    Args:
        builder: a prepared `tfds.core.DatasetBuilder`.
        split: its name.
        name: the set's, for messages.

    Attributes:
        image_shape: (H, W, C); H and W are None where images vary in size.
        num_classes: None where the set does not say.

    Raises:
        DataError: if the set has no image and label, or cannot be read.
    """

    image_shape: Any
    num_classes: int | None

    def __init__(self, builder: Any, split: str, name: str) -> None:
        """Opens the split and checks what its examples are made of."""
        self.name, self.split, self._folder = name, split, str(builder.data_dir)
        features = builder.info.features
        there = sorted(features) if hasattr(features, "keys") else []
        if "image" not in there or "label" not in there:
            raise DataError(
                f"the data set {name!r} has the features {', '.join(there) or '(none)'}; image and label are wanted: choose another set"
            )
        image, label = features["image"], features["label"]
        if len(image.shape or ()) != 3 or image.np_dtype != np.uint8 or image.shape[2] is None:
            raise DataError(
                f"images of {name!r} are {np.dtype(image.np_dtype)} of shape {image.shape}; uint8 (H, W, C) is wanted: choose another set"
            )
        if label.shape != () or not np.issubdtype(label.np_dtype, np.integer):
            raise DataError(
                f"labels of {name!r} are {np.dtype(label.np_dtype)} of shape {label.shape}; one integer is wanted: choose another set"
            )
        height, width, channels = image.shape
        self.image_shape = (height, width, channels) if height and width else (None, None, channels)
        self.num_classes = getattr(label, "num_classes", None)
        try:
            self._records = builder.as_data_source(split=split)
        except NotImplementedError as error:
            raise DataError(
                f"the data set {name!r} lies in {self._folder!r} as {builder.info.file_format.value}, which has no random access; "
                "pass another data_dir, or convert it to array_record"
            ) from error
        except Exception as error:
            raise DataError(self._damaged(error)) from error

    def __len__(self) -> int:
        """The number of examples."""
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        """Example `index`, read and decoded."""
        try:
            return self._example(self._records[index])
        except DataError:
            raise
        except Exception as error:
            raise DataError(self._damaged(error)) from error

    def __repr__(self) -> str:
        """The set and the split."""
        return f"Records({self.name!r}, {self.split!r})"

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """All examples: image (N, H, W, C) uint8 and label (N,) int32; for sets of one image shape."""
        image = np.empty((len(self), *self.image_shape), np.uint8)
        label = np.empty(len(self), np.int32)
        for start in range(0, len(self), _CHUNK):
            places = range(start, min(start + _CHUNK, len(self)))
            try:
                examples = [self._example(record) for record in self._records.__getitems__(list(places))]
            except DataError:
                raise
            except Exception:  # one at a time instead: tfds.testing.mock_data cannot read several, and a damaged record is told better
                examples = [self[place] for place in places]
            for place, example in zip(places, examples, strict=True):
                image[place], label[place] = example["image"], example["label"]
        return image, label

    def _example(self, record: dict) -> Example:
        image = np.asarray(record["image"])[..., : self.image_shape[2]]  # PIL keeps an alpha channel that TensorFlow's decoder drops
        label = int(record["label"])
        if image.ndim != 3 or any(wanted not in (None, size) for wanted, size in zip(self.image_shape, image.shape, strict=True)):
            raise DataError(f"an image of {self.name!r} is {image.shape} where the set promises {self.image_shape}; prepare it again")
        if label < 0:
            raise DataError(
                f"the label {label} in {self.split} of {self.name!r} means unlabelled; choose a set whose {self.split} part is labelled"
            )
        return {"image": image, "label": label}

    def _damaged(self, error: Exception) -> str:
        what = f"the data set {self.name!r} in {self._folder!r} cannot be read ({one_line(error)})"
        return f"{what}; delete that folder, then run the same command again"
