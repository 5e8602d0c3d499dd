"""Banks divided over devices: each device holds one slice of every array of a bank."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from paramshare.schemes.interface import Filters, Site, Weights
from paramshare.schemes.wrapper import Wrapper


@dataclasses.dataclass(frozen=True)
class Sliced(Wrapper):
    """A scheme whose bank is divided over the devices of a mapped axis.

    Used inside `jax.pmap` or `jax.shard_map`, where a bank's arrays are this device's slices (see
    `cut`). A scheme that makes kernels entry by entry (`Scheme.entrywise`) makes a slice of every
    kernel on each device, and the kernels are all-gathered. Of other schemes the bank is
    all-gathered. Either way kernels equal those of the whole bank, bit for bit. The gradient of an
    all-gather is a reduce-scatter: each device gets the gradient of its slice, summed over devices.
    Coefficients and own weights are whole on every device.

    Args:
      scheme: the scheme of the whole bank.
      axis: name of the mapped axis.
      count: its size.
      dtype: dtype to communicate kernels in, such as the model's compute dtype; None keeps theirs.
        Gradients are summed in their own dtype, and whole banks communicated in theirs.

    Example:
      >>> import numpy as np
      >>> from jax.sharding import Mesh, PartitionSpec
      >>> from paramshare import Site, Soft
      >>> sites = (Site("a/kernel", (3, 3), std=1.0), Site("b/kernel", (3, 3), std=1.0))
      >>> scheme, devices = Soft(templates=2), jax.devices()
      >>> weights = scheme.init(jax.random.key(0), sites)
      >>> sliced = Sliced(scheme, "devices", len(devices))
      >>> whole, first = PartitionSpec(), PartitionSpec("devices")
      >>> expand = jax.shard_map(
      ...     lambda bank, coefficients: sliced.expand(
      ...         Weights(jax.tree.map(lambda x: x[0], bank), coefficients), sites),
      ...     mesh=Mesh(np.array(devices), "devices"), in_specs=(first, whole), out_specs=whole,
      ...     check_vma=False)
      >>> kernels = expand(sliced.cut(weights.bank), weights.coefficients)
      >>> bool((kernels[1] == scheme.expand(weights, sites)[1]).all())
      True
    """

    axis: str
    count: int
    dtype: str | None = None

    def cut(self, bank: Any) -> Any:
        """The slices of a whole bank: a first axis, of size `count`, is added to every array."""
        return jax.tree.map(lambda leaf: cut(leaf, self.count, self.scheme.entrywise), bank)

    def shapes(self, sites: tuple[Site, ...]) -> Weights:
        """The arrays on one device as `jax.ShapeDtypeStruct`s."""
        whole = self.scheme.shapes(sites)
        return whole._replace(
            bank=jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(
                    cut_shape(leaf.shape, self.count, self.scheme.entrywise)[1:], leaf.dtype
                ),
                whole.bank,
            )
        )

    def filters(self, weights: Weights, sites: tuple[Site, ...]) -> Filters | None:
        """The whole filters, all-gathered."""
        return self.scheme.filters(self._gathered(weights, sites), sites)

    def mixing(self, weights: Weights, sites: tuple[Site, ...]) -> jax.Array | None:
        """As of the whole bank."""
        return self.scheme.mixing(weights, sites)

    def groups_of(self, sites: tuple[Site, ...]) -> tuple[int, ...] | None:
        """As of the whole bank."""
        return self.scheme.groups_of(sites)

    def _init(self, key: jax.Array, sites: tuple[Site, ...]) -> Weights:
        """This device's slices of the bank that the scheme draws."""
        weights = self.scheme.init(key, sites)
        mine = jax.lax.axis_index(self.axis)
        return weights._replace(bank=jax.tree.map(lambda x: x[mine], self.cut(weights.bank)))

    def _expand(self, weights: Weights, sites: tuple[Site, ...]) -> tuple[jax.Array, ...]:
        if not self.scheme.entrywise:
            return self.scheme._expand(self._gathered(weights, sites), sites)
        slices_LxS = self.scheme.expand_flat(weights, sites)
        kernels_LxP: Any = _gathered_in(self.dtype, self.axis, slices_LxS)
        return tuple(
            kernel_P[: site.size].reshape(site.shape)
            for site, kernel_P in zip(sites, kernels_LxP, strict=True)
        )

    def _gathered(self, weights: Weights, sites: tuple[Site, ...]) -> Weights:
        whole = self.scheme.shapes(sites).bank
        bank = jax.tree.map(
            lambda leaf, like: _trim(_gathered_in(None, self.axis, leaf), like.shape),
            weights.bank,
            whole,
        )
        return weights._replace(bank=bank)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gathered_in(dtype: str | None, axis: str, slices: jax.Array) -> jax.Array:
    """All-gathers the last axis in `dtype`. Gradients are summed over devices in their own dtype.

    A sum of many devices in bfloat16 would lose digits that the replicated form keeps.
    """
    sent = slices.astype(dtype or slices.dtype)
    last = slices.ndim - 1
    return jax.lax.all_gather(sent, axis, axis=last, tiled=True).astype(slices.dtype)


