"""Bases and numbers of learnable repetition, fitted to given kernels by alternating least squares."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paramshare.schemes.tied import leading

ROUNDS = 100
Repeat = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]  # (base, shape of the kernel, numbers) -> kernel
Arrays = list[jax.Array]


def fit(
    repeat: Repeat,
    kernels: Sequence[jax.Array],
    base: tuple[int, ...],
    numbers: Sequence[Any],
    centred: bool,
    rounds: int | jax.Array = ROUNDS,
) -> tuple[jax.Array, list[Any]]:
    """The base, and numbers, whose repetitions are near to the kernels in the sum of squares; never farther than copies of the mean are.

    Entries of a base, numbers of a tile, and those of a remainder each reach kernel entries of their own, so that the rest fixed, every one
    is a small problem by itself: a damped Gauss-Newton step, taken where it lessens the error. Rounds of such steps start from plain
    copies, of the mean and of the leading singular vector; the better end is taken. A local minimum, as a rule.

    Args:
      repeat: makes a kernel; called for those of another shape than the base.
      kernels: of all sites that repeat this base.
      base: its shape.
      numbers: for each kernel, numbers that make plain copies, a dictionary of (*tiles, m) arrays; empty for a kernel that is the base.
      centred: whether a tile may have a constant of its own ("fourier"): the leading vector is then that of tiles without their mean.
      rounds: how many.
    """
    sums = [_Sums(kernel.shape, base) for kernel in kernels]

    def make(base: jax.Array, numbers: Sequence[Any]) -> Arrays:
        """What is made, less what is wanted."""
        made = (repeat(base, kernel.shape, its) if its else base for kernel, its in zip(kernels, numbers, strict=True))
        return [kernel - wanted for kernel, wanted in zip(made, kernels, strict=True)]

    def over_base(parts: Arrays) -> jax.Array:
        return functools.reduce(jnp.add, [of.base(part) for of, part in zip(sums, parts, strict=True)])

    def one_round(_: Any, state: Any) -> Any:
        (base, *numbers), (base_damping, *dampings) = state
        for i, its in enumerate(numbers):
            for name in its:
                its[name], dampings[i][name] = _step(
                    lambda theta, i=i, name=name: [make(base, [*numbers[:i], {**numbers[i], name: theta}, *numbers[i + 1 :]])[i]],
                    lambda parts, i=i, name=name: getattr(sums[i], name)(parts[0]),
                    its[name],
                    dampings[i][name],
                )
        entries, base_damping = _step(
            lambda theta: make(theta[..., 0], numbers),
            over_base,
            base[..., None],
            base_damping,
        )
        return [entries[..., 0], *numbers], [base_damping, *dampings]

    def run(start: jax.Array) -> tuple[jax.Array, Any]:
        damping = jax.tree.map(lambda its: jnp.full(its.shape[:-1], 1e-3, its.dtype), list(numbers))
        state = [start, *map(dict, numbers)], [jnp.full(base, 1e-3, start.dtype), *damping]
        (found, *its), _ = jax.lax.fori_loop(0, rounds, one_round, state)
        return jnp.sum(over_base([part**2 for part in make(found, its)])), (found, its)

    mean = over_base(list(kernels)) / over_base([jnp.ones_like(kernel) for kernel in kernels])
    if not any(numbers):  # plain copies, throughout: nothing else to fit
        return mean, list(numbers)
    rows = jnp.concatenate([of.rows(kernel) for of, kernel in zip(sums, kernels, strict=True)])
    if centred:
        rows = rows - jnp.mean(rows, axis=1, keepdims=True)
    plain = [kernel for kernel, its in zip(kernels, numbers, strict=True) if not its]
    first = jnp.mean(jnp.stack(plain), axis=0) if plain else leading(rows)[0].reshape(base)
    error, found = jax.vmap(run)(jnp.stack([mean, first]))
    best = jnp.argmin(jnp.where(jnp.isfinite(error), error, jnp.inf))
    base_found, its = jax.tree.map(lambda leaf: leaf[best], found)
    return base_found, its


def _step(residual: Callable[[jax.Array], Arrays], gather: Callable[[Arrays], jax.Array], theta: jax.Array, damping: jax.Array) -> Any:
    """One step (Levenberg 1944, Marquardt 1963) of each of many independent fits, theta (*fits, m), where it lessens that fit's error."""
    m = theta.shape[-1]
    left, push = jax.linearize(residual, theta)
    columns = jax.vmap(push)(jnp.stack([jnp.zeros_like(theta).at[..., i].set(1) for i in range(m)]))

    def product(a: Arrays, b: Arrays) -> jax.Array:
        return gather([x * y for x, y in zip(a, b, strict=True)])

    by_columns = jax.vmap(product, in_axes=(None, 0), out_axes=-1)
    slope, square = by_columns(left, columns), jnp.moveaxis(jax.lax.map(lambda a: by_columns(a, columns), columns), 0, -1)
    size = jnp.sqrt(jnp.diagonal(square, axis1=-2, axis2=-1))
    size = jnp.where(size == 0, 1, size)  # what nothing depends on stays: its slope is 0
    damped = jnp.expand_dims(damping, (-2, -1)) * jnp.expand_dims(jnp.eye(m, dtype=theta.dtype), range(damping.ndim))
    square = square / (size[..., :, None] * size[..., None, :]) + damped
    fresh = theta - jnp.linalg.solve(square, (slope / size)[..., None])[..., 0] / size
    new = residual(fresh)
    better = product(new, new) < product(left, left)
    factor = jnp.where(better, 0.2, 5.0).astype(theta.dtype)
    return jnp.where(better[..., None], fresh, theta), jnp.clip(damping * factor, 1e-7, 1e7)


