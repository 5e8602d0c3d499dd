"""How alike the layers of a bank are."""

from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from paramshare.layout import Layout, SharedBank
from paramshare.schemes import Site, Soft
from paramshare.schemes.soft import cosines
from paramshare.shared import Shared

By = Literal["coefficients", "kernels"]


def similarity(shared: Shared, variables: Mapping[str, Any], *, by: By = "coefficients") -> dict[str, jax.Array]:
    r"""The layer similarity matrix of every bank.

    .. math:: S_{ij} = |\langle a_i, a_j \rangle| / (\|a_i\| \|a_j\|)

    where a_i are the coefficients of layer i (soft sharing), or the layer's kernel (any other scheme, and a network that shares nothing).
    S_ij = 1 means that two layers use the same kernel up to a scale, which may be negative. A row of zeros is similar to nothing, itself
    included.

    Args:
      shared: the shared model.
      variables: its variables; or the plain model's own, without `banks`: then the plan only says which kernels to compare.
      by: "kernels" compares kernels under soft sharing too. Equal rows of coefficients are equal kernels; but where templates are alike
        themselves, as in a bank converted from dense kernels, kernels may be similar and coefficients not.

    Returns:
      `{name: (L, L)}`, values in [0, 1]; the names, and whose layers they are, as `layers` gives them.

    Raises:
      PlanError: if the variables are of another model.
      ValueError: if `by` is neither of the two.

    Example:
      >>> import jax, paramshare
      >>> shared = paramshare.create_model("swrn-16-1-1", input_shape=(8, 8, 3))
      >>> variables = shared.init(jax.random.key(0), jax.numpy.zeros((1, 8, 8, 3)))
      >>> {name: matrix.shape for name, matrix in paramshare.similarity(shared, variables).items()}
      {'stage1': (2, 2), 'stage2': (2, 2), 'stage3': (2, 2)}

    References:
      Savarese & Maire, ICLR 2019, section 3.2.
    """
    check_by(by)
    if "banks" in variables:
        own = variables.get("params", {}).get("coefficients", {})
        jax.eval_shape(shared.layout.expand, variables["banks"], own)  # raises if they are of another model
    dense = None if "banks" in variables else shared.layout.read(variables.get("params", {}))
    matrices, named = {}, layers(shared.layout)
    for bank in shared.layout.banks:
        rows = dict(zip(bank.sites, dense[bank.name] if dense else rows_of(bank, variables, by), strict=True))
        for name, sites in named.items():
            if set(sites) <= set(bank.sites):
                matrices[name] = cosines(jnp.stack([rows[site].reshape(-1) for site in sites]))
    return {name: matrices[name] for name in named}


def check_by(by: str) -> None:
    """Raises `ValueError` unless it is one of the two that layers can be compared by."""
    if by not in get_args(By):
        raise ValueError(f"by={by!r}; layers are compared by 'coefficients' or by 'kernels'")


def layers(layout: Layout) -> dict[str, tuple[Site, ...]]:
    """The layers of every similarity matrix: a bank's sites, under the bank's name.

    Where a bank's sites differ in shape, every shape of two sites or more has a matrix, "BANK 3x3x16x16".
    """
    found = {}
    for bank in layout.banks:
        shapes = list(dict.fromkeys(site.shape for site in bank.sites))
        for shape in shapes:
            sites = tuple(site for site in bank.sites if site.shape == shape)
            if len(shapes) == 1:
                found[bank.name] = sites
            elif len(sites) > 1:
                found[f"{bank.name} {'x'.join(map(str, shape))}"] = sites
    return found


def rows_of(bank: SharedBank, variables: Mapping[str, Any], by: By) -> tuple[jax.Array, ...]:
    """What the layers of a bank are compared by: rows of coefficients (soft sharing), else kernels."""
    coefficients = variables.get("params", {}).get("coefficients", {}).get(bank.name, {})  # a scheme may have none
    if isinstance(bank.scheme, Soft) and by == "coefficients":
        return tuple(coefficients)
    return bank.scheme.expand(variables["banks"][bank.name], coefficients, bank.sites)
