"""A residual stage whose later blocks run as a loop: one body, its kernels held once, everything else one per iteration."""

import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from paramshare.models.layers import ModelError, Stage


@dataclasses.dataclass(frozen=True)
class Loop:
    """Which blocks of a stage use which kernels; the pattern repeats, and so is run as a loop. Hashable.

    Args:
      paths: parameters of a block that are tied, such as `("conv1/kernel", "conv2/kernel")`. Others stay a block's own.
      groups: for each of the blocks 2.. of a stage, a kernel's number for each path. Numbers start from 0, in the order of their first
        use. Kernels of different shapes have different numbers.
      scaled: whether each layer multiplies its kernel by a signed scale of its own; one answer for all paths, or one for each.

    Raises:
      ModelError: if an argument is not a legal one, or no pattern repeats: the first b rows must come twice or more, and the rest of the
        rows begin them again.

    Example:
      >>> from paramshare.models.looped import Loop
      >>> loop = Loop(("conv1/kernel", "conv2/kernel"), groups=((0, 1), (2, 0), (1, 2), (0, 1), (2, 0), (1, 2), (0, 1)))
      >>> loop.body, loop.iterations, loop.rest  # three kernels take turns: a body of three blocks, twice, and one block
      (((0, 1), (2, 0), (1, 2)), 2, ((0, 1),))
    """

    paths: tuple[str, ...]
    groups: tuple[tuple[int, ...], ...]
    scaled: bool | tuple[bool, ...] = True

    def __post_init__(self):
        paths = (self.paths,) if isinstance(self.paths, str) else tuple(self.paths)
        if not paths or len(set(paths)) < len(paths) or not all(isinstance(path, str) and path for path in paths):
            raise ModelError(f"Loop(paths={self.paths!r}): paths are different parameters of a block, such as ('conv1/kernel',)")
        scaled = self.scaled if isinstance(self.scaled, tuple) else (self.scaled,) * len(paths)
        if len(scaled) != len(paths) or not all(isinstance(flag, bool) for flag in scaled):
            raise ModelError(f"Loop(scaled={self.scaled!r}): scaled is True or False, or one of them for each of the {len(paths)} paths")
        object.__setattr__(self, "paths", paths)
        object.__setattr__(self, "groups", _check_rows(self.groups, len(paths)))
        object.__setattr__(self, "scaled", scaled)
        if self.iterations < 2:
            raise ModelError(
                f"Loop(groups={self.groups}): no pattern of blocks comes twice, so that there is nothing to loop over; give the stage None"
            )

    @property
    def blocks(self) -> int:
        """How many blocks use the kernels."""
        return len(self.groups)

    @property
    def length(self) -> int:
        """b: the blocks of the body."""
        return period(self.groups) or self.blocks

    @property
    def iterations(self) -> int:
        """How often the body runs."""
        return self.blocks // self.length

    @property
    def body(self) -> tuple[tuple[int, ...], ...]:
        """The rows of the body's blocks."""
        return self.groups[: self.length]

    @property
    def rest(self) -> tuple[tuple[int, ...], ...]:
        """The rows of the blocks behind the loop, fewer than `length`."""
        return self.groups[self.iterations * self.length :]

    @property
    def kernels(self) -> int:
        """How many kernels are held."""
        return 1 + max(max(row) for row in self.groups)

    @property
    def scaled_paths(self) -> tuple[str, ...]:
        """The paths whose kernels are scaled."""
        return tuple(path for path, flag in zip(self.paths, self.scaled, strict=True) if flag)  # pyright: ignore[reportArgumentType]

    def __str__(self) -> str:
        return f"{self.iterations} x {self.length} blocks" + (f" + {len(self.rest)}" if self.rest else "") + f", {self.kernels} kernels"


class Body(nn.Module):
    """Some blocks in a row, `block1`, `block2`, ..., with kernels from outside; what they have of their own is their own.

    Attributes:
      block: builds a block, given its name.
      loop: says which kernels there are.
      rows: of `loop.groups`, one for each block.
    """

    block: Callable[..., nn.Module]
    loop: Loop
    rows: tuple[tuple[int, ...], ...]

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array, kernels: Mapping[str, jax.Array], scales_bxP: jax.Array) -> tuple[jax.Array, None]:
        scaled = self.loop.scaled_paths
        for i, row in enumerate(self.rows):
            weights = {path: kernels[str(group)] for path, group in zip(self.loop.paths, row, strict=True)}
            weights |= {path: scales_bxP[i, p] * weights[path] for p, path in enumerate(scaled)}
            filled = nn.map_variables(
                lambda block, x: block(x),
                "params",
                trans_in_fn=lambda params, weights=weights: {"params": _filled(params.get("params", {}), weights)},
                trans_out_fn=lambda params, weights=weights: {"params": _stripped(params.get("params", {}), tuple(weights))},
                mutable=self.is_initializing(),
            )
            x_BxHxWxC = filled(self.block(name=f"block{i + 1}"), x_BxHxWxC)
        return x_BxHxWxC, None


