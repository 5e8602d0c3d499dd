"""The devices of a run: one interface to `jax.pmap` and `jax.shard_map`."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from paramshare.training.config import ConfigError
from paramshare.training.state import AXIS


class Devices:
    """The devices of a run, and how a function is mapped over them.

    Data are replicated, and so is the state, except for leaves that are said to be divided. Batches
    are divided. Each process passes in its part of a batch; the parts in the order of the processes
    make the global batch.

    Args:
      mapping: "pmap" or "shard_map".
      devices: `jax.Device`s of all processes; all available devices by default.
    """

    def __init__(
        self, mapping: Literal["pmap", "shard_map"] = "pmap", devices: Sequence[Any] | None = None
    ):
        self.mapping = mapping
        self.devices = list(jax.devices()) if devices is None else list(devices)
        self.local = [
            device for device in self.devices if device.process_index == jax.process_index()
        ]
        self.mesh = Mesh(np.array(self.devices), (AXIS,))

    @property
    def count(self) -> int:
        """Number of devices of all processes."""
        return len(self.devices)

    def check_batch(self, batch_size: int) -> None:
        """Raises `ConfigError` unless a global batch divides evenly over the devices."""
        if batch_size % self.count:
            low = batch_size - batch_size % self.count
            nearest = f"{low} or {low + self.count}" if low else f"{self.count}"
            raise ConfigError(
                f"batch_size is {batch_size}; it must be a multiple of {self.count}, the number of "
                f"devices, such as {nearest}"
            )

    def map(self, function: Callable, *, donate: bool = False, divided: Any = False) -> Callable:
        """Maps `function(state, data, batch)`, written for one device, over the axis `AXIS`.

        The mapped function takes replicated `state` and `data` (see `place`) and a divided batch
        (see `cut`). It returns what `function` returns, which must be equal on all devices.

        Args:
          function: reduces or gathers over `AXIS` whatever depends on the batch.
          donate: whether the memory of `state` may be reused for the result, `(state, others)`.
          divided: which leaves of `state` are divided over devices along a first axis, which
            `function` does not see: a pytree of bools; False for none. If `donate`, so are the same
            leaves of the new state.
        """
        donated = (0,) if donate else ()
        whole, cut = PartitionSpec(), PartitionSpec(AXIS)
        if isinstance(divided, bool):
            if self.mapping == "pmap":
                # With axes None, pmap keeps state and results without a leading device axis: both
                # mappings then have the same form of state.
                return jax.pmap(
                    function,
                    AXIS,
                    in_axes=(None, None, 0),
                    out_axes=None,
                    devices=self.devices,
                    donate_argnums=donated,
                )  # pyright: ignore[reportArgumentType]
            # Without check_vma, collectives and their transposes behave as under pmap.
            mapped = jax.shard_map(
                function,
                mesh=self.mesh,
                in_specs=(whole, whole, cut),
                out_specs=whole,
                check_vma=False,
            )
            return jax.jit(mapped, donate_argnums=donated)

        # Flat, since pmap hashes axes.
        leaves, tree = jax.tree.flatten(divided)

        def flat(state: tuple[Any, ...], data: Any, batch: Any) -> Any:
            result = function(tree.unflatten(state), data, batch)
            return (tuple(jax.tree.leaves(result[0])), result[1]) if donate else result

        def without_axis(state: tuple[Any, ...], data: Any, batch: Any) -> Any:
            parts = tuple(x[0] if each else x for each, x in zip(leaves, state, strict=True))
            result = flat(parts, data, batch)
            if not donate:
                return result
            state, others = result
            return tuple(x[None] if e else x for e, x in zip(leaves, state, strict=True)), others

        if self.mapping == "pmap":
            axes = tuple(0 if each else None for each in leaves)
            mapped = jax.pmap(
                flat,
                AXIS,
                in_axes=(axes, None, 0),
                out_axes=(axes, None) if donate else None,
                devices=self.devices,
                donate_argnums=donated,
            )  # pyright: ignore[reportArgumentType]
        else:
            specs = tuple(cut if each else whole for each in leaves)
            mapped = jax.shard_map(
                without_axis,
                mesh=self.mesh,
                in_specs=(specs, whole, cut),
                out_specs=(specs, whole) if donate else whole,
                check_vma=False,
            )
            mapped = jax.jit(mapped, donate_argnums=donated)

        def call(state: Any, data: Any, batch: Any) -> Any:
            result = mapped(tuple(jax.tree.leaves(state)), data, batch)
            return (tree.unflatten(result[0]), result[1]) if donate else result

        return call

    def place(self, tree: Any, divided: Any = False) -> Any:
        """Copies a pytree of arrays, equal in every process, to all devices.

        Args:
          tree: arrays.
          divided: as for `map`; a full pytree. Each device gets its part of these leaves only.
        """
        local = self.mapping == "pmap"
        mesh = Mesh(np.array(self.local), (AXIS,)) if local else self.mesh
        if isinstance(divided, bool):
            return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))
        mine = [i for i, device in enumerate(self.devices) if device in self.local]

        def put(each: bool, leaf: Any) -> Any:
            if not each:
                return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec()))
            sharding, leaf = NamedSharding(mesh, PartitionSpec(AXIS)), np.asarray(leaf)
            leaf = leaf[mine] if local else leaf
            return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

        return jax.tree.map(put, divided, tree)

    def across(self, tree: Any, divided: Any) -> Any:
        """What `map` returns, with divided leaves as arrays over the devices of all processes."""

        def spread(each: bool, leaf: jax.Array) -> jax.Array:
            if not each or len(leaf.sharding.device_set) == self.count:
                return leaf
            shape = (self.count, *leaf.shape[1:])
            parts = [shard.data for shard in leaf.addressable_shards]
            sharding = NamedSharding(self.mesh, PartitionSpec(AXIS))
            return jax.make_array_from_single_device_arrays(shape, sharding, parts)

        return jax.tree.map(spread, divided, tree)

    def gather(self, tree: Any, divided: Any) -> Any:
        """What `map` returns, with divided leaves as whole NumPy arrays, in every process."""
        copy = jax.jit(lambda leaf: leaf, out_shardings=NamedSharding(self.mesh, PartitionSpec()))
        return jax.tree.map(
            lambda each, leaf: np.asarray(copy(leaf)) if each else leaf,
            divided,
            self.across(tree, divided),
        )

    def cut(self, batch: dict[str, Any]) -> dict[str, Any]:
        """This process's part of a batch, leaves (b, ...), as the mapped function takes it."""
        if self.mapping == "pmap":
            count = len(self.local)
            return jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), batch)
        sharding = NamedSharding(self.mesh, PartitionSpec(AXIS))
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
