"""Any NNX module, with some of its weights generated from banks."""

import contextlib
import functools
import inspect
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
from flax import nnx

from paramshare.errors import ParamshareError
from paramshare.layout import Layout, PlanError, variables_of
from paramshare.nnx.places import Hole, empty, filled, places_of
from paramshare.parameters.nnx import params_of
from paramshare.partitioning import Partition
from paramshare.plan import Plan
from paramshare.schemes import Weights

_FILLING = threading.RLock()  # a module that is being called holds weights that are not its own
# `set_view` is called on the module itself.
_NOT_OF_THE_MODEL = {
    *("banks", "coefficients", "layout", "model", "own", "places", "sharding"),
    "set_view",
}


class Bank(nnx.Param):
    """What the layers of a bank share."""


class Coefficient(nnx.Param):
    """How a layer mixes or scales what it shares. Exempt from weight decay."""


class Own(nnx.Param):
    """The private part of a layer's shared weight, such as unique filters."""


class Shared(nnx.Module):
    """An NNX module whose shared weights are generated from banks; an ordinary module itself.

    It is called as the module is, and has its methods, properties and attributes (under `.model`
    where a name below is the same). Its state is

        {"banks":        {BANK: ...},          of type `Bank`, shared by the sites of a bank
         "coefficients": {BANK: {SITE: ...}},  of type `Coefficient`
         "own":          {BANK: {SITE: ...}},  of type `Own`
         "model":        {...}}                the module's state without the shared weights

    `Bank`, `Coefficient` and `Own` are `nnx.Param`s. During a call the generated weights are in the
    module, as variables of the type that it had; afterwards they are taken out, so that `nnx.state`
    and `nnx.split` never see them. Calls from several threads wait for each other. If the module's
    weights say how a mesh divides them (`nnx.with_partitioning`), so do banks and own weights.

    Args:
      model: the plain module; it is copied, not changed.
      layout: the result of `Plan.resolve` for the module.
      rngs: draws the banks, from its stream "params"; or a seed.
      weights: the arrays of every bank, instead of drawn ones.

    Attributes:
      model: the copy of the module, without the shared weights.
      layout: what draws on what.
      banks: the variables of type `Bank`.
      coefficients: the variables of type `Coefficient`.
      own: the variables of type `Own`.

    Raises:
      PlanError: if the module does not have the weights of the layout, or if banks are to be drawn
        and the layout does not know the module's initial mean and standard deviation.
    """

    def __init__(
        self,
        model: nnx.Module,
        layout: Layout,
        *,
        rngs: nnx.Rngs | int | jax.Array = 0,
        weights: Mapping[str, Weights] | None = None,
    ):
        _check_module("Shared", model)
        if not isinstance(layout, Layout):
            raise PlanError(f"Shared takes a layout, as Plan.resolve returns it, got {layout!r}")
        self.layout = layout
        self.places = places_of(model, layout)
        self.sharding = _sharding(model, layout)
        self.model: Any = nnx.clone(model)
        empty(self.model, self.places)
        self.hold(_initial(model, layout, rngs) if weights is None else weights)

    def hold(self, weights: Mapping[str, Weights]) -> None:
        """Replaces the variables of all banks by new ones, with these arrays."""
        banks, params = variables_of(weights)
        partitions = {bank.name: bank.partition for bank in self.layout.banks}
        eager = nn.meta.global_mesh_defined() or any(name == "mesh" for name, _ in self.sharding)

        def wrapped(kind: type[nnx.Param], entries: Mapping[str, Any]) -> Any:
            def variable(array: jax.Array, partition: Partition | None) -> nnx.Param:
                if partition is None or kind is Coefficient or not array.shape:
                    return kind(array)
                names = partition.names_of(array.shape)
                metadata = {"out_sharding": names, "eager_sharding": eager, **dict(self.sharding)}
                return kind(array, **metadata)

            return nnx.data(
                {
                    name: jax.tree.map(lambda x, name=name: variable(x, partitions[name]), tree)
                    for name, tree in entries.items()
                }
            )

        self.banks = wrapped(Bank, banks)
        self.coefficients = wrapped(Coefficient, params.get("coefficients", {}))
        self.own = wrapped(Own, params.get("own", {}))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._filled() as model:
            return model(*args, **kwargs)

    def filled(self) -> contextlib.AbstractContextManager[Any]:
        """The module with its generated weights, for calls of its parts.

        Example:
          >>> import jax.numpy as jnp, paramshare.nnx
          >>> from flax import nnx
          >>> module = nnx.Sequential(*(nnx.Linear(4, 4, rngs=nnx.Rngs(i)) for i in range(2)))
          >>> plan = paramshare.Plan(paramshare.Rule(r".*/kernel", paramshare.Tied()))
          >>> shared = paramshare.nnx.share(module, plan)
          >>> with shared.filled() as module:
          ...     module.layers[0](jnp.ones((1, 4))).shape
          (1, 4)
        """
        return self._filled()

    @contextlib.contextmanager
    def _filled(self) -> Iterator[Any]:
        with _FILLING, filled(self.model, self.places, self.layout.expand(self._stored())):
            yield self.model

    def __getattr__(self, name: str) -> Any:
        model = vars(self).get("model")
        if model is None or name.startswith("_") or name in _NOT_OF_THE_MODEL:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        if name in vars(model):
            value = vars(model)[name]
            if not isinstance(value, Hole):
                return value
        found = inspect.getattr_static(type(model), name, None)
        if found is not None and callable(getattr(type(model), name)):

            @functools.wraps(getattr(type(model), name))
            def method(*args: Any, **kwargs: Any) -> Any:
                with self._filled() as model:
                    return getattr(model, name)(*args, **kwargs)

            return method
        with self._filled() as model:  # a property, for instance
            try:
                return getattr(model, name)
            except AttributeError as error:
                raise AttributeError(
                    f"Shared({type(model).__name__}) has no method or attribute {name!r}: {error}"
                ) from None

    def train(self, **attributes: Any) -> Any:
        """As of any NNX module, or as the module defines it."""
        return self.model.train(**attributes)

    def eval(self, **attributes: Any) -> Any:
        """As of any NNX module, or as the module defines it."""
        return self.model.eval(**attributes)

    def variables(self) -> dict[str, Any]:
        """The parameters as arrays, in the collections of a linen `Shared`.

        Returns:
          `{"banks": ..., "params": {"coefficients": ..., "own": ..., "model": ...}}`, without empty
          entries: what `Layout.expand` and `paramshare.count` take.
        """
        stored = self._stored()
        private = nnx.to_pure_dict(nnx.state(self.model, nnx.Param))
        params = stored["params"] | ({"model": private} if private else {})
        return stored | {"params": params} if params else {"banks": stored["banks"]}

    def describe(self) -> str:
        """A table of the banks: scheme, sites, shapes, trainable and saved parameters."""
        return self.layout.describe()

    def __repr__(self) -> str:
        layout = self.layout
        sites = sum(len(bank.sites) for bank in layout.banks)
        return (
            f"Shared({type(self.model).__name__}, {sites} weights from {len(layout)} "
            f"bank{'s' * (len(layout) > 1)}, {layout.trainable:,} trainable parameters)"
        )

    __str__ = __repr__

    def _stored(self) -> dict[str, Any]:
        """What kernels are made of, as `Layout.weights` takes it."""

        def arrays(tree: Any) -> Any:
            return jax.tree.map(
                lambda variable: variable.get_value(),
                tree,
                is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
            )

        params = {"coefficients": arrays(self.coefficients), "own": arrays(self.own)}
        params = {name: entries for name, entries in params.items() if entries}
        return {"banks": arrays(self.banks), "params": params}


