"""A folded network, whose layers repeat, as a plain model with loops; and back."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from paramshare.layout import Layout, separated, table, variables_of
from paramshare.schemes import Weights
from paramshare.shared import Shared
from paramshare.transform.loop_plan import (
    LoopPlan,
    StageLoop,
    entry,
    renamed,
    stacked,
    unstacked,
)
from paramshare.transform.looped import LoopError

__all__ = ["LoopError", "Looped", "StageLoop", "loop", "unloop"]


@dataclasses.dataclass(frozen=True)
class Looped:
    """A network with loops.

    Attributes:
      model: the plain model, which builds its stages with `LoopedStages`; a `Shared` of it if some
        banks are in no loop.
      variables: the variables of `model`.
      report: the result for each stage.
    """

    model: nn.Module
    variables: dict[str, Any]
    report: tuple[StageLoop, ...]

    def __str__(self) -> str:
        head = "stage", "blocks", "body", "iterations", "after", "loop kernels", "scales", "banks"
        rows: list[tuple[str, ...]] = [(*head, "")]
        for stage in self.report:
            loop, cells = stage.loop, ["-"] * 5
            if loop is not None:
                scales = loop.blocks * len(loop.scaled_paths)
                after = len(loop.remaining)
                numbers = (loop.length, loop.iterations, after, loop.kernels, scales)
                cells = list(map(str, numbers))
            banks = " ".join(stage.banks)
            rows.append((stage.name, str(stage.blocks), *cells, banks, stage.note))
        return "\n".join(table(rows, right={1, 2, 3, 4, 5, 6}))


def loop(shared: Shared, variables: Mapping[str, Any], *, unroll: bool | None = None) -> Looped:
    r"""Turns the repeating banks of a folded network into loops.

    A bank becomes part of its stage's loop if its scheme is `Tied`, if its sites are the same
    parameters of all blocks of one stage but the first (`conv1/kernel`, say), and if its groups
    repeat from block to block, at least twice. Its kernels and scales then become plain parameters
    of the stage; `paramshare.transform.looped.LoopedStage` says where. All other parameters of
    those blocks are stacked.

    All other banks remain, in a `Shared` of the looped model. So no kernel is duplicated, the
    number of trainable parameters stays the same, and the way back is exact. If no bank remains,
    the model is a plain Flax model. To loop the other banks too, fold them first with
    `paramshare.fold`.

    Scales are parameters of a plain model, so `paramshare.decay_mask` no longer exempts them.

    Args:
      shared: the folded model, of a `WideResNet` or a `ResNet`.
      variables: its variables.
      unroll: whether the compiled loops are unrolled; None unrolls on CPU only.

    Returns:
      The looped model, its variables and a report. The arrays are bit-identical.

    Raises:
      LoopError: if the model is of another kind, or no bank repeats; with the reason for each
        stage.
      PlanError: if the variables belong to another model.

    Example:
      >>> import jax, paramshare
      >>> from paramshare.models import WideResNet
      >>> from paramshare.transform.looping import loop
      >>> x = jax.numpy.ones((1, 8, 8, 3))
      >>> recurrent = paramshare.Tied(groups=(0, 1, 0, 1, 0, 1), scaled=True)
      >>> plan = paramshare.Plan(paramshare.Rule(r"stage2/block[2-4]/conv\d/kernel", recurrent))
      >>> shared = paramshare.share(WideResNet(28, width=0.25), plan, x)
      >>> shapes = jax.eval_shape(shared.init, jax.random.key(0), x)
      >>> variables = jax.tree.map(lambda leaf: jax.numpy.zeros(leaf.shape), shapes)
      >>> looped = loop(shared, variables)
      >>> [str(stage.loop) for stage in looped.report]
      ['None', '3 x 1 blocks, 2 kernels', 'None']
      >>> counts = [paramshare.count(v)["trainable"] for v in (looped.variables, variables)]
      >>> counts[0] == counts[1]
      True
    """
    plan, variables = LoopPlan(shared, unroll), separated(variables)
    weights = _weights(shared.layout, variables)
    private = {
        name: dict(tree.get("model", {})) for name, tree in variables.items() if name != "banks"
    }
    for stage in plan.report:
        if stage.loop is None:
            continue
        for tree in private.values():
            if stage.name in tree:
                tree[stage.name] = stacked(tree[stage.name], stage.loop)
        private.setdefault("params", {}).setdefault(stage.name, {})
        private["params"][stage.name] |= plan.gather(stage, weights)
    if plan.layout is None:
        return Looped(plan.model, private, plan.report)
    keys = {site.key: plan.moved(site).key for bank in shared.layout.banks for site in bank.sites}
    remaining = {name: renamed(weights[name], keys) for name in plan.layout}
    looped = shared.clone(model=plan.model, layout=plan.layout)
    return Looped(looped, shared.stored(_variables(remaining, private)), plan.report)


def unloop(shared: Shared, looped_variables: Mapping[str, Any]) -> dict[str, Any]:
    """The variables of a folded network from those of its looped form.

    The exact inverse of `loop`. Linear, so it also converts gradients and an optimizer's moments.

    Args:
      shared: the argument of `loop`.
      looped_variables: variables of `loop(shared, ...).model`, for example after training it.

    Returns:
      Variables of `shared`.

    Raises:
      LoopError: if the variables do not belong to the looped form.
      PlanError: if those of a remaining bank do not.

    Example:
      >>> import jax, paramshare
      >>> from paramshare.models import WideResNet
      >>> from paramshare.transform.looping import loop, unloop
      >>> rule = paramshare.Rule(r"stage2/block[2-4]/conv1/kernel", paramshare.Tied())
      >>> x = jax.numpy.ones((1, 8, 8, 3))
      >>> shared = paramshare.share(WideResNet(28, width=0.25), paramshare.Plan(rule), x)
      >>> variables = jax.eval_shape(shared.init, jax.random.key(0), x)
      >>> back = jax.eval_shape(lambda v: unloop(shared, loop(shared, v).variables), variables)
      >>> back == variables
      True
    """
    plan, looped_variables = LoopPlan(shared), separated(looped_variables)
    private = {name: tree for name, tree in looped_variables.items() if name != "banks"}
    weights = {}
    if plan.layout is not None:
        sites = [site for bank in shared.layout.banks for site in bank.sites]
        keys = {plan.moved(site).key: site.key for site in sites}
        remaining = _weights(plan.layout, looped_variables)
        weights = {name: renamed(remaining[name], keys) for name in plan.layout}
        private = {name: entry(tree, "model") for name, tree in private.items()}
    private = {name: dict(tree) for name, tree in private.items()}
    for stage in plan.report:
        if stage.loop is None:
            continue
        weights |= plan.scatter(stage, entry(private, "params", stage.name))
        for tree in private.values():
            if stage.name in tree:
                tree[stage.name] = unstacked(tree[stage.name], stage.loop)
                if not tree[stage.name]:
                    del tree[stage.name]
    return shared.stored(_variables({name: weights[name] for name in shared.layout}, private))


def _weights(layout: Layout, variables: Mapping[str, Any]) -> dict[str, Weights]:
    """The arrays of every bank; `PlanError` if one is missing, or of another shape."""
    sharing = {name: variables.get(name, {}) for name in ("banks", "params")}
    jax.eval_shape(layout.expand, sharing)  # checks the shapes
    return layout.weights(sharing)


def _variables(weights: Mapping[str, Weights], private: Mapping[str, Any]) -> dict[str, Any]:
    """Variables of a `Shared`, from its banks and the plain model's collections."""
    variables: dict[str, Any] = {name: {"model": tree} for name, tree in private.items()}
    variables["banks"], params = variables_of(weights)
    variables["params"] |= params
    return variables
