"""The transforms of learnable repetition: elementwise functions with a few learned scalars."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

Transform = Literal["swish", "linear", "scale", "fourier"]
PARAMETERS = {"swish": 2, "linear": 0, "scale": 1, "fourier": 6}  # scalars for each copy
SMALL = 0.03  # of fourier's a_2 w^2 beside a_1 w: enough to make copies differ


def identity(name: Transform) -> tuple[float, ...]:
    """The scalars of a plain copy."""
    return {
        "swish": (2.0, 0.0),
        "linear": (),
        "scale": (1.0,),
        "fourier": (0.0, 1.0, 0.0, 0.0, 0.0, 0.0),
    }[name]


def transform(name: Transform, w: jax.Array, scalars: list[jax.Array]) -> jax.Array:
    """`w` transformed; each of the scalars broadcasts against it."""
    if name == "swish":
        alpha, beta = scalars
        return alpha * w * jax.nn.sigmoid(-beta * w)
    if name == "scale":
        return scalars[0] * w
    power, total = jnp.ones_like(w), jnp.zeros_like(w)
    for a in scalars:
        total, power = total + a * power, power * w
    return total


def neutral(
    name: Transform,
    key: jax.Array,
    zeros: jax.Array,
    beta: tuple[float, float],
    before: float,
    after: float,
) -> jax.Array:
    """Random scalars that take weights N(0, before^2) to the standard deviation `after`.

    Args:
      name: the name of the transform, with scalars.
      key: the key of the draw.
      zeros: (*copies, m), of the shape and dtype to return.
      beta: the range of the swish's beta.
      before: standard deviation of the weights.
      after: standard deviation of the transformed weights.
    """
    sign_key, key = jax.random.split(key)
    sign = jax.random.rademacher(sign_key, zeros.shape[:-1], zeros.dtype)
    if name == "scale":
        return (after / before) * sign[..., None]
    if name == "fourier":
        a_2 = SMALL * after / before**2 * jax.random.normal(key, zeros.shape[:-1], zeros.dtype)
        return zeros.at[..., 1].set(sign * after / before).at[..., 2].set(a_2)
    betas = jax.random.uniform(key, zeros.shape[:-1], zeros.dtype, *beta)
    # The mean square of w sigmoid(-beta w) over a normal w, by Gauss-Hermite quadrature.
    nodes, weights = np.polynomial.hermite_e.hermegauss(32)
    w = jnp.expand_dims(jnp.asarray(before * nodes, zeros.dtype), range(betas.ndim))
    squares = (w * jax.nn.sigmoid(-betas[..., None] * w)) ** 2
    square = squares @ jnp.asarray(weights / weights.sum(), zeros.dtype)
    return jnp.stack([sign * after / jnp.sqrt(square), betas], axis=-1)
