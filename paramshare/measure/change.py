"""How far arrays, or the outputs of two models, are from each other."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np


def relative_change(before: Any, after: Any) -> float:
    """|after - before| / |before|, over all elements of two pytrees, in float64.

    |after - before| where `before` is zero.

    Example:
      >>> from paramshare.measure.change import relative_change
      >>> relative_change({"a": [3.0, 4.0]}, {"a": [3.0, 5.0]})
      0.2
    """
    difference = size = 0.0
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        difference += float(np.sum((b - a) ** 2))
        size += float(np.sum(a**2))
    return float(np.sqrt(difference / size if size else difference))


def output_change(
    before: tuple[nn.Module, Mapping[str, Any]],
    after: tuple[nn.Module, Mapping[str, Any]],
    *inputs: Any,
    **options: Any,
) -> float:
    """Relative change of the outputs between two (model, variables) pairs, on the same inputs."""
    outputs = [
        jax.jit(lambda variables, inputs, model=model: model.apply(variables, *inputs, **options))(
            variables, inputs
        )
        for model, variables in (before, after)
    ]
    return relative_change(*outputs)
