"""What a sharing scheme is: a frozen dataclass that makes the kernels of several sites."""

import collections
import dataclasses
import functools
import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import chex
import jax
import jax.numpy as jnp

from paramshare.errors import ParamshareError

Initial = Literal["model", "paper"]
OFF_CENTRE = 0.1  # the largest |mean| / std of an initializer that counts as centred


class SchemeError(ParamshareError):
    """Invalid arguments of a scheme, or sites that the scheme cannot serve."""


class Weights(NamedTuple):
    """The arrays of one bank, each a pytree; `{}` for none.

    Attributes:
      bank: shared by all sites.
      coefficients: mixing coefficients and scales of single sites, `{site.key: ...}`. They are
        exempt from weight decay.
      own: private parts of the sites' kernels, such as unique filters, `{site.key: ...}`. They
        decay, and count as private.
    """

    bank: Any
    coefficients: dict[str, Any] = {}  # noqa: RUF012
    own: dict[str, Any] = {}  # noqa: RUF012


class Filters(NamedTuple):
    """The filters of one bank, flattened: what the orthogonality penalty acts on.

    Attributes:
      shared: (S, P), the filters that the sites share.
      own: an (u, P) array for each site with filters of its own.
    """

    shared: jax.Array
    own: tuple[jax.Array, ...] = ()


@dataclasses.dataclass(frozen=True)
class Site:
    """A parameter of a model, or one layer of a stacked parameter.

    Attributes:
      path: the parameter's path in the model's `params`, joined by "/".
      shape: the parameter's shape in Flax layout: (kh, kw, in, out) for a convolution. Of a
        stacked parameter, the shape of one layer.
      dtype: name of the parameter's dtype.
      index: position along `stack_axis` where the parameter stacks the weights of several layers
        (as `nn.scan` does), else None.
      stack_axis: the axis of the stacked parameter that counts layers.
      in_axes: the axes of `shape` that count inputs. None is the last axis but one; vectors have
        no input axis.
      out_axes: the axes that count outputs. None is the last axis.
      mean: the mean of the model's initializer, None where it has not been measured.
      std: the standard deviation of the model's initializer, None where it has not been measured.

    Example:
      >>> from paramshare import Site
      >>> query = Site("query/kernel", (64, 4, 16), in_axes=(0,), out_axes=(1, 2))
      >>> query.key, query.matrix_shape, query.fan_in, query.fan_out
      ('query.kernel', (64, 64), 64, 64)
    """

    path: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    index: int | None = None
    stack_axis: int = 0
    in_axes: tuple[int, ...] | None = None
    out_axes: tuple[int, ...] | None = None
    mean: float | None = None
    std: float | None = None

    def __str__(self) -> str:
        return self.path if self.index is None else f"{self.path}[{self.index}]"

    @property
    def key(self) -> str:
        """The site's key in a bank's arrays: its name with dots for slashes."""
        return str(self).replace("/", ".")

    @property
    def size(self) -> int:
        """The number of entries."""
        return math.prod(self.shape)

    @property
    def axes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Receptive axes (all others), input axes, output axes."""
        every = tuple(range(len(self.shape)))
        inputs = every[-2:-1] if self.in_axes is None else self.in_axes
        outputs = every[-1:] if self.out_axes is None else self.out_axes
        receptive = tuple(axis for axis in every if axis not in (*inputs, *outputs))
        return receptive, inputs, outputs

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """(*receptive, inputs, outputs): one axis each for inputs and outputs, at the end."""
        receptive, inputs, outputs = ([self.shape[a] for a in axes] for axes in self.axes)
        return (*receptive, math.prod(inputs), math.prod(outputs))

    @property
    def fan_in(self) -> int:
        """Inputs that one output unit sums over."""
        return math.prod(self.matrix_shape[:-1])

    @property
    def fan_out(self) -> int:
        """Outputs that one input unit feeds."""
        return math.prod(self.matrix_shape[:-2]) * self.matrix_shape[-1]

    def to_matrix(self, kernel: jax.Array) -> jax.Array:
        """A kernel of the site's shape, rearranged to `matrix_shape`."""
        receptive, inputs, outputs = self.axes
        return jnp.transpose(kernel, (*receptive, *inputs, *outputs)).reshape(self.matrix_shape)

    def from_matrix(self, matrix: jax.Array) -> jax.Array:
        """The inverse of `to_matrix`."""
        order = sum(self.axes, ())
        kernel = matrix.reshape([self.shape[axis] for axis in order])
        return jnp.transpose(kernel, [order.index(axis) for axis in range(len(order))])


