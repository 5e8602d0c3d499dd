"""The fixed sets of grid problems as a builder of tensorflow-datasets: for other programs, and to look at. Training draws them itself.

    import paramshare.training.data.grids_builder
    tfds.load("shortest_paths/window_5", split="train")         # tf.data over tfrecord: needs TensorFlow
    tfds.data_source("shortest_paths/window_5", split="train")  # array_record: written and read without

Importing this module registers "shortest_paths"; nothing else in the package imports it, for it imports tensorflow-datasets at its head.
"""

import dataclasses
import importlib.util
import re
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds

from paramshare.training.data.curriculum import PARTS, Curriculum
from paramshare.training.data.error import DataError
from paramshare.training.data.grids import Grids

_CHUNK = 1000  # problems drawn at once, and
_CELLS = 2**22  # cells at most: what bounds the memory where grids are large

_DESCRIPTION = """
Which cells lie on a shortest path between two points of a grid with obstacles?

An image has two channels of 0 and 1: obstacles, and the two points. The label is 1 on the cells of all shortest paths, both points
included, and 0 elsewhere. The task is that of Savarese & Maire (ICLR 2019, section 4.3), the problems are not theirs: steps to the four
neighbours, the union of all shortest paths, and the window (the side of a square that holds both points) are paramshare's reading.
Problems are drawn by their number, which is their place in the split.
"""

_CITATION = """
@inproceedings{savarese2019learning,
  title={Learning Implicitly Recurrent {CNN}s Through Parameter Sharing},
  author={Savarese, Pedro and Maire, Michael},
  booktitle={International Conference on Learning Representations},
  year={2019},
  eprint={1902.09701},
  archivePrefix={arXiv}
}
"""


@dataclasses.dataclass(eq=False, kw_only=True)
class GridsConfig(tfds.core.BuilderConfig):
    """A kind of problem, and how many of them; a part of which there are none is left out.

    Attributes:
      name: of the configuration: letters, digits, "_", "-", "+" and "." (the first argument, as of every `BuilderConfig`).
      grids: the kind.
      examples: in split "train".
      validations: in split "validation"; None for a tenth of `examples`, as training holds by default.
      tests: in split "test".

    Raises:
      DataError: if the name or a number is not a legal one.

    Example:
      >>> GridsConfig("wide", grids=Grids(8, 64, window=64), examples=100, tests=20).counts()
      {'train': 100, 'validation': 10, 'test': 20}
    """

    grids: Grids
    examples: int = 5000
    validations: int | None = None
    tests: int = 1000

    def __post_init__(self):
        if not isinstance(self.name, str) or not re.fullmatch(r"[\w+\-.]*\w[\w+\-.]*", self.name, re.ASCII):
            raise DataError(f"GridsConfig(name={self.name!r}): a name is of letters, digits, '_', '-', '+' and '.'; pass such a one")
        if not isinstance(self.grids, Grids):
            raise DataError(f"GridsConfig {self.name!r}: grids={self.grids!r} is no kind of problem; pass a Grids")
        for option in ("examples", "validations", "tests"):
            count = getattr(self, option)
            if option == "validations" and count is None:
                continue
            if isinstance(count, bool) or not isinstance(count, int | np.integer) or count < 0:
                raise DataError(f"GridsConfig {self.name!r}: {option}={count!r}; pass an integer, 0 or more")
        if not any(self.counts().values()):
            raise DataError(f"GridsConfig {self.name!r} holds no problem; pass examples or tests of 1 or more")

    def counts(self) -> dict[str, int]:
        """How many problems each part holds."""
        held = self.validations
        if held is None:
            held = max(1, round(0.1 * self.examples)) if self.examples else 0  # as curriculum_set does by default
        return dict(zip(PARTS, map(int, (self.examples, held, self.tests)), strict=True))


def config_name(kind: str) -> str:
    """A test set's name among `Curriculum.kinds` as the name of a configuration: "_" for what lies between its words.

    Example:
      >>> config_name("size 64, window 64"), config_name("density 0.2")
      ('size_64_window_64', 'density_0.2')
    """
    return kind.replace(", ", "_").replace(" ", "_")


