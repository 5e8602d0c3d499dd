"""The parameters of a Flax model: shapes, order, axes, and how the model initializes them."""

import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.interpreters.partial_eval import dce_jaxpr

Target = tuple[str, int | None]  # the path of a parameter, and the axis that counts layers
Statistics = tuple[tuple[float, float], ...]  # mean and standard deviation of each layer

SAMPLES = 16_384  # per parameter: the standard deviation is measured to 0.6 %
DIGITS = 4  # significant ones, so that equal models have equal statistics
PRNG = "threefry2x32"
# What runs once is not worth optimizing: compilation is nearly all of the time.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def example_input(shape: tuple[int, ...], dtype: Any = "float32") -> jax.ShapeDtypeStruct:
    """An input of this shape, in a batch of one, to trace a model with.

    Example:
      >>> from paramshare.parameters import example_input
      >>> example_input((32, 32, 3))
      ShapeDtypeStruct(shape=(1, 32, 32, 3), dtype=float32)
    """
    return jax.ShapeDtypeStruct((1, *shape), jnp.dtype(dtype))


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
    axes: "Axes | None" = None
    owner: str = ""
    names: tuple[Any, ...] = ()
    logical: bool = False


class Axes(NamedTuple):
    """Input and output axes of a parameter of `ndim` axes."""

    ndim: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Trace:
    """One trace of `model.init`.

    Attributes:
      parameters: by path, in the order in which the model first calls the layers that own them.
      variables: shapes and dtypes of all collections, without partitioning metadata.
      jaxpr: the jaxpr of the parameters, sorted by path, as a function of a key.
      integers: paths of scopes whose names are integers, as `Layout` has them.
      measured: statistics of initializers, by the parameters that were measured together.
    """

    parameters: Mapping[str, Parameter]
    variables: Mapping[str, Any]
    jaxpr: ClosedJaxpr
    integers: frozenset[str]
    measured: dict[tuple[Target, ...], dict[Target, Statistics]] = dataclasses.field(
        default_factory=dict
    )


def trace(model: nn.Module, *example_inputs: Any, **options: Any) -> Trace:
    """Traces `model.init`. Allocates nothing and touches no device.

    Args:
      model: any Flax linen module.
      *example_inputs: the arguments of `model.init`; arrays or `jax.ShapeDtypeStruct`s count by
        shape and dtype alone.
      **options: further arguments of `model.init`.
    """
    leaves, tree = jax.tree.flatten((example_inputs, options))
    leaves = tuple(
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        if hasattr(leaf, "shape") and hasattr(leaf, "dtype")
        else leaf
        for leaf in leaves
    )
    args = (orphan(model), leaves, tree, jax.config.jax_enable_x64)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        hash(args)
    except TypeError:  # a model with a list or an array among its attributes
        return _trace.__wrapped__(*args)
    return _trace(*args)


def orphan(model: nn.Module) -> nn.Module:
    """The model without a parent.

    A module built in the `__call__` of another one belongs to the outer one's scope, and so do the
    modules among its attributes: their parameters would stay with the outer module.
    """
    if model.parent is None:
        return model
    return model.clone(parent=None, name=None, _deep_clone=True, _reset_names=True)


def measure(trace: Trace, stack_axes: Mapping[str, int | None]) -> dict[str, Statistics]:
    """Means and standard deviations of the model's own initializers.

    They do not depend on the PRNG settings of JAX (`jax_default_prng_impl` and the like).

    Args:
      trace: the trace of the model.
      stack_axes: the parameters to measure, each with the axis along which it stacks layers, or
        None.

    Returns:
      `{path: ((mean, std), ...)}`, one pair for each layer of a stacked parameter, else one. A mean
      within five standard errors of zero is zero.
    """
    # Equal layers that are measured together share one draw; what other plans of the model have
    # measured must not change it.
    targets = tuple(stack_axes.items())
    if targets not in trace.measured:
        trace.measured[targets] = _measure(trace, targets)
    return {path: trace.measured[targets][path, axis] for path, axis in targets}


