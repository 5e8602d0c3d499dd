"""What of a folded network can be looped, and where the looped network keeps it. Nothing is computed."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from paramshare.analysis.folding import in_order
from paramshare.layout import Layout, SharedBank
from paramshare.models import Loop, ModelError, ResNet, WideResNet
from paramshare.models.wide_resnet import blocks_per_stage
from paramshare.schemes import Scheme, SchemeError, Site, Tied
from paramshare.shared import Shared


class LoopError(ValueError):
    """A network has no loops, or variables are not those of its looped form."""


@dataclasses.dataclass(frozen=True)
class StageLoop:
    """What became of one stage.

    Attributes:
      name: of the stage.
      blocks: how many it has, the first included.
      loop: how blocks 2.. are looped, or None.
      banks: the banks that went into the loop, in the order in which `loop` numbers their kernels.
      note: why the stage stays as it was, or why some bank of it stays a bank; "" if there is nothing to say.
    """

    name: str
    blocks: int
    loop: Loop | None
    banks: tuple[str, ...]
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Member:
    """One layer of a looped bank: its block among those that follow the first, its path in the block, its group within the bank."""

    block: int
    path: str
    group: int


class LoopPlan:
    """What is looped: the model with its loops, the layout that is left, and whose arrays go where. A function of `shared` alone."""

    def __init__(self, shared: Shared):
        if not isinstance(shared, Shared) or not isinstance(shared.model, WideResNet | ResNet):
            what = f"Shared({type(shared.model).__name__})" if isinstance(shared, Shared) else type(shared).__name__
            raise LoopError(f"loops are for the stages of a shared WideResNet or ResNet, folded with `paramshare.fold`; got {what}")
        model = shared.model
        self.banks = {bank.name: bank for bank in shared.layout.banks}
        self.members: dict[str, tuple[Member, ...]] = {}
        self.report = tuple(
            self._stage(number, blocks, model.loops[number - 1] if model.loops else None)
            for number, blocks in enumerate(_blocks(model), start=1)
        )
        looped = {name for stage in self.report for name in stage.banks}
        if not looped:
            reasons = "; ".join(f"{stage.name}: {stage.note}" for stage in self.report)
            raise LoopError(f"there is nothing to loop: {reasons}")
        before = model.loops or (None,) * len(self.report)
        self.model = model.clone(
            loops=tuple(stage.loop or old for stage, old in zip(self.report, before, strict=True)), parent=None, name=None
        )
        left = tuple(self._moved(bank) for bank in shared.layout.banks if bank.name not in looped)
        saved = sum(self.banks[name].dense - sum(self.banks[name].trainable) for name in looped)
        self.layout = Layout(left, shared.layout.plain - saved) if left else None

    def _stage(self, number: int, blocks: int, old: Loop | None) -> StageLoop:
        """Finds the banks that can be looped together."""
        name, notes = f"stage{number}", []
        if old is not None:
            return StageLoop(name, blocks, None, (), "looped already")
        if blocks < 3:
            return StageLoop(name, blocks, None, (), f"{blocks - 1} blocks behind the first; nothing comes twice")
        here = [bank for bank in self.banks.values() if any(site.path.startswith(name + "/") for site in bank.sites)]
        if not here:
            return StageLoop(name, blocks, None, (), "no bank")
        kept, found = [], None
        for bank in here:
            reason = self._reason(bank, name, blocks)
            if not reason:
                longer, reason = self._loop([*kept, bank], blocks)
                if longer is not None:
                    kept, found = [*kept, bank], longer
            if reason:
                notes.append(f"bank {bank.name!r} stays: {reason}")
        for bank in here:
            if found is not None and bank not in kept:
                reason = self._immovable(bank, name, blocks, found)
                if reason:
                    found, kept, notes = None, [], [*notes, f"it cannot stay a bank in a loop: {reason}"]
        for bank in here:
            if bank not in kept:
                self.members.pop(bank.name, None)
        return StageLoop(name, blocks, found, tuple(bank.name for bank in kept), "; ".join(notes))

    def _reason(self, bank: SharedBank, stage: str, blocks: int) -> str:
        """Why a bank cannot be part of the stage's loop, "" if it can; notes its members."""
        if not isinstance(bank.scheme, Tied):
            return f"it is under {bank.scheme}, not Tied; fold it first"
        places = [_place(site, stage) for site in bank.sites]
        inside = [place for place in places if place is not None and place[0] >= 0]
        paths = {path for _, path in inside}
        if len(inside) < len(places) or set(inside) != {(block, path) for block in range(blocks - 1) for path in paths}:
            return f"its layers are not the same ones of each block behind {stage}'s first"
        groups = bank.scheme.groups_of(bank.sites)
        self.members[bank.name] = tuple(Member(*place, group) for place, group in zip(inside, groups, strict=True))
        return ""

    def _loop(self, banks: list[SharedBank], blocks: int) -> tuple[Loop | None, str]:
        """The loop of these banks together; or why there is none."""
        keys = {(m.block, m.path): (bank.name, m.group) for bank in banks for m in self.members[bank.name]}
        scaled = {m.path: bank.scheme.scaled for bank in banks for m in self.members[bank.name]}  # pyright: ignore[reportAttributeAccessIssue]
        paths = tuple(scaled)
        numbers = in_order([keys[block, path] for block in range(blocks - 1) for path in paths])
        rows = tuple(numbers[i : i + len(paths)] for i in range(0, len(numbers), len(paths)))
        try:
            return Loop(paths, rows, tuple(scaled.values())), ""
        except ModelError:
            shown = " ".join(map(str, self._groups(banks[-1])))
            reason = f"its groups, {shown}, do not repeat from block to block"
            if len(banks) > 1 and self._loop(banks[-1:], blocks)[0] is not None:
                reason += f" together with {' and '.join(repr(bank.name) for bank in banks[:-1])}"
            return None, reason

    def _groups(self, bank: SharedBank) -> tuple[int, ...]:
        return tuple(member.group for member in self.members[bank.name])

    def _immovable(self, bank: SharedBank, stage: str, blocks: int, found: Loop) -> str:
        """Why a bank that stays cannot draw for stacked parameters, "" if it can."""
        places = [place for place in (_place(site, stage) for site in bank.sites) if place is not None and place[0] >= 0]
        looped = found.iterations * found.length
        for path in {path for _, path in places}:
            drawn = {block for block, its in places if its == path}
            for first in range(found.length):
                stacked = set(range(first, looped, found.length))
                if drawn & stacked and not stacked <= drawn:
                    return f"bank {bank.name!r} draws {path!r} in some of the blocks only"
        moved = tuple(_moved_site(site, stage, found) for site in bank.sites)
        try:
            bank.scheme.check(moved)
            same = _arrays(bank.scheme, moved) == _arrays(bank.scheme, bank.sites)
        except SchemeError:
            same = False
        return "" if same else f"bank {bank.name!r}, under {bank.scheme}, goes by the names of its layers"

    def _moved(self, bank: SharedBank) -> SharedBank:
        sites = bank.sites
        for stage in self.report:
            if stage.loop is not None:
                sites = tuple(_moved_site(site, stage.name, stage.loop) for site in sites)
        return SharedBank(bank.name, bank.scheme, sites)

    def _numbered(self, stage: StageLoop) -> list[tuple[SharedBank, int, Member, int]]:
        """Every layer of the loop: its bank, its place in the bank, what it is, and its kernel's number."""
        loop = stage.loop
        assert loop is not None
        column = {path: i for i, path in enumerate(loop.paths)}
        return [
            (self.banks[name], place, member, loop.groups[member.block][column[member.path]])
            for name in stage.banks
            for place, member in enumerate(self.members[name])
        ]

    def gather(self, stage: StageLoop, banks: Mapping[str, Any], coefficients: Mapping[str, Any]) -> tuple[dict[str, jax.Array], Any]:
        """Kernels and scales of a stage's loop, from its banks."""
        loop = stage.loop
        assert loop is not None
        kernels, scales = {}, {}
        for bank, place, member, number in self._numbered(stage):
            kernels[str(number)] = banks[bank.name]["kernels"][member.group]
            if member.path in loop.scaled_paths:
                scales[member.block, member.path] = coefficients[bank.name][place]
        if not scales:
            return kernels, None
        return kernels, jnp.stack([jnp.stack([scales[block, path] for path in loop.scaled_paths]) for block in range(loop.blocks)])

    def scatter(self, stage: StageLoop, kernels: list[jax.Array], scales: Any, banks: dict[str, Any], coefficients: dict[str, Any]) -> None:
        """The inverse of `gather`: fills in the banks of a stage's loop, and their coefficients."""
        loop = stage.loop
        assert loop is not None
        parts: dict[str, dict[int, jax.Array]] = {name: {} for name in stage.banks}
        own: dict[str, list[jax.Array]] = {name: [] for name in stage.banks}
        for bank, _, member, number in self._numbered(stage):
            parts[bank.name][member.group] = kernels[number]
            if member.path in loop.scaled_paths:
                own[bank.name].append(scales[member.block, loop.scaled_paths.index(member.path)])
        for name, found in parts.items():
            banks[name] = {"kernels": jnp.stack([found[group] for group in range(len(found))])}
            if own[name]:
                coefficients[name] = jnp.stack(own[name])


