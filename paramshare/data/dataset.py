"""A data set: sources of examples, the task, and the facts that a network needs."""

import dataclasses
import functools
import hashlib
from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np

from paramshare.data import order, statistics
from paramshare.data.error import DataError
from paramshare.data.sources import ArraySource, Source, digest
from paramshare.data.views import View, ViewOf, stretched
from paramshare.data.vocabulary import Vocabulary
from paramshare.parameters import example_input
from paramshare.tasks import Classification, Task, TaskError, normalise


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set, divided and ready to be batched.

    Attributes:
      name: such as "cifar10".
      train: training examples.
      validation: examples held out of the training part; may be empty.
      test: test examples.
      task: what a network is trained to do.
      input_shape: shape of one input in a batch, such as (H, W, C).
      mean: mean of each channel, on the scale of the inputs; None passes inputs on as they are.
      std: standard deviation of each channel, never 0; None as for `mean`.
      phases: number of phases of a curriculum; 1 for none. The training and validation examples
        are each cut into this many equal, consecutive parts, and each phase uses one part of each.
      others: further test sets by name; their inputs may have other heights and widths.
      view_of: makes inputs of pictures of any size, as `view` does; None to stretch them.
      vocabulary: what the tokens of inputs stand for; None if inputs are no text.
    """

    name: str
    train: Source
    validation: Source
    test: Source
    task: Task
    input_shape: tuple[int, ...]
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    phases: int = 1
    others: Mapping[str, Source] = dataclasses.field(default_factory=dict, hash=False)
    view_of: ViewOf | None = dataclasses.field(default=None, compare=False)
    vocabulary: Vocabulary | None = None

    def __post_init__(self) -> None:
        if (self.mean is None) != (self.std is None):
            raise DataError(f"{self.name}: mean is {self.mean} but std is {self.std}; pass both")
        for part, source in (("train", self.train), ("validation", self.validation)):
            if (
                self.phases < 1
                or len(source) % self.phases
                or (self.phases > 1 and not isinstance(source, ArraySource))
            ):
                raise DataError(
                    f"{self.name}: {len(source)} {part} examples ({type(source).__name__}) cannot "
                    f"be divided into {self.phases} phases; pass an ArraySource whose length is a "
                    "multiple of the phases"
                )

    @property
    def in_memory(self) -> bool:
        """Whether the training examples are arrays; otherwise they are read through grain."""
        return isinstance(self.train, ArraySource)

    @property
    def phase_examples(self) -> int:
        """Training examples of one phase."""
        return len(self.train) // self.phases

    @functools.cached_property
    def example(self) -> jax.ShapeDtypeStruct:
        """One input as the network takes it, in a batch of one; integers only if they are tokens.

        Inputs that are normalised, and all other numbers, are float32.
        """
        dtype = np.dtype(np.float32)
        if self.mean is None and len(self.train):
            first = (
                self.train.input if isinstance(self.train, ArraySource) else self.train[0]["input"]
            )
            dtype = first.dtype if first.dtype.kind in "iu" else dtype
        return example_input(self.input_shape, dtype)

    @functools.cached_property
    def digest(self) -> str:
        """A hash of the examples and of the statistics; see `paramshare.data.sources.digest`."""
        sources = [self.train, self.validation, self.test, *self.others.values()]
        parts = [*map(digest, sources), *self.others, repr(self.mean), repr(self.std)]
        parts += [repr(self.vocabulary)] if self.vocabulary else []
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]

    def of_phase(self, part: Literal["train", "validation"], phase: int) -> Source:
        """The training or validation examples of a phase, counted from 0."""
        source: Source = getattr(self, part)
        if self.phases == 1:
            return source
        assert isinstance(source, ArraySource)
        size = len(source) // self.phases
        return source.take(np.arange(phase * size, (phase + 1) * size))

    def view(self, image_HxWx3: np.ndarray) -> View:
        """A picture (H, W, 3) uint8 of any size as an input, not normalised.

        Raises:
          DataError: if inputs are not images.
        """
        return (self.view_of or stretched(self.input_shape))(image_HxWx3)

    def normalise(self, inputs: jax.Array) -> jax.Array:
        """Inputs as the network takes them."""
        return normalise(inputs, self.mean, self.std)


def from_arrays(
    train: tuple[Any, Any],
    test: tuple[Any, Any],
    *,
    validation_data: tuple[Any, Any] | None = None,
    name: str = "arrays",
    validation: float = 0.1,
    seed: int = 0,
    task: Task | None = None,
    num_classes: int | None = None,
    channels: int | None = None,
    train_examples: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    view_of: ViewOf | None = None,
) -> Dataset:
    """A data set of arrays.

    Without a task, it is the classification of images: inputs (N, H, W, C) uint8, labels (N,)
    integers. With a task, inputs (N, ...) are any numbers, and labels any pytree of arrays that the
    task takes.

    Args:
      train: input and label.
      test: input and label, of the same shapes.
      validation_data: validation examples; None holds some of `train` out.
      name: the set's name.
      validation: fraction of `train` that is held out, chosen by `seed`; 0 for none. With
        `validation_data`, 0 drops it and anything else keeps all of it.
      seed: 0 <= seed < 2**64.
      task: what the labels are for; None for classification.
      num_classes: number of classes; None for the largest label plus one. Then every class must
        have training examples: a gap usually means that labels start at 1, or that one is wrong.
      channels: number of channels, the last axis. Needed only if the second axis looks like the
        channels, as in (N, 3, 32, 32).
      train_examples: train on only this many examples, picked at random by `seed`; None for all.
      mean: mean of each channel, on the scale of the inputs. None computes it from the training
        part of uint8 images, and passes other inputs on as they are.
      std: standard deviation of each channel; None as for `mean`.
      view_of: makes inputs of pictures of any size; None to stretch them.

    Raises:
      DataError: if arrays, labels or sizes do not fit.

    Example:
      >>> image, label = np.zeros((20, 8, 8, 1), np.uint8), np.arange(20) % 2
      >>> data = from_arrays((image, label), (image, label), validation=0.25)
      >>> len(data.train), len(data.validation), len(data.test), data.task.num_classes
      (15, 5, 20, 2)
    """
    parts = {"train": train, "test": test}
    if validation_data is not None:
        parts["validation"] = validation_data
    if task is None:
        parts = {part: (_images(x, channels), _classes(y)) for part, (x, y) in parts.items()}
    sources = {part: ArraySource(*arrays) for part, arrays in parts.items()}
    shape = sources["train"].input.shape[1:]
    for part, source in sources.items():
        if source.input.shape[1:] != shape:
            raise DataError(
                f"{name}: {part} inputs have shape {source.input.shape[1:]} but train inputs "
                f"{shape}; resize them"
            )
    if not len(sources["test"]):
        raise DataError(f"{name}: the test part has no examples; pass at least one")
    if task is None:
        labels = {part: source.label for part, source in sources.items()}
        task = classification(name, labels, num_classes)
    elif num_classes is not None:
        raise DataError(
            f"{name}: got both num_classes={num_classes} and a task; leave out num_classes"
        )
    for part, source in sources.items():
        try:
            task.check_labels(source.label, shape)
        except TaskError as error:
            raise DataError(f"{name}: {part}: {error}") from None
    chosen, remaining = order.held_out(
        len(sources["train"]),
        validation if validation_data is None else 0,
        seed,
        train_examples,
    )
    training = sources["train"].take(chosen)
    held_out = (
        sources["train"].take(remaining)
        if validation_data is None
        else sources["validation"].take(np.arange(len(sources["validation"]) if validation else 0))
    )
    if (mean is None or std is None) and len(shape) == 3 and training.input.dtype == np.uint8:
        computed = statistics.mean_and_std(training.input)
        mean, std = computed[0] if mean is None else mean, computed[1] if std is None else std
    if mean is not None and std is not None:
        mean, std = tuple(float(m) for m in mean), tuple(float(s) for s in std)
        valid = np.isfinite([*mean, *std]).all() and all(s > 0 for s in std)
        if len(mean) != shape[-1] or len(std) != shape[-1] or not valid:
            raise DataError(
                f"{name}: mean is {mean} and std {std}; each must have one finite number for each "
                f"of the {shape[-1]} channels, and every std must be above 0; leave both out to "
                "have them computed (uint8 images only)"
            )
    return Dataset(
        name, training, held_out, sources["test"], task, shape, mean, std, view_of=view_of
    )


def _images(values: Any, channels: int | None) -> np.ndarray:
    try:
        image = np.asarray(values)
    except ValueError:
        raise DataError("images differ in shape; resize them to one shape (H, W, C)") from None
    if image.ndim != 4:
        remedy = "pass image[..., None]" if image.ndim == 3 else "reshape it"
        raise DataError(f"image has shape {image.shape}; it must be (N, H, W, C): {remedy}")
    if image.dtype != np.uint8:
        raise DataError(
            f"image has dtype {image.dtype}; it must be uint8 from 0 to 255: scale and cast it"
        )
    if channels not in (None, image.shape[3]):
        raise DataError(
            f"image has shape {image.shape}, so {image.shape[3]} channels, but channels is "
            f"{channels}; it must be (N, H, W, C)"
        )
    if channels is None and looks_channels_first(image.shape):
        raise DataError(
            f"image has shape {image.shape}, which looks like (N, C, H, W); pass "
            f"np.moveaxis(image, 1, -1), or channels={image.shape[3]} if it is (N, H, W, C)"
        )
    return image


def looks_channels_first(shape: tuple[int, ...]) -> bool:
    """Whether images of a shape (N, _, _, _) have their channels on the second axis.

    Example:
      >>> looks_channels_first((10, 3, 32, 32)), looks_channels_first((10, 1, 8, 3))
      (True, False)
    """
    return shape[1] in (1, 3) and shape[2] > 4 and shape[3] > 4


def _classes(values: Any) -> np.ndarray:
    try:
        label = np.asarray(values)
    except ValueError:
        raise DataError("labels differ in shape; pass one integer per image") from None
    if label.ndim != 1:
        raise DataError(f"label has shape {label.shape}; it must be one integer per image, (N,)")
    if len(label) and not np.issubdtype(label.dtype, np.integer):
        raise DataError(
            f"label has dtype {label.dtype}; it must be integers from 0: cast it, or number the "
            "classes"
        )
    if len(label) and (label.min() < 0 or label.max() >= 2**31):
        raise DataError(
            f"label runs from {label.min()} to {label.max()}; number the classes from 0"
        )
    return label.astype(np.int32)


def classification(
    name: str, labels: Mapping[str, np.ndarray], num_classes: int | None
) -> Classification:
    """The task of a set with these labels, those of its parts; "train" is one of them.

    Raises:
      DataError: if a label is too large, or `num_classes` is None and a class up to the largest
        label has no training example.
    """
    largest = max(int(label.max(initial=-1)) for label in labels.values())
    if num_classes is None:
        if len(labels["train"]):
            _check_every_class(name, labels["train"], largest)
        num_classes = largest + 1
    if largest >= num_classes:
        raise DataError(
            f"{name}: label {largest} must be below num_classes={num_classes}; pass "
            f"num_classes={largest + 1} or correct the labels"
        )
    try:
        return Classification(num_classes)
    except TaskError as error:
        raise DataError(f"{name}: {error}") from None


def _check_every_class(name: str, train: np.ndarray, largest: int) -> None:
    """Checks that every class up to the largest label has training examples."""
    missing = np.setdiff1d(np.arange(min(largest + 1, len(train) + 1)), train)
    if len(missing):
        present = np.unique(train)
        raise DataError(
            f"{name}: labels run up to {largest}, but no training example has label {missing[0]} "
            f"(the training labels are {len(present)} different values from {present.min()} to "
            f"{present.max()}); number the classes from 0, correct the labels, or pass "
            f"num_classes={largest + 1}"
        )