class LoopedStage(nn.Module):
    """A `Stage` whose blocks 2.. are run as a loop (`jax.lax.scan`), and those behind the last whole iteration one by one.

    Its parameters are

        block1/...           the first block's own
        kernels/0, /1, ...   what the others share, each of a kernel's shape
        scales               (blocks, paths that are scaled): the signed scale of each layer, if there are any
        body/block1/...      what the body's blocks have of their own, stacked along axis 0, one entry an iteration
        rest/block1/...      the same of the blocks behind the loop, not stacked

    and batch statistics lie likewise. Scales start at 1.

    Attributes:
      block, blocks, stride, later: as of `Stage`.
      loop: which block uses which kernels.
      unroll: whether the loop is unrolled when it is compiled. None unrolls on CPU, where the gradient of convolutions in a loop is many
        times slower (XLA runs them without its fast library), and nowhere else. Variables and results are the same either way.

    Raises:
      ModelError: if the loop is for another number of blocks; when initialised, if a block has no such parameter, or the layers of one
        group differ in shape.
    """

    block: Callable[..., nn.Module]
    blocks: int
    stride: int
    loop: Loop
    later: Callable[..., nn.Module] | None = None
    unroll: bool | None = None

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
        loop = self.loop
        x_BxHxWxC = self.block(stride=self.stride, name="block1")(x_BxHxWxC)
        later = self.later or _unstrided(self.block)
        if self.is_initializing() and not self.has_variable("params", "kernels"):
            kernels = initial_kernels(loop, later, self.make_rng("params"), x_BxHxWxC)
            self.put_variable("params", "kernels", kernels)
            if loop.scaled_paths:
                dtype = next(iter(kernels.values())).dtype
                self.put_variable("params", "scales", jnp.ones((loop.blocks, len(loop.scaled_paths)), dtype))
        kernels, scales_nxP = self.get_variable("params", "kernels"), self.get_variable("params", "scales", jnp.ones((loop.blocks, 0)))
        missing = [str(group) for group in range(loop.kernels) if str(group) not in (kernels or {})]
        if missing or scales_nxP.shape != (loop.blocks, len(loop.scaled_paths)):
            raise ModelError(
                f"{'/'.join(self.path)}: the variables are not those of a stage of {loop}; pass what this model's init returned, or "
                "`paramshare.analysis.looping.loop`"
            )

        looped = loop.iterations * loop.length
        scanned = nn.scan(
            Body,
            variable_axes={True: 0},  # every collection
            split_rngs={True: True},
            in_axes=(nn.broadcast, 0),  # pyright: ignore[reportArgumentType] (annotated too narrowly)
            length=loop.iterations,
            unroll=loop.iterations if _unrolls(self.unroll) else 1,
        )
        scales_IxbxP = scales_nxP[:looped].reshape(loop.iterations, loop.length, -1)
        x_BxHxWxC, _ = scanned(later, loop, loop.body, name="body")(x_BxHxWxC, kernels, scales_IxbxP)
        if loop.rest:
            x_BxHxWxC, _ = Body(later, loop, loop.rest, name="rest")(x_BxHxWxC, kernels, scales_nxP[looped:])
        return x_BxHxWxC


def stage(model: Any, number: int, blocks: int) -> Callable[..., nn.Module]:
    """What builds a model's stage, numbered from 1: a `Stage`, or the `LoopedStage` that its `loops` ask for.

    Raises:
      ModelError: if the loop is for another number of blocks.
    """
    loop = model.loops[number - 1] if model.loops else None
    if loop is None:
        return Stage
    if loop.blocks != blocks - 1:
        raise ModelError(f"loops: that of stage {number} is for {loop.blocks} blocks, but {blocks - 1} follow the first one of {blocks}")

    def build(block: Callable[..., nn.Module], blocks: int, stride: int, later: Any = None, name: str | None = None) -> LoopedStage:
        return LoopedStage(block, blocks, stride, loop, later, model.unroll, name=name)

    return build


