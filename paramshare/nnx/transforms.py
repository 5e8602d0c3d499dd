"""Transformations and measures of shared NNX modules, as `paramshare` has them for linen ones."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from paramshare import penalties
from paramshare.errors import ParamshareError
from paramshare.layout import Layout, PlanError
from paramshare.measure import similarity as measured
from paramshare.measure.change import relative_change
from paramshare.measure.similarity import By
from paramshare.nnx.places import fill
from paramshare.nnx.shared import Bank, Coefficient, Shared, check_shared
from paramshare.parameters.nnx import params_of, trace
from paramshare.penalties import PenaltyError
from paramshare.plan import Plan
from paramshare.transform.conversion import ConversionError, Converted, fit
from paramshare.transform.folding import Folded, tie
from paramshare.transform.grouping import FoldError


def bake(shared: Shared) -> Any:
    """The plain module with every shared weight written out.

    Use it for inference, or to pass the network to code without sharing: it computes what `shared`
    computes.

    Args:
      shared: the shared module; it is not changed.

    Returns:
      A module of the class that was shared.

    Raises:
      ConversionError: if `shared` is not a `Shared`.

    Example:
      >>> import paramshare, paramshare.nnx
      >>> from flax import nnx
      >>> module = nnx.Sequential(*(nnx.Linear(8, 8, rngs=nnx.Rngs(i)) for i in range(2)))
      >>> plan = paramshare.Plan(paramshare.Rule(r".*/kernel", paramshare.Tied()))
      >>> plain = paramshare.nnx.bake(paramshare.nnx.share(module, plan))
      >>> bool((plain.layers[0].kernel[...] == plain.layers[1].kernel[...]).all())
      True
    """
    check_shared("bake", shared, ConversionError)
    module = nnx.clone(shared.model)
    fill(module, shared.places, jax.jit(shared.layout.expand)(shared.variables()))
    return module


def convert(
    module: nnx.Module,
    plan: Plan | Layout | Shared,
    *example_inputs: Any,
    method: str = "__call__",
    **options: Any,
) -> Converted[Shared]:
    """Shares a trained module: banks whose weights are nearest to its own.

    See `paramshare.convert`. Parameters that are not shared and all other state are copied.

    Args:
      module: the trained plain module; it is not changed.
      plan: which of its weights to share, or a layout, or a module that is shared accordingly.
      *example_inputs: of the module; if given, the change of the outputs is measured.
      method: the method that takes the example inputs.
      **options: further arguments of that method.

    Returns:
      The shared module, as `.shared`, its variables and a report.

    Raises:
      ConversionError: if the module does not have the weights of the plan, or if a scheme cannot be
        fitted to them.
      PlanError: if the plan does not fit the module.

    Example:
      >>> import jax.numpy as jnp, paramshare, paramshare.nnx
      >>> from flax import nnx
      >>> module = nnx.Sequential(*(nnx.Linear(8, 8, rngs=nnx.Rngs(i)) for i in range(2)))
      >>> plan = paramshare.Plan(paramshare.Rule(r".*/kernel", paramshare.Soft(templates=2)))
      >>> converted = paramshare.nnx.convert(module, plan, jnp.ones((1, 8)))
      >>> converted.shared, converted.output_change < 1e-5  # as many templates as layers: exact
      (Shared(Sequential, 2 weights from 1 bank, 148 trainable parameters), True)
    """
    if isinstance(module, Shared):
        raise ConversionError("the module is already shared; pass a plain one, as `bake` makes it")
    layout = _layout(module, plan, method, example_inputs, options)
    arrays = {path: variable.get_value() for path, (_, variable) in params_of(module).items()}
    try:
        dense = layout.read(arrays)
    except PlanError as error:
        raise ConversionError(str(error)) from None
    weights, reports = fit(layout, dense)
    shared = Shared(module, layout, weights=weights)
    change = None
    if example_inputs:
        change = _output_change(module, shared, method, example_inputs, options)
    return Converted(shared, shared.variables(), reports, change)


def fold(
    shared: Shared,
    *example_inputs: Any,
    threshold: float = 0.9,
    scale: bool = True,
    banks: Sequence[str] | None = None,
    groups: Mapping[str, Sequence[int]] | None = None,
    by: By = "coefficients",
    method: str = "__call__",
    **options: Any,
) -> Folded[Shared]:
    """Ties the similar layers of every bank, as `paramshare.fold`.

    An optimizer of `shared` does not fit the folded module: create a new one.

    Args:
      shared: the shared module; it is not changed.
      *example_inputs: of the module; if given, the change of its outputs is measured.
      threshold: in (0, 1]; 1 ties only layers that are equal up to rounding and a scale.
      scale: whether layers keep signed scales.
      banks: regular expressions that match the whole names of the banks to fold; None for all.
      groups: for each bank named here, the group number of each layer, instead of the similarity.
      by: under soft sharing, compare "coefficients" or "weights".
      method: the method that takes the example inputs.
      **options: further arguments of that method.

    Returns:
      The folded module, as `.shared`, its variables and a report.

    Raises:
      FoldError: as for `paramshare.fold`.

    Example:
      >>> import paramshare, paramshare.nnx
      >>> from flax import nnx
      >>> module = nnx.Sequential(*(nnx.Linear(8, 8, rngs=nnx.Rngs(i)) for i in range(3)))
      >>> plan = paramshare.Plan(paramshare.Rule(r".*/kernel", paramshare.Soft(templates=1)))
      >>> folded = paramshare.nnx.fold(paramshare.nnx.share(module, plan))
      >>> folded.banks[0].groups, str(folded.shared.layout["shared"].scheme)
      ((0, 0, 0), 'Tied(groups=(0, 0, 0), scaled=True)')
    """
    check_shared("fold", shared, FoldError)
    weights = shared.layout.weights(shared.variables())
    layout, tied, reports = tie(shared.layout, weights, threshold, scale, banks, groups, by)
    folded = nnx.clone(shared)
    folded.layout = layout
    folded.hold(weights | tied)
    change = None
    if example_inputs:
        change = _output_change(shared, folded, method, example_inputs, options)
    return Folded(folded, folded.variables(), float(threshold), reports, change)


def similarity(shared: Shared, *, by: By = "coefficients") -> dict[str, jax.Array]:
    """Layer similarity matrix of every bank; see `paramshare.similarity`.

    Args:
      shared: the shared module.
      by: under soft sharing, compare "coefficients" or "weights".
    """
    check_shared("similarity", shared, ParamshareError)
    return measured.similarity(shared.layout, shared.variables(), by=by)


def orthogonality(shared: Shared, *pools: str, unique: bool = False) -> jax.Array:
    """Distance of shared filters from orthonormal ones; see `paramshare.orthogonality`.

    Args:
      shared: the shared module.
      *pools: regular expressions that match whole bank names.
      unique: whether to include unique filters.
    """
    check_shared("orthogonality", shared, PenaltyError)
    return penalties.orthogonality(shared.layout, shared.variables(), *pools, unique=unique)


def recurrence(shared: Shared, *pools: str) -> jax.Array:
    """One minus the similarity of layers, summed over pairs; see `paramshare.recurrence`.

    Args:
      shared: the shared module.
      *pools: regular expressions that match whole bank names.
    """
    check_shared("recurrence", shared, PenaltyError)
    return penalties.recurrence(shared.layout, shared.variables(), *pools)


def count(module: nnx.Module) -> dict[str, int]:
    """The number of trainable parameters, `nnx.Param`s; as `paramshare.count`.

    Args:
      module: a `Shared`, a plain module, or a larger module with `Shared`s inside.

    Returns:
      `{"banks", "coefficients", "private", "trainable"}`; the last is the sum.
    """
    sizes = {"banks": 0, "coefficients": 0, "private": 0}
    for _, variable in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        kinds = {Bank: "banks", Coefficient: "coefficients"}
        kind = next((name for kind, name in kinds.items() if isinstance(variable, kind)), "private")
        sizes[kind] += sum(leaf.size for leaf in jax.tree.leaves(variable))
    return sizes | {"trainable": sum(sizes.values())}


def decay_mask(module: nnx.Module, *, wrt: Any = nnx.Param) -> Any:
    """True for every parameter that weight decay applies to: everything but coefficients.

    Args:
      module: a `Shared`, or a larger module with `Shared`s inside.
      wrt: which variables the optimizer changes, as `nnx.Optimizer` takes it.

    Returns:
      An `nnx.State` of bools, for `optax.masked` and the masks of optax's optimizers.
    """
    return jax.tree.map(
        lambda variable: not isinstance(variable, Coefficient),
        nnx.state(module, wrt),
        is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
    )


def _layout(
    module: nnx.Module,
    plan: Plan | Layout | Shared,
    method: str,
    inputs: tuple[Any, ...],
    options: Mapping[str, Any],
) -> Layout:
    if isinstance(plan, Shared):
        return plan.layout
    if isinstance(plan, Layout):
        return plan
    if not isinstance(plan, Plan):
        raise ConversionError(f"convert takes a plan, such as Plan(Rule(...)), got {plan!r}")
    # Trained weights say nothing of how the module was initialized.
    traced = trace(module, *inputs, method=method, **options)
    return plan.resolve(traced.without_values(), *inputs, method=method, **options)


def _output_change(
    before: nnx.Module,
    after: nnx.Module,
    method: str,
    inputs: tuple[Any, ...],
    options: Mapping[str, Any],
) -> float:
    """Relative change of the outputs between two modules, which keep their state."""

    @nnx.jit
    def call(module: Any, inputs: tuple[Any, ...]) -> Any:
        return getattr(module, method)(*inputs, **options)

    return relative_change(*(call(nnx.clone(module), inputs) for module in (before, after)))
