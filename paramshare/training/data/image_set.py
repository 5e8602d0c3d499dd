"""What a data set is: three sources of examples and the few facts a model needs."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, Protocol, TypedDict, runtime_checkable

import numpy as np

from paramshare.training.data import order, statistics
from paramshare.training.data.error import DataError
from paramshare.training.data.task import CLASSES, Task


class Example(TypedDict):
    """One example: image (H, W, C) uint8; label int, or one for each cell, (H, W)."""

    image: np.ndarray
    label: Any  # int, or (H, W)


@runtime_checkable
class Source(Protocol):
    """Anything with a length and examples by index."""

    def __len__(self) -> int:
        """The number of examples."""
        ...

    def __getitem__(self, index: int, /) -> Example:
        """Example `index`, 0 <= index < len."""
        ...


class ArraySource:
    """Examples held in two arrays.

    Attributes:
        image: (N, H, W, C) uint8.
        label: (N,) int32; or, given so, (N, H, W) uint8: a label for each cell.

    Raises:
        DataError: if the arrays are not of those shapes and kinds, or a label is negative.

    Example:
        >>> source = ArraySource(np.zeros((2, 8, 8, 1), np.uint8), [3, 5])
        >>> len(source), source[1]["label"], source[1]["image"].shape
        (2, 5, (8, 8, 1))
    """

    image: np.ndarray
    label: np.ndarray

    def __init__(self, image: Any, label: Any) -> None:
        """Checks the arrays; labels are copied, images are not."""
        image, label = np.asarray(image), np.asarray(label)
        if image.ndim == 3:
            raise DataError(f"image has shape {image.shape}, without channels; (N, H, W, C) is wanted: pass image[..., None]")
        if image.ndim != 4:
            raise DataError(f"image has shape {image.shape}; (N, H, W, C) is wanted: reshape it")
        if image.dtype != np.uint8:
            raise DataError(f"image has dtype {image.dtype}; uint8 from 0 to 255 is wanted: scale and cast it")
        cells = label.ndim == 3 and label.shape == image.shape[:3] and label.dtype == np.uint8
        if (label.ndim != 1 or len(label) != len(image)) and not cells:
            raise DataError(
                f"label has shape {label.shape} and dtype {label.dtype} beside {len(image)} images; one integer an image is wanted, "
                f"({len(image)},), or uint8 for each cell, {image.shape[:3]}"
            )
        if len(label) and not np.issubdtype(label.dtype, np.integer):
            raise DataError(f"label has dtype {label.dtype}; integers from 0 are wanted: cast it, or number the classes")
        if len(label) and (label.min() < 0 or label.max() >= 2**31):
            raise DataError(f"label runs from {label.min()} to {label.max()}; integers from 0 are wanted: number the classes from 0")
        self.image, self.label = image, label if cells else label.astype(np.int32)

    def __len__(self) -> int:
        """The number of examples."""
        return len(self.image)

    def __getitem__(self, index: int) -> Example:
        """Example `index`; its image is a view of the array."""
        label = self.label[index]
        return {"image": self.image[index], "label": label if label.ndim else int(label)}

    def __repr__(self) -> str:
        """What is in it, without the arrays."""
        return f"ArraySource(image={self.image.shape}, label={self.label.shape})"

    def take(self, indices: np.ndarray) -> "ArraySource":
        """The examples at `indices` (n,), in that order."""
        return ArraySource(self.image[indices], self.label[indices])


class Subset:
    """The examples of `source` at `indices`, in that order: itself a source.

    Example:
        >>> Subset(ArraySource(np.zeros((3, 1, 1, 1), np.uint8), [7, 8, 9]), np.array([2, 0]))[0]["label"]
        9
    """

    def __init__(self, source: Source, indices: np.ndarray) -> None:
        """Reads nothing."""
        self.source, self.indices = source, indices

    def __len__(self) -> int:
        """The number of examples."""
        return len(self.indices)

    def __getitem__(self, index: int) -> Example:
        """Example `indices[index]` of the source."""
        return self.source[int(self.indices[index])]

    def __repr__(self) -> str:
        """What is in it, without the arrays."""
        return f"Subset({self.source!r}, {len(self)} examples)"


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """A set of images with what is to be told of them, divided and ready to be batched.

    Attributes:
        name: what it was asked for as.
        train: examples to train on.
        validation: examples held out of the training part (may be empty).
        test: the set's own test examples.
        num_classes: labels are 0 .. num_classes - 1.
        image_shape: (H, W, C) of what batches hold.
        mean: a number a channel, on the 0..255 scale.
        std: likewise, never 0.
        in_memory: whether all three sources are `ArraySource`s; otherwise they are read through grain.
        task: what is asked of a network; its loss and measures. One class an image unless given.
        phases: into how many equal parts, one behind the other, the training and the validation examples divide: a curriculum, trained
            on part by part. 1 for none.
        others: further test sets by name, whose images may be of other heights and widths.
    """

    name: str
    train: Source
    validation: Source
    test: Source
    num_classes: int
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    in_memory: bool
    task: Task = CLASSES
    phases: int = 1
    others: Mapping[str, Source] = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self):
        for part, source in (("train", self.train), ("validation", self.validation)):
            if self.phases < 1 or len(source) % self.phases or (self.phases > 1 and not isinstance(source, ArraySource)):
                raise DataError(
                    f"{self.name}: {len(source)} {part} examples ({type(source).__name__}) cannot be a curriculum of {self.phases} phases; "
                    "give an ArraySource whose length is a multiple of them"
                )

    @property
    def phase_examples(self) -> int:
        """Training examples of a phase."""
        return len(self.train) // self.phases

    def of_phase(self, part: Literal["train", "validation"], phase: int) -> Source:
        """The training or validation examples of a phase, counted from 0."""
        source: Source = getattr(self, part)
        if self.phases == 1:
            return source
        assert isinstance(source, ArraySource)
        size = len(source) // self.phases
        return source.take(np.arange(phase * size, (phase + 1) * size))


def from_arrays(
    train: tuple[Any, Any],
    test: tuple[Any, Any],
    *,
    held: tuple[Any, Any] | None = None,
    name: str = "arrays",
    validation: float = 0.1,
    seed: int = 0,
    num_classes: int | None = None,
    train_examples: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> ImageSet:
    """An `ImageSet` of plain arrays; nothing but NumPy is needed.

    Args:
        train: image (N, H, W, C) uint8 and label (N,) integers.
        test: likewise, of the same H, W, C.
        held: validation examples of the set's own; None to hold some of `train` out.
        name: how the set calls itself.
        validation: part of `train` held out, chosen by `seed`; 0 for none. With `held`, 0 drops it and anything else keeps it whole.
        seed: 0 <= seed < 2**64.
        num_classes: None for the largest label seen plus one.
        train_examples: train on so many only, the first of the seed's order; None for all.
        mean: a number a channel on the 0..255 scale; None to compute it from the training part.
        std: likewise.

    Raises:
        DataError: if arrays, labels or sizes do not fit.

    Example:
        >>> image, label = np.zeros((20, 8, 8, 1), np.uint8), np.arange(20) % 2
        >>> s = from_arrays((image, label), (image, label), validation=0.25)
        >>> len(s.train), len(s.validation), len(s.test), s.num_classes, s.image_shape
        (15, 5, 20, 2, (8, 8, 1))
    """
    sources = {"train": ArraySource(*train), "test": ArraySource(*test)}
    if held is not None:
        sources["validation"] = ArraySource(*held)
    shape = sources["train"].image.shape[1:]
    for part, source in sources.items():
        if source.image.shape[1:] != shape:
            raise DataError(f"{name}: {part} images are {source.image.shape[1:]} but train images are {shape}; resize them alike")
    if not len(sources["test"]):
        raise DataError(f"{name}: the test part holds no examples; pass at least one")
    largest = max(int(source.label.max(initial=-1)) for source in sources.values())
    num_classes = largest + 1 if num_classes is None else num_classes
    if largest >= num_classes:
        raise DataError(
            f"{name}: label {largest} is not below num_classes={num_classes}; pass num_classes={largest + 1} or mend the labels"
        )
    training, rest = order.held_out(len(sources["train"]), 0 if held is not None else validation, seed, train_examples)
    part = sources["train"].take(training)
    held_part = sources["train"].take(rest) if held is None else sources["validation"].take(np.arange(len(held[1]) if validation else 0))
    if mean is None or std is None:
        measured_mean, measured_std = statistics.mean_and_std(part.image)
        mean, std = measured_mean if mean is None else mean, measured_std if std is None else std
    mean, std = tuple(float(m) for m in mean), tuple(float(s) for s in std)
    if len(mean) != shape[-1] or len(std) != shape[-1] or not all(s > 0 for s in std):
        raise DataError(
            f"{name}: mean={mean} and std={std} want a number for each of {shape[-1]} channels, std above 0; leave them out to compute them"
        )
    return ImageSet(name, part, held_part, sources["test"], num_classes, shape, mean, std, in_memory=True)
