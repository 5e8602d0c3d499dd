"""The state of a training run: one pytree."""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

TRAINABLE = ("banks", "params")
AXIS = "devices"  # name of the axis that a step is mapped over


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
    images = jnp.zeros((1, *image_shape), jnp.float32)
    variables = model.init(jax.random.key(seed), images, train=False)
    trainable = {name: variables[name] for name in TRAINABLE if name in variables}
    others = [name for name in variables if name not in TRAINABLE]

    # What a module sows grows with each call: it is shown, not kept. Only what keeps its form from step to step is state.
    def after_a_step(key):
        return dict(model.apply(variables, images, train=True, mutable=others, rngs={"params": key})[1])

    mapped = jax.vmap(after_a_step, axis_name=AXIS)  # a model may average its statistics over the axis
    after = jax.eval_shape(lambda: jax.tree.map(lambda x: x[0], mapped(jax.random.split(jax.random.key(0), 1))))
    collections = {name: variables[name] for name in others if _form(after.get(name)) == _form(variables[name])}
    return State(jnp.zeros((), jnp.int32), trainable, collections, optimizer.init(trainable), jnp.zeros((), jnp.bool_))


def _form(tree: Any) -> Any:
    return jax.tree.structure(tree), [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]
