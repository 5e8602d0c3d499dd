"""Rules: which parameters of a model draw on which bank, and through which scheme."""

import dataclasses
import operator
import re
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp

from paramshare.layout import PlanError
from paramshare.parameters import Parameter
from paramshare.schemes import Scheme, SchemeError, Site
from paramshare.schemes.interface import check_axes


@dataclasses.dataclass(frozen=True)
class Rule:
    r"""Which parameters draw on a bank.

    Args:
      pattern: a regular expression that the whole parameter path must match. A path is its
        names joined by "/", without the leading "params".
      scheme: makes the weights.
      bank: the bank's name. It may use named groups of the pattern in braces, and "{shape}" for the
        shape of the weight, such as 3x3x16x16; one bank is created per value.
      paths: exact paths, instead of a pattern.
      stack_axis: for parameters that stack the weights of several layers (`nn.scan`, `nn.vmap`),
        the layer axis. Each layer is then a separate site.
      in_axes: the input axes of one layer's weight. Inferred by default for `nn.Dense`, `nn.Conv`,
        `nn.ConvTranspose`, `nn.DenseGeneral`, attention, `nn.Embed`, and `nn.Einsum` (unless its
        string has "..." for the kernel). Other layers default to the second-to-last axis.
      out_axes: the output axes, inferred for the same layers. Other layers default to the last
        axis.
      partition: names of the mesh axes that divide the bank, such as ("data",); () for none. By
        default those that divide the model's own parameters (`nn.with_partitioning`). For models
        with logical names (`nn.with_logical_partitioning`) it is a logical name; to divide a bank
        over several mesh axes, give it a name of its own, such as "bank", and add ("bank", ("data",
        "model")) to the rules for logical axes. The mesh must divide the sizes of arrays, such as
        that of a ring; rings and low-rank factors need a mesh with axes of `AxisType.Auto`.

    Raises:
      PlanError: if an argument is invalid.

    Example:
      >>> from paramshare import Rule, Soft
      >>> rule = Rule(r"(?P<stage>stage\d)/block[2-9]/conv\d/kernel", Soft(templates=2), "{stage}")
      >>> rule.match("stage1/block2/conv1/kernel")
      'stage1'
    """

    pattern: str | None = None
    scheme: Scheme | None = None
    bank: str = "shared"
    paths: tuple[str, ...] = ()
    stack_axis: int | None = None
    in_axes: tuple[int, ...] | None = None
    out_axes: tuple[int, ...] | None = None
    partition: tuple[str, ...] | None = None

    def __post_init__(self):
        paths = (self.paths,) if isinstance(self.paths, str) else tuple(self.paths)
        object.__setattr__(self, "paths", paths)
        if (self.pattern is None) == (not paths):
            raise PlanError(f"{self}: a rule takes either a pattern or a list of paths")
        if not isinstance(self.scheme, Scheme):
            raise PlanError(
                f"{self}: scheme must be a sharing scheme such as Soft(templates=2), got "
                f"{self.scheme!r}"
            )
        if (
            not isinstance(self.bank, str)
            or not isinstance(self.pattern, str | None)
            or not all(isinstance(p, str) for p in paths)
        ):
            raise PlanError(
                f"{self}: pattern, bank and paths must be strings, got {self.pattern!r}, "
                f"{self.bank!r} and {paths!r}"
            )
        for name in ("in_axes", "out_axes"):
            object.__setattr__(self, name, self._axes(name, getattr(self, name)))
        if not isinstance(self.stack_axis, int | None) or isinstance(self.stack_axis, bool):
            raise PlanError(f"{self}: stack_axis must be an integer, got {self.stack_axis!r}")
        if isinstance(self.partition, str):
            object.__setattr__(self, "partition", (self.partition,))
        if self.partition is not None and not all(isinstance(x, str) for x in self.partition):
            raise PlanError(f"{self}: partition must be names of axes, got {self.partition!r}")
        repeated = sorted({path for path in paths if paths.count(path) > 1})
        if repeated:
            raise PlanError(f"{self}: path {repeated[0]!r} is listed twice; remove one of them")
        try:
            groups = re.compile(self.pattern or "").groupindex
        except re.error as error:
            raise PlanError(f"{self}: the pattern is not a regular expression: {error}") from None
        try:
            self.bank.format(**{"shape": "", **dict.fromkeys(groups, "")})
        except (KeyError, IndexError, ValueError) as error:
            raise PlanError(
                f"{self}: cannot format the bank name {self.bank!r} ({error}); the pattern's named "
                f"groups are {list(groups)}"
            ) from None

    def __str__(self) -> str:
        return (
            f"Rule({self.pattern!r})" if self.pattern is not None else f"Rule(paths={self.paths!r})"
        )

    def match(self, path: str, shape: tuple[int, ...] = ()) -> str | None:
        """The name of the bank that the parameter at `path`, of this shape, draws on, or None."""
        if self.stack_axis is not None:
            shape = shape[: self.stack_axis] + shape[self.stack_axis + 1 :]
        groups: dict[str, Any] = {"shape": "x".join(map(str, shape))}
        if self.pattern is None:
            return self.bank.format(**groups) if path in self.paths else None
        match = re.fullmatch(self.pattern, path)
        if match is None:
            return None
        groups |= match.groupdict()
        for name, value in groups.items():
            if value is None and "{" + name in self.bank:
                raise PlanError(
                    f"{self}: the bank name {self.bank!r} uses group {name!r}, but that group "
                    f"matched nothing in {path!r}"
                )
        return self.bank.format(**groups)

    def sites(self, path: str, parameter: Parameter) -> list[Site]:
        """The sites of a parameter that the rule matches: one, or one for each stacked layer."""
        shape, axis = parameter.shape, self.stack_axis
        if axis is not None:
            if not 0 <= axis < len(shape):
                raise PlanError(
                    f"{self} has stack_axis={axis}, but {path!r} has shape {shape}; stack_axis "
                    f"must be from 0 to {len(shape) - 1}"
                )
            shape = shape[:axis] + shape[axis + 1 :]
        inputs, outputs = self.in_axes, self.out_axes
        if parameter.axes is not None and parameter.axes.ndim == len(shape):
            inputs = parameter.axes.inputs if inputs is None else inputs
            outputs = parameter.axes.outputs if outputs is None else outputs
        site = Site(path, shape, jnp.dtype(parameter.dtype).name, in_axes=inputs, out_axes=outputs)
        try:
            check_axes(site)
        except SchemeError as error:
            raise PlanError(f"{self}: {error}") from None
        if axis is None:
            return [site]
        layers = range(parameter.shape[axis])
        return [dataclasses.replace(site, index=i, stack_axis=axis) for i in layers]

    def _axes(self, name: str, value: Any) -> tuple[int, ...] | None:
        if value is None:
            return None
        try:
            return tuple(map(operator.index, value if isinstance(value, Iterable) else [value]))
        except TypeError:
            raise PlanError(f"{self}: {name} must be axes such as (0, 1), got {value!r}") from None
