"""A convolution that avoids XLA's slow cases on CPUs."""

import contextlib
import functools
import itertools
import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from paramshare.ops.form import chosen
from paramshare.ops.xla import ynnpack_convolutions

# Patches of about this many bytes are made and multiplied at a time: they stay in a core's cache.
PATCH_BYTES = 2**22
# YNNPACK's gradient of a kernel sums over all places (images times output positions) in one go. It
# becomes several times slower when so many float32 values exceed a first-level cache.
MANY_PLACES = 2**14


def convolution(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    precision: Any = None,
    **options: Any,
) -> jax.Array:
    """`jax.lax.conv_general_dilated`, with forms that are fast on CPUs.

    XLA's convolutions have slow cases on CPUs, where they are up to 200 times slower than
    necessary. Unless `form` says otherwise, two other forms are used there:

    * The gradient of the kernel is a product of image patches ("im2col") and the gradient of the
      output, a few images at a time. This is used for grouped and for 1x1 convolutions; for others
      if there are many images and output positions, unless XLA is told not to use YNNPACK.
    * A depthwise convolution is a sum of shifted images, each times one entry of every kernel.

    Results and derivatives of all orders equal those of `jax.lax.conv_general_dilated` up to
    rounding. It is called as it is on other platforms, and for what Flax's layers do not use: other
    orders of dimensions than batch, positions, channels; dilated inputs; groups of batches. Numbers
    of 16 bits are left to XLA, too.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from paramshare import ops
      >>> conv = nn.Conv(8, (3, 3), conv_general_dilated_cls=lambda: ops.convolution)
      >>> variables = conv.init(jax.random.key(0), jnp.ones((2, 6, 6, 3)))
      >>> conv.apply(variables, jnp.ones((2, 6, 6, 3))).shape
      (2, 6, 6, 8)
    """
    numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    rank = lhs.ndim - 2
    last = (0, lhs.ndim - 1, *range(1, lhs.ndim - 1))
    if (
        chosen() == "xla"
        or options
        or set(lhs_dilation or ()) - {1}
        or numbers != lax.ConvDimensionNumbers(last, (rank + 1, rank, *range(rank)), last)
        or lhs.dtype != rhs.dtype
        or lhs.dtype not in (jnp.float32, jnp.float64)  # sums would be rounded to 16 bits
        or 0 in (*lhs.shape, *rhs.shape)
    ):
        return lax.conv_general_dilated(
            lhs,
            rhs,
            window_strides,
            padding,
            lhs_dilation,
            rhs_dilation,
            dimension_numbers,
            feature_group_count,
            precision=precision,
            **options,
        )
    strides = tuple(map(operator.index, window_strides))
    dilation = tuple(map(operator.index, rhs_dilation or (1,) * rank))
    if isinstance(padding, str):
        window = [(size - 1) * step + 1 for size, step in zip(rhs.shape, dilation, strict=False)]
        padding = lax.padtype_to_pads(lhs.shape[1:-1], window, strides, padding)
    pairs = tuple((operator.index(low), operator.index(high)) for low, high in padding)
    geometry = _Geometry(strides, pairs, dilation, feature_group_count, precision)
    spans = ((k - 1) * step + 1 for k, step in zip(rhs.shape, dilation, strict=False))
    sizes = (n + sum(pair) for n, pair in zip(lhs.shape[1:-1], pairs, strict=True))
    if any(size < span for size, span in zip(sizes, spans, strict=True)):
        return _by_xla(lhs, rhs, geometry)  # no positions
    return _convolution(lhs, rhs, geometry)


@contextlib.contextmanager
def fast_convolutions() -> Iterator[None]:
    """Has Flax's `nn.Conv` layers that are called in this context use `convolution`.

    Layers that were given another function keep it. By Flax's interception of methods, so that
    models need not be changed.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from paramshare import ops
      >>> with ops.fast_convolutions():
      ...     y, _ = nn.Conv(8, (3, 3)).init_with_output(jax.random.key(0), jnp.ones((2, 6, 6, 3)))
      >>> y.shape
      (2, 6, 6, 8)
    """

    def intercept(call: Any, args: Any, options: Any, context: nn.module.InterceptorContext) -> Any:
        layer = context.module
        if (
            not isinstance(layer, nn.Conv)
            or layer.conv_general_dilated
            or layer.conv_general_dilated_cls
        ):
            return call(*args, **options)
        object.__setattr__(layer, "conv_general_dilated_cls", lambda: convolution)
        try:
            return call(*args, **options)
        finally:
            object.__setattr__(layer, "conv_general_dilated_cls", None)

    with nn.intercept_methods(intercept):
        yield


class _Geometry(NamedTuple):
    """A convolution but for its arrays; strides, padding and dilation by dimension."""

    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int
    precision: Any


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _convolution(lhs: jax.Array, rhs: jax.Array, geometry: _Geometry) -> jax.Array:
    by_xla = functools.partial(_by_xla, geometry=geometry)
    if not 1 < geometry.groups == lhs.shape[-1] == rhs.shape[-1] or rhs.shape[-2] != 1:
        return by_xla(lhs, rhs)
    depthwise = functools.partial(_depthwise, geometry=geometry)
    if chosen() == "fast":
        return depthwise(lhs, rhs)
    # A program that is exported from a machine without an accelerator may run on one.
    return lax.platform_dependent(lhs, rhs, cpu=depthwise, default=by_xla)


