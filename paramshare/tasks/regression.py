"""Regression: one or several numbers for each input."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from paramshare.tasks.augment import Augment, AugmentError, Draws, move
from paramshare.tasks.task import Measure, Task, TaskError, add_title


@dataclasses.dataclass(frozen=True)
class Regression(Task):
    """Numbers for each input: labels and outputs (B, V); the loss is Huber's.

    Outputs are standardised: a predicted value is `mean + scale * output`. The loss is the mean
    over the values of Huber's loss (quadratic up to an error of one `scale`, then linear).

    Measures: `r2`, the score, the coefficient of determination averaged over the values; NaN if a
    value is the same for all examples. `mae/NAME`, the mean absolute error of each value, in its
    own unit.

    Attributes:
      values: their names, V of them.
      mean: typical value of each label; one number for all, or one per value.
      scale: typical deviation of each label from `mean`; one number for all, or one per value.
      point: whether the two values are a point (x, y) in pixels of the input. It moves with images
        that are augmented, and `predict` gives it in pixels of the picture.
      invariant: whether the values stay the same when an image is mirrored, turned, shifted or
        zoomed.
        Otherwise training refuses such augmentation.

    Raises:
      TaskError: if there are no values, a name occurs twice, or `mean` or `scale` do not fit.

    Example:
      >>> task = Regression(("x", "y"), mean=32.0, scale=16.0)
      >>> outputs, labels = jnp.array([[0.0, 1.0], [1.0, 0.0]]), jnp.array([[32.0, 48], [40, 32]])
      >>> statistics = task.statistics(outputs, jnp.zeros((2, 1, 1, 1)), labels)
      >>> task.reduce(jax.device_get(statistics))
      {'r2': 0.0, 'mae/x': 4.0, 'mae/y': 0.0}
    """

    values: tuple[str, ...]
    mean: float | tuple[float, ...] = 0.0
    scale: float | tuple[float, ...] = 1.0
    point: bool = False
    invariant: bool = False

    name: ClassVar[str] = "regression"
    outputs_per_input: ClassVar[str] = "one output per value"

    def __post_init__(self) -> None:
        for name in ("values", "mean", "scale"):  # hashable
            if isinstance(getattr(self, name), list | np.ndarray):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if isinstance(self.values, str):
            raise TaskError(f"values is {self.values!r}; it must be a tuple of names")
        if self.point and (len(self.values) != 2 or self.invariant):
            raise TaskError(
                f"point is True, with values {self.values} and invariant={self.invariant}; a point "
                "has two values, which move with the image"
            )
        if not self.values or len(set(self.values)) < len(self.values):
            raise TaskError(
                f"values are {self.values}; there must be at least one, and no name twice"
            )
        for name in ("mean", "scale"):
            numbers = getattr(self, name)
            if isinstance(numbers, tuple) and len(numbers) != len(self.values):
                raise TaskError(
                    f"{name} has {len(numbers)} numbers for {len(self.values)} values; pass one "
                    "per value, or one number for all"
                )
            if not np.all(np.isfinite(numbers)):
                raise TaskError(f"{name} is {numbers}; it must be finite")
        if not np.all(np.array(self.scale) > 0):
            raise TaskError(f"scale is {self.scale}; it must be positive")

    @property
    def measures(  # pyright: ignore[reportIncompatibleVariableOverride]
        self,
    ) -> tuple[Measure, ...]:
        """R^2, then the mean absolute error of each value."""
        return (
            Measure("r2", "R^2", "R2", format_spec=".3f"),
            *(
                Measure(f"mae/{name}", f"mean absolute error of {name}", name, format_spec=".3g")
                for name in self.values
            ),
        )

    def label_spec(self, input_shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        """The values."""
        return jax.ShapeDtypeStruct((len(self.values),), jnp.float32)

    def output_spec(self, input_shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        """The standardised values."""
        return jax.ShapeDtypeStruct((len(self.values),), jnp.float32)

    def network_options(self) -> dict[str, Any]:
        """One output per value."""
        return {"num_classes": len(self.values)}

    def check_labels(self, labels: Any, input_shape: tuple[int, ...]) -> None:
        """Checks shapes and kinds and, of NumPy arrays, that all values are finite."""
        super().check_labels(labels, input_shape)
        if isinstance(labels, np.ndarray) and not np.isfinite(labels).all():
            row = int(np.argwhere(~np.isfinite(labels).all(axis=1))[0, 0])
            raise TaskError(
                f"the label of example {row} is {labels[row].tolist()}; all values must be finite"
            )

    def check_augment(self, config: Augment, input_shape: tuple[int, ...]) -> None:
        """Checks the augmentation, and that the values stay true."""
        super().check_augment(config, input_shape)
        if self.invariant or self.point:
            return
        for field in ("flip", "turn", "pad_crop", "zoom"):
            value = getattr(config, field)
            if value != getattr(Augment(), field):
                raise AugmentError(
                    f"augment.{field} is {value}, but it may change {', '.join(self.values)}; set "
                    f"it to {getattr(Augment(), field)}, or pass invariant=True to Regression if "
                    "the values stay the same"
                )

    def move_labels(
        self, draws: Draws, labels: Any, config: Augment, shape: tuple[int, ...]
    ) -> jax.Array:
        """Moves a point with its image; other values stay as they are."""
        if not self.point:
            return labels
        return move(draws, labels[:, None], config, shape[1:3])[:, 0]

    def losses(self, outputs: Any, labels: Any, *, train: bool) -> dict[str, jax.Array]:
        """Huber's loss, in float32."""
        target_BxV = (labels.astype(jnp.float32) - self._row("mean")) / self._row("scale")
        losses_BxV = optax.huber_loss(outputs.astype(jnp.float32), target_BxV)
        return {"huber": jnp.mean(losses_BxV, axis=-1)}

    def batch_measures(self, outputs: Any, labels: Any) -> dict[str, tuple[jax.Array, jax.Array]]:
        """Mean absolute errors."""
        error_BxV = jnp.abs(self.predicted(outputs) - labels)
        return {
            f"mae/{name}": (error_BxV[:, v], jnp.ones(len(labels)))
            for v, name in enumerate(self.values)
        }

    def predicted(self, outputs: jax.Array) -> jax.Array:
        """The values that outputs (B, V) stand for, in their own units."""
        return outputs.astype(jnp.float32) * self._row("scale") + self._row("mean")

    def _row(self, name: str) -> np.ndarray:
        return np.broadcast_to(np.float32(getattr(self, name)), (1, len(self.values)))

    def statistics(self, outputs: Any, inputs: jax.Array, labels: Any) -> dict[str, jax.Array]:
        """Predicted and true values."""
        return {"predicted": self.predicted(outputs), "true": labels}

    def reduce(self, statistics: Any) -> dict[str, float]:
        """R^2 and mean absolute errors over all examples, in float64."""
        true_NxV = np.asarray(statistics["true"], np.float64)
        error_NxV = statistics["predicted"] - true_NxV
        spread_V = np.sum((true_NxV - true_NxV.mean(axis=0)) ** 2, axis=0)
        with np.errstate(divide="ignore", invalid="ignore"):
            r2_V = 1 - np.sum(error_NxV**2, axis=0) / np.where(spread_V > 0, spread_V, np.nan)
        mae_V = np.abs(error_NxV).mean(axis=0)
        errors = {f"mae/{name}": float(mae_V[v]) for v, name in enumerate(self.values)}
        return {"r2": float(r2_V.mean()), **errors}

    def predict(self, outputs: Any, input_shape: tuple[int, ...]) -> jax.Array:
        """The values, (B, V)."""
        return self.predicted(outputs)

    def describe(self, prediction: Any, original: Callable[[Any], Any]) -> dict[str, Any]:
        """Each value by its name; a point in pixels of the picture."""
        prediction = original(prediction) if self.point else prediction
        return {name: float(value) for name, value in zip(self.values, prediction, strict=True)}

    def draw(self, axes: Any, description: Mapping[str, Any]) -> None:
        """Draws a point as a dot; writes other values above the picture."""
        if self.point:
            x, y = (description[name] for name in self.values)
            axes.plot(x, y, "+", color="#d1495b", markersize=14, markeredgewidth=2)
            return
        add_title(axes, ", ".join(f"{name} {description[name]:.3g}" for name in self.values))
