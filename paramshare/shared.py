"""Any Flax module, with some of its weights generated from banks."""

import contextlib
import dataclasses
import inspect
import operator
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
from flax.traverse_util import flatten_dict

from paramshare import ops
from paramshare.errors import ParamshareError
from paramshare.layout import COLLECTIONS, Layout, PlanError, count_leaves, fill, separated, strip
from paramshare.parameters import is_nnx
from paramshare.parameters.linen import orphan
from paramshare.partitioning import is_box
from paramshare.plan import Plan


class Shared(nn.Module):
    """A Flax module whose shared weights are generated from banks; an ordinary module itself.

    `init` and `apply` take the same arguments as the model's. The variables are

        {"banks":  {BANK: ...},                          shared by the sites of a bank
         "params": {"coefficients": {BANK: {SITE: ...}}, mixing coefficients and scales
                    "own": {BANK: {SITE: ...}},          private parts of shared kernels
                    "model": {...}},                     private parameters
         ...:      {"model": {...}}}                     the model's other collections

    With collection="params", the banks are under `params`, `{"params": {"banks": ..., ...}}`: for
    training loops and lifted transforms that keep or pass on this collection alone.

    Empty collections are omitted. Call the model's other methods as usual: by name or as functions,
    `shared.apply(variables, x, method="encode")` or `method=Model.encode`, or on a bound module,
    `bound.encode(x)`. The model's properties and attributes can be read from the `Shared`.

    Lifted transforms (`nn.remat`, `nn.jit`, `nn.vmap`, ...) work on it as on any module.

    Attributes:
      model: the plain model, unmodified.
      layout: the result of `Plan.resolve` for the model.
      fast_convolutions: see `share`.
      collection: where the banks are: "banks" or "params".

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
    # It does not change what is computed, and so is no part of what identifies a network.
    fast_convolutions: bool = dataclasses.field(default=False, repr=False)
    collection: Literal["banks", "params"] = dataclasses.field(default="banks", repr=False)

    def __post_init__(self):
        # A model named "model" belongs to this module already: lifted transforms rebuild it.
        if isinstance(self.model, nn.Module) and self.model.name != "model":
            object.__setattr__(self, "model", orphan(self.model))
        super().__post_init__()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(lambda model, *args, **kwargs: model(*args, **kwargs), args, kwargs)

    def __getattr__(self, name: str) -> Any:
        model = self.__dict__.get("model")
        if name.startswith("_") or not isinstance(model, nn.Module):
            return super().__getattr__(name)
        if name in (field.name for field in dataclasses.fields(model)):
            return getattr(model, name)
        found = inspect.getattr_static(type(model), name, None)
        if found is None:
            raise AttributeError(
                f"Shared({type(model).__name__}) has no method or attribute {name!r}, and neither "
                "has the model; read what its setup defines inside the model's methods"
            )
        if not callable(getattr(type(model), name)):  # a property, or an attribute of the class
            # The property of a bound module may need parameters.
            bound = self.scope is not None and hasattr(found, "__get__")
            return self._call(operator.attrgetter(name), (), {}) if bound else getattr(model, name)

        def called(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return getattr(model, name)(*args, **kwargs)

        return types.MethodType(
            lambda module, *args, **kwargs: module._call(called, args, kwargs), self
        )

    @nn.nowrap
    def init_with_output(self, *args: Any, method: Any = None, **kwargs: Any) -> Any:
        """As of any Flax module; `method` may be a method of the model."""
        return super().init_with_output(*args, method=self._method(method), **kwargs)

    @nn.nowrap
    def init(self, *args: Any, method: Any = None, **kwargs: Any) -> Any:
        """As of any Flax module; `method` may be a method of the model."""
        return super().init(*args, method=self._method(method), **kwargs)

    @nn.nowrap
    def apply(self, *args: Any, method: Any = None, **kwargs: Any) -> Any:
        """As of any Flax module; `method` may be a method of the model."""
        return super().apply(*args, method=self._method(method), **kwargs)

    @nn.nowrap
    def _method(self, method: Any) -> Any:
        """A function among the model's methods, such as `Model.encode`, as a method of this."""
        owners = type(self.model).__mro__ if callable(method) else ()
        if callable(method) and any(
            method is function for owner in owners for function in vars(owner).values()
        ):
            return lambda module, *args, **kwargs: module._call(method, args, kwargs)
        return method

    def setup(self):
        if self.name is not None and self.model.path[-2:] != (self.name, "model"):
            raise PlanError(
                "the model already belongs to another module, where its parameters would go; build "
                "a new model for each Shared"
            )
        # Not in `_call`: several methods may be called, but banks are initialized only once.
        if self.is_initializing() and not self._collected()["banks"]:
            banks, params = self.layout.init(self.make_rng("params"))
            drawn = self.stored(self.layout.boxed({"banks": banks, "params": params}))
            for collection, entries in drawn.items():
                for name, value in entries.items():
                    self.put_variable(collection, name, value)

    def _collected(self) -> dict[str, Any]:
        """The variables that kernels are made of, as `Layout.weights` takes them."""

        def entries(collection: str, names: Iterable[str]) -> dict[str, Any]:
            present = (name for name in names if self.has_variable(collection, name))
            return {name: self.get_variable(collection, name) for name in present}

        params = entries("params", (*COLLECTIONS, "banks"))
        banks = params.pop("banks", {}) if self.collection == "params" else {}
        return {"banks": banks or entries("banks", self.layout), "params": params}

    @nn.nowrap
    def stored(self, variables: Mapping[str, Any], like: Any = None) -> dict[str, Any]:
        """Variables with the banks in `collection`; in boxes, if any of `like` are."""
        variables = dict(separated(variables))
        like = variables if like is None else like
        if any(map(is_box, jax.tree.leaves(like, is_leaf=is_box))):
            variables = self.layout.boxed(variables)
        if self.collection == "banks" or "banks" not in variables:
            return variables
        banks = variables.pop("banks")
        return {**variables, "params": {**variables.get("params", {}), "banks": banks}}

    def _call(self, function: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        """`function(model, *args, **kwargs)`, with the model's parameters filled in."""
        kernels = self.layout.expand(self._collected())

        def filled(params: Any) -> dict[str, Any]:
            return fill(params, kernels, self.layout.integers)

        lifted = nn.map_variables(
            lambda model, *args, **kwargs: function(model, *args, **kwargs),
            "params",
            trans_in_fn=lambda params: {"params": filled(params.get("params", {}))},
            trans_out_fn=lambda params: {
                "params": strip(params.get("params", {}), self.layout.paths)
            },
            mutable=self.is_initializing(),
        )
        fast = ops.fast_convolutions() if self.fast_convolutions else contextlib.nullcontext()
        with fast:
            return lifted(self.model, *args, **kwargs)

    def expand(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        """The plain model's variables, with kernels instead of banks. Pure and differentiable.

        `self.model.apply(self.expand(variables), x)` equals `self.apply(variables, x)`, except for
        random masks (dropout), whose keys Flax derives from module paths.

        Args:
          variables: the variables of this model, initial or trained.

        Raises:
          PlanError: if a bank of the layout is missing.
        """
        params = variables.get("params", {}).get("model", {})
        # A model may have a collection called "banks" itself, for instance if it is a Shared.
        others = {
            name: value["model"]
            for name, value in variables.items()
            if name != "params" and "model" in value
        }
        kernels = self.layout.expand(variables)
        return {"params": fill(params, kernels, self.layout.integers), **others}

    def describe(self) -> str:
        """A table of the banks: scheme, sites, shapes, trainable and saved parameters."""
        return self.layout.describe()


def share(
    model: nn.Module,
    plan: Plan,
    *example_inputs: Any,
    fast_convolutions: bool = False,
    collection: Literal["banks", "params"] = "banks",
    **options: Any,
) -> Shared:
    """Shares weights of a model according to a plan.

    Args:
      model: any Flax linen module, unmodified.
      plan: which of its parameters draw on which bank.
      *example_inputs: the inputs that the model is initialized with; only their shapes and dtypes
        are used.
      fast_convolutions: whether the model's `nn.Conv` layers use `ops.convolution`, which avoids
        slow cases of XLA on CPUs; see `ops.fast_convolutions`.
      collection: the Flax collection that holds the banks: one of their own, "banks", or "params",
        for training loops that keep and train `variables["params"]` alone.
      **options: further arguments of `model.init`, such as `train=False` or `method="encode"`.

    Returns:
      A `Shared` module. Nothing is trained or allocated; under `initial="model"` the initializers
      of the shared weights are sampled.

    Raises:
      PlanError: if the plan does not fit the model. The message names the rule, the sites and the
        nearest paths.
    """
    if isinstance(model, Shared):
        raise PlanError("the model is already shared; combine all rules into one plan")
    if not isinstance(model, nn.Module):
        raise PlanError(f"share takes a Flax linen module, got {_kind(model)}")
    if not isinstance(plan, Plan):
        raise PlanError(f"share takes a plan, such as Plan(Rule(...)), got {plan!r}")
    if collection not in ("banks", "params"):
        raise PlanError(f'collection={collection!r}; it must be "banks" or "params"')
    layout = plan.resolve(model, *example_inputs, **options)
    return Shared(model, layout, fast_convolutions, collection)


def _kind(model: Any) -> str:
    """What was passed instead of a linen module, and what to pass."""
    kind = type(model).__name__
    if is_nnx(model):
        return f"the NNX module {kind}; use paramshare.nnx.share({kind}(...), plan)"
    if isinstance(getattr(model, "module", None), nn.Module):
        return f"a {kind}; pass the module that it holds, its attribute .module"
    return f"{kind} {model!r}" if len(repr(model)) < 80 else f"a {kind}"


def check_shared(function: str, model: Any, error: type[ParamshareError] = ParamshareError) -> None:
    """Raises an error unless `model` is a `Shared`; `function` is what was called with it."""
    if not isinstance(model, Shared):
        name = type(model).__name__
        kind = f"the NNX module {name}; use paramshare.nnx" if is_nnx(model) else name
        raise error(
            f"{function} takes a Shared, as `share` and `create_model` return it, got {kind}"
        )


def layout_of(function: str, model: Any, error: type[ParamshareError] = ParamshareError) -> Layout:
    """The layout of a `Shared`, or `model` if it is a layout; errors as of `check_shared`."""
    if isinstance(model, Layout):
        return model
    check_shared(function, model, error)
    return model.layout


def count(variables: Mapping[str, Any]) -> dict[str, int]:
    """The number of trainable parameters.

    Args:
      variables: the variables of a `Shared`, of a plain model, or of a larger module with `Shared`s
        inside; arrays or shapes.

    Returns:
      `{"banks", "coefficients", "private", "trainable"}`; the last is the sum. Whole weights of
      single sites ("own") are private. Batch statistics are not counted.
    """
    if _is_params(variables):
        variables = {"params": variables}
    sizes = {"banks": count_leaves(variables.get("banks", {})), "coefficients": 0, "private": 0}
    params = jax.tree.leaves(variables.get("params", {}))
    for leaf, kind in zip(params, jax.tree.leaves(_kinds(variables)), strict=True):
        sizes[kind] += leaf.size
    return sizes | {"trainable": sum(sizes.values())}


def decay_mask(variables: Mapping[str, Any]) -> dict[str, Any]:
    """True for every parameter that weight decay applies to: everything but coefficients.

    Coefficients do not decay in the reference recipe of soft sharing.

    Args:
      variables: the variables of a `Shared`, or of a larger module with `Shared`s inside;
        collections other than `banks` and `params` are ignored.

    Returns:
      A pytree of bools with the structure of `{"banks": ..., "params": ...}`, for `optax.masked`
      and `optax.add_decayed_weights`.
    """
    if _is_params(variables):
        return decay_mask({"params": variables})["params"]
    mask = {"banks": jax.tree.map(lambda _: True, variables.get("banks", {}))}
    mask["params"] = jax.tree.map(lambda kind: kind != "coefficients", _kinds(variables))
    return {name: tree for name, tree in mask.items() if name in variables}


def _is_params(variables: Mapping[str, Any]) -> bool:
    """Whether it is the collection `params` alone, of a `Shared` with collection="params"."""
    return (
        "banks" in variables
        and "params" not in variables
        and len(variables) > 1
        and (set(variables) <= _SHARED)
    )


def _kinds(variables: Mapping[str, Any]) -> Any:
    """What each leaf of `params` is: "banks", "coefficients" or "private".

    A subtree `coefficients/NAME` holds coefficients if there is a bank NAME at the same place, in
    the collection `banks` or in `params`.
    """
    params = variables.get("params", {})
    banks = flatten_dict(variables.get("banks", {}))
    exempt = {(*path[:i], "coefficients", path[i]) for path in banks for i in range(len(path))}
    within = {
        (*path, "banks"): scope["banks"]
        for path, scope in _scopes(params)
        if "banks" in scope and scope.keys() <= _SHARED
    }
    for (*path, _), entries in within.items():
        exempt |= {(*path, "coefficients", name) for name in entries}

    def kind(path: Any, _: Any) -> str:
        names = tuple(str(getattr(key, "key", key)) for key in path)
        heads = {names[:i] for i in range(len(names) + 1)}
        return "coefficients" if heads & exempt else "banks" if heads & within.keys() else "private"

    return jax.tree_util.tree_map_with_path(kind, params)


_SHARED = {"banks", "model", *COLLECTIONS}


def _scopes(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """All scopes of a tree of parameters, by path."""
    if isinstance(tree, Mapping):
        yield path, tree
        for name, value in tree.items():
            yield from _scopes(value, (*path, str(name)))
