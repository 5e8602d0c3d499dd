"""Plans: rules that say which parameters of a model draw on which bank, through which scheme."""

import collections
import dataclasses
import difflib
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax.numpy as jnp

from paramshare.groups import sites
from paramshare.layout import Layout, PlanError, SharedBank, count_leaves
from paramshare.parameters import Parameter, Trace, is_nnx, trace
from paramshare.schemes import Scheme, SchemeError, Site
from paramshare.schemes.interface import check_axes

if TYPE_CHECKING:
    from flax import nnx


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


class Plan:
    """An ordered list of rules. A parameter follows the first rule that matches it.

    Parameters that no rule matches stay private.

    Args:
      *rules: the rules. Several rules may name the same bank if they have the same scheme.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from paramshare import Plan, Rule, Soft
      >>> model = nn.Sequential([nn.Dense(8), nn.Dense(8), nn.Dense(8)])
      >>> plan = Plan(Rule(r"layers_\\d/kernel", Soft(templates=1)))
      >>> layout = plan.resolve(model, jax.ShapeDtypeStruct((1, 8), jnp.float32))
      >>> [str(site) for site in layout["shared"].sites]
      ['layers_0/kernel', 'layers_1/kernel', 'layers_2/kernel']
    """

    def __init__(self, *rules: Rule):
        for rule in rules:
            if not isinstance(rule, Rule):
                raise PlanError(f"a plan takes rules such as Rule(pattern, scheme), got {rule!r}")
        if not rules:
            raise PlanError("a plan needs at least one rule")
        self.rules = rules

    def __repr__(self) -> str:
        return f"Plan({', '.join(map(repr, self.rules))})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.rules == other.rules

    def __hash__(self) -> int:
        return hash(self.rules)

    def under(self, prefix: str) -> "Plan":
        r"""The same plan for the model as a submodule: all paths begin with `prefix`.

        Args:
          prefix: path of the submodule, such as "backbone".

        Example:
          >>> from paramshare import Plan, Rule, Soft
          >>> plan = Plan(Rule(r"stage1/.*/kernel", Soft(templates=2)))
          >>> plan.under("backbone").rules[0].match("backbone/stage1/block1/conv1/kernel")
          'shared'
        """
        return Plan(
            *(
                dataclasses.replace(
                    rule,
                    pattern=rule.pattern and f"{re.escape(prefix)}/(?:{rule.pattern})",
                    paths=tuple(f"{prefix}/{path}" for path in rule.paths),
                )
                for rule in self.rules
            )
        )

    @classmethod
    def blocks(
        cls,
        model: "nn.Module | nnx.Module",
        *example_inputs: Any,
        scheme: Scheme,
        include: str = r".*kernel",
        **options: Any,
    ) -> "Plan":
        """A bank for each weight that recurs over numbered blocks, without regular expressions.

        Weights recur if their paths differ in numbers only, as `block_0/mlp/kernel` and
        `block_1/mlp/kernel` do, and their shapes are equal; two or more share a bank. Print
        `paramshare.sites(model, ...)` to see which. Layers that are stacked in one parameter (by
        `nn.scan`) need a rule with `stack_axis`.

        Args:
          model: any Flax linen or NNX module.
          *example_inputs: the inputs that a linen model is initialized with.
          scheme: makes the weights of each bank.
          include: a regular expression that the whole path of a weight must match.
          **options: further arguments of `model.init`.

        Raises:
          PlanError: if no weight recurs.

        Example:
          >>> import flax.linen as nn, jax.numpy as jnp
          >>> from paramshare import Plan, Soft
          >>> model = nn.Sequential([nn.Dense(8), nn.Dense(8), nn.Dense(8)])
          >>> plan = Plan.blocks(model, jnp.ones((1, 8)), scheme=Soft(templates=2))
          >>> [(rule.bank, len(rule.paths)) for rule in plan.rules]
          [('layers.kernel', 3)]
        """
        try:
            pattern = re.compile(include)
        except re.error as error:
            raise PlanError(f"include={include!r} is not a regular expression: {error}") from None
        chosen = {
            group: tuple(path for path in group.paths if pattern.fullmatch(path))
            for group in sites(model, *example_inputs, **options).groups
        }
        found = {group: paths for group, paths in chosen.items() if len(paths) > 1}
        if not found:
            raise PlanError(
                f"no weight of {type(model).__name__} whose path matches {include!r} recurs over "
                "numbered blocks; print paramshare.sites(model, ...) to see the paths"
            )
        names = collections.Counter(group.name for group in found)
        return cls(
            *(
                Rule(
                    paths=paths,
                    scheme=scheme,
                    bank=group.name + (".{shape}" if names[group.name] > 1 else ""),
                )
                for group, paths in found.items()
            )
        )

    def resolve(
        self, model: "nn.Module | nnx.Module | Trace", *example_inputs: Any, **options: Any
    ) -> Layout:
        """Matches the rules against the model's parameters, by tracing `model.init`.

        Where a scheme starts from the model's own initialization (`initial="model"`), the
        initializers of its sites are sampled. Otherwise nothing is allocated or computed.

        An NNX module holds its parameters, so that nothing is traced or sampled: the mean and
        standard deviation are those of its arrays. Of an abstract module they are unknown.

        Args:
          model: any Flax linen or NNX module, or its `Trace`.
          *example_inputs: the inputs that the model is initialized with. Of arrays and
            `jax.ShapeDtypeStruct`s, only the shape and dtype matter. NNX modules need none; with
            inputs, sites are in the order of calls, otherwise of definition.
          **options: further arguments of `model.init`, such as `train=False` or `method="encode"`;
            for an NNX module, of its method.

        Returns:
          The layout. A bank's sites are in the order in which the model calls its layers.

        Raises:
          PlanError: if a rule matches nothing, a path does not exist, or a bank's sites do not fit
            its scheme.
        """
        traced = model if isinstance(model, Trace) else trace(model, *example_inputs, **options)
        parameters = traced.parameters
        if not parameters:
            raise PlanError(
                f"{type(model).__name__} has no parameters, so there is nothing to share"
            )
        claimed: dict[str, int] = {}
        sites: dict[str, list[Site]] = {}
        schemes: dict[str, tuple[Rule, Any]] = {}

        def shapes_of(other: "nn.Module | nnx.Module") -> dict[str, tuple[int, ...]]:
            if not isinstance(other, nn.Module) and not is_nnx(other):
                raise PlanError(
                    f"the small model to repeat must be a Flax module, such as Net(width=1), got "
                    f"{other!r}"
                )
            try:
                small = trace(other, *example_inputs, **options).parameters
            except Exception as error:  # on a wrong shape, a model can raise anything
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise PlanError(
                    f"the small model {type(other).__name__} cannot take the example inputs of the "
                    f"model: {reason}"
                ) from error
            return {path: parameter.shape for path, parameter in small.items()}

        for number, rule in enumerate(self.rules):
            taken: dict[str, int] = {}
            for path, parameter in parameters.items():
                bank = rule.match(path, parameter.shape)
                if bank is None:
                    continue
                if path in claimed:
                    taken[path] = claimed[path]
                    continue
                claimed[path] = number
                if not bank or "/" in bank or bank == "model":
                    raise PlanError(
                        f"{rule} puts {path!r} into a bank named {bank!r}; a name must not be "
                        "empty, contain '/', or be 'model'"
                    )
                if schemes.setdefault(bank, (rule, rule.scheme))[1] != rule.scheme:
                    raise PlanError(
                        f"{schemes[bank][0]} and {rule} both use bank {bank!r}, with "
                        f"{schemes[bank][1]!r} and {rule.scheme!r}; use different bank names, or "
                        "one scheme"
                    )
                sites.setdefault(bank, []).extend(rule.sites(path, parameter))
            self._check_matched(number, rule, claimed, taken, parameters)
        order = {path: i for i, path in enumerate(parameters)}
        banks = []
        for name, members in sites.items():
            members.sort(key=lambda site: (order[site.path], site.index or 0))
            try:
                scheme = schemes[name][1].bind(shapes_of)
                scheme.check(tuple(members))
                if scheme.measures_initializer:
                    members = _measured(traced, members)
                    scheme.check_initializer(tuple(s for s in members if s.std is not None))
            except SchemeError as error:
                raise PlanError(f"bank {name!r}: {error}") from None
            banks.append(SharedBank(name, scheme, tuple(members)))
        plain = count_leaves(list(parameters.values()))
        return Layout(tuple(banks), plain, traced.integers)

    def _check_matched(
        self, number: int, rule: Rule, claimed: dict, taken: dict, parameters: Mapping
    ) -> None:
        for path in rule.paths:
            if path not in parameters:
                raise PlanError(
                    f"the model has no parameter {path!r}; nearest: {_nearest(path, parameters)}"
                )
            if path in taken:
                raise PlanError(
                    f"{rule} lists {path!r}, but the earlier {self.rules[taken[path]]} takes it"
                )
        if number not in claimed.values():
            if taken:
                path, first = next(iter(taken.items()))
                raise PlanError(
                    f"{rule} matches only parameters that earlier rules take, such as {path!r}, "
                    f"taken by {self.rules[first]}"
                )
            raise PlanError(
                f"{rule} matches no parameter of the model (the whole path must match); nearest: "
                f"{_nearest(rule.pattern or '', parameters)}"
            )


def _measured(traced: Trace, sites: Sequence[Site]) -> tuple[Site, ...]:
    """The sites with the mean and standard deviation of the model's initializers."""
    axes = {site.path: None if site.index is None else site.stack_axis for site in sites}
    statistics = traced.measure(axes)

    def measured(site: Site) -> Site:
        if site.path not in statistics:
            return site
        mean, std = statistics[site.path][site.index or 0]
        return dataclasses.replace(site, mean=mean, std=std)

    return tuple(map(measured, sites))


def _nearest(target: str, parameters: Mapping[str, Any]) -> str:
    """The three paths nearest to a path or a pattern, for an error message."""
    plain = re.sub(r"\(\?P<\w+>|\[[^]]*\]|\\[dw.]|[()|*+?^$\\]|\{[^}]*\}", "", target)
    near = difflib.get_close_matches(plain, parameters, n=3, cutoff=0.0)
    return ", ".join(map(repr, near))
