"""A residual stage that runs its later blocks as a loop over one body with shared kernels."""

import dataclasses
import functools
import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from paramshare.errors import ParamshareError
from paramshare.layout import fill, strip
from paramshare.models.layers import Stage
from paramshare.schemes import SchemeError, Tied

LOOP, SCALES, BODY, REMAINING = "loop", "scales", "body", "remaining"


class LoopError(ParamshareError):
    """A network cannot be looped, or the variables do not belong to its loops."""


@dataclasses.dataclass(frozen=True)
class Loop:
    """Which blocks of a stage use which kernels. The pattern must repeat to run as a loop.

    Args:
      paths: the shared parameters of a block, such as `("conv1/kernel", "conv2/kernel")`. Each
        block keeps its other parameters.
      groups: for each of the blocks 2, 3, ... of a stage, one kernel number per path. Numbers start
        at 0, in the order of first use. Kernels of different shapes need different numbers.
      scaled: whether each layer multiplies its kernel by a signed scale: one bool for all paths, or
        one per path.

    Raises:
      LoopError: if an argument is invalid, or if no pattern repeats. The first b rows must occur at
        least twice; the remaining rows must be the start of the same pattern.

    Example:
      >>> from paramshare.transform.looped import Loop
      >>> turns = ((0, 1), (2, 0), (1, 2))  # three kernels take turns
      >>> loop = Loop(("conv1/kernel", "conv2/kernel"), groups=(*turns, *turns, (0, 1)))
      >>> loop.body, loop.iterations, loop.remaining
      (((0, 1), (2, 0), (1, 2)), 2, ((0, 1),))
    """

    paths: tuple[str, ...]
    groups: tuple[tuple[int, ...], ...]
    scaled: bool | tuple[bool, ...] = True

    def __post_init__(self):
        paths = (self.paths,) if isinstance(self.paths, str) else tuple(self.paths)
        valid = all(isinstance(path, str) and path for path in paths)
        if not paths or len(set(paths)) < len(paths) or not valid:
            raise LoopError(
                f"Loop(paths={self.paths!r}): paths must be distinct parameters of a block, "
                "such as ('conv1/kernel',)"
            )
        scaled = self.scaled if isinstance(self.scaled, tuple) else (self.scaled,) * len(paths)
        if len(scaled) != len(paths) or not all(isinstance(flag, bool) for flag in scaled):
            raise LoopError(
                f"Loop(scaled={self.scaled!r}): scaled must be True or False, or a tuple with one "
                f"bool for each of the {len(paths)} paths"
            )
        object.__setattr__(self, "paths", paths)
        object.__setattr__(self, "groups", _check_rows(self.groups, len(paths)))
        object.__setattr__(self, "scaled", scaled)
        if self.iterations < 2:
            raise LoopError(
                f"Loop(groups={self.groups}): no pattern of blocks occurs twice; "
                "leave this stage without a loop"
            )

    @property
    def blocks(self) -> int:
        """Number of blocks that use the kernels."""
        return len(self.groups)

    @property
    def length(self) -> int:
        """b: number of blocks in the body."""
        return period(self.groups) or self.blocks

    @property
    def iterations(self) -> int:
        """Number of times the body runs."""
        return self.blocks // self.length

    @property
    def body(self) -> tuple[tuple[int, ...], ...]:
        """Rows of the body's blocks."""
        return self.groups[: self.length]

    @property
    def remaining(self) -> tuple[tuple[int, ...], ...]:
        """Rows of the blocks after the loop, fewer than `length`."""
        return self.groups[self.iterations * self.length :]

    @property
    def kernels(self) -> int:
        """Number of shared kernels."""
        return 1 + max(max(row) for row in self.groups)

    @property
    def scaled_paths(self) -> tuple[str, ...]:
        """Paths whose kernels are scaled."""
        return tuple(path for path, flag in zip(self.paths, self.scaled, strict=True) if flag)  # pyright: ignore[reportArgumentType]

    def __str__(self) -> str:
        after = f" + {len(self.remaining)}" if self.remaining else ""
        return f"{self.iterations} x {self.length} blocks{after}, {self.kernels} kernels"


