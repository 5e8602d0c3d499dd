"""Plans: rules that say which parameters of a model draw on which bank, through which scheme."""

import dataclasses
import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import flax.linen as nn

from paramshare.budget import fill_budget
from paramshare.groups import bank_names, selected
from paramshare.layout import Layout, PlanError, SharedBank, count_leaves, table
from paramshare.parameters import Trace, is_nnx, trace
from paramshare.partitioning import partition
from paramshare.rule import Rule
from paramshare.schemes import Scheme, SchemeError, Site

if TYPE_CHECKING:
    from flax import nnx


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

    def __str__(self) -> str:
        rows = [("bank", "scheme", "weights")]
        for rule in self.rules:
            weights = rule.pattern if rule.pattern is not None else str(len(rule.paths))
            rows.append((rule.bank, str(rule.scheme), weights))
        return "\n".join(
            table(rows, right={2} if not any(r.pattern for r in self.rules) else set())
        )

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
        include: str | None = None,
        target_modules: str | Sequence[str] | None = None,
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
          include: a regular expression that the whole path of a weight must match; kernels by
            default.
          target_modules: the layers to share instead, as in PEFT: "all-linear" for the kernels of
            dense layers, or names such as ["query", "value"] for the kernels of layers with these
            names; a text is a regular expression of the whole path of a layer.
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
        groups = selected(model, example_inputs, options, include, target_modules)
        found = [group for group in groups if len(group.paths) > 1]
        if not found:
            chosen = f"include={include!r}, target_modules={target_modules!r}"
            raise PlanError(
                f"no weight of {type(model).__name__} that {chosen} selects recurs over numbered "
                "blocks; print paramshare.sites(model, ...) to see the paths"
            )
        return cls(
            *(
                Rule(paths=group.paths, scheme=scheme, bank=name)
                for group, name in zip(found, bank_names(found), strict=True)
            )
        )

    @classmethod
    def budget(
        cls,
        model: "nn.Module | nnx.Module",
        *example_inputs: Any,
        trainable: int,
        scheme: Callable[[int], Scheme],
        include: str | None = None,
        target_modules: str | Sequence[str] | None = None,
        **options: Any,
    ) -> "Plan":
        """The largest plan of a kind with at most so many trainable parameters.

        All selected weights share one bank if the scheme can serve them, as `Ring` can; else those
        that recur share one, as in `Plan.blocks`. The size of the scheme is the largest that fits,
        the same for all banks; then single banks get more, as long as it fits. `print(plan)` shows
        what was chosen.

        Args:
          model: any Flax linen or NNX module.
          *example_inputs: the inputs that a linen model is initialized with.
          trainable: the number of trainable parameters of the whole model to fill, including those
            that are not shared.
          scheme: makes a scheme of a size, 1 or more, such as `Ring`, `Soft` or `lambda rank:
            Relaxed(Tied(), rank)`. A larger size must not need fewer parameters.
          include: as for `Plan.blocks`.
          target_modules: as for `Plan.blocks`.
          **options: further arguments of `model.init`.

        Raises:
          PlanError: if the smallest size does not fit, or the plain model has no more parameters
            than that.

        Example:
          >>> import flax.linen as nn, jax.numpy as jnp, paramshare
          >>> from paramshare import Plan, Ring
          >>> model = nn.Sequential([nn.Dense(64), nn.Dense(64), nn.Dense(10)])
          >>> x = jnp.ones((1, 64))
          >>> plan = Plan.budget(model, x, trainable=1000, scheme=Ring)
          >>> print(plan)
          bank    scheme          weights
          ------  --------------  -------
          shared  Ring(size=862)        3
          >>> paramshare.share(model, plan, x).layout.trainable
          1000
        """
        if isinstance(scheme, Scheme) or not callable(scheme):
            raise PlanError(
                f"scheme={scheme}; pass what makes a scheme of a size, such as Ring, or lambda "
                "rank: Relaxed(Tied(), rank)"
            )
        groups = selected(model, example_inputs, options, include, target_modules)
        paths = tuple(path for group in groups for path in group.paths)

        def resolved(plan: Plan) -> Layout:
            return plan.resolve(model, *example_inputs, **options)

        try:
            layout = resolved(cls(Rule(paths=paths, scheme=scheme(1))))
        except PlanError:
            kind = {"include": include, "target_modules": target_modules}
            layout = resolved(
                cls.blocks(model, *example_inputs, scheme=scheme(1), **kind, **options)
            )
        sizes = fill_budget(layout, trainable, scheme)
        return cls(
            *(
                Rule(
                    paths=tuple(dict.fromkeys(site.path for site in bank.sites)),
                    scheme=scheme(sizes[bank.name]),
                    bank=bank.name,
                )
                for bank in layout.banks
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
            divided = partition(members, parameters, schemes[name][0].partition)
            banks.append(SharedBank(name, scheme, tuple(members), divided))
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