def check_loops(model: Any, stages: int) -> None:
    """`ModelError` unless a model's `loops` has an entry for each stage, or none at all, and `unroll` is True, False or None."""
    if not isinstance(model.loops, tuple) or not all(loop is None or isinstance(loop, Loop) for loop in model.loops):
        raise ModelError(f"loops={model.loops!r}; give a tuple with a Loop, or None, for each stage")
    if model.loops and len(model.loops) != stages:
        raise ModelError(f"loops has {len(model.loops)} entries, but there are {stages} stages; give each stage a Loop or None")
    if model.unroll is not None and not isinstance(model.unroll, bool):
        raise ModelError(f"unroll={model.unroll!r}; it is True, False, or None to choose by backend")


def initial_kernels(loop: Loop, block: Callable[..., nn.Module], key: jax.Array, x_BxHxWxC: jax.Array) -> dict[str, jax.Array]:
    """A fresh kernel for each group, drawn as the first layer that uses it draws its own.

    Raises:
      ModelError: if a block has no such parameter, or the layers of one group differ in shape.
    """
    image = jax.ShapeDtypeStruct(x_BxHxWxC.shape, x_BxHxWxC.dtype)

    def draw(key: jax.Array) -> list[dict[str, jax.Array]]:
        drawn = []
        for i in range(loop.length):
            params = block(parent=None).init(jax.random.fold_in(key, i), jnp.zeros(image.shape, image.dtype))["params"]
            drawn.append({path: _at(params, path) for path in loop.paths})
        return drawn

    kernels: dict[str, jax.Array] = {}
    first: dict[str, str] = {}
    for row, drawn in zip(loop.body, jax.jit(draw)(key), strict=True):  # compiled, so that what the block computes is left out
        for path, group in zip(loop.paths, map(str, row), strict=True):
            kernel = kernels.setdefault(group, drawn[path])
            origin = first.setdefault(group, path)
            if kernel.shape != drawn[path].shape:
                raise ModelError(
                    f"group {group} ties {origin} of shape {kernel.shape} to {path} of shape {drawn[path].shape}; "
                    "give kernels of different shapes groups of their own"
                )
    return kernels


def period(rows: Sequence[Any]) -> int | None:
    """The smallest p, less than their number, with rows[i] = rows[i + p] throughout; None if there is none.

    Example:
      >>> from paramshare.models.looped import period
      >>> period((0, 1, 0, 1, 0)), period((0, 1, 1))
      (2, None)
    """
    return next((p for p in range(1, len(rows)) if all(a == b for a, b in zip(rows, rows[p:], strict=False))), None)


def _unrolls(unroll: bool | None) -> bool:
    return jax.default_backend() == "cpu" if unroll is None else unroll


def _unstrided(block: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    return lambda **options: block(stride=1, **options)


def _at(params: Mapping[str, Any], path: str) -> jax.Array:
    node: Any = params
    for name in path.split("/"):
        if not isinstance(node, Mapping) or name not in node:
            raise ModelError(f"a block of this stage has no parameter {path!r}; it has {_paths(params)}")
        node = node[name]
    if isinstance(node, Mapping):
        raise ModelError(f"{path!r} of this stage's blocks is no parameter but holds several: {_paths(node)}")
    return node


def _paths(params: Mapping[str, Any]) -> list[str]:
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return ["/".join(str(getattr(key, "key", key)) for key in path) for path, _ in leaves]


def _filled(params: Mapping[str, Any], weights: Mapping[str, jax.Array]) -> dict[str, Any]:
    """`params` with the weights put in their places."""
    tree = dict(params)
    for path, weight in weights.items():
        name, _, below = path.partition("/")
        tree[name] = _filled(tree.get(name, {}), {below: weight}) if below else weight
    return tree


def _stripped(params: Mapping[str, Any], paths: tuple[str, ...]) -> dict[str, Any]:
    """`params` without these, and without the scopes that this leaves empty."""
    kept = {}
    for name, value in params.items():
        below = tuple(path.partition("/")[2] for path in paths if path.partition("/")[0] == name)
        if "" in below:
            continue
        if isinstance(value, Mapping):
            value = _stripped(value, below)
            if not value:
                continue
        kept[name] = value
    return kept


def _check_rows(groups: Any, width: int) -> tuple[tuple[int, ...], ...]:
    try:
        rows = tuple(tuple(operator.index(group) for group in row) for row in groups)
    except TypeError:
        rows = ()
    if not rows or any(len(row) != width for row in rows):
        raise ModelError(
            f"Loop(groups={groups!r}): groups are whole numbers, for each block a row of as many as there are paths ({width}), "
            "such as ((0, 1), (0, 1))"
        )
    known = 0
    for number in (group for row in rows for group in row):
        if not 0 <= number <= known:
            raise ModelError(f"Loop(groups={rows}): groups are numbered from 0 in the order of their first use, but {number} comes early")
        known = max(known, number + 1)
    return rows
