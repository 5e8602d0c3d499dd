"""Which banks of a folded network become loops, and where the looped network keeps their arrays."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from paramshare.layout import Layout, SharedBank
from paramshare.models import ResNet, WideResNet
from paramshare.models.layers import Stage
from paramshare.models.wide_resnet import blocks_per_stage
from paramshare.schemes import SchemeError, Site, Tied, Weights
from paramshare.shared import Shared
from paramshare.transform.grouping import in_order
from paramshare.transform.looped import (
    BODY,
    LOOP,
    REMAINING,
    SCALES,
    Loop,
    LoopedStages,
    LoopError,
)


@dataclasses.dataclass(frozen=True)
class StageLoop:
    """The result for one stage.

    Attributes:
      name: the name of the stage.
      blocks: number of its blocks, including the first.
      loop: the loop of its later blocks, or None.
      banks: banks that are now part of the loop, in the order in which it numbers their kernels.
      note: why the stage is unchanged, or why some of its banks remain; "" if there is no reason to
        give.
    """

    name: str
    blocks: int
    loop: Loop | None
    banks: tuple[str, ...]
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Member:
    """One layer of a looped bank.

    Attributes:
      block: counted from 0 after the first block of the stage.
      path: the path of the parameter in the block.
      group: the group of the layer within the bank.
    """

    block: int
    path: str
    group: int


class LoopPlan:
    """A function of `shared` alone: no arrays are computed.

    Attributes:
      report: the result for each stage.
      model: the plain model with its loops.
      layout: the banks that remain, with their sites in the looped model; None if there are none.
    """

    def __init__(self, shared: Shared, unroll: bool | None = None):
        model = shared.model if isinstance(shared, Shared) else None
        if not isinstance(model, WideResNet | ResNet):
            kind = type(shared).__name__ + (f"({type(model).__name__})" if model else "")
            raise LoopError(
                "only the stages of a shared WideResNet or ResNet can be looped, folded with "
                f"`paramshare.fold`; got {kind}"
            )
        loops = _present_loops(model)
        self.banks = {bank.name: bank for bank in shared.layout.banks}
        self.members: dict[str, tuple[Member, ...]] = {}
        self.report = tuple(
            self._stage(f"stage{number}", blocks, looped=f"stage{number}" in loops)
            for number, blocks in enumerate(_blocks(model), start=1)
        )
        looped = {name for stage in self.report for name in stage.banks}
        if not looped:
            reasons = "; ".join(f"{stage.name}: {stage.note}" for stage in self.report)
            raise LoopError(f"there is nothing to loop: {reasons}")
        loops |= {stage.name: stage.loop for stage in self.report if stage.loop is not None}
        self.model = model.clone(stage=LoopedStages(loops, unroll), parent=None, name=None)
        remaining = tuple(
            dataclasses.replace(bank, sites=tuple(map(self.moved, bank.sites)))
            for bank in shared.layout.banks
            if bank.name not in looped
        )
        saved = sum(self.banks[name].dense - sum(self.banks[name].trainable) for name in looped)
        self.layout = Layout(remaining, shared.layout.plain - saved) if remaining else None

    def moved(self, site: Site) -> Site:
        """A site's place in the looped model."""
        for stage in self.report:
            if stage.loop is not None:
                site = _moved(site, stage.name, stage.loop)
        return site

    def gather(self, stage: StageLoop, weights: Mapping[str, Weights]) -> dict[str, Any]:
        """The parameters "loop" and "scales" of a looped stage, from its banks."""
        loop = _loop(stage)
        kernels, scales = {}, {}
        for name in stage.banks:
            bank, scheme = self.banks[name], self._tied(name)
            kernels_G, scales_L = (
                scheme.kernels(weights[name].bank),
                scheme.scales(weights[name], bank.sites),
            )
            for member, scale in zip(self.members[name], scales_L, strict=True):
                kernels[str(_number(loop, member))] = kernels_G[member.group]
                scales[member.block, member.path] = scale
        params: dict[str, Any] = {LOOP: kernels}
        if loop.scaled_paths:
            rows = [[scales[b, path] for path in loop.scaled_paths] for b in range(loop.blocks)]
            params[SCALES] = jnp.stack([jnp.stack(row) for row in rows])
        return params

    def scatter(self, stage: StageLoop, params: Mapping[str, Any]) -> dict[str, Weights]:
        """The inverse of `gather`: the stage's banks, from the parameters of the looped stage."""
        loop, scales_nxP = _loop(stage), None
        kernels = [entry(params, LOOP, str(number)) for number in range(loop.kernels)]
        if loop.scaled_paths:
            scales_nxP, shape = entry(params, SCALES), (loop.blocks, len(loop.scaled_paths))
            if jnp.shape(scales_nxP) != shape:
                raise LoopError(
                    f"{stage.name}: scales must have shape {shape}, got {jnp.shape(scales_nxP)}; "
                    "pass variables of the looped form of this model"
                )
        weights = {}
        for name in stage.banks:
            members, scheme, scales_L = self.members[name], self._tied(name), None
            number = {member.group: _number(loop, member) for member in members}
            if scheme.scaled:
                column = loop.scaled_paths.index
                scales_L = jnp.stack([scales_nxP[m.block, column(m.path)] for m in members])  # pyright: ignore[reportOptionalSubscript]
            kernels_G = jnp.stack([kernels[number[group]] for group in range(len(number))])
            weights[name] = scheme.weights(kernels_G, scales_L, self.banks[name].sites)
        return weights

    def _stage(self, name: str, blocks: int, looped: bool) -> StageLoop:
        """Finds the banks that can be looped together."""
        banks = [
            bank
            for bank in self.banks.values()
            if any(site.path.startswith(name + "/") for site in bank.sites)
        ]
        note = ""
        if looped:
            note = "looped already"
        elif blocks < 3:
            note = f"blocks after the first: {blocks - 1}; nothing repeats"
        elif not banks:
            note = "no bank"
        if note:
            return StageLoop(name, blocks, None, (), note)

        chosen, loop, notes = [], None, []
        for bank in banks:
            reason = self._reason(bank, name, blocks)
            if not reason:
                larger, reason = self._joint_loop([*chosen, bank], blocks)
                if larger is not None:
                    chosen, loop = [*chosen, bank], larger
            if reason:
                notes.append(f"bank {bank.name!r} remains: {reason}")
        for bank in banks:
            if loop is not None and bank not in chosen:
                reason = _immovable(bank, name, loop)
                if reason:
                    notes.append(f"it cannot remain beside a loop: {reason}")
                    chosen, loop = [], None
        for bank in banks:
            if bank not in chosen:
                self.members.pop(bank.name, None)
        names = tuple(bank.name for bank in chosen)
        return StageLoop(name, blocks, loop, names, "; ".join(notes))

    def _reason(self, bank: SharedBank, stage: str, blocks: int) -> str:
        """Why a bank cannot be part of the stage's loop, "" if it can; stores its members."""
        if not isinstance(bank.scheme, Tied):
            return f"its scheme is {bank.scheme}, not Tied; fold it first"
        places = [_place(site, stage) for site in bank.sites]
        inside = [place for place in places if place is not None and place[0] >= 0]
        paths = {path for _, path in inside}
        everywhere = {(block, path) for block in range(blocks - 1) for path in paths}
        if len(inside) < len(places) or set(inside) != everywhere:
            return f"its layers are not the same in every block of {stage} after the first"
        groups = bank.scheme.groups_of(bank.sites)
        self.members[bank.name] = tuple(
            Member(*place, group) for place, group in zip(inside, groups, strict=True)
        )
        return ""

    def _joint_loop(self, banks: list[SharedBank], blocks: int) -> tuple[Loop | None, str]:
        """The loop of these banks together; or the reason why there is none."""
        kernel, scaled = {}, {}
        for bank in banks:
            for member in self.members[bank.name]:
                kernel[member.block, member.path] = bank.name, member.group
                scaled[member.path] = self._tied(bank.name).scaled
        paths = tuple(scaled)
        numbers = in_order([kernel[block, path] for block in range(blocks - 1) for path in paths])
        rows = tuple(numbers[i : i + len(paths)] for i in range(0, len(numbers), len(paths)))
        try:
            return Loop(paths, rows, tuple(scaled.values())), ""
        except LoopError:
            groups = " ".join(str(member.group) for member in self.members[banks[-1].name])
            reason = f"its groups, {groups}, do not repeat from block to block"
            if len(banks) > 1 and self._joint_loop(banks[-1:], blocks)[0] is not None:
                reason += f" together with {' and '.join(repr(bank.name) for bank in banks[:-1])}"
            return None, reason

    def _tied(self, bank: str) -> Tied:
        scheme = self.banks[bank].scheme
        assert isinstance(scheme, Tied)
        return scheme


