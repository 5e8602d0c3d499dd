"""The handwritten digits of scikit-learn: 1,797 images of 8x8, ten classes.

They are the test part of the UCI set "Optical recognition of handwritten digits" (E. Alpaydin, C.
Kaynak, 1998). They need no download, and a small network learns them in seconds.
"""

from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds

from paramshare.data.error import require


def split_digits(label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The fixed stratified split: every fifth example of each class is a test example.

    scikit-learn stores the writers one after another; every fifth spreads each over both parts.

    Args:
      label: (N,) integers.

    Returns:
      (train, test): disjoint ascending indices into label, about 80 to 20 in every class.

    Example:
      >>> train, test = split_digits(np.array([0] * 10 + [1] * 5))
      >>> test.tolist()
      [4, 9, 14]
    """
    test = np.sort(np.concatenate([np.flatnonzero(label == c)[4::5] for c in np.unique(label)]))
    return np.setdiff1d(np.arange(len(label)), test), test


class DigitsBuilder(tfds.core.GeneratorBasedBuilder):
    """8x8 grey digits: 1,442 to train, 355 to test."""

    name = "digits"
    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Handwritten digits of scikit-learn, 8x8, grey levels scaled to 0..255.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80",
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        del dl_manager
        datasets = require("sklearn.datasets", "scikit-learn", "the data set 'digits'")
        pixels, label = datasets.load_digits(return_X_y=True)
        image = np.round(pixels.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
        train, test = split_digits(label)
        return {
            "train": self._generate_examples(image[train], label[train]),
            "test": self._generate_examples(image[test], label[test]),
        }

    def _generate_examples(
        self, image: np.ndarray, label: np.ndarray
    ) -> Iterator[tuple[int, dict]]:
        for key in range(len(image)):
            yield key, {"image": image[key], "label": int(label[key])}
