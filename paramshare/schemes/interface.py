"""What a sharing scheme is: a frozen dataclass with two pure functions over arrays."""

import dataclasses
import math
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

Bank = Any  # pytree of arrays: what the sites of a bank share
Coefficients = Any  # pytree of arrays: what each site keeps for itself


class SchemeError(ValueError):
    """A scheme was given numbers, or sites, that it cannot work with."""


@dataclasses.dataclass(frozen=True)
class Site:
    """One place in a model that needs a weight.

    Attributes:
      path: the parameter's path in the model's `params`, joined by "/".
      shape: shape of the weight that the site needs, in Flax layout: (kh, kw, in, out) for a convolution.
      dtype: name of the parameter's dtype.
      index: position along `stack_axis` where the parameter stacks several layers' weights (as `nn.scan` does), else None.
      stack_axis: the axis of the stacked parameter that counts layers.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    index: int | None = None
    stack_axis: int = 0

    @property
    def size(self) -> int:
        """How many numbers the weight has."""
        return math.prod(self.shape)

    @property
    def fan_in(self) -> int:
        """Inputs that one output unit sums over: the product of all axes but the last."""
        return math.prod(self.shape[:-1])

    def __str__(self) -> str:
        return self.path if self.index is None else f"{self.path}[{self.index}]"


@runtime_checkable
class Scheme(Protocol):
    """How the weights of a bank's sites are made. Implementations are frozen dataclasses: hashable, static under `jax.jit`."""

    def check(self, sites: tuple[Site, ...]) -> None:
        """Raises `SchemeError` if these sites cannot share one bank."""
        ...

    def init(self, key: jax.Array, sites: tuple[Site, ...]) -> tuple[Bank, Coefficients]:
        """Draws a bank and its coefficients."""
        ...

    def expand(self, bank: Bank, coefficients: Coefficients, sites: tuple[Site, ...]) -> tuple[jax.Array, ...]:
        """The weights of the sites, in their order, each of its site's shape and dtype."""
        ...


def bank_dtype(sites: tuple[Site, ...]) -> jnp.dtype:
    """Banks are held in at least float32, whatever precision the sites' own parameters have."""
    # Not `jnp.result_type`: that refuses bfloat16 beside float32 where the user has set strict dtype promotion.
    return max(jnp.dtype(jnp.float32), *(jnp.dtype(site.dtype) for site in sites), key=lambda dtype: dtype.itemsize)


def check_equal_shapes(sites: tuple[Site, ...], scheme: Scheme) -> None:
    """Raises `SchemeError`, naming the first two sites that differ, unless there are sites, of numbers, and all have one shape."""
    if not sites:
        raise SchemeError(f"{scheme} needs at least one site")
    if not sites[0].size:
        raise SchemeError(f"{sites[0]} is {sites[0].shape}, a weight without numbers; leave it out of the rule")
    for site in sites[1:]:
        if site.shape != sites[0].shape:
            raise SchemeError(
                f"{scheme} needs sites of one shape, but {sites[0]} is {sites[0].shape} and {site} is {site.shape}; "
                "give each shape a bank of its own, or leave the odd ones out of the rule"
            )
