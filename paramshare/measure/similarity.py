"""The layer similarity matrix: which layers of a bank use nearly the same kernel."""

from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from paramshare.errors import ParamshareError
from paramshare.layout import Layout, SharedBank, separated
from paramshare.schemes import Site, Weights, cosines
from paramshare.shared import Shared, layout_of

By = Literal["coefficients", "weights"]


def similarity(
    shared: Shared | Layout, variables: Mapping[str, Any], *, by: By = "coefficients"
) -> dict[str, jax.Array]:
    r"""Layer similarity matrix of every bank.

    .. math:: S_{ij} = |\langle a_i, a_j \rangle| / (\|a_i\| \|a_j\|)

    Under soft sharing a_i is the row of mixing coefficients of layer i. Under any other scheme,
    and in a network without sharing, a_i is the layer's flattened weight. S_ij = 1 means that two
    layers use the same kernel up to a scale, which may be negative. A row of zeros has similarity
    0 to every row, including itself.

    Args:
      shared: the shared model, or its layout.
      variables: its variables. Variables of the plain model (without `banks`) are also accepted:
        the plan then only says which layers to compare.
      by: "weights" compares weights under soft sharing too. Layers
        with equal coefficients have equal kernels. Layers with different coefficients can still
        have similar kernels, if templates are alike or one is much larger than the rest.

    Returns:
      `{name: (L, L)}`, values in [0, 1]. `layers` gives the names and the layers of each matrix.

    Raises:
      PlanError: if the variables do not match the layout.
      ParamshareError: if `by` is neither "coefficients" nor "weights".

    Example:
      >>> import jax, paramshare
      >>> shared = paramshare.create_model("swrn-16-1-1", input_shape=(8, 8, 3))
      >>> variables = jax.jit(shared.init)(jax.random.key(0), jax.numpy.ones((1, 8, 8, 3)))
      >>> matrices = paramshare.similarity(shared, variables)
      >>> {name: matrix.shape for name, matrix in matrices.items()}
      {'stage1': (2, 2), 'stage2': (2, 2), 'stage3': (2, 2)}

    References:
      Savarese & Maire, ICLR 2019, section 3.2.
    """
    layout = layout_of("similarity", shared)
    check_by(by)
    if "banks" in separated(variables):
        weights = layout.weights(variables)
        rows = {b.name: layer_rows(b, weights[b.name], by) for b in layout.banks}
    else:
        rows = layout.read(variables.get("params", {}))
    row_of = {
        (bank.name, site): jnp.ravel(row)
        for bank in layout.banks
        for site, row in zip(bank.sites, rows[bank.name], strict=True)
    }
    return {
        name: cosines(jnp.stack([row_of[bank.name, site] for site in sites]))
        for name, (bank, sites) in _compared(layout).items()
    }


def check_by(by: str) -> None:
    """Raises `ParamshareError` unless `by` is "coefficients" or "weights"."""
    if by not in get_args(By):
        raise ParamshareError(f"by={by!r}: must be 'coefficients' or 'weights'")


def layers(layout: Layout) -> dict[str, tuple[Site, ...]]:
    """The sites compared in each similarity matrix.

    A bank whose sites have one shape gives one matrix, under the bank's name. Otherwise there
    is one matrix for each shape that at least two sites share, named like "BANK 3x3x16x16".
    """
    return {name: sites for name, (_, sites) in _compared(layout).items()}


def layer_rows(bank: SharedBank, weights: Weights, by: By) -> tuple[jax.Array, ...]:
    """What is compared: for each layer its mixing row (soft sharing), else its weight."""
    rows = bank.scheme.mixing(weights, bank.sites) if by == "coefficients" else None
    return bank.scheme.expand(weights, bank.sites) if rows is None else tuple(rows)


def _compared(layout: Layout) -> dict[str, tuple[SharedBank, tuple[Site, ...]]]:
    compared = {}
    for bank in layout.banks:
        by_shape: dict[tuple[int, ...], list[Site]] = {}
        for site in bank.sites:
            by_shape.setdefault(site.shape, []).append(site)
        for shape, sites in by_shape.items():
            if len(by_shape) == 1:
                compared[bank.name] = bank, tuple(sites)
            elif len(sites) > 1:
                compared[f"{bank.name} {'x'.join(map(str, shape))}"] = bank, tuple(sites)
    return compared