class _Sums:
    """Sums over the entries of a kernel that depend on one entry of the base, on one tile's numbers, or on a remainder's."""

    def __init__(self, shape: tuple[int, ...], base: tuple[int, ...]):
        self.tiled, self.own, self.tile = [], [], []  # for inputs, outputs: length without remainder, one-hot places in base and tiles
        for size, part in zip(shape[-2:], base[-2:], strict=True):
            tiles = size // part
            place = np.arange(size) % (tiles * part)  # a remainder repeats the first slices, already transformed
            self.tiled.append(tiles * part)
            self.own.append(np.eye(part, dtype=np.float32)[place % part])
            self.tile.append(np.eye(tiles, dtype=np.float32)[place // part])

    def base(self, x: jax.Array) -> jax.Array:
        return self._sum("...rc,rp,cq->...pq", x, self.own)

    def tiles(self, x: jax.Array) -> jax.Array:
        return self._sum("rc,rj,ci->ij", jnp.sum(x, axis=tuple(range(x.ndim - 2))), self.tile)

    def outputs(self, x: jax.Array) -> jax.Array:
        return jnp.sum(x[..., self.tiled[1] :])

    def inputs(self, x: jax.Array) -> jax.Array:
        return jnp.sum(x[..., self.tiled[0] :, :])

    def rows(self, x: jax.Array) -> jax.Array:
        """(tiles, P): every whole tile, flattened as a base is."""
        (*cell, _, _), (inputs, outputs) = x.shape, self.tiled
        (p, q), (j, i) = (own.shape[1] for own in self.own), (tile.shape[1] for tile in self.tile)
        parts = x[..., :inputs, :outputs].reshape(*cell, j, p, i, q)
        return jnp.moveaxis(parts, (-4, -2), (0, 1)).reshape(j * i, -1)

    def _sum(self, form: str, x: jax.Array, places: list[np.ndarray]) -> jax.Array:
        rows, columns = (jnp.asarray(place, x.dtype) for place in places)
        return jnp.einsum(form, x, rows, columns, precision=jax.lax.Precision.HIGHEST)
