"""How alike the layers of a bank are."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from paramshare.schemes import Soft
from paramshare.shared import Shared


def similarity(shared: Shared, variables: Mapping[str, Any]) -> dict[str, jax.Array]:
    r"""The layer similarity matrix of every bank.

    .. math:: S_{ij} = |\langle a_i, a_j \rangle| / (\|a_i\| \|a_j\|)

    where a_i are the coefficients of layer i (soft sharing), or the layer's expanded kernel (any other scheme whose sites have one
    shape). S_ij = 1 means that two layers use the same kernel up to a scale, which may be negative. A row of zeros is similar to
    nothing, itself included.

    Args:
      shared: the shared model.
      variables: its variables.

    Returns:
      `{bank: (L, L)}`, values in [0, 1], layers in the order of the bank's sites. Banks whose sites differ in shape are left out.

    References:
      Savarese & Maire, ICLR 2019, section 3.2.
    """
    matrices = {}
    for bank in shared.layout.banks:
        if len({site.shape for site in bank.sites}) != 1:
            continue
        coefficients = variables.get("params", {}).get("coefficients", {}).get(bank.name, {})  # a scheme may have none
        if isinstance(bank.scheme, Soft):
            rows_LxN = coefficients
        else:
            kernels = bank.scheme.expand(variables["banks"][bank.name], coefficients, bank.sites)
            rows_LxN = jnp.stack([kernel.reshape(-1) for kernel in kernels])
        length_Lx1 = jnp.linalg.norm(rows_LxN, axis=1, keepdims=True)
        unit_LxN = rows_LxN / jnp.where(length_Lx1 == 0, 1, length_Lx1)
        products_LxL = jnp.matmul(unit_LxN, unit_LxN.T, precision=jax.lax.Precision.HIGHEST)
        matrices[bank.name] = jnp.clip(jnp.abs(products_LxL), 0, 1)
    return matrices