class Scheme:
    """Base class of sharing schemes: checks sites and arrays once, then calls the scheme's methods.

    A scheme is a frozen dataclass (hashable, static under `jax.jit`) with the methods `_init` and
    `_expand`, and where they apply `_check` and `_from_dense`. They take checked arguments, with
    the sites in the order of their paths (`path_order`), whichever order the model calls them in:

    * `_init(key, sites) -> Weights`: draws the arrays.
    * `_expand(weights, sites)`: the kernels, in the order of these sites; casting is done here.
    * `_check(sites)`: raises `SchemeError` for sites that the scheme cannot serve.
    * `_from_dense(kernels, sites) -> Weights`: the arrays whose kernels are nearest to these.

    A scheme that can start each kernel like the model's own initializer has a field
    `initial: Initial = "model"`; `_init` then reads `site.std`. "paper" is the initialization of
    the scheme's paper.

    The methods from `filters` on are what penalties, similarity and folding ask of a scheme. By
    default they do not apply.

    Attributes:
      one_shape: whether all sites of a bank must have one shape.
      entrywise: whether kernels are made entry by entry, by `expand_flat`: slices of the bank's
        arrays along their last axis then give slices of the kernels.
      keeps_mean: whether `_init` also reads `site.mean`. Other schemes refuse sites whose
        initializer is constant, or not centred at zero.
    """

    one_shape: ClassVar[bool] = False
    entrywise: ClassVar[bool] = False
    keeps_mean: ClassVar[bool] = False

    @property
    def measures_initializer(self) -> bool:
        """Whether `init` needs the sites' `mean` and `std`."""
        return getattr(self, "initial", "paper") == "model"

    def __str__(self) -> str:
        fields = [field for field in dataclasses.fields(self) if field.name != "initial"]  # pyright: ignore[reportArgumentType]
        values = {field.name: getattr(self, field.name) for field in fields}
        shown = [
            str(value) if isinstance(value := values[f.name], Scheme) else f"{f.name}={value!r}"
            for f in fields
            if values[f.name] != f.default
        ]
        return f"{type(self).__name__}({', '.join(shown)})"

    def bind(self, shapes_of: Callable[[Any], Mapping[str, tuple[int, ...]]]) -> "Scheme":
        """The scheme to use instead, for schemes that refer to another model.

        Args:
          shapes_of: maps a module to the shapes of its parameters, by path, for the plan's example
            inputs.
        """
        return self

    def check(self, sites: tuple[Site, ...]) -> None:
        """Raises `SchemeError` if these sites cannot share one bank."""
        if not sites:
            raise SchemeError(f"{self} needs at least one site")
        for site in sites:
            if not site.size:
                raise SchemeError(
                    f"{site} is an empty weight, of shape {site.shape}; exclude it from the rule"
                )
            if not jnp.issubdtype(jnp.dtype(site.dtype), jnp.floating):
                raise SchemeError(
                    f"{site} has dtype {site.dtype}; only floating-point parameters can be shared"
                )
            check_axes(site)
        for name, count in collections.Counter(site.key for site in sites).items():
            if count > 1:
                raise SchemeError(
                    f"{self}: {count} sites have the key {name!r}; give them different banks"
                )
        for site in sites if self.one_shape else ():
            if site.shape != sites[0].shape:
                raise SchemeError(
                    f"{self} needs sites of one shape, but {sites[0]} is {sites[0].shape} and "
                    f"{site} is {site.shape}; give each shape its own bank"
                )
        self._check(_take(sites, path_order(sites)))

    def check_initializer(self, sites: tuple[Site, ...]) -> None:
        """Raises `SchemeError` if `init` needs statistics that are missing or of no use to it."""
        for site in sites if self.measures_initializer else ():
            if site.std is None:
                raise SchemeError(
                    f"{site} has no std, which {self} starts from; share a model (which measures "
                    "it), pass Site(std=...), or use initial='paper'"
                )
            mean = site.mean or 0.0
            if not self.keeps_mean and (site.std == 0 or abs(mean) > OFF_CENTRE * site.std):
                raise SchemeError(
                    f"{site} starts with mean {mean:g} and standard deviation {site.std:g}, but "
                    f"{self} starts kernels centred at zero; exclude it from the rule, use Tied "
                    "or initial='paper'"
                )

    def check_weights(self, weights: Weights, sites: tuple[Site, ...]) -> None:
        """Raises `SchemeError` if the arrays do not have the shapes that `init` gives."""
        expected, actual = _paths(self.shapes(sites)), _paths(weights)
        for name in [*expected, *actual]:
            if expected.get(name) != actual.get(name):
                raise SchemeError(
                    f"{self} needs {name} of shape {expected.get(name)}, got {actual.get(name)}; "
                    "pass the variables of a model shared by this same plan"
                )

    def shapes(self, sites: tuple[Site, ...]) -> Weights:
        """The arrays of these sites as `jax.ShapeDtypeStruct`s."""
        return _shapes(self, sites)

    def init(self, key: jax.Array, sites: tuple[Site, ...]) -> Weights:
        """Draws the arrays of a bank.

        Raises:
          SchemeError: if the sites cannot share a bank, or lack `std` under initial="model".
        """
        self.check(sites)
        self.check_initializer(sites)
        return self._init(key, _take(sites, path_order(sites)))

    def expand(self, weights: Weights, sites: tuple[Site, ...]) -> tuple[jax.Array, ...]:
        """The kernels of the sites, in their order, each of its site's shape.

        Kernels have the dtypes of their sites. If the arrays were cast from the dtype that `init`
        gives to another one, to bfloat16 or to float64, kernels have that dtype instead.

        Raises:
          SchemeError: if the arrays do not have the shapes that `init` gives.
        """
        self.check_weights(weights, sites)
        order = path_order(sites)
        made = dict(zip(order, self._expand(weights, _take(sites, order)), strict=True))
        kernels = [made[i] for i in range(len(sites))]
        chex.assert_shape(kernels, [site.shape for site in sites])
        cast = _dtype({jnp.dtype(leaf.dtype) for leaf in jax.tree.leaves(weights)})
        dtypes = [site.dtype if cast == bank_dtype(sites) else cast for site in sites]
        return tuple(k.astype(dtype) for k, dtype in zip(kernels, dtypes, strict=True))

    def expand_flat(self, weights: Weights, sites: tuple[Site, ...]) -> jax.Array:
        """(L, P): the flattened kernels of sites of one shape, of an `entrywise` scheme."""
        raise NotImplementedError

    def from_dense(self, kernels: tuple[jax.Array, ...], sites: tuple[Site, ...]) -> Weights:
        """The arrays whose kernels are nearest to the given ones, in the sum of squares.

        Args:
          kernels: one array for each site, in the order of the sites.
          sites: the bank's sites.

        Raises:
          SchemeError: if the kernels do not have the sites' shapes, or the scheme has no way from
            kernels back to a bank.
        """
        self.check(sites)
        if len(kernels) != len(sites):
            raise SchemeError(f"{self}: got {len(kernels)} kernels for {len(sites)} sites")
        for kernel, site in zip(kernels, sites, strict=True):
            if jnp.shape(kernel) != site.shape:
                raise SchemeError(
                    f"{self}: the kernel of {site} must have shape {site.shape}, got "
                    f"{jnp.shape(kernel)}"
                )
        order = path_order(sites)
        dtype = _dtype({bank_dtype(sites), *(jnp.asarray(kernel).dtype for kernel in kernels)})
        arrays = [jnp.asarray(kernels[i], dtype) for i in order]
        return self._from_dense(tuple(arrays), _take(sites, order))

    def filters(self, weights: Weights, sites: tuple[Site, ...]) -> Filters | None:
        """The filters to keep orthonormal; None where the scheme has none."""
        return None

    def mixing(self, weights: Weights, sites: tuple[Site, ...]) -> jax.Array | None:
        """(L, k): the rows by which the layers differ; None where they differ otherwise."""
        return None

    def combine(self, bank: Any, rows_GxN: jax.Array, site: Site) -> jax.Array:
        """(G, *site.shape): the kernels of G rows, of `mixing` or else flattened kernels."""
        return rows_GxN.reshape(-1, *site.shape)

    def groups_of(self, sites: tuple[Site, ...]) -> tuple[int, ...] | None:
        """The group of each site, in order, for schemes that tie whole kernels; else None."""
        return None

    def _check(self, sites: tuple[Site, ...]) -> None:
        pass

    def _init(self, key: jax.Array, sites: tuple[Site, ...]) -> Weights:
        raise NotImplementedError

    def _expand(self, weights: Weights, sites: tuple[Site, ...]) -> tuple[jax.Array, ...]:
        raise NotImplementedError

    def _from_dense(self, kernels: tuple[jax.Array, ...], sites: tuple[Site, ...]) -> Weights:
        raise SchemeError(
            f"{self} cannot be fitted to kernels; train it from its initialization, or use another "
            "scheme"
        )


