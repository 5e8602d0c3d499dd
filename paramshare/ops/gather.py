"""Gathers whose indices are computed."""

import functools

import jax

from paramshare.ops.form import chosen


def computed_first(index: jax.Array) -> jax.Array:
    """The same indices, computed before the gather that uses them.

    On CPUs, XLA fuses index arithmetic into the gather, in spite of an optimization barrier. It
    then runs once for every entry that is moved, not once for every index: five times slower where
    an index moves a block of 32. A loop that never runs keeps them apart; XLA
    cannot tell that it never runs.

    Args:
      index: integers of at least 0, an array of any shape that has entries.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from paramshare.ops import computed_first
      >>> jax.jit(lambda x: x[computed_first(jnp.arange(3)[::-1])])(jnp.array([5, 6, 7])).tolist()
      [7, 6, 5]
    """
    if chosen() == "xla":
        return jax.lax.optimization_barrier(index)
    return _apart(index)


@functools.partial(jax.jit, inline=True)  # traced once for each shape
def _apart(index: jax.Array) -> jax.Array:
    return jax.lax.platform_dependent(
        index,
        cpu=lambda index: jax.lax.while_loop(
            lambda index: index.ravel()[0] < 0, jax.lax.neg, index
        ),
        default=jax.lax.optimization_barrier,
    )
