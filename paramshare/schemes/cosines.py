"""Cosines between rows: how similar layers are."""

import jax
import jax.numpy as jnp


def cosines(rows_LxN: jax.Array) -> jax.Array:
    """|cosine| between rows, (L, L); 0 for rows of zeros.

    The gradient is finite everywhere. It is 0 at rows of zeros, and for two orthogonal rows, where
    |.| has its kink.
    """
    # Squares could under- or overflow.
    largest_Lx1 = jax.lax.stop_gradient(jnp.max(jnp.abs(rows_LxN), axis=1, keepdims=True))
    rows_LxN = rows_LxN / jnp.where(largest_Lx1 == 0, 1, largest_Lx1)
    squares_Lx1 = jnp.sum(rows_LxN**2, axis=1, keepdims=True)
    # The gradient of the square root is infinite at 0: rows of zeros avoid it.
    zero_Lx1 = squares_Lx1 == 0
    unit_LxN = jnp.where(zero_Lx1, 0, rows_LxN) / jnp.sqrt(jnp.where(zero_Lx1, 1, squares_Lx1))
    products_LxL = jnp.matmul(unit_LxN, unit_LxN.T, precision=jax.lax.Precision.HIGHEST)
    # The gradient of jnp.abs is 1 at 0.
    return jnp.minimum(products_LxL * jnp.sign(jax.lax.stop_gradient(products_LxL)), 1)
