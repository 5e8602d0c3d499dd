"""Image sets of tensorflow-datasets: cifar10, mnist, imagenet2012, coco/2017, ..."""

import contextlib
import difflib
import pathlib
from typing import Any

from paramshare.data import registry
from paramshare.data.dataset import Dataset
from paramshare.data.detector import DetectorOptions
from paramshare.data.error import DataError, require
from paramshare.data.prepared import prepared_builder
from paramshare.data.reading import PreparedConfig, read, read_objects
from paramshare.data.registry import register
from paramshare.data.statistics import IMAGENET, Channels
from paramshare.tasks.config import Count

# Zagoruyko and Komodakis, "Wide residual networks" (2016): the reference implementation.
_CIFAR10 = ((125.3, 123.0, 113.9), (63.0, 62.1, 66.7))
_CIFAR100 = ((129.3, 124.1, 112.4), (68.2, 65.4, 70.4))
# Training, validation and test splits of sets whose names of splits mislead.
_SPLITS = {  # their test splits have no labels
    "imagenet2012": ("train", None, "validation"),
    "coco": ("train", None, "validation"),
}


@register(registry.OTHERS)
class Tfds(PreparedConfig):
    """A set of tensorflow-datasets with an image and a class label, or an image and objects.

    Preparing it needs TensorFlow; reading it does not. A set with validation *and* test examples
    keeps them. Where there are validation but no labelled test examples, as in imagenet2012 and
    coco, they are the test part, and validation examples are held out of train.
    """

    name: str
    """Name in tensorflow-datasets, such as cifar10, cifar100, mnist, svhn_cropped, imagenet2012,
    coco/2017."""
    image_size: Count | None = None
    """Side of the crops, if images vary in size; None for 224. For detection, of the letterboxed
    images; None for 320."""
    max_boxes: Count = 100
    """Boxes in a label, for detection; the largest boxes of an image are kept, in evaluation
    too."""
    detector: DetectorOptions = DetectorOptions()
    """For detection: its loss of boxes, and which boxes it returns."""

    def load(self, seed: int = 0) -> Dataset:
        """The data set, prepared if it is not yet; the seed chooses the validation images."""
        tfds = require("tensorflow_datasets", "tensorflow-datasets", f"the data set {self.name!r}")
        base = self.name.split("/")[0].split(":")[0]
        self._check_name(tfds, base)
        builder = prepared_builder(
            lambda data_dir: _builder(tfds, self.name, data_dir), self.name, self.data_dir
        )
        splits, features = _SPLITS.get(base), builder.info.features or {}
        if "objects" in features and "label" not in features:
            return read_objects(
                builder,
                self,
                seed,
                image_size=self.image_size,
                max_boxes=self.max_boxes,
                detector=self.detector,
                splits=splits,
            )
        return read(
            builder,
            self,
            seed,
            image_size=self.image_size,
            splits=splits,
            constants=published(base),
        )

    def _check_name(self, tfds: Any, base: str) -> None:
        names = sorted({*registry.names(), *tfds.list_builders(with_community_datasets=False)})
        if base in names:
            return
        if base and self.data_dir and (pathlib.Path(self.data_dir).expanduser() / base).is_dir():
            return
        close = difflib.get_close_matches(base, names, n=3)
        remedy = (
            f"did you mean {', '.join(close)}?"
            if close
            else f"choose one of {', '.join(registry.names())}, or a name of tensorflow-datasets "
            "such as cifar10, cifar100 or mnist"
        )
        raise DataError(f"there is no data set {self.name!r}; {remedy}")


def _builder(tfds: Any, name: str, data_dir: str | None) -> Any:
    try:
        return tfds.builder(name, data_dir=data_dir)
    except ImportError:
        # A few sets, such as coco, name their features in TensorFlow's types; what was prepared
        # states its features without them.
        with contextlib.suppress(tfds.core.DatasetNotFoundError):
            from tensorflow_datasets.core import read_only_builder

            return read_only_builder.builder_from_files(name, data_dir=data_dir)
        raise


def published(name: str) -> tuple[Channels, Channels] | None:
    """The published (mean, std) of a set, on the scale 0 to 255; None where there is none.

    Example:
      >>> published("cifar10")[0]
      (125.3, 123.0, 113.9)
      >>> published("mnist") is None
      True
    """
    if name.startswith("imagenet"):  # imagenet_v2, imagenet_a, ... have the same statistics
        return IMAGENET
    return {"cifar10": _CIFAR10, "cifar100": _CIFAR100}.get(name)
