"""The parameters of an NNX module, which holds them."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Key, PathParts
from jax.core import Tracer

from paramshare.parameters.parameter import (
    Axes,
    Parameter,
    Statistics,
    Trace,
    einsum_axes,
    general_axes,
    natural_order,
    rounded,
    transposed_axes,
)


@dataclasses.dataclass(frozen=True, eq=False)
class NNXTrace(Trace):
    """The parameters that an NNX module holds.

    Attributes:
      arrays: their values by path, without those of abstract or traced modules.
    """

    arrays: Mapping[str, jax.Array]

    def measure(self, stack_axes: Mapping[str, int | None]) -> dict[str, Statistics]:
        """As of any `Trace`, from the values of the parameters."""
        layers = {
            path: self.arrays[path][None]
            if axis is None
            else jnp.moveaxis(self.arrays[path], axis, 0)
            for path, axis in stack_axes.items()
            if path in self.arrays
        }
        with jax.ensure_compile_time_eval():
            moments = jax.device_get({path: _moments(rows) for path, rows in layers.items()})
        return {
            path: tuple(
                rounded(float(mean), float(std), layers[path][0].size)
                for mean, std in zip(*moments[path], strict=True)
            )
            for path in layers
        }

    def without_values(self) -> "NNXTrace":
        """The same without means and standard deviations, as for an abstract module."""
        return dataclasses.replace(self, arrays={})


def trace(
    model: nnx.Module, *example_inputs: Any, method: str = "__call__", **options: Any
) -> NNXTrace:
    """The parameters of a module: the variables of type `nnx.Param`.

    Args:
      model: any NNX module.
      *example_inputs: the arguments of a method. With them, parameters are in the order in which
        the method first uses the modules that own them, otherwise in the order of definition.
      method: the method's name.
      **options: further arguments of the method.
    """
    variables = params_of(model)
    owners = {path: _owner(model, keys) for path, (keys, _) in variables.items()}
    defined = {path: _definition(model, keys) for path, (keys, _) in variables.items()}
    order = sorted(variables, key=lambda path: defined[path])
    if example_inputs or options:
        order = [*_used(model, method, example_inputs, options), *order]
    first: dict[int, int] = {}
    for i, path in enumerate(order):
        first.setdefault(id(owners[path]), i)

    def parameter(path: str) -> Parameter:
        keys, variable = variables[path]
        owner = owners[path]
        axes = module_axes(owner).get(str(keys[-1]))
        metadata = variable.get_metadata()
        names = tuple(metadata.get("out_sharding") or ())
        logical = bool(metadata.get("sharding_rules"))
        return Parameter(variable.shape, variable.dtype, axes, type(owner).__name__, names, logical)

    ranked = sorted(variables, key=lambda path: (first[id(owners[path])], natural_order(path)))
    values = {path: variable.get_value() for path, (_, variable) in variables.items()}
    arrays = {
        path: value
        for path, value in values.items()
        if not isinstance(value, jax.ShapeDtypeStruct | Tracer)
    }
    return NNXTrace({path: parameter(path) for path in ranked}, frozenset(), arrays)


def params_of(model: nnx.Module) -> dict[str, tuple[PathParts, nnx.Param]]:
    """The parameters of a module by path, each with the names and numbers of its path."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {
        "/".join(map(str, keys)): (keys, variable)
        for keys, variable in flat
        if hasattr(variable.get_value(), "shape")  # a value may be a tree of arrays
    }


def child(node: Any, key: Key) -> Any:
    """What a module or a container has under a name or number of a path."""
    if isinstance(node, nnx.Pytree):
        return vars(node)[str(key)]
    if isinstance(node, Mapping | Sequence):
        return node[key]  # pyright: ignore[reportCallIssue, reportArgumentType]
    return getattr(node, str(key))