def stacked(tree: Mapping[str, Any], loop: Loop) -> dict[str, Any]:
    """A stage's part of a collection, the looped blocks' own arrays stacked."""
    fresh: dict[str, Any] = {name: value for name, value in tree.items() if name == "block1"}
    parts: dict[tuple[str, str], list[Any]] = {}
    for block in range(loop.blocks):
        scope, name, _ = _home(block, loop)
        if f"block{block + 2}" in tree:  # a block may have nothing of its own
            parts.setdefault((scope, name), []).append(tree[f"block{block + 2}"])
    for (scope, name), its in parts.items():
        fresh.setdefault(scope, {})[name] = its[0] if scope == "rest" else jax.tree.map(lambda *leaves: jnp.stack(leaves), *its)
    return fresh


def unstacked(tree: Mapping[str, Any], loop: Loop) -> dict[str, Any]:
    """The inverse of `stacked`."""
    fresh = {name: value for name, value in tree.items() if name == "block1"}
    for block in range(loop.blocks):
        scope, name, index = _home(block, loop)
        its = tree.get(scope, {}).get(name)
        if its is None:
            continue
        for leaf in jax.tree.leaves(its):
            if index is not None and jnp.shape(leaf)[:1] != (loop.iterations,):
                raise LoopError(
                    f"{scope}/{name} holds an array of shape {jnp.shape(leaf)}, not one for each of {loop.iterations} iterations"
                )
        fresh[f"block{block + 2}"] = its if index is None else jax.tree.map(lambda leaf, index=index: leaf[index], its)
    return fresh