def _sharding(model: nnx.Module, layout: Layout) -> tuple[tuple[str, Any], ...]:
    """The mesh and the rules for logical axes that the module's own weights name, if any do."""
    if not any(bank.partition for bank in layout.banks):
        return ()
    every = [variable.get_metadata() for _, variable in params_of(model).values()]
    found = {
        name: next((x[name] for x in every if x.get(name)), None)
        for name in ("mesh", "sharding_rules")
    }
    return tuple((name, value) for name, value in found.items() if value)


def share(
    module: nnx.Module,
    plan: Plan,
    *example_inputs: Any,
    rngs: nnx.Rngs | int | jax.Array = 0,
    method: str = "__call__",
    **options: Any,
) -> Shared:
    r"""Shares weights of an NNX module according to a plan.

    A rule matches the path of an `nnx.Param` in `nnx.state(module)`, joined by "/". The module's
    parameters that no rule matches, and all its other state, are kept with their values. Shared
    weights are drawn anew, with the mean and standard deviation that the module's weights have;
    `convert` keeps trained weights as nearly as possible.

    Args:
      module: any NNX module; it is copied, not changed. Of an abstract module (`nnx.eval_shape`),
        the result is abstract too.
      plan: which of its parameters draw on which bank.
      *example_inputs: of the module's call. They are optional: with them, the sites of a bank are
        in the order in which the module calls its layers, otherwise in the order of definition.
      rngs: draws the banks, from its stream "params"; or a seed.
      method: the method that takes the example inputs.
      **options: further arguments of that method.

    Returns:
      A `Shared` module.

    Raises:
      PlanError: if the plan does not fit the module. The message names the rule, the sites and the
        nearest paths.

    Example:
      >>> import jax.numpy as jnp, paramshare, paramshare.nnx
      >>> from flax import nnx
      >>> rngs = nnx.Rngs(0)
      >>> module = nnx.Sequential(*(nnx.Linear(8, 8, rngs=rngs) for _ in range(3)))
      >>> plan = paramshare.Plan(paramshare.Rule(r"layers/\d/kernel", paramshare.Soft(1)))
      >>> shared = paramshare.nnx.share(module, plan, rngs=rngs)
      >>> shared
      Shared(Sequential, 3 weights from 1 bank, 91 trainable parameters)
      >>> shared(jnp.ones((2, 8))).shape
      (2, 8)
      >>> nnx.state(shared, paramshare.nnx.Bank)["banks"]["shared"]["templates"].shape
      (1, 64)
    """
    _check_module("share", module)
    if not isinstance(plan, Plan):
        raise PlanError(f"share takes a plan, such as Plan(Rule(...)), got {plan!r}")
    return Shared(
        module, plan.resolve(module, *example_inputs, method=method, **options), rngs=rngs
    )


