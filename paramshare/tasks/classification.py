"""Classification: one class for each input."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from paramshare.tasks.task import Measure, Task, TaskError, add_title


@dataclasses.dataclass(frozen=True)
class Classification(Task):
    """One class for each input: labels (B,) int, outputs (B, K) logits, cross entropy.

    Measures: `accuracy`, the score; `top5`, the fraction of inputs whose label is among the five
    largest logits.

    Attributes:
      num_classes: K; labels are 0 to K - 1.
      label_smoothing: fraction of the target spread evenly over all classes in training (Szegedy et
        al. 2016).

    Raises:
      TaskError: if there are fewer than two classes.

    Example:
      >>> task, labels = Classification(2), jnp.array([0, 1])
      >>> logits = jnp.array([[2.0, 1.0], [2.0, 1.0]])
      >>> statistics = task.statistics(logits, jnp.zeros((2, 1, 1, 1)), labels)
      >>> task.reduce(jax.device_get(statistics))
      {'accuracy': 0.5, 'top5': 1.0}
    """

    num_classes: int
    label_smoothing: float = 0.0

    name: ClassVar[str] = "classification"
    measures: ClassVar[tuple[Measure, ...]] = (
        Measure("accuracy", "accuracy", "acc", fraction_of_examples=True),
        Measure("top5", "top-5 accuracy", "top5", fraction_of_examples=True),
    )
    outputs_per_input: ClassVar[str] = "one output per class"

    def __post_init__(self) -> None:
        if self.num_classes < 2:
            raise TaskError(
                f"num_classes is {self.num_classes}; there is nothing to learn from fewer than two "
                "classes: check the labels"
            )

    def label_spec(self, input_shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        """A number from 0 to num_classes - 1."""
        return jax.ShapeDtypeStruct((), jnp.int32)

    def output_spec(self, input_shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        """A logit for each class."""
        return jax.ShapeDtypeStruct((self.num_classes,), jnp.float32)

    def network_options(self) -> dict[str, Any]:
        """The number of classes."""
        return {"num_classes": self.num_classes}

    def with_label_smoothing(self, smoothing: float) -> "Classification":
        """The same task with this fraction of the target spread over all classes."""
        return dataclasses.replace(self, label_smoothing=smoothing)

    def check_labels(self, labels: Any, input_shape: tuple[int, ...]) -> None:
        """Checks shapes and kinds and, where the labels are concrete arrays, the classes too."""
        super().check_labels(labels, input_shape)
        if isinstance(labels, np.ndarray | jax.Array) and not isinstance(labels, Tracer):
            label_B = np.asarray(labels)
            if label_B.size and not 0 <= label_B.min() <= label_B.max() < self.num_classes:
                raise TaskError(
                    f"labels run from {label_B.min()} to {label_B.max()}; they must be from 0 to "
                    f"{self.num_classes - 1}: correct them, or raise num_classes"
                )

    def losses(self, outputs: Any, labels: Any, *, train: bool) -> dict[str, jax.Array]:
        """Cross entropy, in float32."""
        logits_BxK = outputs.astype(jnp.float32)
        target_BxK = jax.nn.one_hot(labels, logits_BxK.shape[-1])
        if train and self.label_smoothing:
            target_BxK = optax.smooth_labels(target_BxK, self.label_smoothing)
        return {"cross_entropy": optax.softmax_cross_entropy(logits_BxK, target_BxK)}

    def batch_measures(self, outputs: Any, labels: Any) -> dict[str, tuple[jax.Array, jax.Array]]:
        """Accuracy."""
        correct_B = (jnp.argmax(outputs, axis=-1) == labels).astype(jnp.float32)
        return {"accuracy": (correct_B, jnp.ones_like(correct_B))}

    def statistics(self, outputs: Any, inputs: jax.Array, labels: Any) -> dict[str, jax.Array]:
        """Whether the label has the largest logit, and whether it has one of the five largest."""
        top_Bx5 = jax.lax.top_k(outputs, min(5, outputs.shape[-1]))[1]
        return {
            "accuracy": jnp.argmax(outputs, axis=-1) == labels,
            "top5": jnp.any(top_Bx5 == labels[:, None], axis=-1),
        }

    def reduce(self, statistics: Any) -> dict[str, float]:
        """Fractions of the examples."""
        return {name: float(np.mean(flags)) for name, flags in statistics.items()}

    def predict(self, outputs: Any, input_shape: tuple[int, ...]) -> dict[str, jax.Array]:
        """The five likeliest classes, (B, 5), and their probabilities."""
        del input_shape
        probability_BxK = jax.nn.softmax(outputs.astype(jnp.float32))
        score, category = jax.lax.top_k(probability_BxK, min(5, outputs.shape[-1]))
        return {"class": category, "score": score}

    def describe(self, prediction: Any, original: Callable[[Any], Any]) -> dict[str, Any]:
        """The class, its probability, and the five likeliest classes with theirs."""
        del original
        classes, scores = prediction["class"].tolist(), prediction["score"].tolist()
        top = [{"class": c, "score": s} for c, s in zip(classes, scores, strict=True)]
        return {**top[0], "top5": top}

    def draw(self, axes: Any, description: Mapping[str, Any]) -> None:
        """Writes the class above the picture."""
        add_title(axes, f"class {description['class']} ({description['score']:.0%})")
