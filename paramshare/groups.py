"""The parameters of a model in groups: which weights recur from block to block."""

import collections
import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import flax.linen as nn

from paramshare.layout import PlanError, table
from paramshare.parameters import trace

if TYPE_CHECKING:
    from flax import nnx

LINEAR = ("Dense", "DenseGeneral", "Einsum", "Linear", "LinearGeneral")


@dataclasses.dataclass(frozen=True)
class Group:
    """Parameters whose paths differ in numbers only, of one shape.

    Attributes:
      pattern: the path with "*" for the numbers that differ.
      paths: the paths, in the order in which the model calls their layers.
      shape: the shape of each.
      owner: the class of the module that has them.
    """

    pattern: str
    paths: tuple[str, ...]
    shape: tuple[int, ...]
    owner: str

    @property
    def name(self) -> str:
        """A name for a bank: the pattern without numbers, with dots for slashes."""
        parts = (re.sub(r"[_*-]*\*[_*-]*", "", part) for part in self.pattern.split("/"))
        return ".".join(part for part in parts if part)


@dataclasses.dataclass(frozen=True)
class Sites:
    """The parameters of a model, grouped; its text is a table."""

    groups: tuple[Group, ...]

    def __str__(self) -> str:
        rows = [("parameter", "shape", "layer", "layers", "entries")]
        for group in self.groups:
            shape = "x".join(map(str, group.shape)) or "()"
            entries = len(group.paths) * math.prod(group.shape)
            rows.append((group.pattern, shape, group.owner, str(len(group.paths)), f"{entries:,}"))
        return "\n".join(table(rows, right={3, 4}))


def sites(model: "nn.Module | nnx.Module", *example_inputs: Any, **options: Any) -> Sites:
    """The parameters of a model: paths, shapes, owning layers, and how many layers recur.

    Parameters whose paths differ in numbers only and whose shapes are equal are one line, with "*"
    for the numbers. `Plan.blocks` gives each such group a bank. Nothing is computed.

    Args:
      model: any Flax linen or NNX module.
      *example_inputs: the inputs that the model is initialized with; only their shapes and dtypes
        are used. NNX modules need none.
      **options: further arguments of `model.init`, or of an NNX module's method.

    Example:
      >>> import flax.linen as nn, jax.numpy as jnp, paramshare
      >>> model = nn.Sequential([nn.Dense(8), nn.Dense(8), nn.Dense(2)])
      >>> print(paramshare.sites(model, jnp.ones((1, 8))))
      parameter        shape  layer  layers  entries
      ---------------  -----  -----  ------  -------
      layers_*/bias    8      Dense       2       16
      layers_*/kernel  8x8    Dense       2      128
      layers_2/bias    2      Dense       1        2
      layers_2/kernel  8x2    Dense       1       16
    """
    found: dict[tuple[Any, ...], list[str]] = {}
    for path, parameter in trace(model, *example_inputs, **options).parameters.items():
        key = tuple(re.split(r"\d+", path)), parameter.shape, parameter.owner
        found.setdefault(key, []).append(path)
    groups = (
        Group(_starred(paths), tuple(paths), shape, owner)
        for (_, shape, owner), paths in found.items()
    )
    return Sites(tuple(groups))


def selected(
    model: "nn.Module | nnx.Module",
    example_inputs: Sequence[Any],
    options: Mapping[str, Any],
    include: str | None,
    target_modules: str | Sequence[str] | None,
) -> list[Group]:
    """The groups of a model's parameters, with those paths that are chosen.

    Args:
      model: as for `sites`.
      example_inputs: as for `sites`.
      options: as for `sites`.
      include: see `Plan.blocks`.
      target_modules: see `Plan.blocks`.

    Raises:
      PlanError: if both are given, or an expression is malformed, or nothing is chosen.
    """
    if include is not None and target_modules is not None:
        raise PlanError(
            f"include={include!r} and target_modules={target_modules!r} both say which weights to "
            "share; pass one of them"
        )
    pattern = r"(?:.*/)?kernel" if include is None else include
    linear = target_modules == "all-linear"
    if isinstance(target_modules, str) and not linear:
        pattern = f"(?:{target_modules})/kernel"
    elif target_modules is not None and not linear:
        pattern = f"(?:.*/)?(?:{'|'.join(map(re.escape, target_modules))})/kernel"
    try:
        chosen = re.compile(pattern)
    except re.error as error:
        name = "include" if target_modules is None else "target_modules"
        value = include if target_modules is None else target_modules
        raise PlanError(f"{name}={value!r} is not a regular expression: {error}") from None
    groups = sites(model, *example_inputs, **options).groups
    found = (
        dataclasses.replace(group, paths=tuple(filter(chosen.fullmatch, group.paths)))
        for group in groups
        if not linear or group.owner in LINEAR
    )
    result = [group for group in found if group.paths]
    if not result:
        raise PlanError(
            f"no weight of {type(model).__name__} matches include={include!r}, target_modules="
            f"{target_modules!r}; print paramshare.sites(model, ...) to see the paths"
        )
    return result


def bank_names(groups: Sequence[Group]) -> list[str]:
    """Different names for the banks of groups; "{shape}" where only the shape tells them apart.

    Example:
      >>> kernels = [Group("a_*/kernel", (), (2,), "Dense"), Group("a*/kernel", (), (2,), "Dense")]
      >>> bank_names([*kernels, Group("b*/kernel", (), (3,), "Dense")])
      ['a.kernel.1', 'a.kernel.2', 'b.kernel']
    """
    same = collections.Counter(group.name for group in groups)
    alike = collections.Counter((group.name, group.shape) for group in groups)
    seen: collections.Counter[Any] = collections.Counter()
    names = []
    for group in groups:
        name, key = group.name, (group.name, group.shape)
        seen[key] += 1
        if alike[key] < same[name]:
            name += ".{shape}"
        names.append(f"{name}.{seen[key]}" if alike[key] > 1 else name)
    return names


def _starred(paths: list[str]) -> str:
    """The paths as one, with "*" for the numbers in which they differ."""
    split = [re.split(r"(\d+)", path) for path in paths]
    columns = (set(column) for column in zip(*split, strict=True))
    return "".join(column.pop() if len(column) == 1 else "*" for column in columns)
