"""The lift: any Flax module, with some of its weights made from banks."""

import types
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from paramshare.layout import Layout, PlanError
from paramshare.plan import Plan, orphan
from paramshare.schemes import UNIQUE


class Shared(nn.Module):
    """A Flax module whose shared weights come out of banks. It is again an ordinary Flax module.

    `init` and `apply` take what the model's take. The variables are

        {"banks":  {bank: ...},                                          what layers share
         "params": {"coefficients": {bank: ...}, "model": {...}},        what stays a layer's own
         ...:      {"model": {...}}}                                     the model's other collections

    The model's other methods are called by name, `shared.apply(variables, x, method="encode")`, and on a bound module as its own,
    `bound.encode(x)`.

    Lifted transforms (`nn.remat`, `nn.jit`, `nn.vmap`, ...) take it as they take any module.

    Attributes:
      model: the plain model; it knows nothing of this.
      layout: what `Plan.resolve` returned for the model.

    Raises:
      PlanError: when called, if a bank is missing from the variables.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, paramshare
      >>> model = nn.Sequential([nn.Dense(8), nn.Dense(8), nn.Dense(8)])
      >>> plan = paramshare.Plan(paramshare.Rule(r".*/kernel", paramshare.Soft(templates=1)))
      >>> x = jnp.ones((2, 8))
      >>> shared = paramshare.share(model, plan, x)
      >>> variables = shared.init(jax.random.key(0), x)
      >>> paramshare.count(variables)
      {'banks': 64, 'coefficients': 3, 'private': 24, 'trainable': 91}
      >>> bool(jnp.allclose(shared.apply(variables, x), model.apply(shared.expand(variables), x)))
      True
    """

    model: nn.Module
    layout: Layout

    def __post_init__(self):
        # "model" is the name of a model that is ours already: lifted transforms rebuild this module around it.
        if isinstance(self.model, nn.Module) and self.model.name != "model":
            object.__setattr__(self, "model", orphan(self.model))
        super().__post_init__()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call("__call__", args, kwargs)

    def __getattr__(self, name: str) -> Any:
        model = self.__dict__.get("model")
        if name.startswith("_") or model is None:
            return super().__getattr__(name)
        if not callable(getattr(type(model), name, None)):
            raise AttributeError(
                f"Shared({type(model).__name__}) has no method {name!r}; the model's methods are called by name, "
                'as in shared.apply(variables, x, method="encode"), its attributes are those of shared.model'
            )
        return types.MethodType(lambda module, *args, **kwargs: module._call(name, args, kwargs), self)

    def setup(self):
        if self.name is not None and self.model.path[-2:] != (self.name, "model"):
            raise PlanError("the model belongs to another module already, where its parameters would go; build one for each Shared")
        # Not in `_call`: several of the model's methods may be called on one bound module, and must draw the banks once.
        if self.is_initializing() and not any(self.has_variable("banks", name) for name in self.layout):
            banks, coefficients = self.layout.init(self.make_rng("params"))
            for name, bank in banks.items():
                self.put_variable("banks", name, bank)
            if coefficients:
                self.put_variable("params", "coefficients", coefficients)

    def _call(self, method: str, args: tuple, kwargs: dict) -> Any:
        banks = {name: self.get_variable("banks", name) for name in self.layout if self.has_variable("banks", name)}
        weights = self.layout.expand(banks, self.get_variable("params", "coefficients", {}))
        lifted = nn.map_variables(
            lambda model, *args, **kwargs: getattr(model, method)(*args, **kwargs),
            "params",
            trans_in_fn=lambda params: {"params": self.layout.fill(params.get("params", {}), weights)},
            trans_out_fn=lambda params: {"params": self.layout.strip(params.get("params", {}))},
            mutable=self.is_initializing(),
        )
        return lifted(self.model, *args, **kwargs)

    def expand(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        """The plain model's variables: `self.model.apply(self.expand(variables), x)` equals `self.apply(variables, x)`.

        Pure, and differentiable. Random masks (dropout) differ between the two: Flax derives their keys from module paths.

        Args:
          variables: what `init` returned, or a trained version of it.

        Raises:
          PlanError: if a bank of the layout is missing.
        """
        params = variables.get("params", {})
        weights = self.layout.expand(variables.get("banks", {}), params.get("coefficients", {}))
        # A model may have a collection called "banks" of its own: it is a Shared, say.
        rest = {name: value["model"] for name, value in variables.items() if name != "params" and "model" in value}
        return {"params": self.layout.fill(params.get("model", {}), weights), **rest}

    def describe(self) -> str:
        """A table of the banks: scheme, sites, shapes, trainable numbers, and numbers saved."""
        return self.layout.describe()


def share(model: nn.Module, plan: Plan, *example_inputs: Any, **options: Any) -> Shared:
    """Shares weights of a model according to a plan.

    Args:
      model: any Flax linen module, unmodified.
      plan: which of its parameters draw on which bank.
      *example_inputs: what the model is initialised with; only shapes and dtypes count.
      **options: further arguments of `model.init`, such as `train=False` or `method="encode"`.

    Returns:
      A `Shared` module. Nothing is computed or allocated.

    Raises:
      PlanError: if the plan does not fit the model; it names the rule, the sites and the nearest paths.
    """
    if isinstance(model, Shared):
        raise PlanError("the model is already shared; put all rules into one plan")
    if not isinstance(model, nn.Module):
        raise PlanError(f"share takes a Flax linen module, got {model!r}")
    if not isinstance(plan, Plan):
        raise PlanError(f"share takes a plan, such as Plan(Rule(...)), got {plan!r}")
    return Shared(model, plan.resolve(model, *example_inputs, **options))


def coefficient_paths(variables: Mapping[str, Any]) -> set[tuple[str, ...]]:
    """Paths inside `params` of every bank's coefficients, of a `Shared` and of any that are nested in a larger module.

    A subtree `coefficients/NAME` counts where the `banks` collection has an entry NAME at the same place; except for its "unique", which
    holds weights.
    """

    def walk(banks: Any, params: Any, prefix: tuple[str, ...]) -> set[tuple[str, ...]]:
        if not isinstance(banks, Mapping) or not isinstance(params, Mapping):
            return set()
        own = params.get("coefficients", {})
        found = set()
        for name in banks:
            if isinstance(own, Mapping) and name in own:
                parts = own[name] if isinstance(own[name], Mapping) else {}
                path = (*prefix, "coefficients", name)
                found |= {(*path, part) for part in parts if part != UNIQUE} if UNIQUE in parts else {path}
        return found.union(*(walk(banks[name], params[name], (*prefix, name)) for name in banks if name in params))

    return walk(variables.get("banks", {}), variables.get("params", {}), ())


def count(variables: Mapping[str, Any]) -> dict[str, int]:
    """How many numbers of a model's variables are trained.

    Args:
      variables: of a `Shared`, of a plain model, or of a larger module with `Shared`s inside; arrays or shapes.

    Returns:
      `{"banks", "coefficients", "private", "trainable"}`; the last is the sum. Batch statistics are not counted.
    """
    sizes = {"banks": _size(variables.get("banks", {})), "coefficients": 0, "private": 0}
    mask = decay_mask(variables)
    for leaf, decays in zip(jax.tree.leaves(variables.get("params", {})), jax.tree.leaves(mask.get("params", {})), strict=True):
        sizes["private" if decays else "coefficients"] += leaf.size
    return sizes | {"trainable": sum(sizes.values())}


def decay_mask(variables: Mapping[str, Any]) -> dict[str, Any]:
    """True for every trainable number that weight decay acts on: all but coefficients (soft sharing, reference recipe).

    A layer's own filters in a shared basis are weights, and decay.

    Args:
      variables: their `banks` and `params` are looked at; other collections are left out.

    Returns:
      A pytree of bools in the shape of `{"banks": ..., "params": ...}`, as `optax.masked` and `optax.add_decayed_weights` take it.
    """
    coefficients = coefficient_paths(variables)

    def decays(path, _) -> bool:
        names = tuple(str(getattr(key, "key", key)) for key in path)
        return not any(names[: len(prefix)] == prefix for prefix in coefficients)

    mask = {"params": jax.tree_util.tree_map_with_path(decays, variables["params"])} if "params" in variables else {}
    return ({"banks": jax.tree.map(lambda _: True, variables["banks"])} if "banks" in variables else {}) | mask


def _size(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
