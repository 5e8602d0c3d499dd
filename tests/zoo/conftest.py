"""Every named network is traced once per session, while it is created."""

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import paramshare
from paramshare import Shared
from paramshare.zoo import default_input_shape


@dataclasses.dataclass(frozen=True)
class Trace:
    """A named network, and what its creation shows.

    Attributes:
      model: what `create_model` returns.
      outputs: (shape, dtype) for one image.
      collections: names of the plain model's collections.
      plain: number of trainable parameters of the plain model.
      convolutions: multiply-adds of the convolutions for one image.
    """

    model: Any
    outputs: Any
    collections: set[str]
    plain: int
    convolutions: int

    @property
    def trainable(self) -> int:
        """The number of trainable parameters."""
        return self.model.layout.trainable if isinstance(self.model, Shared) else self.plain


# The forward passes that were traced. `create_model` traces equal plain models once.
passes: dict[Any, tuple[Any, ...]] = {}


@functools.cache
def trace(name: str, **options: Any) -> Trace:
    """Creates a network and looks at the forward pass that `create_model` traces."""
    shape = options.get("input_shape", default_input_shape(name, options.get("stem")))
    convolutions = 0

    def look(call, args, kwargs, context):
        nonlocal convolutions
        outputs, module = call(*args, **kwargs), context.module
        if module.scope is None or context.method_name != "__call__":
            return outputs
        if isinstance(module, nn.Conv):
            kernel = module.variables["params"]["kernel"]
            convolutions += math.prod(outputs.shape) * math.prod(kernel.shape[:-1])
        if not module.path:
            parameters = paramshare.count(module.variables)["trainable"]
            shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), outputs)
            result = shapes, set(module.variables), parameters, convolutions
            unbound = module.clone(parent=None, _deep_clone=True, _reset_names=True)
            passes[unbound, shape] = result
            convolutions = 0
        return outputs

    with nn.intercept_methods(look):
        model = paramshare.create_model(name, **options)
        plain = model.model if isinstance(model, Shared) else model
        if (plain, shape) not in passes:  # another test has created an equal model
            x = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
            jax.eval_shape(lambda x: plain.init(jax.random.key(0), x), x)
    return Trace(model, *passes[plain, shape])


@pytest.fixture(scope="session")
def network():
    """`network(name, **options)`: the `Trace` of a named network."""
    return trace