def stacked(tree: Mapping[str, Any], loop: Loop) -> dict[str, Any]:
    """A stage's part of a collection, with the arrays of the looped blocks stacked."""
    result: dict[str, Any] = {name: value for name, value in tree.items() if name == "block1"}
    parts: dict[tuple[str, str], list[Any]] = {}
    for block in range(loop.blocks):
        scope, name, _ = _home(block, loop)
        if f"block{block + 2}" in tree:  # a block may have no arrays besides the shared ones
            parts.setdefault((scope, name), []).append(tree[f"block{block + 2}"])
    for (scope, name), trees in parts.items():
        result.setdefault(scope, {})[name] = (
            trees[0]
            if scope == REMAINING
            else jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
        )
    return result


def unstacked(tree: Mapping[str, Any], loop: Loop) -> dict[str, Any]:
    """The inverse of `stacked`."""
    result = {name: value for name, value in tree.items() if name == "block1"}
    for block in range(loop.blocks):
        scope, name, index = _home(block, loop)
        arrays = tree.get(scope, {}).get(name)
        if arrays is None:
            continue
        for leaf in jax.tree.leaves(arrays) if index is not None else ():
            if jnp.shape(leaf)[:1] != (loop.iterations,):
                raise LoopError(
                    f"{scope}/{name} has an array of shape {jnp.shape(leaf)}; its first axis must "
                    f"count the {loop.iterations} iterations"
                )
        result[f"block{block + 2}"] = (
            arrays if index is None else jax.tree.map(lambda leaf, index=index: leaf[index], arrays)
        )
    return result