@functools.lru_cache(maxsize=1024)
def path_order(sites: tuple[Site, ...]) -> tuple[int, ...]:
    """The positions of the sites, sorted by path, with numbers by value.

    What a bank stores then means the same whichever order the model calls its layers in.

    Example:
      >>> from paramshare.schemes.interface import path_order
      >>> path_order((Site("layer10/kernel", (2,)), Site("layer9/kernel", (2,))))
      (1, 0)
    """

    def key(i: int) -> list[tuple[int, int, str]]:
        parts = re.split(r"([0-9]+)", str(sites[i]))
        return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in parts]

    return tuple(sorted(range(len(sites)), key=key))


def _take(items: tuple[Any, ...], places: tuple[int, ...]) -> tuple[Any, ...]:
    return tuple(items[i] for i in places)


def bank_dtype(sites: tuple[Site, ...]) -> jnp.dtype:
    """The dtype of a bank: float32 at least, whatever precision the sites' parameters have."""
    return _dtype({jnp.dtype(jnp.float32), *(jnp.dtype(site.dtype) for site in sites)})


def _dtype(dtypes: set[jnp.dtype]) -> jnp.dtype:
    """The widest of these dtypes."""
    # Not `jnp.result_type`: it refuses bfloat16 beside float32 under strict dtype promotion.
    return max(dtypes, key=lambda dtype: dtype.itemsize)