@functools.partial(_convolution.defjvp, symbolic_zeros=True)
def _convolution_jvp(geometry: _Geometry, primals: Any, tangents: Any) -> tuple[Any, Any]:
    (lhs, rhs), (d_lhs, d_rhs) = primals, tangents
    out = _convolution(lhs, rhs, geometry)
    parts = []
    if not isinstance(d_lhs, SymbolicZero):
        parts.append(_convolution(d_lhs, rhs, geometry))
    if not isinstance(d_rhs, SymbolicZero):
        # Its transpose, which is what reverse mode runs, is the gradient of the kernel.
        pays = _patches_pay(out, rhs, geometry)
        parts.append((_by_patches if pays else _by_xla)(lhs, d_rhs, geometry))
    return out, functools.reduce(jnp.add, parts) if parts else jnp.zeros_like(out)


def _patches_pay(out: jax.Array, rhs: jax.Array, geometry: _Geometry) -> bool:
    """Whether patches give the gradient of the kernel faster than XLA on a CPU.

    XLA takes 10 to 200 times as long for grouped convolutions and 1.4 to 6 times for 1x1. For
    others it depends on what it uses, and then on the number of places. See
    experiments/results/speed.md for the measurements.
    """
    channels, groups = rhs.shape[-1], geometry.groups
    if chosen() == "auto" and jax.default_backend() != "cpu":
        return False
    return (
        chosen() == "fast"
        or 1 < groups < channels
        or math.prod(rhs.shape[:-2]) == 1
        or (ynnpack_convolutions() and math.prod(out.shape[:-1]) >= MANY_PLACES)
    )


def _by_xla(lhs: jax.Array, rhs: jax.Array, geometry: _Geometry) -> jax.Array:
    positions = "".join(map(str, range(lhs.ndim - 2)))
    return lax.conv_general_dilated(
        lhs,
        rhs,
        geometry.strides,
        geometry.padding,
        rhs_dilation=geometry.dilation,
        dimension_numbers=(f"N{positions}C", f"{positions}IO", f"N{positions}C"),
        feature_group_count=geometry.groups,
        precision=geometry.precision,
    )


def _depthwise(lhs: jax.Array, rhs: jax.Array, geometry: _Geometry) -> jax.Array:
    """One kernel a channel. XLA fuses the sum into one pass over the images."""
    entries = rhs.reshape(-1, *(1,) * (lhs.ndim - 1), rhs.shape[-1])
    shifted = _shifted(_padded(lhs, geometry.padding), rhs.shape[:-2], geometry)
    return functools.reduce(jnp.add, map(jnp.multiply, shifted, entries))


def _by_patches(lhs: jax.Array, rhs: jax.Array, geometry: _Geometry) -> jax.Array:
    """Products of patches and the kernel as a matrix, for a few images at a time."""
    images, channels = len(lhs), lhs.shape[-1]
    window, groups, features = rhs.shape[:-2], geometry.groups, rhs.shape[-1]
    size = math.prod(window)

    @jax.checkpoint  # the backward pass makes patches again; kept, they take much memory
    def product(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        shifted = list(_shifted(_padded(lhs, geometry.padding), window, geometry))
        shape = (*shifted[0].shape[:-1], features)
        if groups == 1:
            patches = jnp.concatenate(shifted, axis=-1).reshape(-1, size * channels)
            kernel = rhs.reshape(-1, features)
            return jnp.matmul(patches, kernel, precision=geometry.precision).reshape(shape)
        patches = jnp.stack(shifted, axis=-2).reshape(-1, size, groups, channels // groups)
        kernel = rhs.reshape(size, channels // groups, groups, features // groups)
        return jnp.einsum("pkgc,kcgf->pgf", patches, kernel, precision=geometry.precision).reshape(
            shape
        )

    places = math.prod(jax.eval_shape(product, lhs, rhs).shape[:-1])
    steps = min(images, -(-places * size * channels * lhs.dtype.itemsize // PATCH_BYTES))
    share = -(-images // steps)
    steps = -(-images // share)
    if steps == 1:
        return product(lhs, rhs)
    more = [(0, steps * share - images), *[(0, 0)] * (lhs.ndim - 1)]
    parts = jnp.pad(lhs, more).reshape(steps, share, *lhs.shape[1:])
    out = lax.map(lambda part: product(part, rhs), parts)
    return out.reshape(-1, *out.shape[2:])[:images]


def _padded(lhs: jax.Array, padding: Any) -> jax.Array:
    """With zeros around every image. Negative padding cuts."""
    amounts = [(0, 0, 0), *((low, high, 0) for low, high in padding), (0, 0, 0)]
    return lax.pad(lhs, jnp.zeros((), lhs.dtype), amounts)


def _shifted(lhs: jax.Array, window: Sequence[int], geometry: _Geometry) -> Iterator[jax.Array]:
    """For every entry of the window, what it meets at every output position."""
    for entry in itertools.product(*map(range, window)):
        start, limit = [0], [lhs.shape[0]]
        for i, size, length, stride, dilation in zip(
            entry, window, lhs.shape[1:-1], geometry.strides, geometry.dilation, strict=True
        ):
            start.append(i * dilation)
            last = (length - (size - 1) * dilation - 1) // stride * stride
            limit.append(i * dilation + last + 1)
        yield lax.slice(lhs, (*start, 0), (*limit, lhs.shape[-1]), (1, *geometry.strides, 1))
