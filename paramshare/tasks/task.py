"""The base class of tasks. A task defines its labels, augmentation, losses and measures."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pydantic

from paramshare.errors import ParamshareError
from paramshare.tasks.augment import Augment, Draws, apply, draw, normalise


class TaskError(ParamshareError):
    """Labels, outputs or options that do not fit the task."""


@dataclasses.dataclass(frozen=True)
class Measure:
    """An evaluation metric, such as accuracy: the metric's name and display format.

    Example:
      >>> Measure("accuracy", "accuracy", "acc").format(0.9925)
      '99.25%'
    """

    name: str
    """Key in the result of `Task.reduce`."""
    title: str
    """Label in text, tables and charts."""
    short: str
    """Label in the progress bar."""
    fraction_of_examples: bool = False
    """Whether it is a fraction of the examples, so that value times count is a whole number."""
    format_spec: str = ".2%"
    """How a value is printed, as in `format(value, format_spec)`."""
    lower_is_better: bool = False
    """Whether smaller values are better, as of an error."""

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid")  # when read from a file

    def format(self, value: float) -> str:
        """The value as text; "-" for NaN, where there was nothing to measure."""
        return "-" if math.isnan(value) else format(value, self.format_spec)

    def is_better(self, value: float, other: float) -> bool:
        """Whether a value is better than another one.

        Example:
          >>> Measure("bits", "bits per character", "bits", lower_is_better=True).is_better(1.5, 2)
          True
        """
        return value < other if self.lower_is_better else value > other


@dataclasses.dataclass(frozen=True)
class Curves:
    """A chart of whole-set results for the report, such as precision against recall.

    Points that are not finite are left out.
    """

    title: str
    """Shown above the chart; says what the y axis is."""
    x_label: str
    """Label of the x axis."""
    lines: dict[str, list[tuple[float, float]]]
    """Points (x, y) of each line, by its label."""

    def __post_init__(self) -> None:
        lines = {
            label: [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
            for label, points in self.lines.items()
        }
        object.__setattr__(self, "lines", lines)

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid")  # when read from a file


class Task:
    """What a network is trained to do. Subclasses are frozen dataclasses and so hashable.

    Labels and outputs are pytrees of arrays with the batch first. Ragged labels are padded to one
    shape, with a mask.
    """

    name: ClassVar[str]
    """Such as "classification"."""
    measures: ClassVar[tuple[Measure, ...]]
    """The measures that `reduce` returns, in order. The first one is the score."""
    outputs_per_input: ClassVar[str]
    """The outputs a network must have, such as "one output per class"; used in error messages."""

    @property
    def score(self) -> Measure:
        """The measure that ranks epochs and runs."""
        return self.measures[0]

    def label_spec(self, input_shape: tuple[int, ...]) -> Any:
        """Shapes and dtypes of the label of one input: a pytree of `jax.ShapeDtypeStruct`."""
        raise NotImplementedError

    def output_spec(self, input_shape: tuple[int, ...]) -> Any:
        """Shapes of a network's outputs for one input: a pytree of `jax.ShapeDtypeStruct`."""
        raise NotImplementedError

    def network_options(self) -> dict[str, Any]:
        """Options of `paramshare.create_model` that follow from the task."""
        return {}

    @property
    def has_label_smoothing(self) -> bool:
        """Whether `with_label_smoothing` takes anything but 0."""
        return type(self).with_label_smoothing is not Task.with_label_smoothing

    def with_label_smoothing(self, smoothing: float) -> "Task":
        """The same task with smoothed labels in training.

        Raises:
          TaskError: if the task has no label smoothing and `smoothing` is not 0.
        """
        if smoothing == 0:
            return self
        raise TaskError(
            f"label_smoothing is {smoothing}, but the task {self.name!r} does not support label "
            "smoothing; set it to 0"
        )

    def losses(self, outputs: Any, labels: Any, *, train: bool) -> dict[str, jax.Array]:
        """The losses of each example by name, (B,) float32 each; training minimises their sum.

        Args:
          outputs: the network's outputs.
          labels: the batch's labels.
          train: whether for training; label smoothing is omitted otherwise.
        """
        raise NotImplementedError

    def batch_measures(self, outputs: Any, labels: Any) -> dict[str, tuple[jax.Array, jax.Array]]:
        """Per-example numerators and denominators of the measures shown for a training batch, by
        name.

        The measure of a batch is the sum of the (B,) numerators over the sum of the denominators.
        Measures that are not such ratios are omitted.
        """
        del outputs, labels
        return {}

    def views(self, inputs: jax.Array) -> jax.Array:
        """What the network is shown of each input in evaluation, such as its mirror image too.

        Args:
          inputs: (B, ...), as the network takes them.

        Returns:
          (V, B, ...): V views of each input.
        """
        return inputs[None]

    def merge(self, outputs: Any) -> Any:
        """The outputs for the inputs, from those for each of their `views`, (V, B, ...) arrays."""
        return jax.tree.map(lambda leaf: leaf[0], outputs)

    def statistics(self, outputs: Any, inputs: jax.Array, labels: Any) -> Any:
        """Per-example statistics collected during evaluation, for `reduce`.

        Args:
          outputs: the network's outputs.
          inputs: the raw inputs of the batch, as loaded.
          labels: the batch's labels.

        Returns:
          A pytree of (B, ...) arrays.
        """
        raise NotImplementedError

    def reduce(self, statistics: Any) -> dict[str, float]:
        """All measures over a whole data set, on the host.

        Args:
          statistics: as `statistics` returns them, concatenated: (N, ...) NumPy arrays, N >= 1, in
            the order of the examples.

        Returns:
          The values of `measures`, by name.
        """
        raise NotImplementedError

    def curves(self, statistics: Any) -> tuple[Curves, ...]:
        """Charts of the results over a whole data set, for the report; by default none.

        Args:
          statistics: as for `reduce`.
        """
        del statistics
        return ()

    def predict(self, outputs: Any, input_shape: tuple[int, ...]) -> Any:
        """What the outputs of a batch stand for, such as boxes: a pytree of (B, ...) arrays.

        Args:
          outputs: the network's outputs.
          input_shape: (H, W, C).

        Raises:
          TaskError: if predictions of this task cannot be shown.
        """
        del outputs, input_shape
        raise TaskError(f"predictions of the task {self.name!r} cannot be shown")

    def heatmap(self, outputs: Any) -> jax.Array | None:
        """Maps (B, h, w) over the whole images that pictures of the report show; None for none."""
        del outputs
        return None

    def describe(self, prediction: Any, original: Callable[[Any], Any]) -> dict[str, Any]:
        """The prediction for one image as JSON values.

        Args:
          prediction: an example of what `predict` returns, as NumPy arrays.
          original: maps points (..., 2) of the input, (x, y), to pixels of the picture.

        Raises:
          TaskError: if predictions of this task cannot be shown.
        """
        del prediction, original
        raise TaskError(f"predictions of the task {self.name!r} cannot be shown")

    def draw(self, axes: Any, description: Mapping[str, Any]) -> None:
        """Draws a prediction onto matplotlib axes that show the picture.

        Args:
          axes: the axes; pixel (x, y) of the picture covers x to x + 1 and y to y + 1.
          description: as `describe` returns it.

        Raises:
          TaskError: if predictions of this task cannot be drawn.
        """
        del axes, description
        raise TaskError(f"predictions of the task {self.name!r} cannot be drawn")

    def check_augment(self, config: Augment, input_shape: tuple[int, ...]) -> None:
        """Checks that `config` can be applied to inputs of this shape.

        Raises:
          AugmentError: if it cannot.
        """
        config.check(input_shape)

    def augment(
        self,
        key: jax.Array,
        inputs: jax.Array,
        labels: Any,
        config: Augment,
        mean: tuple[float, ...] | None,
        std: tuple[float, ...] | None,
        *,
        first: int | jax.Array = 0,
    ) -> tuple[jax.Array, Any]:
        """Augments and normalises a training batch; `move_labels` changes the labels.

        Args:
          key: PRNG key of the global batch.
          inputs: (B, ...), as loaded.
          labels: the batch's labels.
          config: the augmentation.
          mean: mean of each channel; None for inputs that are not normalised.
          std: standard deviation of each channel; None as for `mean`.
          first: position of `inputs[0]` in the global batch, of which `inputs` may be one device's
            part.

        Returns:
          Inputs as the network takes them, and labels.
        """
        self.check_augment(config, inputs.shape[1:])
        if config == Augment():
            return normalise(inputs, mean, std), labels
        draws = draw(key, config, inputs.shape, first)
        labels = self.move_labels(draws, labels, config, inputs.shape)
        return apply(draws, inputs, config, mean, std), labels

    def move_labels(
        self, draws: Draws, labels: Any, config: Augment, shape: tuple[int, ...]
    ) -> Any:
        """The labels of images that are augmented. By default, labels stay as they are.

        Args:
          draws: what is random in the augmentation.
          labels: the batch's labels.
          config: the augmentation.
          shape: (B, H, W, ...) of the inputs.
        """
        del draws, config, shape
        return labels

    def check_outputs(self, outputs: Any, input_shape: tuple[int, ...]) -> None:
        """Checks the shapes of a network's outputs.

        Args:
          outputs: the outputs for a batch; arrays or `jax.ShapeDtypeStruct`s.
          input_shape: shape of one input.

        Raises:
          TaskError: if, without the batch axis, they differ from `output_spec`.
        """
        spec = self.output_spec(input_shape)
        expected, actual = _shapes(spec, batched=False), _shapes(outputs, batched=True)
        if expected != actual:
            raise TaskError(
                f"the outputs for one input have shape {_text(actual)}; the task {self.name!r} "
                f"needs {self.outputs_per_input}, shape {_text(expected)}"
            )

    def check_labels(self, labels: Any, input_shape: tuple[int, ...]) -> None:
        """Checks the shapes and the kinds (integer, float, bool) of labels.

        Args:
          labels: a batch of labels, of any size; arrays with the batch axis first.
          input_shape: shape of one input.

        Raises:
          TaskError: if they differ from `label_spec`.
        """
        spec = self.label_spec(input_shape)
        expected = _shapes(spec, batched=False, kinds=True)
        actual = _shapes(labels, batched=True, kinds=True)
        if expected != actual:
            raise TaskError(
                f"the label of one input is {_text(actual)}; the task {self.name!r} needs "
                f"{_text(expected)}"
            )


def add_title(axes: Any, text: str) -> None:
    """Writes text above a picture, after what other tasks have written there."""
    axes.set_title(", ".join(filter(None, [axes.get_title(), text])))


_KINDS = {"i": "integer", "u": "integer", "f": "float", "b": "bool"}


def _shapes(tree: Any, *, batched: bool, kinds: bool = False) -> dict[str, tuple[Any, ...]]:
    """The shape of each leaf by its path, without the batch; with `kinds`, also its kind."""
    return {
        jax.tree_util.keystr(path): (
            tuple(leaf.shape[1:] if batched else leaf.shape),
            *([_KINDS.get(_kind(leaf.dtype), str(leaf.dtype))] if kinds else []),
        )
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _kind(dtype: Any) -> str:
    return "f" if jnp.issubdtype(dtype, jnp.floating) else np.dtype(dtype).kind  # bfloat16 too


def _text(shapes: dict[str, tuple[Any, ...]]) -> str:
    texts = {path: " ".join(map(str, parts)) for path, parts in shapes.items()}
    if list(texts) == [""]:
        return texts[""]
    return ", ".join(f"{path} {text}" for path, text in texts.items()) or "(nothing)"