@functools.lru_cache(maxsize=16)
def _trace(model: nn.Module, leaves: tuple[Any, ...], tree: Any, x64: bool) -> Trace:
    order: dict[tuple[str, ...], int] = {}
    axes: dict[tuple[str, ...], dict[str, Axes]] = {}
    owners: dict[tuple[str, ...], str] = {}
    collections: dict[str, Any] = {}
    integers: set[str] = set()
    names: dict[str, tuple[tuple[Any, ...], bool]] = {}  # and whether they are logical

    def note(call, args, kwargs, context):
        module = context.module
        if module.scope is None:  # a module that is used without being bound has no path
            return call(*args, **kwargs)
        order.setdefault(module.path, len(order))
        owners.setdefault(module.path, type(module).__name__)
        result = call(*args, **kwargs)
        if context.method_name == "__call__":
            axes.setdefault(module.path, {}).update(module_axes(module, *args, **kwargs))
        return result

    def init(key: jax.Array) -> dict[str, Any]:
        args, options = jax.tree.unflatten(
            tree,
            [
                jnp.zeros(leaf.shape, leaf.dtype)
                if isinstance(leaf, jax.ShapeDtypeStruct)
                else leaf
                for leaf in leaves
            ],
        )
        with nn.intercept_methods(note):
            boxed = model.init(key, *args, **options)
        for scopes, leaf in flatten_dict(boxed.get("params", {})).items():
            if isinstance(leaf, nn.Partitioned):
                logical = isinstance(leaf, nn.LogicallyPartitioned)
                names["/".join(map(str, scopes))] = leaf.names, logical
        variables = nn.meta.unbox(boxed)
        collections.update(
            jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), variables)
        )
        flat = flatten_dict(variables.get("params", {}))
        for scopes in flat:
            heads = (scopes[: i + 1] for i in range(len(scopes)))
            integers.update("/".join(map(str, h)) for h in heads if isinstance(h[-1], int))
        return {"/".join(map(str, scopes)): leaf for scopes, leaf in flat.items()}

    with _fixed_prng():
        jaxpr, shapes = jax.make_jaxpr(init, return_shape=True)(jax.eval_shape(_key))

    def rank(path: str):
        scopes = tuple(path.split("/"))
        owners = [scopes[:n] for n in range(len(scopes), -1, -1)]
        first = next((order[owner] for owner in owners if owner in order), -1)
        return first, [
            (0, int(part), "") if part.isdigit() else (1, 0, part)
            for part in re.split(r"(\d+)", path)
        ]

    def parameter(path: str) -> Parameter:
        *owner, name = path.split("/")
        scope, shape = tuple(owner), shapes[path]
        found = axes.get(scope, {}).get(name)
        return Parameter(
            shape.shape, shape.dtype, found, owners.get(scope, ""), *names.get(path, ((), False))
        )

    parameters = {path: parameter(path) for path in sorted(shapes, key=rank)}
    return Trace(parameters, collections, jaxpr, frozenset(integers))


def module_axes(module: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Axes]:
    """The axes of a module's parameters by name, where they are not the last two.

    Known for `nn.DenseGeneral` (and so for attention), `nn.ConvTranspose` and `nn.Einsum` (unless
    the kernel has "..." in its string).

    Args:
      module: any Flax linen module.
      *args: the arguments of its call.
      **kwargs: further arguments of its call.
    """
    if isinstance(module, nn.DenseGeneral):
        batch, inputs, outputs = (
            len(value) if isinstance(value, Iterable) else 1
            for value in (module.batch_dims, module.axis, module.features)
        )
        ndim = batch + inputs + outputs
        kernel = Axes(ndim, _range(batch, batch + inputs), _range(batch + inputs, ndim))
        bias = Axes(batch + outputs, (), _range(batch, batch + outputs))
        return {"kernel": kernel, "bias": bias}
    if isinstance(module, nn.ConvTranspose) and module.transpose_kernel:
        size = module.kernel_size
        spatial = 1 if isinstance(size, int) else len(size)
        return {"kernel": Axes(spatial + 2, (spatial + 1,), (spatial,))}
    if isinstance(module, nn.Einsum):
        return _einsum_axes(module.einsum_str or kwargs.get("einsum_str") or args[1])
    return {}