@dataclasses.dataclass(frozen=True)
class LoopedStages:
    """Builds a network's stages: a `LoopedStage` for each stage with a loop, otherwise a `Stage`.

    Hashable, so that a model with loops is as static under `jax.jit` as one without.

    Args:
      loops: loops by stage name, as a mapping or as pairs; stored as a tuple of pairs.
      unroll: see `LoopedStage`.

    Raises:
      LoopError: if an argument is invalid; when a stage is built, if its loop is for another number
        of blocks.

    Example:
      >>> from paramshare.models import WideResNet
      >>> from paramshare.transform.looped import Loop, LoopedStages
      >>> loop = Loop(("conv1/kernel", "conv2/kernel"), groups=((0, 1),) * 3)
      >>> model = WideResNet(28, width=1).clone(stage=LoopedStages({"stage2": loop}))
      >>> print(dict(model.stage.loops)["stage2"])
      3 x 1 blocks, 2 kernels
    """

    loops: Mapping[str, Loop] | tuple[tuple[str, Loop], ...] = ()
    unroll: bool | None = None

    def __post_init__(self):
        try:
            loops = dict(self.loops)
        except (TypeError, ValueError):
            loops = {"": None}
        if not all(isinstance(k, str) and isinstance(v, Loop) for k, v in loops.items()):
            raise LoopError(
                f"LoopedStages(loops={self.loops!r}): loops must map names of stages to Loops, "
                "such as {'stage2': Loop(...)}"
            )
        object.__setattr__(self, "loops", tuple(loops.items()))
        if self.unroll is not None and not isinstance(self.unroll, bool):
            raise LoopError(
                f"LoopedStages(unroll={self.unroll!r}): unroll must be True, False, or None to "
                "let the backend decide"
            )

    def __call__(
        self,
        block: Callable[..., nn.Module],
        blocks: int,
        stride: int,
        later: Callable[..., nn.Module] | None = None,
        name: str | None = None,
    ) -> nn.Module:
        """The stage called `name`; arguments as of `Stage`."""
        loop = dict(self.loops).get(name or "")
        if loop is None:
            return Stage(block, blocks, stride, later, name=name)
        if loop.blocks != blocks - 1:
            raise LoopError(
                f"the loop of {name} is for {loop.blocks} blocks, but the stage has {blocks - 1} "
                "after the first; give one row of groups for each of them"
            )
        return LoopedStage(block, blocks, stride, loop, later, self.unroll, name=name)


class Body(nn.Module):
    """Some blocks in a row, `block1`, `block2`, ..., with their shared kernels passed in.

    Attributes:
      block: builds a block, given its name.
      loop: the loop that the blocks belong to.
      rows: rows of `loop.groups`, one for each block.
    """

    block: Callable[..., nn.Module]
    loop: Loop
    rows: tuple[tuple[int, ...], ...]

    @nn.compact
    def __call__(
        self, x_BxHxWxC: jax.Array, kernels: Mapping[str, jax.Array], scales_bxP: jax.Array
    ) -> tuple[jax.Array, None]:
        paths = self.loop.paths
        for i, row in enumerate(self.rows):
            weights = {path: kernels[str(g)] for path, g in zip(paths, row, strict=True)}
            for p, path in enumerate(self.loop.scaled_paths):
                weights[path] = scales_bxP[i, p] * weights[path]
            filled = nn.map_variables(
                lambda block, x: block(x),
                "params",
                trans_in_fn=lambda block, weights=weights: {
                    "params": fill(block.get("params", {}), weights)
                },
                trans_out_fn=lambda block: {"params": strip(block.get("params", {}), set(paths))},
                mutable=self.is_initializing(),
            )
            x_BxHxWxC = filled(self.block(name=f"block{i + 1}"), x_BxHxWxC)
        return x_BxHxWxC, None


