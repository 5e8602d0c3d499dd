"""The state of a training run: one pytree."""

import functools
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
      ema: the moving average of `variables`; None for none.
    """

    step: jax.Array
    trainable: dict[str, Any]
    collections: dict[str, Any]
    optimizer: optax.OptState
    failed: jax.Array
    ema: dict[str, Any] | None = None

    @property
    def variables(self) -> dict[str, Any]:
        """The model's variables."""
        return {**self.trainable, **self.collections}


def init_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    input_shape: tuple[int, ...],
    seed: int,
    ema: bool = False,
) -> State:
    """The initial state, a pure function of the seed.

    Under `jax.jit`, no weight is drawn that a bank replaces.

    Args:
      model: the network.
      optimizer: the update rule.
      input_shape: (H, W, C).
      seed: the seed.
      ema: whether to keep a moving average of the variables.
    """
    inputs = jnp.zeros((1, *input_shape), jnp.float32)
    variables = model.init(jax.random.key(seed), inputs, train=False)
    trainable = {name: variables[name] for name in TRAINABLE if name in variables}
    names = _stable_collections
    try:
        hash(model)
    except TypeError:  # a list or an array is among its attributes
        names = names.__wrapped__
    collections = {name: variables[name] for name in names(model, input_shape)}
    return first_state(trainable, collections, optimizer, ema)


def first_state(
    trainable: dict[str, Any],
    collections: dict[str, Any],
    optimizer: optax.GradientTransformation,
    ema: bool,
) -> State:
    """The state at step 0, with these variables."""
    return State(
        jnp.zeros((), jnp.int32),
        trainable,
        collections,
        optimizer.init(trainable),
        jnp.zeros((), jnp.bool_),
        {**trainable, **collections} if ema else None,
    )


def moved(
    average: dict[str, Any], variables: dict[str, Any], decay: float, step: jax.Array
) -> dict[str, Any]:
    """The moving average after one more step: decay * average + (1 - decay) * variables.

    Early on, the decay is at most (1 + step) / (10 + step), so that the initial values are soon
    forgotten (as in TensorFlow's `ExponentialMovingAverage` with `num_updates`). What is not
    floating-point is copied.

    Args:
      average: the average so far.
      variables: the new variables.
      decay: 0 to 1.
      step: updates made before this one.
    """
    rate = jnp.minimum(decay, (1.0 + step) / (10.0 + step))

    def leaf(old: jax.Array, new: jax.Array) -> jax.Array:
        if not jnp.issubdtype(new.dtype, jnp.inexact):
            return new
        return old + (1 - rate).astype(old.dtype) * (new - old)

    return jax.tree.map(leaf, average, variables)


@functools.lru_cache(maxsize=16)
def _stable_collections(model: nn.Module, input_shape: tuple[int, ...]) -> tuple[str, ...]:
    """The collections beside `TRAINABLE` whose form does not change in a step.

    Values that a module sows grow with each call, and are not kept in a state.
    """

    def before_and_after(key: jax.Array) -> tuple[dict[str, Any], dict[str, Any]]:
        inputs = jnp.zeros((1, *input_shape), jnp.float32)
        variables = model.init(key, inputs, train=False)
        others = [name for name in variables if name not in TRAINABLE]
        _, after = model.apply(variables, inputs, train=True, mutable=others, rngs={"params": key})
        return {name: variables[name] for name in others}, dict(after)

    # A model may average its statistics over the axis.
    mapped = jax.vmap(before_and_after, axis_name=AXIS)
    before, after = jax.eval_shape(lambda: mapped(jax.random.split(jax.random.key(0), 1)))
    return tuple(name for name in before if _form(after.get(name)) == _form(before[name]))


def _form(tree: Any) -> Any:
    return jax.tree.structure(tree), [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]
