"""The fixed sets of grid problems as a builder of tensorflow-datasets, for other programs.

    import paramshare.data.sets.builders.grids
    tfds.load("shortest_paths/window_5", split="train")         # tfrecord; needs TensorFlow
    tfds.data_source("shortest_paths/window_5", split="train")  # array_record; does not

Importing this module registers "shortest_paths". Training draws the problems itself and does not
import it.
"""

import dataclasses
import importlib.util
import re
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds

from paramshare.data.error import DataError
from paramshare.data.grid_problems import GridProblems
from paramshare.data.sets.grids import PARTS, Curriculum

_CHUNK = 1000  # problems drawn at once
_CELLS = 2**22  # cells drawn at once, which bounds the memory for large grids

_DESCRIPTION = """
Which cells lie on a shortest path between two points of a grid with obstacles?

An image has two channels of 0 and 1: obstacles, and the two points. The label is 1 on the cells of
all shortest paths, both points included, and 0 elsewhere. The task is that of Savarese & Maire
(ICLR 2019, section 4.3). The problems are not theirs: steps to the four neighbours, the union of
all shortest paths, and the window (the side of a square that holds both points) are paramshare's
reading. Problems are drawn by their number, which is their place in the split.
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
    """A kind of problem, and how many of them. A split of 0 problems is left out.

    Attributes:
      name: name of the configuration (letters, digits, "_", "-", "+" and "."); the first argument.
      problems: the kind.
      examples: in split "train".
      validations: in split "validation"; None for a tenth of `examples`, the default of training.
      tests: in split "test".

    Raises:
      DataError: if the name or a number is not allowed.

    Example:
      >>> wide = GridProblems(8, 64, window=64)
      >>> GridsConfig("wide", problems=wide, examples=100, tests=20).counts()
      {'train': 100, 'validation': 10, 'test': 20}
    """

    problems: GridProblems
    examples: int = 5000
    validations: int | None = None
    tests: int = 1000

    def __post_init__(self):
        if not isinstance(self.name, str) or not re.fullmatch(
            r"[\w+\-.]*\w[\w+\-.]*", self.name, re.ASCII
        ):
            raise DataError(
                f"GridsConfig: name is {self.name!r}; it must consist of letters, digits, '_', "
                "'-', '+' and '.'"
            )
        if not isinstance(self.problems, GridProblems):
            raise DataError(
                f"GridsConfig {self.name!r}: problems is {self.problems!r}; it must be a "
                "GridProblems"
            )
        for option in ("examples", "validations", "tests"):
            count = getattr(self, option)
            if option == "validations" and count is None:
                continue
            if isinstance(count, bool) or not isinstance(count, int | np.integer) or count < 0:
                raise DataError(
                    f"GridsConfig {self.name!r}: {option} is {count!r}; it must be an integer, "
                    "0 or more"
                )
        if not any(self.counts().values()):
            raise DataError(
                f"GridsConfig {self.name!r} has no problems; pass examples or tests of 1 or more"
            )

    def counts(self) -> dict[str, int]:
        """The number of problems in each split."""
        validations = self.validations
        if validations is None:  # as many as `Grids.load` draws by default
            validations = max(1, round(0.1 * self.examples)) if self.examples else 0
        return dict(zip(PARTS, map(int, (self.examples, validations, self.tests)), strict=True))


def config_name(kind: str) -> str:
    """The name of a configuration for a test set of `Curriculum.kinds`.

    Example:
      >>> config_name("size 64, window 64"), config_name("density 0.2")
      ('size_64_window_64', 'density_0.2')
    """
    return kind.replace(", ", "_").replace(" ", "_")


class ShortestPaths(tfds.core.GeneratorBasedBuilder):
    """Shortest paths on grids: image (H, W, 2) and label (H, W), uint8, ordered as in `fixed_set`.

    There is a configuration for each kind of the default `Curriculum`: window_5, window_9,
    window_13, window_17, window_21 (the phases), window_25, window_32, size_48, size_48_window_48,
    size_64, size_64_window_64, density_0.2, density_0.3 (beyond them); `config_name` maps the
    names. Training uses the train split of the phases only. For other problems, pass a
    `GridsConfig`.

    Only the format "tfrecord" needs TensorFlow; it is the default of tensorflow-datasets and what
    `tfds.load` reads. Without TensorFlow, pass file_format="array_record", here or to
    `download_and_prepare`, and read by `as_data_source`. (`tfds.data_source` without data_dir
    passes it by itself.)

    Args:
      **kwargs: of `tfds.core.GeneratorBasedBuilder`: config (a name or a `GridsConfig`; "window_5"
        by default), data_dir, file_format.

    Raises:
      DataError: if config is neither, or other problems are already prepared under its name; and by
        `download_and_prepare`, if "tfrecord" is to be written and TensorFlow is not installed.

    References:
      Savarese & Maire, ICLR 2019, arXiv:1902.09701: the task.

    Example:
      >>> config = GridsConfig("small", problems=GridProblems(8, 8), examples=20, tests=10)
      >>> builder = ShortestPaths(config=config, data_dir="a/folder")
      >>> builder.info.features["image"].shape
      (8, 8, 2)
      >>> builder.download_and_prepare(file_format="array_record")  # doctest: +SKIP
      >>> len(builder.as_data_source(split="test"))  # doctest: +SKIP
      10
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "The problems of fixed_set."}
    BUILDER_CONFIGS: ClassVar[list[GridsConfig]] = [
        GridsConfig(
            config_name(kind),
            description=str(problems),
            problems=problems,
            examples=Curriculum().examples,
            tests=Curriculum().tests,
        )
        for kind, problems in Curriculum().kinds().items()
    ]

    def __init__(self, **kwargs) -> None:
        config = kwargs.get("config")
        if not isinstance(config, str | GridsConfig | None):
            raise DataError(
                f"ShortestPaths: config is {config!r}; it must be a name or a GridsConfig"
            )
        super().__init__(**kwargs)
        expected, stored = self._metadata(), dict(self.info.metadata or {})
        if stored != expected:
            raise DataError(
                f"{self.data_dir!r} holds the problems {stored}, not {expected}; give the "
                "GridsConfig another name"
            )

    @property
    def _config(self) -> GridsConfig:
        assert isinstance(self.builder_config, GridsConfig)
        return self.builder_config

    def _metadata(self) -> dict[str, float]:
        problems = self._config.problems
        sizes = {name: getattr(problems, name) for name in ("height", "width", "window")}
        return sizes | {"density": problems.density} | self._config.counts()

    def _info(self) -> tfds.core.DatasetInfo:
        cells = (self._config.problems.height, self._config.problems.width)

        def tensor(shape: tuple[int, ...], doc: str) -> tfds.features.Tensor:
            # Without the encoding each cell would be stored as an int64.
            return tfds.features.Tensor(shape=shape, dtype=np.uint8, encoding="zlib", doc=doc)

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
        if (
            self.info.file_format in (None, tfds.core.FileFormat.TFRECORD)
            and importlib.util.find_spec("tensorflow") is None
        ):
            raise DataError(
                f"preparing {self.info.full_name!r} as tfrecord needs TensorFlow, which is not "
                'installed; pass file_format="array_record" and read by as_data_source, or run '
                '`pip install "paramshare[tfds]"`'
            )
        return {
            part: self._generate_examples(part, count)
            for part, count in self._config.counts().items()
            if count
        }

    def _generate_examples(self, part: str, count: int) -> Iterator[tuple[int, dict]]:
        problems = self._config.problems
        chunk = max(1, min(_CHUNK, _CELLS // (problems.height * problems.width)))
        for start in range(0, count, chunk):
            indices = range(start, min(start + chunk, count))
            arrays = problems.draw(PARTS.index(part), indices)  # those of `fixed_set`
            for key, image, label in zip(indices, *arrays, strict=True):
                yield key, {"image": image, "label": label}
