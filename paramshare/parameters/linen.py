"""The parameters of a Flax linen module, from one trace of its `init`."""

import contextlib
import dataclasses
import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.interpreters.partial_eval import dce_jaxpr

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

Target = tuple[str, int | None]  # the path of a parameter, and the axis that counts layers

SAMPLES = 16_384  # per parameter: the standard deviation is measured to 0.6 %
PRNG = "threefry2x32"
# What runs once is not worth optimizing: compilation is nearly all of the time.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@dataclasses.dataclass(frozen=True, eq=False)
class LinenTrace(Trace):
    """One trace of `model.init`.

    Attributes:
      variables: shapes and dtypes of all collections, without partitioning metadata.
      jaxpr: the jaxpr of the parameters, sorted by path, as a function of a key.
      measured: statistics of initializers, by the parameters that were measured together.
    """

    variables: Mapping[str, Any]
    jaxpr: ClosedJaxpr
    measured: dict[tuple[Target, ...], dict[Target, Statistics]] = dataclasses.field(
        default_factory=dict
    )

    def measure(self, stack_axes: Mapping[str, int | None]) -> dict[str, Statistics]:
        """As of any `Trace`, by sampling the initializers.

        The results do not depend on the PRNG settings of JAX (`jax_default_prng_impl` and the
        like).
        """
        # Equal layers that are measured together share one draw; what other plans of the model have
        # measured must not change it.
        targets = tuple(stack_axes.items())
        if targets not in self.measured:
            self.measured[targets] = _measure(self, targets)
        return {path: self.measured[targets][path, axis] for path, axis in targets}


def trace(model: nn.Module, *example_inputs: Any, **options: Any) -> LinenTrace:
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


@functools.lru_cache(maxsize=16)
def _trace(model: nn.Module, leaves: tuple[Any, ...], tree: Any, x64: bool) -> LinenTrace:
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
        return first, natural_order(path)

    def parameter(path: str) -> Parameter:
        *owner, name = path.split("/")
        scope, shape = tuple(owner), shapes[path]
        found = axes.get(scope, {}).get(name)
        return Parameter(
            shape.shape, shape.dtype, found, owners.get(scope, ""), *names.get(path, ((), False))
        )

    parameters = {path: parameter(path) for path in sorted(shapes, key=rank)}
    return LinenTrace(parameters, frozenset(integers), collections, jaxpr)


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
        return general_axes(batch, inputs, outputs)
    if isinstance(module, nn.ConvTranspose) and module.transpose_kernel:
        size = module.kernel_size
        return transposed_axes(1 if isinstance(size, int) else len(size))
    if isinstance(module, nn.Einsum):
        return einsum_axes(module.einsum_str or kwargs.get("einsum_str") or args[1])
    return {}


def _measure(trace: LinenTrace, targets: tuple[Target, ...]) -> dict[Target, Statistics]:
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
    moments = [
        tuple(rounded(float(m), float(s), int(count)) for m, s in zip(mean, std, strict=True))
        for mean, std, count in results
    ]
    of_program = dict(zip(programs, moments, strict=True))
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


def _on_cpu() -> contextlib.AbstractContextManager:
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:  # JAX_PLATFORMS excludes it
        return contextlib.nullcontext()
