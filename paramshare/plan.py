"""Plans: rules that say which parameters of a model draw on which bank, through which scheme."""

import dataclasses
import difflib
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from paramshare.layout import Layout, PlanError, SharedBank, count_leaves
from paramshare.schemes import Scheme, SchemeError, Site


@dataclasses.dataclass(frozen=True)
class Rule:
    r"""Which parameters draw on a bank.

    Args:
      pattern: a regular expression that the whole parameter path must match; paths are joined by "/", without the leading "params".
      scheme: how the weights are made.
      bank: the bank's name; named groups of the pattern may stand in it in braces, and give a bank for each value they take.
      paths: instead of a pattern, the exact paths.
      stack_axis: where the parameter stacks the weights of several layers (as `nn.scan` and `nn.vmap` do), the axis that counts
        them; every layer is then a site of its own.

    Raises:
      PlanError: if the pattern is no regular expression, or the bank names a group that it does not have.

    Example:
      >>> from paramshare import Rule, Soft
      >>> Rule(r"(?P<stage>stage\d)/block[2-9]/conv\d/kernel", Soft(templates=2), bank="{stage}").bank
      '{stage}'
    """

    pattern: str | None = None
    scheme: Scheme | None = None
    bank: str = "shared"
    paths: tuple[str, ...] = ()
    stack_axis: int | None = None

    def __post_init__(self):
        paths = (self.paths,) if isinstance(self.paths, str) else tuple(self.paths)
        object.__setattr__(self, "paths", paths)
        if (self.pattern is None) == (not paths):
            raise PlanError(f"{self}: a rule takes either a pattern or a list of paths")
        if not isinstance(self.scheme, Scheme) or isinstance(self.scheme, type):
            raise PlanError(f"{self}: scheme must be a sharing scheme such as Soft(templates=2), got {self.scheme!r}")
        if not isinstance(self.bank, str) or not isinstance(self.pattern, str | None) or not all(isinstance(p, str) for p in paths):
            raise PlanError(f"{self}: pattern, bank and paths are strings; got {self.pattern!r}, {self.bank!r} and {paths!r}")
        repeated = sorted({path for path in paths if paths.count(path) > 1})
        if repeated:
            raise PlanError(f"{self}: path {repeated[0]!r} is listed twice; a parameter is one site")
        try:
            groups = re.compile(self.pattern or "").groupindex
        except re.error as error:
            raise PlanError(f"{self}: the pattern is not a regular expression: {error}") from None
        try:
            self.bank.format(**dict.fromkeys(groups, ""))
        except (KeyError, IndexError, ValueError) as error:
            raise PlanError(
                f"{self}: the bank's name {self.bank!r} asks for {error}, but the pattern's named groups are {list(groups)}"
            ) from None

    def __str__(self) -> str:
        return f"Rule({self.pattern!r})" if self.pattern is not None else f"Rule(paths={self.paths!r})"

    def match(self, path: str) -> str | None:
        """The name of the bank that the parameter at `path` draws on, or None."""
        if self.pattern is None:
            return self.bank if path in self.paths else None
        found = re.fullmatch(self.pattern, path)
        if found is None:
            return None
        unset = [name for name, value in found.groupdict().items() if value is None and "{" + name in self.bank]
        if unset:
            raise PlanError(f"{self} matches {path!r} without setting its group {unset[0]!r}, which the bank's name {self.bank!r} needs")
        return self.bank.format(**found.groupdict())