def check_shared(function: str, module: Any, error: type[ParamshareError]) -> None:
    """Raises an error unless `module` is a `Shared`; `function` is what was called with it."""
    if not isinstance(module, Shared):
        raise error(
            f"paramshare.nnx.{function} takes a Shared, as paramshare.nnx.share returns it, got "
            f"{type(module).__name__}"
        )


def _check_module(function: str, module: Any) -> None:
    kind = type(module).__name__
    if isinstance(module, nn.Module):
        raise PlanError(f"{kind} is a linen module; use paramshare.{function}, without .nnx")
    if not isinstance(module, nnx.Module):
        if isinstance(module, type):
            kind = f"the class {module.__name__}; pass an instance of it"
        raise PlanError(f"paramshare.nnx.{function} takes an NNX module, got {kind}")
    if isinstance(module, Shared):
        raise PlanError("the module is already shared; combine all rules into one plan")


def _initial(
    module: nnx.Module, layout: Layout, rngs: nnx.Rngs | int | jax.Array
) -> Mapping[str, Weights]:
    """Weights of every bank: drawn, or only their shapes if the module has only shapes."""
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(nnx.state(module))):
        return {bank.name: bank.scheme.shapes(bank.sites) for bank in layout.banks}
    for bank in layout.banks:
        if bank.scheme.measures_initializer and any(site.std is None for site in bank.sites):
            raise PlanError(
                f"bank {bank.name!r} starts as the module's own weights do, which cannot be "
                "measured inside nnx.jit or nnx.eval_shape, nor of an abstract module; resolve the "
                "plan outside, layout = plan.resolve(module), and use "
                "paramshare.nnx.Shared(module, layout)"
            )
    rngs = rngs if isinstance(rngs, nnx.Rngs) else nnx.Rngs(rngs)
    banks, params = layout.init(rngs.params())
    return layout.weights({"banks": banks, "params": params})
