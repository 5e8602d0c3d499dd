"""Tokens: the next token at each place of a sequence, such as the next character of a text."""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from paramshare.tasks.augment import Augment, AugmentError
from paramshare.tasks.task import Measure, Task, TaskError


@dataclasses.dataclass(frozen=True)
class Tokens(Task):
    """The next token at each place: labels (B, T) integers, outputs (B, T, V) logits.

    The loss is the cross entropy, averaged over the tokens of a sequence. Places with a negative
    label are padding: they have no loss and are not measured.

    Measures, over all tokens of a set: `bits`, the score, the mean of -log2 of the probability of
    the right token, of which less is better; `perplexity`, 2 to the power of that; and the
    `accuracy` of the likeliest token.

    Attributes:
      vocabulary: V; labels are below V.
      unit: what a token is, such as "character".
      label_smoothing: fraction of the target spread evenly over all tokens in training.

    Raises:
      TaskError: if there are fewer than two different tokens.

    Example:
      >>> task, labels = Tokens(4), jnp.array([[2, 0, -1]])
      >>> logits = jnp.zeros((1, 3, 4))
      >>> measures = task.reduce(jax.device_get(task.statistics(logits, labels, labels)))
      >>> {name: round(value, 3) for name, value in measures.items()}
      {'bits': 2.0, 'perplexity': 4.0, 'accuracy': 0.5}
    """

    vocabulary: int
    unit: str = "token"
    label_smoothing: float = 0.0

    name: ClassVar[str] = "tokens"
    outputs_per_input: ClassVar[str] = "one output per token and place"

    def __post_init__(self) -> None:
        if self.vocabulary < 2:
            raise TaskError(
                f"vocabulary is {self.vocabulary}; there is nothing to learn from fewer than two "
                "different tokens: check the labels"
            )

    @property
    def measures(  # pyright: ignore[reportIncompatibleVariableOverride]
        self,
    ) -> tuple[Measure, ...]:
        """Bits per token, perplexity and accuracy."""
        return (
            Measure("bits", f"bits per {self.unit}", "bits", False, ".4f", lower_is_better=True),
            Measure("perplexity", "perplexity", "ppl", False, ".3f", lower_is_better=True),
            Measure("accuracy", "accuracy", "acc"),
        )

    def label_spec(self, input_shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        """The next token at each place."""
        return jax.ShapeDtypeStruct(tuple(input_shape), jnp.int32)

    def output_spec(self, input_shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        """A logit for each token of the vocabulary, at each place."""
        return jax.ShapeDtypeStruct((*input_shape, self.vocabulary), jnp.float32)

    def network_options(self) -> dict[str, Any]:
        """The size of the vocabulary."""
        return {"num_classes": self.vocabulary}

    def with_label_smoothing(self, smoothing: float) -> "Tokens":
        """The same task with this fraction of the target spread over all tokens."""
        return dataclasses.replace(self, label_smoothing=smoothing)

    def check_labels(self, labels: Any, input_shape: tuple[int, ...]) -> None:
        """Checks shapes and kinds and, where the labels are concrete arrays, the tokens too."""
        super().check_labels(labels, input_shape)
        if isinstance(labels, np.ndarray | jax.Array) and not isinstance(labels, Tracer):
            largest = np.asarray(labels).max(initial=-1)
            if largest >= self.vocabulary:
                raise TaskError(
                    f"labels run up to {largest}; they must be below the size of the vocabulary, "
                    f"{self.vocabulary}: correct them, or enlarge it"
                )

    def check_augment(self, config: Augment, input_shape: tuple[int, ...]) -> None:
        """Refuses all augmentation, which is of images."""
        del input_shape
        for field in dataclasses.fields(config):
            value, default = getattr(config, field.name), getattr(Augment(), field.name)
            if value != default:
                raise AugmentError(
                    f"augment.{field.name} is {value}, but the inputs of the task {self.name!r} "
                    f"are no images; it must be {default}"
                )

    def losses(self, outputs: Any, labels: Any, *, train: bool) -> dict[str, jax.Array]:
        """Cross entropy in float32, averaged over the tokens of each sequence."""
        nats_BxT, counted_BxT = _cross_entropy(outputs, labels)
        if train and self.label_smoothing:
            log_BxTxV = jax.nn.log_softmax(outputs.astype(jnp.float32))
            even_BxT = -jnp.mean(log_BxTxV, axis=-1) * counted_BxT
            nats_BxT = (1 - self.label_smoothing) * nats_BxT + self.label_smoothing * even_BxT
        count_B = jnp.maximum(jnp.sum(counted_BxT, axis=1), 1)
        return {"cross_entropy": jnp.sum(nats_BxT, axis=1) / count_B}

    def batch_measures(self, outputs: Any, labels: Any) -> dict[str, tuple[jax.Array, jax.Array]]:
        """Bits and accuracy."""
        sums = _sums(outputs, labels)
        tokens_B = jnp.maximum(sums["tokens"], 1e-6)  # 0 / 0 of a batch that is all padding
        bits_B = sums["nats"] / math.log(2)
        return {"bits": (bits_B, tokens_B), "accuracy": (sums["correct"], tokens_B)}

    def statistics(self, outputs: Any, inputs: jax.Array, labels: Any) -> dict[str, jax.Array]:
        """Sums over the tokens of each sequence: nats, right predictions, and their number."""
        return _sums(outputs, labels)

    def reduce(self, statistics: Any) -> dict[str, float]:
        """Means over all tokens; NaN where there is none."""
        sums = {name: float(np.sum(x, dtype=np.float64)) for name, x in statistics.items()}
        if not sums["tokens"]:
            return dict.fromkeys(("bits", "perplexity", "accuracy"), math.nan)
        bits = sums["nats"] / sums["tokens"] / math.log(2)
        perplexity = 2.0**bits if bits < 1000 else math.inf
        return {
            "bits": bits,
            "perplexity": perplexity,
            "accuracy": sums["correct"] / sums["tokens"],
        }


def _cross_entropy(outputs: Any, labels: Any) -> tuple[jax.Array, jax.Array]:
    """Nats of each token, 0 for padding, and 1 for tokens, else 0: (B, T) float32 each."""
    counted_BxT = labels >= 0
    nats_BxT = optax.softmax_cross_entropy_with_integer_labels(
        outputs.astype(jnp.float32), jnp.maximum(labels, 0)
    )
    return jnp.where(counted_BxT, nats_BxT, 0), counted_BxT.astype(jnp.float32)


def _sums(outputs: Any, labels: Any) -> dict[str, jax.Array]:
    nats_BxT, counted_BxT = _cross_entropy(outputs, labels)
    correct_BxT = (jnp.argmax(outputs, axis=-1) == labels).astype(jnp.float32)
    parts = {"nats": nats_BxT, "correct": correct_BxT, "tokens": counted_BxT}
    return {name: jnp.sum(x, axis=1) for name, x in parts.items()}
