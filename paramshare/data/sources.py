"""Sources of examples: anything with a length and examples by index."""

import hashlib
from collections.abc import Callable
from typing import Any, Protocol, TypedDict, runtime_checkable

import jax
import numpy as np

from paramshare.data.error import DataError


class Example(TypedDict):
    """One example: the input, such as an image (H, W, C), and a label, any pytree of arrays."""

    input: np.ndarray
    label: Any


@runtime_checkable
class Source(Protocol):
    """Anything with a length and examples by index.

    A source may also have a method `training_view(index, seed, epoch)`: the example as an epoch of
    training sees it.
    """

    def __len__(self) -> int:
        """The number of examples."""
        ...

    def __getitem__(self, index: int, /) -> Example:
        """Example `index`, 0 <= index < len."""
        ...


class ArraySource:
    """Examples held in arrays.

    Args:
      input: (N, ...) numbers.
      label: a pytree of arrays (N, ...) of numbers. Pad ragged labels to one shape and add a mask.

    64-bit arrays are converted to 32 bits, which is what JAX computes with.

    Raises:
      DataError: if an array does not hold numbers, lengths differ, or an integer needs 64 bits.

    Example:
      >>> source = ArraySource(np.zeros((2, 8, 8, 1), np.uint8), [3, 5])
      >>> len(source), source[1]["label"].item(), source[1]["input"].shape
      (2, 5, (8, 8, 1))
      >>> boxes = {"box": np.zeros((2, 7, 4), np.float32), "mask": np.zeros((2, 7), bool)}
      >>> ArraySource(np.zeros((2, 8, 8, 1), np.uint8), boxes)[0]["label"]["box"].shape
      (7, 4)
    """

    input: np.ndarray
    label: Any

    def __init__(self, input: Any, label: Any) -> None:
        self.input = _numbers("input", input)
        # Lists are arrays here, not pytrees.
        self.label = jax.tree_util.tree_map_with_path(
            lambda path, leaf: _numbers(f"label{jax.tree_util.keystr(path)}", leaf),
            label,
            is_leaf=lambda node: isinstance(node, list),
        )
        shapes = {"input": self.input.shape} | {
            f"label{jax.tree_util.keystr(path)}": leaf.shape
            for path, leaf in jax.tree_util.tree_leaves_with_path(self.label)
        }
        for name, shape in shapes.items():
            if not shape or shape[0] != self.input.shape[0]:
                raise DataError(
                    f"{name} has shape {shape}, but input has shape {self.input.shape}; all arrays "
                    "must have the number of examples first"
                )

    def __len__(self) -> int:
        return len(self.input)

    def __getitem__(self, index: int) -> Example:
        return {"input": self.input[index], "label": self._label(lambda leaf: leaf[index])}

    def __repr__(self) -> str:
        return f"ArraySource(input={self.input.shape}, label={self._label(np.shape)})"

    @property
    def arrays(self) -> dict[str, Any]:
        """All examples as one batch: {"input": (N, ...), "label": ...}."""
        return {"input": self.input, "label": self.label}

    def take(self, indices: np.ndarray) -> "ArraySource":
        """The examples at `indices` (n,), in that order."""
        return ArraySource(self.input[indices], self._label(lambda leaf: leaf[indices]))

    def _label(self, function: Callable[[np.ndarray], Any]) -> Any:
        return jax.tree.map(function, self.label)


class Subset:
    """The examples of `source` at `indices`, in that order: itself a source.

    Example:
      >>> source = ArraySource(np.zeros((3, 1, 1, 1), np.uint8), [7, 8, 9])
      >>> Subset(source, np.array([2, 0]))[0]["label"].item()
      9
    """

    def __init__(self, source: Source, indices: np.ndarray) -> None:
        self.source, self.indices = source, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Example:
        return self.source[int(self.indices[index])]

    def __repr__(self) -> str:
        return f"Subset({self.source!r}, {len(self)} examples)"


SAMPLED = 16  # examples of a source outside memory that its digest reads


def digest(source: Source) -> str:
    """A hash of a source's examples.

    Of all examples in memory; otherwise of `SAMPLED` evenly spaced ones, and of the `fingerprint`
    that the source, or one that it wraps, may have.

    Example:
      >>> image = np.zeros((2, 8, 8, 1), np.uint8)
      >>> digest(ArraySource(image, [3, 5])) == digest(ArraySource(image, [3, 4]))
      False
    """
    result = hashlib.sha256(str(len(source)).encode())
    if isinstance(source, ArraySource):
        examples = [source.arrays]
    else:
        places = sorted({i * (len(source) - 1) // (SAMPLED - 1) for i in range(SAMPLED)})
        examples = [dict(source[i]) for i in places] if len(source) else []
        inner: Any = source
        while not hasattr(inner, "fingerprint") and hasattr(inner, "source"):
            inner = inner.source
        result.update(str(getattr(inner, "fingerprint", "")).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(examples):
        array = np.ascontiguousarray(leaf)
        result.update(f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype}".encode())
        result.update(array.data if array.size and array.ndim else array.tobytes())
    return result.hexdigest()[:16]


_LIMITS = np.iinfo(np.int32)


def _numbers(name: str, values: Any) -> np.ndarray:
    """An array of numbers or bools, at most 32 bits each."""
    try:
        array = np.asarray(values)
    except ValueError as error:  # lists of different lengths
        raise DataError(f"{name} is not rectangular ({error}); pad it to one shape") from None
    if array.dtype.kind not in "biuf" and str(array.dtype) != "bfloat16":
        raise DataError(f"{name} has dtype {array.dtype}; it must hold numbers: cast it")
    if array.dtype.kind == "f" and array.dtype.itemsize > 4:
        return array.astype(np.float32)
    if array.dtype.itemsize == 8:
        if array.size and (array.min() < _LIMITS.min or array.max() > _LIMITS.max):
            raise DataError(
                f"{name} runs from {array.min()} to {array.max()}; integers must fit into 32 bits"
            )
        return array.astype(np.int32)
    return array