def entry(tree: Any, *path: str) -> Any:
    """An entry of nested variables; `LoopError` if it is missing."""
    for name in path:
        if not isinstance(tree, Mapping) or name not in tree:
            raise LoopError(
                f"the variables have no entry {'/'.join(path)!r}; pass variables of "
                "`loop(shared, ...).model` for this shared model"
            )
        tree = tree[name]
    return tree


def renamed(weights: Weights, keys: Mapping[str, str]) -> Weights:
    """The same arrays, with other keys of sites."""
    coefficients, own = ({keys[key]: value for key, value in tree.items()} for tree in weights[1:])
    return Weights(weights.bank, coefficients, own)


def _present_loops(model: WideResNet | ResNet) -> dict[str, Loop]:
    if isinstance(model.stage, LoopedStages):
        return dict(model.stage.loops)
    if model.stage is not Stage:
        raise LoopError(
            f"the model builds its stages with {model.stage!r}, which `loop` cannot replace; "
            "use the default, Stage"
        )
    return {}


def _blocks(model: WideResNet | ResNet) -> tuple[int, ...]:
    return (blocks_per_stage(model.depth),) * 3 if isinstance(model, WideResNet) else model.blocks


def _loop(stage: StageLoop) -> Loop:
    assert stage.loop is not None
    return stage.loop


def _number(loop: Loop, member: Member) -> int:
    """The kernel's number in the loop."""
    return loop.groups[member.block][loop.paths.index(member.path)]


def _place(site: Site, stage: str) -> tuple[int, str] | None:
    """Block, counted from 0 after the first (which is -1), and path in it; None outside `stage`."""
    match = re.fullmatch(rf"{stage}/block(\d+)/(.+)", site.path)
    return (int(match[1]) - 2, match[2]) if match and site.index is None else None


def _home(block: int, loop: Loop) -> tuple[str, str, int | None]:
    """Where a looped stage keeps a block's other arrays: scope, name, index along axis 0."""
    looped = loop.iterations * loop.length
    if block < looped:
        return BODY, f"block{block % loop.length + 1}", block // loop.length
    return REMAINING, f"block{block - looped + 1}", None


def _moved(site: Site, stage: str, loop: Loop) -> Site:
    place = _place(site, stage)
    if place is None or place[0] < 0:
        return site
    scope, name, index = _home(place[0], loop)
    path = f"{stage}/{scope}/{name}/{place[1]}"
    return dataclasses.replace(site, path=path, index=index, stack_axis=0)


def _immovable(bank: SharedBank, stage: str, loop: Loop) -> str:
    """Why a remaining bank cannot serve stacked parameters, "" if it can."""
    places = [place for site in bank.sites if (place := _place(site, stage)) and place[0] >= 0]
    looped = loop.iterations * loop.length
    for path in {path for _, path in places}:
        blocks = {block for block, other in places if other == path}
        for first in range(loop.length):
            stack = set(range(first, looped, loop.length))
            if blocks & stack and not stack <= blocks:
                return f"bank {bank.name!r} makes {path!r} of some blocks only"
    sites = tuple(_moved(site, stage, loop) for site in bank.sites)
    keys = {old.key: new.key for old, new in zip(bank.sites, sites, strict=True)}
    try:
        bank.scheme.check(sites)
        same = bank.scheme.shapes(sites) == renamed(bank.scheme.shapes(bank.sites), keys)
    except SchemeError:
        same = False
    return "" if same else f"bank {bank.name!r}, {bank.scheme}, depends on the names of its layers"