class Plan:
    """Rules in order: of those that match a parameter, the first decides. What no rule matches stays private.

    Args:
      *rules: the rules. Rules may name the same bank if they name the same scheme.

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
                raise PlanError(f"a plan is made of rules, got {rule!r}")
        if not rules:
            raise PlanError("a plan needs at least one rule")
        self.rules = rules

    def __repr__(self) -> str:
        return f"Plan({', '.join(map(repr, self.rules))})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.rules == other.rules

    def __hash__(self) -> int:
        return hash(self.rules)

    def resolve(self, model: nn.Module, *example_inputs: Any, **options: Any) -> Layout:
        """Matches the rules against the model's parameters. Allocates nothing and touches no device.

        Args:
          model: any Flax linen module.
          *example_inputs: what the model is initialised with; arrays or `jax.ShapeDtypeStruct`s count by shape alone.
          **options: further arguments of `model.init`, such as `train=False` or `method="encode"`.

        Returns:
          The layout. A bank's sites stand in the order in which the model calls its layers.

        Raises:
          PlanError: if a rule matches nothing, a path does not exist, or a bank's sites do not fit its scheme.
        """
        parameters = trace_parameters(model, *example_inputs, **options)
        claimed: dict[str, int] = {}
        sites: dict[str, list[Site]] = {}
        schemes: dict[str, tuple[Rule, Any]] = {}

        traced: dict[int, dict[str, tuple[int, ...]]] = {}

        def shapes_of(other: nn.Module) -> dict[str, tuple[int, ...]]:
            if id(other) not in traced:
                if not isinstance(other, nn.Module):
                    raise PlanError(f"the small model to repeat is {other!r}; give a Flax module, such as Net(width=1)")
                try:
                    parameters = trace_parameters(other, *example_inputs, **options)
                except Exception as error:  # a model may fail on a wrong shape in any way it likes
                    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                    raise PlanError(f"the small model {type(other).__name__} cannot take the model's example inputs: {reason}") from error
                traced[id(other)] = {path: leaf.shape for path, leaf in parameters.items()}
            return traced[id(other)]

        for number, rule in enumerate(self.rules):
            taken: dict[str, int] = {}
            for path, shape in parameters.items():
                bank = rule.match(path)
                if bank is None:
                    continue
                if path in claimed:
                    taken[path] = claimed[path]
                    continue
                claimed[path] = number
                if not bank or "/" in bank or bank == "model":
                    raise PlanError(f"{rule} gives {path!r} a bank named {bank!r}; a name must not be empty, hold a '/', or be 'model'")
                if schemes.setdefault(bank, (rule, rule.scheme))[1] != rule.scheme:
                    raise PlanError(
                        f"{schemes[bank][0]} and {rule} both draw on bank {bank!r}, through {schemes[bank][1]} and {rule.scheme}; "
                        "give them banks of different names, or one scheme"
                    )
                sites.setdefault(bank, []).extend(_sites(rule, path, shape))
            self._check_matched(number, rule, claimed, taken, parameters)
        order = {path: i for i, path in enumerate(parameters)}
        banks = []
        for name, found in sites.items():
            scheme = schemes[name][1]
            scheme = scheme.bind(shapes_of) if hasattr(scheme, "bind") else scheme
            bank = SharedBank(name, scheme, tuple(sorted(found, key=lambda site: (order[site.path], site.index or 0))))
            try:
                bank.scheme.check(bank.sites)
            except SchemeError as error:
                raise PlanError(f"bank {name!r}: {error}") from None
            banks.append(bank)
        return Layout(tuple(banks), plain=count_leaves(parameters))

    def _check_matched(self, number: int, rule: Rule, claimed: dict, taken: dict, parameters: dict) -> None:
        for path in rule.paths:
            if path not in parameters:
                raise PlanError(f"the model has no parameter {path!r}; nearest: {_nearest(path, parameters)}")
            if path in taken:
                raise PlanError(f"{rule} lists {path!r}, but {self.rules[taken[path]]} comes first and takes it")
        if number not in claimed.values():
            if taken:
                first = self.rules[next(iter(taken.values()))]
                raise PlanError(f"{rule} matches only parameters that earlier rules take, such as {next(iter(taken))!r}, taken by {first}")
            raise PlanError(
                f"{rule} matches no parameter of the model (the whole path must match); nearest: {_nearest(rule.pattern or '', parameters)}"
            )


def orphan(model: nn.Module) -> nn.Module:
    """The model, free of the module in whose method it was built.

    A module built in another one's `__call__` belongs to that one's scope, and so do the modules that it was given as attributes:
    wherever it is put, their parameters would stay with the outer module.
    """
    return model if model.parent is None else model.clone(parent=None, name=None, _deep_clone=True, _reset_names=True)


def trace_parameters(model: nn.Module, *example_inputs: Any, **options: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """The model's parameters by path, in the order in which the model first calls the layers that own them.

    By `jax.eval_shape` of `model.init`: allocates nothing, touches no device.
    """
    calls: dict[tuple[str, ...], int] = {}

    def note(call, args, kwargs, context):
        if context.module.scope is not None:  # a module that is used without being bound has no place
            calls.setdefault(context.module.path, len(calls))
        return call(*args, **kwargs)

    leaves, tree = jax.tree.flatten((example_inputs, options))
    arrays = [i for i, leaf in enumerate(leaves) if hasattr(leaf, "shape") and hasattr(leaf, "dtype")]

    def init(values):
        filled = list(leaves)
        for i, value in zip(arrays, values, strict=True):
            filled[i] = value
        args, kwargs = jax.tree.unflatten(tree, filled)
        with nn.intercept_methods(note):
            return nn.meta.unbox(orphan(model).init(jax.random.key(0), *args, **kwargs))

    shapes = [jax.ShapeDtypeStruct(leaves[i].shape, leaves[i].dtype) for i in arrays]
    flat = _flatten(jax.eval_shape(init, shapes).get("params", {}))
    if not flat:
        raise PlanError(f"{type(model).__name__} has no parameters, so there is nothing to share")

    def rank(path: str):
        scopes = tuple(path.split("/"))
        owners = [scopes[:n] for n in range(len(scopes), -1, -1)]
        first = next((calls[owner] for owner in owners if owner in calls), -1)
        return first, [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", path)]

    return {path: flat[path] for path in sorted(flat, key=rank)}


def _sites(rule: Rule, path: str, shape: jax.ShapeDtypeStruct) -> list[Site]:
    if not jnp.issubdtype(shape.dtype, jnp.floating):
        raise PlanError(f"{rule} matches {path!r}, whose dtype is {shape.dtype}; only floating-point parameters can be shared")
    dtype = jnp.dtype(shape.dtype).name
    if rule.stack_axis is None:
        return [Site(path, shape.shape, dtype)]
    if not 0 <= rule.stack_axis < len(shape.shape):
        raise PlanError(f"{rule} says that {path!r} is stacked along axis {rule.stack_axis}, but its shape is {shape.shape}")
    axis = rule.stack_axis
    one = shape.shape[:axis] + shape.shape[axis + 1 :]
    return [Site(path, one, dtype, index, axis) for index in range(shape.shape[axis])]


def _nearest(wanted: str, parameters: Mapping[str, Any]) -> str:
    """The three paths most like a path or a pattern, for an error message."""
    plain = re.sub(r"\(\?P<\w+>|\[[^]]*\]|\\[dw.]|[()|*+?^$\\]|\{[^}]*\}", "", wanted)
    near = difflib.get_close_matches(plain, parameters, n=3, cutoff=0.0)
    return ", ".join(map(repr, near))


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in tree.items():
        flat |= _flatten(value, f"{prefix}{name}/") if isinstance(value, Mapping) else {prefix + name: value}
    return flat
