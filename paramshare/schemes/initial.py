"""Distributions that banks are drawn from."""

import math

import jax
import jax.numpy as jnp

from paramshare.schemes.interface import Site


def he_fan_out(site: Site) -> float:
    """sqrt(2 / fan_out): the standard deviation of He's initializer, in its fan-out version."""
    return math.sqrt(2 / site.fan_out)


def model_std(site: Site) -> float:
    """The standard deviation of the model's initializer (`Scheme.check_initializer` has run)."""
    assert site.std is not None
    return site.std


def rms_std(sites: tuple[Site, ...]) -> float:
    """The root mean square of the sites' standard deviations."""
    return math.sqrt(sum(model_std(site) ** 2 for site in sites) / len(sites))


def orthogonal(key: jax.Array, rows: int, columns: int, dtype: jnp.dtype) -> jax.Array:
    """A (rows, columns) matrix whose shorter side is orthonormal.

    By QR of a Gaussian matrix; the diagonal of R fixes the signs.
    """
    return jax.nn.initializers.orthogonal()(key, (rows, columns), dtype)
