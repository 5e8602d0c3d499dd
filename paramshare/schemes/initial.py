"""What fresh banks are drawn from."""

import math
from typing import Literal

import jax
import jax.numpy as jnp

from paramshare.schemes.interface import SchemeError, Site

Fan = Literal["fan_in", "fan_out"]


def standard_deviation(site: Site, scale: float, fan: Fan) -> float:
    """sqrt(scale / fan): the standard deviation of `jax.nn.initializers.variance_scaling(scale, fan, "normal")` for the site's shape.

    He's initialiser is scale 2, LeCun's (Flax's default) scale 1 with "fan_in".
    """
    return math.sqrt(scale / getattr(site, fan))


def check_variance(scheme: str, scale: float, fan: str) -> None:
    """Raises `SchemeError` unless `scale` is positive and `fan` one of the two."""
    if fan not in ("fan_in", "fan_out"):
        raise SchemeError(f"{scheme}(fan={fan!r}): fan is 'fan_in' or 'fan_out', as in jax.nn.initializers.variance_scaling")
    if not (isinstance(scale, int | float) and not isinstance(scale, bool) and math.isfinite(scale) and scale > 0):
        raise SchemeError(f"{scheme}(scale={scale!r}): the scale of the initial variance is a positive number; He's is 2, LeCun's 1")


def orthogonal(key: jax.Array, rows: int, columns: int, dtype: jnp.dtype) -> jax.Array:
    """A (rows, columns) matrix whose shorter side is orthonormal: QR of a Gaussian, signs fixed by the diagonal of R."""
    return jax.nn.initializers.orthogonal()(key, (rows, columns), dtype)