def module_axes(module: Any) -> dict[str, Axes]:
    """The axes of a module's parameters by name, where they are not the last two.

    Known for `nnx.LinearGeneral` (and so for attention), `nnx.ConvTranspose` and `nnx.Einsum`
    (unless the kernel has "..." in its string).
    """
    if isinstance(module, nnx.LinearGeneral):
        batch, inputs, outputs = module.batch_axis, module.in_features, module.out_features
        return general_axes(len(batch), len(inputs), len(outputs))
    if isinstance(module, nnx.ConvTranspose) and module.transpose_kernel:
        size = module.kernel_size
        return transposed_axes(1 if isinstance(size, int) else len(size))
    return einsum_axes(module.einsum_str) if isinstance(module, nnx.Einsum) else {}


@jax.jit
def _moments(layers: jax.Array) -> tuple[jax.Array, jax.Array]:
    rows = layers.reshape(layers.shape[0], -1).astype(jnp.float32)
    mean = jnp.mean(rows, axis=1, keepdims=True)
    return mean[:, 0], jnp.sqrt(jnp.mean((rows - mean) ** 2, axis=1))


def _owner(model: nnx.Module, keys: PathParts) -> nnx.Module:
    """The innermost module on a path that is not a mere container."""
    owner = node = model
    for key in keys[:-1]:
        node = child(node, key)
        if isinstance(node, nnx.Module) and not isinstance(node, nnx.List | nnx.Dict):
            owner = node
    return owner


def _definition(model: nnx.Module, keys: PathParts) -> tuple[int, ...]:
    """Where a parameter was defined: the positions of the names of its path."""
    positions, node = [], model
    for key in keys:
        names = [str(key)]
        if isinstance(node, nnx.Pytree | Mapping):
            names = list(map(str, vars(node) if isinstance(node, nnx.Pytree) else node))
        positions.append(key if isinstance(key, int) else names.index(str(key)))
        node = child(node, key)
    return tuple(positions)


def _used(model: nnx.Module, method: str, inputs: tuple, options: Mapping[str, Any]) -> list[str]:
    """The paths of the parameters that a method uses, in the order of their first use."""
    leaves, tree = jax.tree.flatten((inputs, options))
    traced = [hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves]
    graph, params, others = nnx.split(model, nnx.Param, ...)
    paths = [
        "/".join(map(str, keys))
        for keys, variable in nnx.to_flat_state(params)
        for _ in jax.tree.leaves(variable)
    ]

    def call(params: Any, others: Any, arrays: list[Any]) -> None:
        arrays = list(arrays)
        args, kwargs = jax.tree.unflatten(
            tree, [arrays.pop(0) if t else x for t, x in zip(traced, leaves, strict=True)]
        )
        getattr(nnx.merge(graph, params, others), method)(*args, **kwargs)

    arrays = [leaf for leaf, is_array in zip(leaves, traced, strict=True) if is_array]
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (params, others, arrays)
    )
    jaxpr = jax.make_jaxpr(call)(*shapes).jaxpr
    of_variable = dict(zip(jaxpr.invars[: len(paths)], paths, strict=True))
    return list(dict.fromkeys(_uses(jaxpr, of_variable)))


def _uses(jaxpr: Any, names: Mapping[Any, str]) -> Iterator[str]:
    """The names of a jaxpr's variables, in the order in which its operations use them."""
    for equation in jaxpr.eqns:
        used = [(i, names[x]) for i, x in enumerate(equation.invars) if _is_in(x, names)]
        for value in equation.params.values() if len(used) > 1 else ():
            inner = getattr(value, "jaxpr", value)
            if len(getattr(inner, "invars", ())) == len(equation.invars):
                yield from _uses(inner, {inner.invars[i]: name for i, name in used})
        yield from (name for _, name in used)


def _is_in(variable: Any, names: Mapping[Any, str]) -> bool:
    with contextlib.suppress(TypeError):  # literals have no hash
        return variable in names
    return False
