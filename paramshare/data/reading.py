"""Sources read as a `Dataset`: those of a prepared builder of tensorflow-datasets, and others."""

import concurrent.futures
from typing import Any

import jax
import numpy as np

from paramshare.data import order, statistics
from paramshare.data.crop import CropSource
from paramshare.data.dataset import Dataset, classification, from_arrays
from paramshare.data.detector import DetectorOptions
from paramshare.data.error import DataError
from paramshare.data.object_records import ObjectRecords
from paramshare.data.objects import DetectionSource
from paramshare.data.records import Records
from paramshare.data.registry import DataConfig
from paramshare.data.sources import Source, Subset
from paramshare.data.statistics import Channels
from paramshare.data.views import ViewOf, centred, letterboxed
from paramshare.tasks import Classification, Task
from paramshare.tasks.config import Count, Fraction, checked_dataclass

MEMORY_LIMIT = 2**30  # bytes of decoded training images that are held in memory
IMAGE_SIZE = 224
ANNOTATED_SIZE = 320  # of images with boxes or joints


@checked_dataclass(DataError)
class PreparedConfig(DataConfig):
    """The fields that all prepared sets have."""

    data_dir: str | None = None
    """Where tensorflow-datasets keeps prepared data; None for ~/tensorflow_datasets."""
    validation: Fraction = 0.1
    """Fraction of the training images held out for validation (to choose an epoch); 0 for none."""
    train_examples: Count | None = None
    """Train on this many images only; None for all."""


def read(
    builder: Any,
    config: PreparedConfig,
    seed: int,
    *,
    image_size: int | None = None,
    splits: tuple[str, str | None, str] | None = None,
    constants: tuple[Channels, Channels] | None = None,
    num_classes: int | None = None,
    stated: bool = True,
) -> Dataset:
    """Reads a set of images with one class each, into memory if it is small and of one shape.

    Args:
      builder: a prepared `tfds.core.DatasetBuilder`.
      config: configuration of the data set. `validation` holds training examples out; a set with
        validation *and* test examples keeps them (0 leaves the validation examples out).
        `train_examples` takes the first of the seed's order; the validation part stays the same.
      seed: chooses the examples that are held out; 0 <= seed < 2**64.
      image_size: side of the crop, for sets whose images vary in size; None for 224.
      splits: names of the training, validation (or None) and test splits; None for the usual ones.
      constants: mean and std of each channel; None to compute them from the training part.
      num_classes: number of classes, for a builder that does not state it.
      stated: whether the builder states the number of classes, or counts the labels.

    Returns:
      The data set. Its test part does not depend on `config` and `seed`.

    Raises:
      DataError: if the data set does not exist, cannot be read, or an option does not fit it.
    """
    name = config.name
    train_split, validation_split, test_split = splits or _splits(name, builder)
    train = Records(builder, train_split, name)
    validation = Records(builder, validation_split, name) if validation_split else None
    test = Records(builder, test_split, name)
    shape = train.image_shape
    fixed = None not in shape
    if fixed and image_size is not None:
        raise DataError(
            f"image_size is {image_size}, but all images of {name!r} have shape {shape}; leave it "
            "out"
        )
    if fixed and len(train) * int(np.prod(np.array(shape, np.int64))) <= MEMORY_LIMIT:
        return from_arrays(
            train.arrays(),
            test.arrays(),
            validation_data=None if validation is None else validation.arrays(),
            name=name,
            validation=config.validation,
            seed=seed,
            num_classes=train.num_classes if stated else num_classes,
            channels=shape[2],
            train_examples=config.train_examples,
            mean=constants[0] if constants else None,
            std=constants[1] if constants else None,
        )
    parts = {"train": train, "validation": validation, "test": test}
    task = None
    if not stated:
        labels = {part: source.labels() for part, source in parts.items() if source is not None}
        task = classification(name, labels, num_classes)
    elif train.num_classes is not None:
        task = Classification(train.num_classes)
    if task is None:
        raise DataError(
            f"the data set {name!r} does not say how many classes it has; choose one whose "
            "label is a ClassLabel"
        )
    size = image_size or IMAGE_SIZE

    def view(source: Source) -> Source:
        return source if fixed else CropSource(source, size, shape[2])

    chosen, remaining = order.held_out(
        len(train), config.validation if validation is None else 0, seed, config.train_examples
    )
    held_out = (
        Subset(train, remaining)
        if validation is None
        else Subset(validation, np.arange(len(validation) if config.validation else 0))
    )
    training = view(Subset(train, chosen))
    mean, std = constants or statistics.sampled(training)
    return Dataset(
        name,
        training,
        view(held_out),
        view(test),
        task,
        shape if fixed else (size, size, shape[2]),
        mean,
        std,
        view_of=None if fixed else centred(size, shape[2]),
    )


