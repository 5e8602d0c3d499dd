"""The state of a training run: one pytree."""

import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from paramshare import ops

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
    example: jax.ShapeDtypeStruct,
    seed: int,
    ema: bool = False,
) -> State:
    """The initial state, a pure function of the seed.

    Under `jax.jit`, no weight is drawn that a bank replaces.

    Args:
      model: the network.
      optimizer: the update rule.
      example: an input as the network takes it, in a batch of one.
      seed: the seed.
      ema: whether to keep a moving average of the variables.
    """
    inputs = jnp.zeros(example.shape, example.dtype)
    # Without boxes of `nn.with_partitioning`: a run divides banks itself (`shard_banks`).
    variables = nn.meta.unbox(model.init(jax.random.key(seed), inputs, train=False))
    trainable = {name: variables[name] for name in TRAINABLE if name in variables}
    _, names = cached_for(training_trace, model, example)
    collections = {name: variables[name] for name in names}
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
@ops.form("xla")  # whose program is the same on all machines
def training_trace(model: nn.Module, example: jax.ShapeDtypeStruct) -> tuple[Any, tuple[str, ...]]:
    """The training pass, traced once for all that is asked of it; nothing is computed.

    Args:
      model: the network.
      example: an input as the network takes it, in a batch of one.

    Returns:
      The program, as `jax.make_jaxpr` returns it, on the only device of the axis `AXIS`; and the
      collections beside `TRAINABLE` whose form it does not change. Values that a module sows grow
      with each call, and are not kept in a state.
    """
    before = {}

    def call(variables: Any, inputs: jax.Array) -> Any:
        rngs, mutable = {"params": jax.random.key(0)}, nn.DenyList(TRAINABLE)
        return model.apply(variables, inputs, train=True, mutable=mutable, rngs=rngs)

    def program(inputs: jax.Array) -> Any:
        variables = nn.meta.unbox(model.init(jax.random.key(0), inputs, train=False))
        before.update({name: _form(tree) for name, tree in variables.items()})
        # A model may average its statistics over the axis.
        mapped = jax.vmap(call, in_axes=(None, 0), axis_name=AXIS, axis_size=1)
        return mapped(variables, inputs[None])

    traced, (_, after) = jax.make_jaxpr(program, return_shape=True)(example)
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), dict(after))
    others = [name for name in before if name not in TRAINABLE]
    return traced, tuple(name for name in others if _form(one.get(name)) == before[name])


def cached_for(function: Any, model: nn.Module, example: jax.ShapeDtypeStruct) -> Any:
    """`function(model, example)`, a cached function, from its cache if the model can be a key.

    It cannot if a list or an array is among its attributes.
    """
    try:
        hash(model)
    except TypeError:
        return function.__wrapped__(model, example)
    return function(model, example)


def _form(tree: Any) -> Any:
    return jax.tree.structure(tree), [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]
