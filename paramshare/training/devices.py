"""One thin front over `jax.pmap` and `jax.shard_map`: the same per-device function, the same arrays in and out."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from paramshare.training.config import ConfigError
from paramshare.training.state import AXIS


class Devices:
    """The devices of a run, and how a function is mapped over them.

    State and data are replicated; only batches are cut. A process hands in its own part of a batch, the processes' parts in order
    making the global one.

    Args:
      mapping: "pmap" or "shard_map".
      devices: `jax.Device`s, of all processes; all there are by default.
    """

    def __init__(self, mapping: Literal["pmap", "shard_map"] = "pmap", devices: Sequence[Any] | None = None):
        self.mapping = mapping
        self.devices = list(jax.devices()) if devices is None else list(devices)
        self.local = [device for device in self.devices if device.process_index == jax.process_index()]
        self.mesh = Mesh(np.array(self.devices), (AXIS,))

    @property
    def count(self) -> int:
        """Devices of all processes."""
        return len(self.devices)

    def check_batch(self, batch_size: int) -> None:
        """Raises `ConfigError` unless a global batch can be cut evenly."""
        if batch_size % self.count:
            low = batch_size - batch_size % self.count
            offer = f"{low} or {low + self.count}" if low else f"{self.count}"
            raise ConfigError(f"batch_size {batch_size} does not divide evenly over {self.count} devices; try {offer}")

    def map(self, function: Callable, *, donate: bool = False) -> Callable:
        """Maps `function(state, data, batch)`, written for one device, over the axis `AXIS`; compiled once.

        The result takes replicated `state` and `data` (see `replicate`) and a batch (see `cut`), and returns what `function` returns,
        which must be the same on all devices.

        Args:
          function: reduces over `AXIS` whatever depends on the batch.
          donate: whether the memory of `state` may be taken for the result.
        """
        donated = (0,) if donate else ()
        if self.mapping == "pmap":
            # With axes None, pmap keeps state and results without a leading device axis: one form of state for both mappings.
            return jax.pmap(function, AXIS, in_axes=(None, None, 0), out_axes=None, devices=self.devices, donate_argnums=donated)  # pyright: ignore[reportArgumentType]
        whole, cut = PartitionSpec(), PartitionSpec(AXIS)
        # Without check_vma, collectives and their transposes mean what they mean under pmap.
        mapped = jax.shard_map(function, mesh=self.mesh, in_specs=(whole, whole, cut), out_specs=whole, check_vma=False)
        return jax.jit(mapped, donate_argnums=donated)

    def replicate(self, tree: Any) -> Any:
        """Puts a pytree of arrays, the same in every process, on all devices."""
        mesh = self.mesh if self.mapping == "shard_map" else Mesh(np.array(self.local), (AXIS,))
        return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))

    def cut(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """This process's part of a batch, leaves (b, ...), as the mapped function takes it."""
        if self.mapping == "pmap":
            return {name: x.reshape(len(self.local), -1, *x.shape[1:]) for name, x in batch.items()}
        sharding = NamedSharding(self.mesh, PartitionSpec(AXIS))
        return {name: jax.make_array_from_process_local_data(sharding, x) for name, x in batch.items()}
