"""A data set by its name."""

from typing import Any

import numpy as np

from paramshare.training.data import order, prepared, statistics
from paramshare.training.data.crop import CropSource
from paramshare.training.data.curriculum import Curriculum, curriculum_set
from paramshare.training.data.error import DataError
from paramshare.training.data.image_set import ImageSet, Source, Subset, from_arrays
from paramshare.training.data.records import Records


def load(
    name: str,
    *,
    data_dir: str | None = None,
    path: str | None = None,
    validation: float = 0.1,
    seed: int = 0,
    train_examples: int | None = None,
    image_size: int | None = None,
    curriculum: Curriculum = Curriculum(),  # noqa: B008 (frozen)
    memory_limit: int = 2**30,
) -> ImageSet:
    """Loads a set by name, preparing it the first time.

    Args:
        name: "digits" (scikit-learn's, no download), "idx" (a folder of MNIST's format), "grids" (shortest paths on grids, drawn as
            `curriculum` says), or a set of tensorflow-datasets with an image and a label: cifar10, cifar100, mnist, fashion_mnist,
            svhn_cropped, imagenet2012, ... Preparing those needs TensorFlow; reading them does not.
        data_dir: where prepared sets lie; None for TFDS's default, ~/tensorflow_datasets.
        path: the folder of IDX files, for "idx" only.
        validation: part of the training examples held out, chosen by `seed`; 0 for none. A set with validation *and* test examples
            of its own keeps them (0 leaves the validation examples out). Where there are validation but no labelled test examples, as in
            imagenet2012, they are the test part and the held-out part comes out of train.
        seed: of the held-out choice, 0 <= seed < 2**64.
        train_examples: train on so many only, the first of the seed's order; the validation part stays what it is.
        image_size: side of the crop, for sets whose images vary in size; None for 224.
        curriculum: the phases and test sets of "grids", whose problems do not depend on `seed`.
        memory_limit: a set of one image shape whose decoded training part is at most so many bytes is held in memory.

    Returns:
        The set. Its test part never depends on `validation`, `seed` or `train_examples`.

    Raises:
        DataError: whatever is wrong, in one line.

    Example:
        >>> digits = load("digits")  # doctest: +SKIP
        >>> len(digits.train), len(digits.validation), len(digits.test)  # doctest: +SKIP
        (1298, 144, 355)
    """
    if name == "grids":
        for option, value in (("path", path), ("data_dir", data_dir), ("train_examples", train_examples), ("image_size", image_size)):
            if value is not None:
                raise DataError(f"data set 'grids' is drawn as its curriculum says, but {option} is {value!r}; leave it out")
        return curriculum_set(curriculum, validation)
    builder = prepared.builder(name, data_dir, path)
    train_split, held_split, test_split = _splits(name, builder)
    train = Records(builder, train_split, name)
    held = Records(builder, held_split, name) if held_split else None
    test = Records(builder, test_split, name)
    constants = statistics.known(name.split("/")[0].split(":")[0])
    shape = train.image_shape
    fixed = None not in shape
    if fixed and image_size is not None:
        raise DataError(f"image_size={image_size} is for sets whose images vary in size; those of {name!r} are {shape}: leave it out")
    if fixed and len(train) * int(np.prod(np.array(shape, np.int64))) <= memory_limit:
        return from_arrays(
            train.arrays(),
            test.arrays(),
            held=None if held is None else held.arrays(),
            name=name,
            validation=validation,
            seed=seed,
            num_classes=train.num_classes,
            train_examples=train_examples,
            mean=constants[0] if constants else None,
            std=constants[1] if constants else None,
        )
    size = image_size or 224

    def view(source: Source) -> Source:
        return source if fixed else CropSource(source, size, shape[2])

    training, rest = order.held_out(len(train), validation if held is None else 0, seed, train_examples)
    held_source: Source = Subset(train, rest) if held is None else Subset(held, np.arange(len(held) if validation else 0))
    part = view(Subset(train, training))
    mean, std = constants or statistics.sampled(part)
    image_shape = shape if fixed else (size, size, shape[2])
    if train.num_classes is None:
        raise DataError(f"the data set {name!r} does not say how many classes it has; choose one whose label is a ClassLabel")
    return ImageSet(name, part, view(held_source), view(test), train.num_classes, image_shape, mean, std, in_memory=False)


def _splits(name: str, builder: Any) -> tuple[str, str | None, str]:
    """The names of the training, own validation (or None) and test splits."""
    # Under tfds.testing.mock_data a builder knows no splits.
    found = set(builder.info.splits) or {"train", "test"}
    if builder.name == "imagenet2012":
        return "train", None, "validation"  # its test split has no labels
    if {"train", "test"} <= found:
        return "train", "validation" if "validation" in found else None, "test"
    if {"train", "validation"} <= found:
        return "train", None, "validation"
    raise DataError(
        f"the data set {name!r} has the splits {', '.join(sorted(found))}; train and test (or validation) are wanted: choose another set"
    )
