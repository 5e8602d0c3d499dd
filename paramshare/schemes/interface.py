"""What a sharing scheme is: a frozen dataclass with two pure functions over arrays."""

import dataclasses
import math
import operator
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

Bank = Any  # pytree of arrays: what the sites of a bank share
Coefficients = Any  # pytree of arrays: what each site keeps for itself
UNIQUE = "unique"  # the entry of a bank's coefficients that holds whole weights of the sites' own, where there are any


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

    @property
    def fan_out(self) -> int:
        """Outputs that one input unit feeds: the product of all axes but the last but one; of a vector, its length."""
        return self.size // self.shape[-2] if len(self.shape) > 1 else self.size

    def __str__(self) -> str:
        return self.path if self.index is None else f"{self.path}[{self.index}]"


@runtime_checkable
class Scheme(Protocol):
    """How the weights of a bank's sites are made. Implementations are frozen dataclasses: hashable, static under `jax.jit`.

    Coefficients are no weights: `paramshare.decay_mask` spares them. What stands in them under the key "unique" is weights, of one
    site each: it decays, and counts as private. A scheme without coefficients has an empty pytree of them.

    A scheme may have a method `bind(shapes_of)`, which a plan calls before `check`, and which returns the scheme to take instead:
    `shapes_of(module)` gives the shapes of another module's parameters, by path, for the plan's example inputs.
    """

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


def check_sites(sites: tuple[Site, ...], scheme: Scheme) -> None:
    """Raises `SchemeError` unless there are sites, and all of them have numbers."""
    if not sites:
        raise SchemeError(f"{scheme} needs at least one site")
    for site in sites:
        if not site.size:
            raise SchemeError(f"{site} is {site.shape}, a weight without numbers; leave it out of the rule")


def check_equal_shapes(sites: tuple[Site, ...], scheme: Scheme) -> None:
    """Raises `SchemeError`, naming the first two sites that differ, unless there are sites, of numbers, and all have one shape."""
    check_sites(sites, scheme)
    for site in sites[1:]:
        if site.shape != sites[0].shape:
            raise SchemeError(
                f"{scheme} needs sites of one shape, but {sites[0]} is {sites[0].shape} and {site} is {site.shape}; "
                "give each shape a bank of its own, or leave the odd ones out of the rule"
            )


def check_count(scheme: str, name: str, value: Any, least: int) -> int:
    """`value` as an int; `SchemeError` unless it is a whole number, `least` or more."""
    try:
        count = operator.index(value)
    except TypeError:
        raise SchemeError(f"{scheme}({name}={value!r}): {name} must be an integer, {least} or more") from None
    if count < least or isinstance(value, bool):
        raise SchemeError(f"{scheme}({name}={value!r}): {name} must be an integer, {least} or more")
    return count


def check_flag(scheme: str, name: str, value: Any) -> None:
    """Raises `SchemeError` unless `value` is True or False."""
    if not isinstance(value, bool):
        raise SchemeError(f"{scheme}({name}={value!r}): {name} is True or False")


def check_arrays(scheme: Scheme, what: str, found: Any, wanted: Any) -> None:
    """Raises `SchemeError` unless a pytree of arrays has the shapes of another one, of tuples."""
    shapes = jax.tree.map(lambda leaf: tuple(jnp.shape(leaf)), found)
    if shapes != wanted:
        raise SchemeError(f"{scheme} wants {what} of shapes {wanted}, got {shapes}; pass the variables of a model shared by this same plan")