def read_objects(
    builder: Any,
    config: PreparedConfig,
    seed: int,
    *,
    image_size: int | None = None,
    max_boxes: int = 100,
    detector: DetectorOptions | None = None,
    splits: tuple[str, str | None, str] | None = None,
) -> Dataset:
    """Reads a set of images with objects, such as coco/2017, for detection.

    Args:
      builder: a prepared `tfds.core.DatasetBuilder`.
      config: configuration of the data set, as in `read`.
      seed: chooses the examples that are held out; 0 <= seed < 2**64.
      image_size: side of the letterboxed images; None for 320.
      max_boxes: rows of a label; the largest objects of an image are kept.
      detector: the loss of boxes, and which boxes are returned; None for the defaults.
      splits: names of the training, validation (or None) and test splits; None for the usual ones.

    Returns:
      The data set, as `from_sources` makes it.

    Raises:
      DataError: if the data set cannot be read, or an option does not fit it.
    """
    name, size = config.name, image_size or ANNOTATED_SIZE
    train_split, validation_split, test_split = splits or _splits(name, builder)
    train = ObjectRecords(builder, train_split, name)

    def view(split: str) -> Source:
        return DetectionSource(ObjectRecords(builder, split, name), size, max_boxes)

    return from_sources(
        DetectionSource(train, size, max_boxes),
        view(validation_split) if validation_split else None,
        view(test_split),
        name=name,
        task=(detector or DetectorOptions()).task(train.categories, max_boxes),
        size=size,
        fraction=config.validation,
        train_examples=config.train_examples,
        seed=seed,
    )


def from_sources(
    train: Source,
    validation: Source | None,
    test: Source,
    *,
    name: str,
    task: Task,
    size: int,
    fraction: float,
    train_examples: int | None,
    seed: int,
    group: np.ndarray | None = None,
    view_of: ViewOf | None = None,
) -> Dataset:
    """A data set of RGB images of one size, in memory if all of them fit into `MEMORY_LIMIT`.

    Inputs are normalised by ImageNet's mean and std.

    Args:
      train: N training examples.
      validation: validation examples; None holds some of `train` out.
      test: test examples.
      name: the set's name.
      task: what the labels are for.
      size: side of the images.
      fraction: share of `train` that is held out; with `validation`, 0 drops it and anything else
        keeps all of it.
      train_examples: train on this many examples only; None for all.
      seed: chooses the examples that are held out; 0 <= seed < 2**64.
      group: (N,) integers; examples of one group, such as the people in an image, are all held out
        or none of them. None for single examples.
      view_of: makes inputs of pictures of any size; None to letterbox them.

    Raises:
      DataError: if a number does not fit, or an example cannot be read.
    """
    chosen, remaining = order.held_out_groups(
        np.arange(len(train)) if group is None else group,
        fraction if validation is None else 0,
        seed,
        train_examples,
    )
    parts = {"train": Subset(train, chosen), "test": test}
    if validation is not None:
        parts["validation"] = Subset(validation, np.arange(len(validation) if fraction else 0))
    else:
        parts["validation"] = Subset(train, remaining)
    mean, std = statistics.IMAGENET
    view_of = view_of or letterboxed(size)
    if sum(map(len, parts.values())) * size * size * 3 > MEMORY_LIMIT:
        return Dataset(
            name,
            parts["train"],
            parts["validation"],
            test,
            task,
            (size, size, 3),
            mean,
            std,
            view_of=view_of,
        )
    arrays = {part: _loaded(source) for part, source in parts.items() if len(source)}
    return from_arrays(
        arrays["train"],
        arrays["test"],
        validation_data=arrays.get("validation"),
        name=name,
        validation=0.5 if "validation" in arrays else 0,  # the examples are divided already
        seed=seed,
        task=task,
        mean=mean,
        std=std,
        view_of=view_of,
    )


def _loaded(source: Source) -> tuple[np.ndarray, Any]:
    """All inputs (N, ...) and labels of a source, read by several threads."""
    first = source[0]
    whole = jax.tree.map(
        lambda x: np.empty((len(source), *np.shape(x)), np.asarray(x).dtype), first
    )

    def read(index: int) -> None:
        example = source[index]
        for array, value in zip(jax.tree.leaves(whole), jax.tree.leaves(example), strict=True):
            array[index] = value

    # Decoding and resizing release Python's lock.
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for _ in pool.map(read, range(len(source))):
            pass
    return whole["input"], whole["label"]


def _splits(name: str, builder: Any) -> tuple[str, str | None, str]:
    """The names of the training, validation (or None) and test splits."""
    # Under tfds.testing.mock_data a builder has no splits.
    splits = set(builder.info.splits) or {"train", "test"}
    if {"train", "test"} <= splits:
        return "train", "validation" if "validation" in splits else None, "test"
    if {"train", "validation"} <= splits:
        return "train", None, "validation"
    raise DataError(
        f"the data set {name!r} has the splits {', '.join(sorted(splits))}; it must have train and "
        "test, or train and validation: choose another data set"
    )
