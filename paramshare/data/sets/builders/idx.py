"""A folder of IDX files, the format of MNIST, as a builder of tensorflow-datasets."""

import os
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds

from paramshare.data import idx_files


class IdxBuilder(tfds.core.GeneratorBasedBuilder):
    """Images and labels of four IDX files.

    Its configuration is a digest of the files' bytes: files that change are prepared again, and a
    folder that is only moved or copied is not.

    Args:
      path: the folder.
      **kwargs: of `tfds.core.GeneratorBasedBuilder`.

    Raises:
      DataError: if a file is missing.
    """

    name = "idx"
    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, path: str | os.PathLike[str], **kwargs) -> None:
        self._folder = idx_files.find(path)
        self._parts: dict[str, tuple[np.ndarray, np.ndarray]] | None = None
        super().__init__(
            config=tfds.core.BuilderConfig(name=f"sha256-{idx_files.digest(self._folder)[:24]}"),
            **kwargs,
        )

    def _read(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        if self._parts is None:
            self._parts = idx_files.read(self._folder)
        return self._parts

    def _info(self) -> tfds.core.DatasetInfo:
        if (self.data_path / "features.json").exists():
            features = tfds.features.FeatureConnector.from_config(self.data_dir)
        else:
            parts = self._read()
            features = tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Tensor(
                        shape=parts["train"][0].shape[1:], dtype=np.uint8
                    ),
                    "label": tfds.features.ClassLabel(
                        num_classes=1 + max(int(label.max()) for _, label in parts.values())
                    ),
                }
            )
        return tfds.core.DatasetInfo(
            builder=self,
            description="Images and labels read from IDX files.",
            features=features,
            supervised_keys=("image", "label"),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        del dl_manager
        return {part: self._generate_examples(*arrays) for part, arrays in self._read().items()}

    def _generate_examples(
        self, image: np.ndarray, label: np.ndarray
    ) -> Iterator[tuple[int, dict]]:
        for key in range(len(image)):
            yield key, {"image": image[key], "label": int(label[key])}