def _einsum_axes(equation: str) -> dict[str, Axes]:
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


def _range(start: int, stop: int) -> tuple[int, ...]:
    return tuple(range(start, stop))


def _measure(trace: Trace, targets: tuple[Target, ...]) -> dict[Target, Statistics]:
    """Draws each parameter as often as it takes for `SAMPLES` entries, in one program."""
    paths = sorted(trace.parameters)
    programs: dict[tuple[str, int | None], ClosedJaxpr] = {}
    program_of = {}
    for path, axis in targets:
        # What a parameter depends on, the rest of the model left out.
        jaxpr, _ = dce_jaxpr(trace.jaxpr.jaxpr, [p == path for p in paths], instantiate=True)
        # Layers with the same initializer and shape differ only in what is folded into their keys.
        text = re.sub(r"(random_fold_in \w+) \d+", r"\1", str(jaxpr))
        programs.setdefault((text, axis), ClosedJaxpr(jaxpr, trace.jaxpr.consts))
        program_of[path, axis] = text, axis

    items = programs.items()

    def statistics(key: jax.Array) -> list[tuple[jax.Array, jax.Array, int]]:
        results = []
        draws = [-(-SAMPLES // _layer_size(program, axis)) for (_, axis), program in items]
        keys = jax.random.split(key, max(draws))
        for ((_, axis), program), count in zip(items, draws, strict=True):
            (leaf,) = jax.vmap(jaxpr_as_fun(program))(keys[:count])
            layers = leaf[None] if axis is None else jnp.moveaxis(leaf, axis + 1, 0)
            rows = layers.reshape(layers.shape[0], -1).astype(jnp.float32)
            mean = jnp.mean(rows, axis=1, keepdims=True)
            std = jnp.sqrt(jnp.mean((rows - mean) ** 2, axis=1))
            results.append((mean[:, 0], std, rows.shape[1]))
        return results

    with jax.ensure_compile_time_eval(), _on_cpu(), _fixed_prng():
        run = jax.jit(statistics, compiler_options=QUICK)
        results = jax.device_get(run(_key()))
    rounded = [
        tuple(_rounded(float(m), float(s), int(count)) for m, s in zip(mean, std, strict=True))
        for mean, std, count in results
    ]
    of_program = dict(zip(programs, rounded, strict=True))
    return {target: of_program[program_of[target]] for target in targets}


@contextlib.contextmanager
def _fixed_prng() -> Iterator[None]:
    """The same random numbers under all PRNG settings."""
    with jax.default_prng_impl(PRNG), jax.threefry_partitionable(True):
        yield


def _key() -> jax.Array:
    """`jax.random.key(0)`, which would depend on `jax_random_seed_offset`."""
    return jax.random.wrap_key_data(np.zeros(2, np.uint32), impl=PRNG)  # pyright: ignore[reportArgumentType]


def _layer_size(program: ClosedJaxpr, axis: int | None) -> int:
    (parameter,) = program.out_avals
    return parameter.size // (1 if axis is None else parameter.shape[axis])


def _rounded(mean: float, std: float, count: int) -> tuple[float, float]:
    if std < 1e-6 * abs(mean):  # a constant, up to rounding
        std = 0.0
    if abs(mean) < 5 * std / math.sqrt(count):
        mean = 0.0
    return float(f"{mean:.{DIGITS}g}"), float(f"{std:.{DIGITS}g}")


def _on_cpu() -> contextlib.AbstractContextManager:
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:  # JAX_PLATFORMS excludes it
        return contextlib.nullcontext()
