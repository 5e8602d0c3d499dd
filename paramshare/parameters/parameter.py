"""What there is to know about a parameter, and about all of a model, linen or NNX."""

import abc
import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Statistics = tuple[tuple[float, float], ...]  # mean and standard deviation of each layer

DIGITS = 4  # significant ones, so that equal models have equal statistics


class Axes(NamedTuple):
    """Input and output axes of a parameter of `ndim` axes."""

    ndim: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter of a model.

    Attributes:
      shape: as the model holds it.
      dtype: as the model holds it.
      axes: its input and output axes, where they are not the last two.
      owner: the class of the module that has it, such as "Dense".
      names: the names of its axes on a device mesh, from `nn.with_partitioning`; () for none.
      logical: whether they are logical names, from `nn.with_logical_partitioning`.
    """

    shape: tuple[int, ...]
    dtype: Any
    axes: Axes | None = None
    owner: str = ""
    names: tuple[Any, ...] = ()
    logical: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Trace(abc.ABC):
    """What a plan needs to know of a model.

    Attributes:
      parameters: by path, in the order in which the model first calls the layers that own them.
      integers: paths of scopes whose names are integers, as `Layout` has them.
    """

    parameters: Mapping[str, Parameter]
    integers: frozenset[str]

    @abc.abstractmethod
    def measure(self, stack_axes: Mapping[str, int | None]) -> dict[str, Statistics]:
        """Means and standard deviations of the model's own initializers.

        Args:
          stack_axes: the parameters to measure, each with the axis along which it stacks layers, or
            None.

        Returns:
          `{path: ((mean, std), ...)}`, one pair for each layer of a stacked parameter, else one. A
          mean within five standard errors of zero is zero. Parameters that cannot be measured are
          missing.
        """


def example_input(shape: tuple[int, ...], dtype: Any = "float32") -> jax.ShapeDtypeStruct:
    """An input of this shape, in a batch of one, to trace a model with.

    Example:
      >>> from paramshare.parameters import example_input
      >>> example_input((32, 32, 3))
      ShapeDtypeStruct(shape=(1, 32, 32, 3), dtype=float32)
    """
    return jax.ShapeDtypeStruct((1, *shape), jnp.dtype(dtype))


def general_axes(batch: int, inputs: int, outputs: int) -> dict[str, Axes]:
    """The axes of a general linear layer with this many batch, input and output axes."""
    ndim = batch + inputs + outputs
    kernel = Axes(ndim, _range(batch, batch + inputs), _range(batch + inputs, ndim))
    bias = Axes(batch + outputs, (), _range(batch, batch + outputs))
    return {"kernel": kernel, "bias": bias}


def transposed_axes(spatial: int) -> dict[str, Axes]:
    """The axes of a transposed convolution whose kernel ends with (outputs, inputs)."""
    return {"kernel": Axes(spatial + 2, (spatial + 1,), (spatial,))}


def einsum_axes(equation: str) -> dict[str, Axes]:
    """The axes of an `Einsum` layer, unless the kernel has "..." in the equation."""
    inputs, kernel, outputs = re.split(",|->", equation.replace(" ", ""))
    if "." in kernel:
        return {}
    contracted = tuple(i for i, x in enumerate(kernel) if x in inputs and x not in outputs)
    features = tuple(i for i, x in enumerate(kernel) if x not in inputs)
    bias = [x for x in outputs if x in kernel]
    return {
        "kernel": Axes(len(kernel), contracted, features),
        "bias": Axes(len(bias), (), tuple(i for i, x in enumerate(bias) if x not in inputs)),
    }


def natural_order(path: str) -> list[tuple[int, int, str]]:
    """A key that sorts paths with their numbers by value."""
    return [
        (0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", path)
    ]


def rounded(mean: float, std: float, count: int) -> tuple[float, float]:
    """Mean and standard deviation of `count` entries, without digits that are noise."""
    if std < 1e-6 * abs(mean):  # a constant, up to rounding
        std = 0.0
    if abs(mean) < 5 * std / math.sqrt(count):
        mean = 0.0
    return float(f"{mean:.{DIGITS}g}"), float(f"{std:.{DIGITS}g}")


def _range(start: int, stop: int) -> tuple[int, ...]:
    return tuple(range(start, stop))
