"""The state of a training run: one pytree."""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

TRAINABLE = ("banks", "params")


@flax.struct.dataclass
class State:
    """Everything that a step reads and writes.

    Attributes:
      step: how many updates have been made.
      trainable: `{"banks": ..., "params": ...}`, or `params` alone for a plain model.
      collections: the model's other collections, such as `batch_stats`.
      optimizer: the optimizer's state, over `trainable`.
      failed: whether a loss or gradient was not finite; from then on nothing changes any more.
    """

    step: jax.Array
    trainable: dict[str, Any]
    collections: dict[str, Any]
    optimizer: optax.OptState
    failed: jax.Array

    @property
    def variables(self) -> dict[str, Any]:
        """The model's variables."""
        return {**self.trainable, **self.collections}


def init_state(model: nn.Module, optimizer: optax.GradientTransformation, image_shape: tuple[int, ...], seed: int) -> State:
    """A fresh state, a pure function of the seed; jit it to draw no weight that a bank replaces."""
    variables = model.init(jax.random.key(seed), jnp.zeros((1, *image_shape), jnp.float32))
    trainable = {name: variables[name] for name in TRAINABLE if name in variables}
    # What the model merely shows of its inner life is no state.
    collections = {name: value for name, value in variables.items() if name not in (*TRAINABLE, "intermediates", "perturbations")}
    return State(jnp.zeros((), jnp.int32), trainable, collections, optimizer.init(trainable), jnp.zeros((), jnp.bool_))
