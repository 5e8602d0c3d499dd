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

    State and data are replicated; batches are divided. Each process passes in its part of a batch;
    the parts in the order of the processes make the global batch.

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

    def map(self, function: Callable, *, donate: bool = False) -> Callable:
        """Maps `function(state, data, batch)`, written for one device, over the axis `AXIS`.

        The mapped function takes replicated `state` and `data` (see `replicate`) and a divided
        batch (see `cut`). It returns what `function` returns, which must be equal on all devices.

        Args:
          function: reduces or gathers over `AXIS` whatever depends on the batch.
          donate: whether the memory of `state` may be reused for the result.
        """
        donated = (0,) if donate else ()
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
        whole, cut = PartitionSpec(), PartitionSpec(AXIS)
        # Without check_vma, collectives and their transposes behave as under pmap.
        mapped = jax.shard_map(
            function, mesh=self.mesh, in_specs=(whole, whole, cut), out_specs=whole, check_vma=False
        )
        return jax.jit(mapped, donate_argnums=donated)

    def replicate(self, tree: Any) -> Any:
        """Copies a pytree of arrays, equal in every process, to all devices."""
        mesh = self.mesh if self.mapping == "shard_map" else Mesh(np.array(self.local), (AXIS,))
        return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))

    def cut(self, batch: dict[str, Any]) -> dict[str, Any]:
        """This process's part of a batch, leaves (b, ...), as the mapped function takes it."""
        if self.mapping == "pmap":
            count = len(self.local)
            return jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), batch)
        sharding = NamedSharding(self.mesh, PartitionSpec(AXIS))
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
