"""How banks are divided over a device mesh, from the axis names of the model's own parameters."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax

from paramshare.parameters import Parameter
from paramshare.schemes import Site

Names = tuple[Any, ...]  # of an array's axes: each a text, a tuple of texts, or None


@dataclasses.dataclass(frozen=True)
class Partition:
    """The mesh axes that divide the arrays of a bank.

    An array that stacks whole kernels, (G, *shape), is divided as the model divides the kernel. Of
    other arrays the longest axis is divided over all mesh axes of the sites: templates, for one,
    are kept flat, (k, P), so that all kernels of a bank are one matrix product.

    Attributes:
      axes: names of the mesh axes, or of logical axes.
      logical: whether they are logical names (`nn.with_logical_partitioning`). Flax maps each array
        axis from a single logical name, so that there `axes` has one.
      shape: shape of the sites, where all have the same shape and names; else ().
      names: their names, one for each axis of `shape`.

    Example:
      >>> import jax.numpy as jnp
      >>> from paramshare.partitioning import Partition
      >>> partition = Partition(("data", "model"), shape=(4, 8), names=("data", "model"))
      >>> partition.names_of((2, 4, 8)), partition.names_of((2, 32))
      ((None, 'data', 'model'), (None, ('data', 'model')))
    """

    axes: tuple[str, ...]
    logical: bool = False
    shape: tuple[int, ...] = ()
    names: Names = ()

    def names_of(self, shape: tuple[int, ...]) -> Names:
        """The names of the axes of an array of the bank."""
        if self.shape and shape[1:] == self.shape:
            return (None, *self.names)
        names: list[Any] = [None] * len(shape)
        longest = max(range(len(shape)), key=lambda axis: (shape[axis], axis))
        names[longest] = self.axes[0] if len(self.axes) == 1 else self.axes
        return tuple(names)

    def box(self, tree: Any) -> Any:
        """Arrays in `nn.Partitioned` boxes; scalars and what is boxed already stay as they are."""
        kind = nn.LogicallyPartitioned if self.logical else nn.Partitioned

        def boxed(leaf: Any) -> Any:
            if is_box(leaf) or not leaf.shape:
                return leaf
            return kind(leaf, self.names_of(leaf.shape))

        return jax.tree.map(boxed, tree, is_leaf=is_box)


def is_box(value: Any) -> bool:
    """Whether a value is a box that describes an array's sharding, such as `nn.Partitioned`."""
    return isinstance(value, nn.meta.AxisMetadata)


def partition(
    sites: Sequence[Site],
    parameters: Mapping[str, Parameter],
    axes: tuple[str, ...] | None = None,
) -> Partition | None:
    """The partition of a bank.

    Args:
      sites: the sites of the bank.
      parameters: those of the model, by path.
      axes: names to use instead of those of the parameters; () to divide nothing.

    Returns:
      None if nothing is divided.
    """
    owners = [parameters[site.path] for site in sites]
    names = [_names(site, owner) for site, owner in zip(sites, owners, strict=True)]
    logical = any(owner.logical for owner in owners)
    if axes is not None:
        return Partition(axes, logical) if axes else None
    if not any(map(any, names)):
        return None
    axes = tuple(dict.fromkeys(name for each in names for name in _flat(each)))
    if logical:  # the name of the longest axis of the largest site that has names
        of_axis = [
            (site.size, size, name)
            for site, each in zip(sites, names, strict=True)
            for size, part in zip(site.shape, each, strict=False)
            for name in _flat((part,))
        ]
        axes = (max(of_axis, key=lambda entry: entry[:2])[2],)
    same = {(site.shape, each) for site, each in zip(sites, names, strict=True)}
    shape, each = same.pop() if len(same) == 1 else ((), ())
    return Partition(axes, logical, shape, each)


def _names(site: Site, parameter: Parameter) -> Names:
    """The names of a site's axes: those of its parameter, without the axis of stacked layers."""
    names = parameter.names
    return names if site.index is None else names[: site.stack_axis] + names[site.stack_axis + 1 :]


def _flat(names: Iterable[Any]) -> Iterable[str]:
    for name in names:
        if name is not None:
            yield from (name,) if isinstance(name, str) else name