def _forward(dtype: str | None, axis: str, slices: jax.Array) -> tuple[jax.Array, None]:
    return _gathered_in(dtype, axis, slices), None


def _backward(dtype: str | None, axis: str, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    last = gradient.ndim - 1
    return (jax.lax.psum_scatter(gradient, axis, scatter_dimension=last, tiled=True),)


_gathered_in.defvjp(_forward, _backward)


def cut(whole: jax.Array, count: int, entrywise: bool) -> jax.Array:
    """An array divided into `count` slices along a new first axis.

    The last axis is divided if `entrywise`, else the flattened array. What does not divide evenly
    is padded with zeros.

    Example:
      >>> cut(jnp.arange(6).reshape(2, 3), 2, entrywise=True).tolist()
      [[[0, 1], [3, 4]], [[2, 0], [5, 0]]]
      >>> cut(jnp.arange(6).reshape(2, 3), 2, entrywise=False).tolist()
      [[0, 1, 2], [3, 4, 5]]
    """
    _, *rows, length = cut_shape(whole.shape, count, entrywise)
    size = whole.size // math.prod(rows)
    padding = [(0, 0)] * len(rows) + [(0, length * count - size)]
    padded = jnp.pad(whole.reshape(*rows, size), padding)
    return jnp.moveaxis(padded.reshape(*rows, count, length), -2, 0)


def cut_shape(shape: tuple[int, ...], count: int, entrywise: bool) -> tuple[int, ...]:
    """The shape of `cut`: (count, *rows, length).

    Example:
      >>> cut_shape((2, 3), 2, entrywise=True), cut_shape((2, 3), 2, entrywise=False)
      ((2, 2, 2), (2, 3))
    """
    rows = shape[:-1] if entrywise else ()
    return (count, *rows, -(-math.prod(shape) // (math.prod(rows) * count)))


def join(slices: Any, shape: tuple[int, ...]) -> Any:
    """The inverse of `cut`: the array of this shape, of NumPy if the slices are.

    Example:
      >>> join(cut(jnp.arange(6).reshape(2, 3), 2, entrywise=True), (2, 3)).tolist()
      [[0, 1, 2], [3, 4, 5]]
    """
    count, *rows, length = slices.shape
    order = (*range(1, slices.ndim - 1), 0, slices.ndim - 1)
    return _trim(slices.transpose(order).reshape(*rows, count * length), shape)


def _trim(padded: Any, shape: tuple[int, ...]) -> Any:
    """Without padding at the end of the last axis, in this shape."""
    rows = padded.shape[:-1]
    return padded[..., : math.prod(shape) // math.prod(rows)].reshape(shape)
