"""Looping: a folded network, whose layers repeat, as a plain model with actual loops; and back."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from paramshare.analysis.loop_plan import LoopError, LoopPlan, StageLoop, at, stacked, unstacked
from paramshare.layout import table
from paramshare.shared import Shared

__all__ = ["LoopError", "Looped", "StageLoop", "loop", "unloop"]


@dataclasses.dataclass(frozen=True)
class Looped:
    """A network with loops.

    Attributes:
      model: the plain model with `loops`; where banks are left that are in no loop, a `Shared` of it.
      variables: of `model`.
      report: what became of each stage.
    """

    model: nn.Module
    variables: dict[str, Any]
    report: tuple[StageLoop, ...]

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("stage", "blocks", "body", "iterations", "rest", "kernels", "scales", "banks", "")]
        for stage in self.report:
            its = stage.loop
            numbers = ["-"] * 5
            if its is not None:
                scales = its.blocks * len(its.scaled_paths)
                numbers = list(map(str, (its.length, its.iterations, len(its.rest), its.kernels, scales)))
            rows.append((stage.name, str(stage.blocks), *numbers, " ".join(stage.banks), stage.note))
        return "\n".join(table(rows, right={1, 2, 3, 4, 5, 6}))


def loop(shared: Shared, variables: Mapping[str, Any], *, unroll: bool | None = None) -> Looped:
    r"""Turns the repeating banks of a folded network into loops.

    A bank becomes part of its stage's loop if it is under `Tied`, draws for whole paths (say `conv1/kernel` in all of the blocks 2.. of one
    stage, and nothing else), and its groups repeat from block to block, twice or more. Its kernels and scales are then plain parameters
    of the stage, held once: `paramshare.models.looped` says where. All other parameters of those blocks are stacked.

    Every other bank stays a bank: the looped model comes under a `Shared` that has what is left of the layout, so that no
    kernel is multiplied, the trainable numbers are exactly as many as before, and the way back is exact. If none is left, the model is a
    plain Flax model. To loop them too, fold them first (`paramshare.fold`).

    Scales are weights of a plain model: `paramshare.decay_mask` no longer spares them.

    Args:
      shared: the folded model, of a `WideResNet` or a `ResNet`.
      variables: its variables, or their shapes under `jax.eval_shape`.
      unroll: the looped model's: None to choose by backend.

    Returns:
      The looped model, its variables and a report. The arrays are the same, bit for bit; nothing of the input is changed.

    Raises:
      LoopError: if the model is of another kind, or no bank repeats; it says why for each stage.
      PlanError: if the variables are of another model.

    Example:
      >>> import jax, paramshare
      >>> from paramshare.analysis.looping import loop
      >>> x = jax.numpy.ones((1, 8, 8, 3))
      >>> recurrent = paramshare.Tied(groups=(0, 1, 0, 1, 0, 1), scaled=True)  # made by hand; `paramshare.fold` finds such
      >>> rule = paramshare.Rule(r"stage2/block[2-4]/conv\d/kernel", recurrent)
      >>> shared = paramshare.share(paramshare.models.WideResNet(28, width=0.25), paramshare.Plan(rule), x)
      >>> variables = jax.tree.map(jax.numpy.zeros_like, jax.eval_shape(shared.init, jax.random.key(0), x))
      >>> looped = loop(shared, variables)
      >>> [str(stage.loop) for stage in looped.report]
      ['None', '3 x 1 blocks, 2 kernels', 'None']
      >>> paramshare.count(looped.variables)["trainable"] == paramshare.count(variables)["trainable"]
      True
    """
    plan = LoopPlan(shared)
    params = variables.get("params", {})
    jax.eval_shape(shared.layout.expand, variables.get("banks", {}), params.get("coefficients", {}))  # raises if of another model
    own = {name: dict(value.get("model", {})) for name, value in variables.items() if name != "banks"}
    for stage in plan.report:
        if stage.loop is None:
            continue
        for tree in own.values():
            if stage.name in tree:
                tree[stage.name] = stacked(tree[stage.name], stage.loop)
        kernels, scales = plan.gather(stage, variables["banks"], params.get("coefficients", {}))
        tree = own["params"].setdefault(stage.name, {})
        tree["kernels"] = kernels
        if stage.loop.scaled_paths:
            tree["scales"] = scales
    model, layout = plan.model.clone(unroll=unroll), plan.layout
    if layout is None:
        return Looped(model, own, plan.report)
    fresh = {name: {"model": tree} for name, tree in own.items()}
    fresh["banks"] = {name: variables["banks"][name] for name in layout}
    kept = {name: value for name, value in params.get("coefficients", {}).items() if name in list(layout)}
    if kept:
        fresh["params"]["coefficients"] = kept
    return Looped(Shared(model, layout), fresh, plan.report)


def unloop(shared: Shared, looped_variables: Mapping[str, Any]) -> dict[str, Any]:
    """The variables of a folded network from those of its looped form, trained on or not: the inverse of `loop`, bit for bit.

    Linear, so that it also takes gradients, or an optimizer's moments, from the one form to the other.

    Args:
      shared: what `loop` was given.
      looped_variables: of `loop(shared, ...).model`.

    Returns:
      Variables of `shared`.

    Raises:
      LoopError: if the variables are not of that form.

    Example:
      >>> import jax, paramshare
      >>> from paramshare.analysis.looping import loop, unloop
      >>> rule = paramshare.Rule(r"stage2/block[2-4]/conv1/kernel", paramshare.Tied())
      >>> x = jax.numpy.ones((1, 8, 8, 3))
      >>> shared = paramshare.share(paramshare.models.WideResNet(28, width=0.25), paramshare.Plan(rule), x)
      >>> variables = jax.eval_shape(shared.init, jax.random.key(0), x)
      >>> back = jax.eval_shape(lambda v: unloop(shared, loop(shared, v).variables), variables)
      >>> back == variables
      True
    """
    plan = LoopPlan(shared)
    banks = {}
    own = {name: value for name, value in looped_variables.items() if name != "banks"}
    coefficients = {}
    if plan.layout is not None:
        banks |= {name: at(looped_variables, "banks", name) for name in plan.layout}
        coefficients |= dict(looped_variables.get("params", {}).get("coefficients", {}))
        own = {name: at(looped_variables, name, "model") for name in own}
    own = {name: dict(tree) for name, tree in own.items()}
    for stage in plan.report:
        if stage.loop is None:
            continue
        its = at(own, "params", stage.name)
        kernels = [at(its, "kernels", str(number)) for number in range(stage.loop.kernels)]
        scales = at(its, "scales") if stage.loop.scaled_paths else None
        wanted = (stage.loop.blocks, len(stage.loop.scaled_paths))
        if scales is not None and jnp.shape(scales) != wanted:
            raise LoopError(
                f"{stage.name}: scales are of shape {jnp.shape(scales)}, the loop wants {wanted}; pass its own model's variables"
            )
        plan.scatter(stage, kernels, scales, banks, coefficients)
        for tree in own.values():
            if stage.name in tree:
                tree[stage.name] = unstacked(tree[stage.name], stage.loop)
                if not tree[stage.name]:
                    del tree[stage.name]
    variables = {name: {"model": tree} for name, tree in own.items()} | {"banks": {name: banks[name] for name in shared.layout}}
    if coefficients:
        variables["params"]["coefficients"] = {name: coefficients[name] for name in shared.layout if name in coefficients}
    return variables