def check_axes(site: Site) -> None:
    """Raises `SchemeError` unless the input and output axes are different axes of the shape."""
    _, inputs, outputs = site.axes
    axes = (*inputs, *outputs)
    if len(set(axes)) < len(axes) or not all(0 <= axis < len(site.shape) for axis in axes):
        raise SchemeError(
            f"{site} of shape {site.shape} has in_axes={inputs} and out_axes={outputs}; they must "
            f"be different axes from 0 to {len(site.shape) - 1}"
        )


def check_count(scheme: str, name: str, value: Any, least: int) -> int:
    """`value` as an int; `SchemeError` unless it is an integer and at least `least`."""
    try:
        count = operator.index(value)
    except TypeError:
        count = least - 1
    if count < least or isinstance(value, bool):
        raise SchemeError(f"{scheme}({name}={value!r}): {name} must be an integer, {least} or more")
    return count


def check_flag(scheme: str, name: str, value: Any) -> None:
    """Raises `SchemeError` unless `value` is True or False."""
    if not isinstance(value, bool):
        raise SchemeError(f"{scheme}({name}={value!r}): {name} must be True or False")


def check_choice(scheme: str, name: str, value: Any, literal: Any) -> None:
    """Raises `SchemeError` unless `value` is one of the values of a `Literal`."""
    if value not in get_args(literal):
        choices = ", ".join(map(repr, get_args(literal)))
        raise SchemeError(f"{scheme}({name}={value!r}): {name} must be one of {choices}")


@functools.lru_cache(maxsize=1024)
def _shapes(scheme: Scheme, sites: tuple[Site, ...]) -> Weights:
    scheme.check(sites)
    # Shapes do not depend on the statistics, which the sites may lack.
    sites = tuple(dataclasses.replace(site, mean=0.0, std=1.0) for site in sites)
    in_order = _take(sites, path_order(sites))
    shapes = jax.eval_shape(lambda: scheme._init(jax.random.key(0), in_order))
    # Without the mesh that is in use now.
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), shapes)


def _paths(weights: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of a pytree's arrays by path, such as "coefficients/conv1.kernel"."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(jnp.shape(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(weights)
    }
