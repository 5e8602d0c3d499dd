"""The state of a training run: one pytree."""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

TRAINABLE = ("banks", "params")
AXIS = "devices"  # the axis that a step is mapped over


@flax.struct.dataclass
class State:
    """Everything that a step reads and writes.

    Attributes:
      step: number of updates made.
      trainable: `{"banks": ..., "params": ...}`; only `params` for a plain model.
      collections: the model's other collections, such as `batch_stats`.
      optimizer: the optimizer's state, for `trainable`.
      failed: whether a loss or gradient was not finite; after that the state no longer changes.
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


def init_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    input_shape: tuple[int, ...],
    seed: int,
) -> State:
    """The initial state, a pure function of the seed.

    Under `jax.jit`, no weight is drawn that a bank replaces.
    """
    inputs = jnp.zeros((1, *input_shape), jnp.float32)
    variables = model.init(jax.random.key(seed), inputs, train=False)
    trainable = {name: variables[name] for name in TRAINABLE if name in variables}
    others = [name for name in variables if name not in TRAINABLE]

    # Values that a module sows grow with each call and are not kept: the state holds only
    # collections whose form does not change in a step.
    def after_a_step(key: jax.Array) -> Any:
        return dict(
            model.apply(variables, inputs, train=True, mutable=others, rngs={"params": key})[1]
        )

    # A model may average its statistics over the axis.
    mapped = jax.vmap(after_a_step, axis_name=AXIS)
    after = jax.eval_shape(
        lambda: jax.tree.map(lambda x: x[0], mapped(jax.random.split(jax.random.key(0), 1)))
    )
    collections = {
        name: variables[name] for name in others if _form(after.get(name)) == _form(variables[name])
    }
    return State(
        jnp.zeros((), jnp.int32),
        trainable,
        collections,
        optimizer.init(trainable),
        jnp.zeros((), jnp.bool_),
    )


def _form(tree: Any) -> Any:
    return jax.tree.structure(tree), [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]
