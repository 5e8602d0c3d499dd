"""Bases and scalars of learnable repetition, fitted to kernels by alternating least squares."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paramshare.schemes.tied import leading

ROUNDS = 100
Repeat = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]  # (base, shape, scalars) -> kernel
Arrays = list[jax.Array]


def fit(
    repeat: Repeat,
    kernels: Sequence[jax.Array],
    base: tuple[int, ...],
    scalars: Sequence[Any],
    centred: bool,
    rounds: int | jax.Array = ROUNDS,
) -> tuple[jax.Array, list[Any]]:
    """The base and scalars whose repetitions are near to the kernels in the sum of squares.

    They are never farther than copies of the mean. Each entry of the base, and the scalars of each
    tile and remainder, reach different kernel entries. With everything else fixed, each is a small
    problem by itself: a damped Gauss-Newton step, taken where it reduces the error. Rounds of such
    steps start from plain copies of the mean and of the leading singular vector; the better end is
    returned, as a rule a local minimum.

    Args:
      repeat: makes a kernel; called for kernels of another shape than the base.
      kernels: the kernels of all sites that repeat this base.
      base: the shape of the base.
      scalars: for each kernel, scalars that make plain copies, a dictionary of (*tiles, m) arrays;
        empty for a kernel that is the base.
      centred: whether a tile may have a constant ("fourier"). The leading vector is then that of
        tiles without their mean.
      rounds: the number of rounds.
    """
    sums = [_Sums(kernel.shape, base) for kernel in kernels]

    def errors(base: jax.Array, scalars: Sequence[Any]) -> Arrays:
        repeated = (
            repeat(base, kernel.shape, values) if values else base
            for kernel, values in zip(kernels, scalars, strict=True)
        )
        return [a - b for a, b in zip(repeated, kernels, strict=True)]

    def over_base(parts: Arrays) -> jax.Array:
        return functools.reduce(
            jnp.add, [of.base(part) for of, part in zip(sums, parts, strict=True)]
        )

    def one_round(_: Any, state: Any) -> Any:
        (base, *scalars), (base_damping, *dampings) = state
        for i, values in enumerate(scalars):
            for name in values:

                def residual(theta: jax.Array, i=i, name=name) -> Arrays:
                    changed = {**scalars[i], name: theta}
                    return [errors(base, [*scalars[:i], changed, *scalars[i + 1 :]])[i]]

                values[name], dampings[i][name] = _step(
                    residual,
                    lambda parts, i=i, name=name: getattr(sums[i], name)(parts[0]),
                    values[name],
                    dampings[i][name],
                )
        entries, base_damping = _step(
            lambda theta: errors(theta[..., 0], scalars),
            over_base,
            base[..., None],
            base_damping,
        )
        return [entries[..., 0], *scalars], [base_damping, *dampings]

    def run(start: jax.Array) -> tuple[jax.Array, Any]:
        damping = jax.tree.map(lambda x: jnp.full(x.shape[:-1], 1e-3, x.dtype), list(scalars))
        state = [start, *map(dict, scalars)], [jnp.full(base, 1e-3, start.dtype), *damping]
        (end, *values), _ = jax.lax.fori_loop(0, rounds, one_round, state)
        return jnp.sum(over_base([part**2 for part in errors(end, values)])), (end, values)

    mean = over_base(list(kernels)) / over_base([jnp.ones_like(kernel) for kernel in kernels])
    if not any(scalars):  # plain copies: nothing else to fit
        return mean, list(scalars)
    rows = jnp.concatenate([of.rows(kernel) for of, kernel in zip(sums, kernels, strict=True)])
    if centred:
        rows = rows - jnp.mean(rows, axis=1, keepdims=True)
    plain = [kernel for kernel, values in zip(kernels, scalars, strict=True) if not values]
    first = jnp.mean(jnp.stack(plain), axis=0) if plain else leading(rows)[0].reshape(base)
    error, ends = jax.vmap(run)(jnp.stack([mean, first]))
    best = jnp.argmin(jnp.where(jnp.isfinite(error), error, jnp.inf))
    return jax.tree.map(lambda leaf: leaf[best], ends)


def _step(
    residual: Callable[[jax.Array], Arrays],
    gather: Callable[[Arrays], jax.Array],
    theta: jax.Array,
    damping: jax.Array,
) -> Any:
    """One step (Levenberg 1944, Marquardt 1963) of many independent fits, theta (*fits, m).

    A fit takes its step where that reduces its error.
    """
    m = theta.shape[-1]
    left, push = jax.linearize(residual, theta)
    columns = jax.vmap(push)(jnp.stack([jnp.zeros_like(theta).at[..., i].set(1) for i in range(m)]))

    def product(a: Arrays, b: Arrays) -> jax.Array:
        return gather([x * y for x, y in zip(a, b, strict=True)])

    by_columns = jax.vmap(product, in_axes=(None, 0), out_axes=-1)
    slope, square = (
        by_columns(left, columns),
        jnp.moveaxis(jax.lax.map(lambda a: by_columns(a, columns), columns), 0, -1),
    )
    size = jnp.sqrt(jnp.diagonal(square, axis1=-2, axis2=-1))
    size = jnp.where(size == 0, 1, size)  # without effect, and slope 0: stays
    damped = jnp.expand_dims(damping, (-2, -1)) * jnp.expand_dims(
        jnp.eye(m, dtype=theta.dtype), range(damping.ndim)
    )
    square = square / (size[..., :, None] * size[..., None, :]) + damped
    moved = theta - jnp.linalg.solve(square, (slope / size)[..., None])[..., 0] / size
    new = residual(moved)
    better = product(new, new) < product(left, left)
    factor = jnp.where(better, 0.2, 5.0).astype(theta.dtype)
    return jnp.where(better[..., None], moved, theta), jnp.clip(damping * factor, 1e-7, 1e7)


class _Sums:
    """Sums over the kernel entries that depend on one base entry, one tile, or one remainder."""

    def __init__(self, shape: tuple[int, ...], base: tuple[int, ...]):
        # For inputs, outputs: length without remainder, one-hot places in base and tiles.
        self.tiled, self.place, self.tile = [], [], []
        for size, part in zip(shape[-2:], base[-2:], strict=True):
            tiles = size // part
            # A remainder repeats the first slices, already transformed.
            place = np.arange(size) % (tiles * part)
            self.tiled.append(tiles * part)
            self.place.append(np.eye(part, dtype=np.float32)[place % part])
            self.tile.append(np.eye(tiles, dtype=np.float32)[place // part])

    def base(self, x: jax.Array) -> jax.Array:
        return self._sum("...rc,rp,cq->...pq", x, self.place)

    def tiles(self, x: jax.Array) -> jax.Array:
        return self._sum("rc,rj,ci->ij", jnp.sum(x, axis=tuple(range(x.ndim - 2))), self.tile)

    def outputs(self, x: jax.Array) -> jax.Array:
        return jnp.sum(x[..., self.tiled[1] :])

    def inputs(self, x: jax.Array) -> jax.Array:
        return jnp.sum(x[..., self.tiled[0] :, :])

    def rows(self, x: jax.Array) -> jax.Array:
        """(tiles, P): every whole tile, flattened like a base."""
        (*cell, _, _), (inputs, outputs) = x.shape, self.tiled
        (p, q), (j, i) = (
            (place.shape[1] for place in self.place),
            (tile.shape[1] for tile in self.tile),
        )
        parts = x[..., :inputs, :outputs].reshape(*cell, j, p, i, q)
        return jnp.moveaxis(parts, (-4, -2), (0, 1)).reshape(j * i, -1)

    def _sum(self, form: str, x: jax.Array, places: list[np.ndarray]) -> jax.Array:
        rows, columns = (jnp.asarray(place, x.dtype) for place in places)
        return jnp.einsum(form, x, rows, columns, precision=jax.lax.Precision.HIGHEST)