class LoopedStage(nn.Module):
    """A `Stage` that runs its blocks 2, 3, ... as a loop (`jax.lax.scan`) over a body of blocks.

    Blocks after the last whole iteration run one by one. The parameters are

        block1/...            the first block
        loop/0, loop/1, ...   the shared kernels
        scales                (blocks, scaled paths): the signed scale of each layer, if any
        body/block1/...       the other parameters of the body, with a leading axis of iterations
        remaining/block1/...  the other parameters of the blocks after the loop

    and batch statistics have the same structure. Scales start at 1.

    Attributes:
      block, blocks, stride, later: as of `Stage`.
      loop: which block uses which kernels.
      unroll: whether the compiled loop is unrolled. None unrolls on CPU only, where XLA computes
        the gradient of a convolution inside a loop many times slower, without its fast library.
        Variables and results are the same either way.

    Raises:
      LoopError: at initialisation, if a block has no such parameter, or if layers of one group
        differ in shape; when called, if the variables belong to another loop.
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
        later = self.later or functools.partial(self.block, stride=1)
        if self.is_initializing() and not self.has_variable("params", LOOP):
            kernels = initial_kernels(loop, later, self.make_rng("params"), x_BxHxWxC)
            self.put_variable("params", LOOP, kernels)
            if loop.scaled_paths:
                shape = (loop.blocks, len(loop.scaled_paths))
                self.put_variable("params", SCALES, jnp.ones(shape, kernels["0"].dtype))
        kernels = self.get_variable("params", LOOP, {})
        scales_nxP = self.get_variable("params", SCALES, jnp.ones((loop.blocks, 0)))
        complete = set(kernels) == {str(number) for number in range(loop.kernels)}
        if not complete or scales_nxP.shape != (loop.blocks, len(loop.scaled_paths)):
            raise LoopError(
                f"{'/'.join(self.path)}: the variables do not belong to a stage of {loop}; pass "
                "what this model's init, or `paramshare.loop`, returned"
            )

        looped = loop.iterations * loop.length
        unroll = jax.default_backend() == "cpu" if self.unroll is None else self.unroll
        scanned = nn.scan(
            Body,
            variable_axes={True: 0},  # every collection
            split_rngs={True: True},
            in_axes=(nn.broadcast, 0),  # pyright: ignore[reportArgumentType] (annotated too narrowly)
            length=loop.iterations,
            unroll=loop.iterations if unroll else 1,
        )
        scales_IxbxP = scales_nxP[:looped].reshape(loop.iterations, loop.length, -1)
        x_BxHxWxC, _ = scanned(later, loop, loop.body, name=BODY)(x_BxHxWxC, kernels, scales_IxbxP)
        if loop.remaining:
            remaining = Body(later, loop, loop.remaining, name=REMAINING)
            x_BxHxWxC, _ = remaining(x_BxHxWxC, kernels, scales_nxP[looped:])
        return x_BxHxWxC


def initial_kernels(
    loop: Loop, block: Callable[..., nn.Module], key: jax.Array, x_BxHxWxC: jax.Array
) -> dict[str, jax.Array]:
    """One initial kernel per group, drawn by the initialiser of the first layer that uses it.

    Raises:
      LoopError: if a block has no such parameter, or if the layers of one group differ in shape.
    """
    shape, dtype = x_BxHxWxC.shape, x_BxHxWxC.dtype

    @jax.jit  # compiled, so that the outputs of the blocks are never computed
    def draw(key: jax.Array) -> list[dict[str, jax.Array]]:
        keys = [jax.random.fold_in(key, i) for i in range(loop.length)]
        inits = [block(parent=None).init(key, jnp.zeros(shape, dtype)) for key in keys]
        params: Any = [flatten_dict(variables["params"], sep="/") for variables in inits]
        for path in loop.paths:
            if path not in params[0]:
                raise LoopError(
                    f"a block of this stage has no parameter {path!r}; it has {sorted(params[0])}"
                )
        return [{path: block[path] for path in loop.paths} for block in params]

    kernels: dict[str, jax.Array] = {}
    origin: dict[str, str] = {}
    for row, drawn in zip(loop.body, draw(key), strict=True):
        for path, group in zip(loop.paths, map(str, row), strict=True):
            kernel = kernels.setdefault(group, drawn[path])
            first = origin.setdefault(group, path)
            if kernel.shape != drawn[path].shape:
                raise LoopError(
                    f"group {group} ties {first} of shape {kernel.shape} to {path} of shape "
                    f"{drawn[path].shape}; use separate groups for kernels of different shapes"
                )
    return kernels


def period(rows: Sequence[Any]) -> int | None:
    """The smallest p < len(rows) with rows[i] = rows[i + p] for all i, or None if there is none.

    Example:
      >>> from paramshare.transform.looped import period
      >>> period((0, 1, 0, 1, 0)), period((0, 1, 1))
      (2, None)
    """
    return next((p for p in range(1, len(rows)) if rows[p:] == rows[:-p]), None)


def _check_rows(groups: Any, width: int) -> tuple[tuple[int, ...], ...]:
    try:
        rows = tuple(tuple(operator.index(group) for group in row) for row in groups)
    except TypeError:
        rows = ()
    if not rows or any(len(row) != width for row in rows):
        raise LoopError(
            f"Loop(groups={groups!r}): each block needs a row of {width} integers, one per path, "
            "such as ((0, 1), (0, 1))"
        )
    try:
        Tied(groups=tuple(itertools.chain(*rows)))
    except SchemeError as error:
        raise LoopError(f"Loop(groups={rows}): {error}") from None
    return rows
