"""A folder of four IDX files, the format of MNIST."""

import pathlib
from typing import Annotated, Any

import pydantic

from paramshare.data.dataset import Dataset
from paramshare.data.error import DataError
from paramshare.data.prepared import prepared_builder
from paramshare.data.reading import PreparedConfig, read
from paramshare.data.registry import register
from paramshare.tasks.config import Count


def _absolute(path: str | None) -> str | None:
    return path and str(pathlib.Path(path).expanduser().absolute())


Folder = Annotated[str | None, pydantic.AfterValidator(_absolute)]
"""The type of a field that names a folder; it is stored as an absolute path."""


@register("idx")
class Idx(PreparedConfig):
    """Images and class labels in the format of MNIST."""

    name: str = "idx"
    path: Folder = None
    """Folder with train-images-idx3-ubyte[.gz] and the three other files; stored as an absolute
    path."""
    num_classes: Count | None = None
    """Number of classes, if some have no training images; None for the largest label plus one."""

    def load(self, seed: int = 0) -> Dataset:
        """The images of the folder; the seed chooses the validation images."""
        if self.path is None:
            raise DataError(
                "the data set 'idx' is read from a folder; pass path, the folder that holds "
                "train-images-idx3-ubyte[.gz] and the three other files"
            )
        builder = prepared_builder(self._builder, self.name, self.data_dir, local=True)
        return read(builder, self, seed, num_classes=self.num_classes, stated=False)

    def _builder(self, data_dir: str | None) -> Any:
        from paramshare.data.sets.builders.idx import IdxBuilder

        return IdxBuilder(path=str(self.path), data_dir=data_dir)