class ShortestPaths(tfds.core.GeneratorBasedBuilder):
    """Shortest paths on grids: image (H, W, 2) and label (H, W), uint8, the problems of `fixed_set` in their order.

    There is a configuration for each kind of the default `Curriculum`: window_5, window_9, window_13, window_17, window_21 (the phases),
    window_25, window_32, size_48, size_48_window_48, size_64, size_64_window_64, density_0.2, density_0.3 (beyond them); `config_name`
    maps the names. Training in phases uses the train part of the phases only. Other problems are asked for with a `GridsConfig`.

    TensorFlow is needed for the format "tfrecord" alone, TFDS's default and the one that `tfds.load` reads. Without it, pass
    file_format="array_record", here or to `download_and_prepare` (`tfds.data_source` does so itself where it is given no data_dir), and
    read by `as_data_source`.

    Args:
      **kwargs: of `tfds.core.GeneratorBasedBuilder`: config (a name or a `GridsConfig`; "window_5" if left out), data_dir, file_format.

    Raises:
      DataError: if the configuration is none of ours, or other problems lie prepared under its name; and by `download_and_prepare`, if
        "tfrecord" is to be written and TensorFlow is not installed.

    References:
      Savarese & Maire, ICLR 2019, arXiv:1902.09701: the task.

    Example:
      >>> config = GridsConfig("small", grids=Grids(8, 8), examples=20, tests=10)
      >>> builder = ShortestPaths(config=config, data_dir="a/folder")
      >>> builder.info.features["image"].shape
      (8, 8, 2)
      >>> builder.download_and_prepare(file_format="array_record")  # doctest: +SKIP
      >>> len(builder.as_data_source(split="test"))  # doctest: +SKIP
      10
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "The problems of fixed_set, as they were first drawn."}
    BUILDER_CONFIGS: ClassVar[list[GridsConfig]] = [
        GridsConfig(config_name(kind), description=str(grids), grids=grids, examples=Curriculum().examples, tests=Curriculum().tests)
        for kind, grids in Curriculum().kinds().items()
    ]

    def __init__(self, **kwargs) -> None:
        """Opens what is prepared, if anything is, and sees that it is what was asked for."""
        config = kwargs.get("config")
        if not isinstance(config, str | GridsConfig | None):
            raise DataError(f"ShortestPaths(config={config!r}): that is no kind of grid problems; pass a name or a GridsConfig")
        super().__init__(**kwargs)
        wanted, found = self._metadata(), dict(self.info.metadata or {})
        if found != wanted:
            raise DataError(f"in {self.data_dir!r} lie {found}, asked for were {wanted}; give the GridsConfig another name")

    @property
    def _config(self) -> GridsConfig:
        assert isinstance(self.builder_config, GridsConfig)
        return self.builder_config

    def _metadata(self) -> dict[str, float]:
        grids = self._config.grids
        sizes = {name: int(getattr(grids, name)) for name in ("height", "width", "window")}
        return sizes | {"density": float(grids.density)} | self._config.counts()

    def _info(self) -> tfds.core.DatasetInfo:
        grids = self._config.grids
        cells = (grids.height, grids.width)

        def tensor(shape: tuple[int, ...], doc: str) -> tfds.features.Tensor:
            return tfds.features.Tensor(shape=shape, dtype=np.uint8, encoding="zlib", doc=doc)  # else a cell would be an int64

        return tfds.core.DatasetInfo(
            builder=self,
            description=_DESCRIPTION,
            features=tfds.features.FeaturesDict(
                {
                    "image": tensor((*cells, 2), "1 on obstacles; 1 on the two points."),
                    "label": tensor(cells, "1 on the cells of all shortest paths."),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://arxiv.org/abs/1902.09701",
            citation=_CITATION,
            metadata=tfds.core.MetadataDict(self._metadata()),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        del dl_manager
        if self.info.file_format in (None, tfds.core.FileFormat.TFRECORD) and importlib.util.find_spec("tensorflow") is None:
            raise DataError(
                f"{self.info.full_name!r} is to be prepared as tfrecord, which needs TensorFlow, and that is not installed; "
                'pass file_format="array_record" and read by as_data_source, or run `pip install "paramshare[tfds]"`'
            )
        return {part: self._generate_examples(part, count) for part, count in self._config.counts().items() if count}

    def _generate_examples(self, part: str, count: int) -> Iterator[tuple[int, dict]]:
        grids = self._config.grids
        chunk = max(1, min(_CHUNK, _CELLS // (grids.height * grids.width)))
        for start in range(0, count, chunk):
            numbers = range(start, min(start + chunk, count))
            # As fixed_set draws them, from `start` on.
            for key, image, label in zip(numbers, *grids.draw(PARTS.index(part), numbers), strict=True):
                yield key, {"image": image, "label": label}
