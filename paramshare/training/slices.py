"""Banks and their optimizer state divided over devices: what a state looks like then.

Outside of the mapped step, a divided array has a first axis that counts devices. It is recognised
by its path: the banks are under "banks" in the variables, and optimizers keep their statistics in
trees of the same form.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from paramshare.schemes.sliced import cut, join
from paramshare.shared import Shared
from paramshare.training.config import ConfigError
from paramshare.training.state import AXIS

BANKS = "banks"


def sliced_model(model: nn.Module, count: int) -> Shared:
    """The network of one device of the axis `AXIS`, with 1 / count of every bank.

    Kernels are communicated in the network's compute dtype, its attribute `dtype`.

    Raises:
      ConfigError: if the network is not a `Shared`.
    """
    if not isinstance(model, Shared):
        raise ConfigError(
            f"shard_banks is True, but {type(model).__name__} has no banks; use a network that "
            "shares parameters, or leave shard_banks out"
        )
    dtype = getattr(model.model, "dtype", None)
    name = None if dtype is None else jnp.dtype(dtype).name
    return model.clone(layout=model.layout.sliced(AXIS, count, name))


def is_sliced(path: tuple[Any, ...]) -> bool:
    """Whether the leaf at a path of a state, or of variables, belongs to a bank."""
    names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
    return bool(names) and names[0] == BANKS


def cut_banks(tree: Any, model: Shared, count: int) -> Any:
    """A state, or variables, with its banks divided; call it under `jax.jit`.

    Args:
      tree: whole arrays.
      model: the network with whole banks.
      count: the number of slices.
    """

    def leaf(path: tuple[Any, ...], value: jax.Array) -> jax.Array:
        if not is_sliced(path):
            return value
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        return cut(value, count, model.layout[names[1]].scheme.entrywise)

    return jax.tree_util.tree_map_with_path(leaf, tree)


def join_banks(tree: Any, shapes: Any) -> Any:
    """The inverse of `cut_banks`: whole arrays of these shapes."""
    return jax.tree.map(
        lambda leaf, like: leaf if leaf.shape == like.shape else join(leaf, like.shape),
        tree,
        shapes,
    )


def norm_over(sliced: bool) -> Callable[[Any], jax.Array]:
    """The norm of a gradient `{"banks", "params"}`; of slices, over all devices of `AXIS`."""
    if not sliced:
        return optax.tree.norm

    def norm(gradient: Any) -> jax.Array:
        others = {name: tree for name, tree in gradient.items() if name != BANKS}
        squares = jax.lax.psum(optax.tree.norm(gradient[BANKS], squared=True), AXIS)
        return jnp.sqrt(squares + optax.tree.norm(others, squared=True))

    return norm
