"""One split of a prepared builder, as a source."""

from typing import Any

import numpy as np

from paramshare.data.decoding import decode
from paramshare.data.error import DataError, require
from paramshare.data.sources import Example
from paramshare.errors import one_line

_CHUNK = 4096  # records read at once: fewer calls, bounded memory


class Records:
    """The examples of a split, read by index from disk.

    Args:
      builder: a prepared `tfds.core.DatasetBuilder`.
      split: its name.
      name: name of the data set, for messages.

    Attributes:
      image_shape: (H, W, C); H and W are None where images vary in size.
      num_classes: None where the data set does not say.

    Raises:
      DataError: if the data set has no image and label, or cannot be read.
    """

    image_shape: Any
    num_classes: int | None
    fingerprint: str
    """The name, version and size of the prepared files."""

    def __init__(self, builder: Any, split: str, name: str) -> None:
        self.name, self.split, self._folder = name, split, str(builder.data_dir)
        self._read_features(builder.info.features)
        tfds = require("tensorflow_datasets", "tensorflow-datasets", f"the data set {name!r}")
        try:
            self._records = builder.as_data_source(split=split)
            if isinstance(builder.info.features["image"], tfds.features.Image):
                # As an argument, tfds.testing.mock_data would need TensorFlow for it.
                self._records.decoders = {"image": tfds.decode.SkipDecoding()}
        except NotImplementedError as error:
            raise DataError(
                f"the data set {name!r} is stored in {self._folder!r} as "
                f"{builder.info.file_format.value}, which has no random access; pass another "
                "data_dir, or convert it to array_record"
            ) from error
        except Exception as error:
            raise DataError(self._damaged(None, error)) from error

        info = builder.info
        # Under tfds.testing.mock_data a builder has no splits.
        size = info.splits[split].num_bytes if split in info.splits else None
        self.fingerprint = f"{info.full_name} {split} {size}"

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        try:
            record = self._records[index]
        except Exception as error:
            raise DataError(self._damaged(index, error)) from error
        return self._example(record, index)

    def __repr__(self) -> str:
        return f"Records({self.name!r}, {self.split!r})"

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """All images (N, H, W, C) uint8 and labels (N,) int32, for sets of one image shape."""
        image = np.empty((len(self), *self.image_shape), np.uint8)
        label = np.empty(len(self), np.int32)
        for start in range(0, len(self), _CHUNK):
            places = range(start, min(start + _CHUNK, len(self)))
            try:
                records = self._records.__getitems__(list(places))
            # One at a time: tfds.testing.mock_data cannot read several, and a damaged record is
            # reported better.
            except Exception:
                records = None
            examples = [
                self[place] if records is None else self._example(records[place - start], place)
                for place in places
            ]
            for place, example in zip(places, examples, strict=True):
                image[place], label[place] = example["input"], example["label"]
        return image, label

    def labels(self) -> np.ndarray:
        """All labels (N,) int32, without decoding the images."""
        label = np.empty(len(self), np.int32)
        for place in range(len(self)):
            label[place] = int(self._records[place]["label"])
        return label

    def _read_features(self, features: Any) -> None:
        """Checks that images have one class each."""
        self.image_shape = image_shape(features, "label", self.name)
        label = features["label"]
        if label.shape != () or not np.issubdtype(label.np_dtype, np.integer):
            raise DataError(
                f"labels of {self.name!r} are {np.dtype(label.np_dtype)} of shape {label.shape}; "
                "they must be one integer each: choose another data set"
            )
        self.num_classes = getattr(label, "num_classes", None)

    def _example(self, record: dict, index: int) -> Example:
        try:
            image = self._image(record, index)
            label = self._label(record, index, image.shape)
        except DataError:
            raise
        except Exception as error:
            raise DataError(self._damaged(index, error)) from error
        return {"input": image, "label": label}

    def _image(self, record: dict, index: int) -> np.ndarray:
        # Under tfds.testing.mock_data images come decoded.
        encoded = isinstance(record["image"], bytes)
        if not encoded and not isinstance(record["image"], np.ndarray):
            raise TypeError(f"its image is {record['image']!r}")  # a damaged record
        image = self._decoded(record, index) if encoded else record["image"]
        if image.ndim != 3 or any(
            size not in (None, actual)
            for size, actual in zip(self.image_shape, image.shape, strict=True)
        ):
            raise DataError(
                f"{self._described(record, index)} has an image of shape {image.shape}, but the "
                f"data set states {self.image_shape}; prepare it again"
            )
        return image

    def _label(self, record: dict, index: int, shape: tuple[int, ...]) -> Any:
        """The label of a record whose image has this shape."""
        label = int(record["label"])
        if label < 0:
            raise DataError(
                f"{self.name!r} has the label {label} in its {self.split} split, which means "
                f"unlabelled; choose a data set whose {self.split} split is labelled"
            )
        if self.num_classes is not None and label >= self.num_classes:
            raise DataError(
                f"{self._described(record, index)} has the label {label}, but the data set states "
                f"{self.num_classes} classes; prepare it again"
            )
        return np.int32(label)

    def _decoded(self, record: dict, index: int) -> np.ndarray:
        try:
            return decode(record["image"], self.image_shape[2])
        except Exception as error:
            reason = str(error) if isinstance(error, DataError) else one_line(error)
            raise DataError(
                f"the image of {self._described(record, index)} in {self._folder!r} cannot be "
                f"decoded ({reason}); replace it where the data set was made from, or leave it "
                "out, delete that folder, then rerun the same command"
            ) from error

    def _described(self, record: dict, index: int) -> str:
        files = [
            value.decode(errors="replace") if isinstance(value, bytes) else str(value)
            for key, value in record.items()
            if key.split("/")[-1] in ("file_name", "filename")
        ]
        file = f" ({files[0]!r})" if files else ""
        return f"example {index}{file} of the {self.split} split of {self.name!r}"

    def _damaged(self, index: int | None, error: Exception) -> str:
        example = "" if index is None else f"example {index} of "
        return (
            f"{example}the {self.split} split of {self.name!r} in {self._folder!r} cannot be read "
            f"({one_line(error)}); delete that folder, then rerun the same command"
        )


def image_shape(features: Any, label: str, name: str) -> tuple[int | None, ...]:
    """The shape (H, W, C) of a set's images; H and W are None where they vary.

    Args:
      features: the features of a builder.
      label: the feature that the set must have besides `image`.
      name: name of the data set, for messages.

    Raises:
      DataError: if a feature is missing, or images are not uint8 (H, W, C).
    """
    names = sorted(features) if hasattr(features, "keys") else []
    if "image" not in names or label not in names:
        raise DataError(
            f"the data set {name!r} has the features {', '.join(names) or '(none)'}; it must have "
            "image and label, or image and objects: choose another data set"
        )
    image = features["image"]
    if len(image.shape or ()) != 3 or image.np_dtype != np.uint8 or image.shape[2] is None:
        raise DataError(
            f"images of {name!r} are {np.dtype(image.np_dtype)} of shape {image.shape}; they must "
            "be uint8 (H, W, C): choose another data set"
        )
    height, width, channels = image.shape
    return (height, width, channels) if height and width else (None, None, channels)
