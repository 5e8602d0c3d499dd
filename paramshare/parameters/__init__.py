"""The parameters of a Flax model: shapes, order, axes, and how the model initializes them."""

import sys
from typing import Any

from paramshare.parameters import linen
from paramshare.parameters.parameter import Axes, Parameter, Trace, example_input

__all__ = ["Axes", "Parameter", "Trace", "example_input", "is_nnx", "trace"]


def trace(model: Any, *example_inputs: Any, **options: Any) -> Trace:
    """The parameters of a Linen or an NNX module. Allocates nothing.

    Args:
      model: a Flax linen module, or an NNX module with its arrays.
      *example_inputs: what a Linen module is initialized with. An NNX module needs no inputs; with
        them, its parameters are in the order in which it calls its layers.
      **options: further arguments of `model.init`, or of an NNX module's method.
    """
    if is_nnx(model):
        from paramshare.parameters import nnx  # loaded already, with the module

        return nnx.trace(model, *example_inputs, **options)
    return linen.trace(model, *example_inputs, **options)


def is_nnx(model: Any) -> bool:
    """Whether it is an NNX module. Does not load `flax.nnx`, which `flax.linen` does not need."""
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(model, nnx.Module)