def at(tree: Any, *path: str) -> Any:
    """An entry of nested variables; `LoopError` if it is not there."""
    node = tree
    for name in path:
        if not isinstance(node, Mapping) or name not in node:
            raise LoopError(
                f"no entry {'/'.join(path)!r} among the variables; pass those of `loop(shared, ...).model`, for this same shared model"
            )
        node = node[name]
    return node


def _blocks(model: WideResNet | ResNet) -> tuple[int, ...]:
    return (blocks_per_stage(model.depth),) * 3 if isinstance(model, WideResNet) else model.blocks


def _arrays(scheme: Scheme, sites: tuple[Site, ...]) -> Any:
    return jax.eval_shape(lambda: scheme.init(jax.random.key(0), sites))


def _place(site: Site, stage: str) -> tuple[int, str] | None:
    """Block, counted from 0 behind the first (which is -1), and path within it, of a stage's site."""
    found = re.fullmatch(rf"{stage}/block(\d+)/(.+)", site.path)
    return (int(found[1]) - 2, found[2]) if found and site.index is None else None


def _home(block: int, loop: Loop) -> tuple[str, str, int | None]:
    """Where what a block has of its own lies in a looped stage: scope, name there, and index along axis 0."""
    looped = loop.iterations * loop.length
    if block < looped:
        return "body", f"block{block % loop.length + 1}", block // loop.length
    return "rest", f"block{block - looped + 1}", None


def _moved_site(site: Site, stage: str, loop: Loop) -> Site:
    place = _place(site, stage)
    if place is None or place[0] < 0:
        return site
    scope, name, index = _home(place[0], loop)
    return dataclasses.replace(site, path=f"{stage}/{scope}/{name}/{place[1]}", index=index, stack_axis=0)
