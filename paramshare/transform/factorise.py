"""Factorising: turns dense residual networks into factored ones with shared filter bases.

Each 3x3 convolution becomes a shared filter basis, a batch norm and 1x1 coefficients.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict

from paramshare.layout import SharedBank
from paramshare.measure.change import output_change
from paramshare.models import ResNet
from paramshare.schemes import FilterBasis, Site, Weights
from paramshare.shared import Shared
from paramshare.transform.conversion import (
    ConversionError,
    Converted,
    bake,
    bank_report,
    check_variables,
    sharing_variables,
)

# Rounds of fitting shared and unique filters in turn. The second lowers the error by about a
# percent, later ones by little.
ROUNDS = 3
EPSILON = 1e-5  # of the networks' batch norms (paramshare.models.layers)
BASIS = re.compile(r"(?P<block>.+/)basis(?P<number>\d)/kernel")


def factorise(shared: Shared, variables: Mapping[str, Any], images: Any = None) -> Converted:
    r"""Converts a dense residual network to a factored one of the same depth and widths.

    The 3x3 kernels W_l of the blocks that share, (P, T) matrices of T filters with P elements,
    are approximated by a basis and 1x1 coefficients,

    .. math:: W_l \approx [U_l, S] A_l

    with s shared filters S and u unique ones U_l.

    With u = 0, S are the leading left singular vectors of all layers of a basis side by side. The
    squared error is the sum of the squared singular values left out (Eckart & Young 1936), the
    least possible for s filters. With u > 0, the unique filters are the leading ones of each
    layer's residual, and the shared filters are fitted again to the remainder, in a few rounds
    that never increase the error. Coefficients are least squares. The filters of a basis are
    orthonormal, as at initialisation; those of the two bases of a bank ("double") are orthonormal
    within each basis, not jointly.

    The batch norm between basis and coefficients starts as the identity. With `images`, its
    statistics are those of the basis outputs on the images, and its scale and bias undo them, so
    that it is close to the identity in training mode too. Without, its statistics are 0 and 1. All
    other parameters and statistics are copied. Re-estimate the statistics behind the approximated
    kernels with `reestimate`.

    Args:
      shared: the factored network, such as `create_model("resnet32-s16u1")`.
      variables: the variables of the dense network, `create_model("resnet32")`.
      images: one normalised batch, run through the network at once, to measure the outputs of the
        bases.

    Returns:
      The variables and a report, with the change of the outputs on the images. A bank's count of
      parameters after conversion includes the coefficients and the inner batch norms.

    Raises:
      ConversionError: if `shared` is not a factored residual network, or if a variable is missing
        or has another shape than in the dense network.

    Example:
      >>> import jax, paramshare
      >>> from paramshare.transform.factorise import factorise
      >>> x = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
      >>> dense = paramshare.create_model("resnet14", input_shape=(8, 8, 3))
      >>> variables = jax.jit(dense.init)(jax.random.key(1), x)
      >>> # More filters than needed: exact.
      >>> shared = paramshare.create_model("resnet14-s32u0", input_shape=(8, 8, 3))
      >>> converted = factorise(shared, variables, x)
      >>> [(bank.name, bank.layers, bank.before, bank.after) for bank in converted.banks]
      [('stage1', 2, 4608, 5760), ('stage2', 2, 18432, 22784), ('stage3', 2, 73728, 90624)]
      >>> converted.output_change < 1e-5
      True

    References:
      Kang & Kim, NeurIPS 2021, arXiv:2006.05066, for the network. The conversion of a dense one is
      this library's.
    """
    model = _check_factored(shared)
    variables = unfreeze(dict(variables))
    stem = variables.get("params", {}).get("stem", {}).get("kernel")
    channels = stem.shape[2] if np.ndim(stem) == 4 else 3
    dense_model = model.clone(rank=0, parent=None, name=None)
    # Kernels do not depend on the size of the images.
    check_variables(dense_model, variables, jnp.zeros((1, 32, 32, channels)))

    params: dict[str, Any] = flatten_dict(jax.device_get(variables["params"]), sep="/")
    statistics: dict[str, Any] = flatten_dict(jax.device_get(variables["batch_stats"]), sep="/")
    weights, reports = {}, []
    for bank in shared.layout.banks:
        dense = [params.pop(f"{_names(site).dense}/kernel") for site in bank.sites]
        weights[bank.name], coefficients_LxRxT = _fit(bank, dense)
        for site, coefficients_RxT in zip(bank.sites, coefficients_LxRxT, strict=True):
            _replace(params, statistics, site, coefficients_RxT)
        bases = jax.device_get(bank.scheme.expand(weights[bank.name], bank.sites))
        kernels = [
            np.tensordot(basis, coefficients_RxT, 1)
            for basis, coefficients_RxT in zip(bases, coefficients_LxRxT, strict=True)
        ]
        inner = sum(a.size + 2 * len(a) for a in coefficients_LxRxT)  # with batch norms
        reports.append(bank_report(bank, kernels, dense, sum(bank.trainable) + inner))
    factored = sharing_variables(weights, unflatten_dict(params, sep="/"))
    factored["batch_stats"] = {"model": unflatten_dict(statistics, sep="/")}
    factored = jax.tree.map(jnp.asarray, factored)
    if images is None:
        return Converted(shared, shared.stored(factored), tuple(reports))
    factored = shared.stored(_with_moments(shared, factored, images))
    change = output_change((dense_model, variables), (shared, factored), images)
    return Converted(shared, factored, tuple(reports), change)


def shared_filters(
    filters: Sequence[np.ndarray], s: int, u: int
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Fits s shared and u unique filters whose combinations approximate several layers' filters.

    Args:
      filters: for every layer a (P, T) matrix, one filter per column.
      s: number of shared filters.
      u: number of unique filters of each layer.

    Returns:
      (P, s) orthonormal columns, and for every layer a (P, u) matrix of orthonormal columns.
    """
    unique = [np.zeros((len(layer), 0)) for layer in filters]
    unique_parts = [np.zeros_like(layer) for layer in filters]
    shared_PxS = np.zeros((len(filters[0]), s))
    for _ in range(ROUNDS if u else 1):
        shared_parts = [a - b for a, b in zip(filters, unique_parts, strict=True)]
        shared_PxS = _leading(np.concatenate(shared_parts, axis=1), s)
        residuals = [layer - shared_PxS @ (shared_PxS.T @ layer) for layer in filters]
        unique = [_leading(residual, u) for residual in residuals]
        unique_parts = [
            basis @ (basis.T @ residual) for basis, residual in zip(unique, residuals, strict=True)
        ]
    return shared_PxS, unique


def _leading(matrix: np.ndarray, count: int) -> np.ndarray:
    """The first `count` left singular vectors, as columns."""
    return np.linalg.svd(matrix, full_matrices=matrix.shape[1] < count)[0][:, :count]


def _fit(bank: SharedBank, dense: list[Any]) -> tuple[Weights, list[np.ndarray]]:
    """The bank's weights, and for every layer the (R, T) coefficients, unique filters first."""
    scheme: Any = bank.scheme
    dtype = np.dtype(dense[0].dtype)
    filters = [np.asarray(kernel, np.float64).reshape(-1, kernel.shape[-1]) for kernel in dense]
    if not all(np.isfinite(layer).all() for layer in filters):
        raise ConversionError(
            f"bank {bank.name!r}: kernels are not finite; use an earlier checkpoint"
        )
    shared, unique = [], [np.zeros((0, 0))] * len(filters)
    for i in range(scheme.bases):
        shared_PxS, unique[i :: scheme.bases] = shared_filters(
            filters[i :: scheme.bases], scheme.shared, scheme.unique
        )
        shared.append(shared_PxS)
    bases = [
        np.concatenate([unique_PxU, shared[i % scheme.bases]], axis=1)
        for i, unique_PxU in enumerate(unique)
    ]
    coefficients = [
        np.linalg.lstsq(basis, layer, rcond=None)[0].astype(dtype)
        for basis, layer in zip(bases, filters, strict=True)
    ]
    # Exact: the shared filters of a basis's layers are equal, so that their mean is the basis.
    kernels = tuple(
        site.from_matrix(jnp.asarray(basis.reshape(site.matrix_shape), dtype))
        for basis, site in zip(bases, bank.sites, strict=True)
    )
    return scheme.from_dense(kernels, bank.sites), coefficients


class _Names(NamedTuple):
    """Scopes of one convolution: dense, and the three that replace it."""

    dense: str
    basis: str
    norm: str
    coefficients: str


def _names(site: Site) -> _Names:
    match = BASIS.fullmatch(site.path)
    assert match is not None  # _check_factored has checked all sites
    block, number = match.groups()
    return _Names(*(f"{block}{x}{number}" for x in ("conv", "basis", "basis_bn", "coefficients")))


def _replace(
    params: dict[str, Any], statistics: dict[str, Any], site: Site, coefficients_RxT: np.ndarray
) -> None:
    """Adds coefficients and inner batch norm to the flat variables; the basis is in the bank."""
    names, rank, dtype = _names(site), len(coefficients_RxT), coefficients_RxT.dtype
    params[f"{names.coefficients}/kernel"] = coefficients_RxT[None, None]
    if f"{names.dense}/bias" in params:
        params[f"{names.coefficients}/bias"] = params.pop(f"{names.dense}/bias")
        params[f"{names.basis}/bias"] = np.zeros(rank, dtype)
    params[f"{names.norm}/scale"] = np.full(rank, np.sqrt(1 + EPSILON), dtype)
    params[f"{names.norm}/bias"] = np.zeros(rank, dtype)
    statistics[f"{names.norm}/mean"] = np.zeros(rank, dtype)
    statistics[f"{names.norm}/var"] = np.ones(rank, dtype)


def _with_moments(shared: Shared, variables: Any, images: Any) -> Any:
    """The variables, with inner batch norms that undo the moments of their bases' outputs."""

    @jax.jit
    def moments(dense: Any, images: Any) -> Any:
        _, state = shared.model.apply(
            dense,
            images,
            train=False,
            capture_intermediates=lambda module, _: bool(
                re.fullmatch(r"basis\d", module.name or "")
            ),
            mutable=["intermediates"],
        )
        return jax.tree.map(
            lambda y: (jnp.mean(y, axis=(0, 1, 2)), jnp.var(y, axis=(0, 1, 2))),
            state["intermediates"],
        )

    moments_of: Any = flatten_dict(moments(bake(shared, variables), images), sep="/")
    params: dict[str, Any] = flatten_dict(variables["params"]["model"], sep="/")
    statistics: dict[str, Any] = flatten_dict(variables["batch_stats"]["model"], sep="/")
    for bank in shared.layout.banks:
        for site in bank.sites:
            names = _names(site)
            ((mean, var),) = moments_of[f"{names.basis}/__call__"]
            params[f"{names.norm}/scale"] = jnp.sqrt(var + EPSILON)
            params[f"{names.norm}/bias"] = statistics[f"{names.norm}/mean"] = mean
            statistics[f"{names.norm}/var"] = var
    return {
        **variables,
        "params": {**variables["params"], "model": unflatten_dict(params, sep="/")},
        "batch_stats": {"model": unflatten_dict(statistics, sep="/")},
    }


def _check_factored(shared: Any) -> ResNet:
    model = shared.model if isinstance(shared, Shared) else shared
    if not isinstance(shared, Shared) or not isinstance(model, ResNet) or not model.rank:
        raise ConversionError(
            "factorise takes a shared network of factored blocks, such as resnet32-s16u1, "
            f"got {type(model).__name__}; use `convert` where the dense kernels are shared"
        )
    if not model.inner_norm:
        raise ConversionError(
            "factorise needs the inner batch norms; build the factored network with inner_norm=True"
        )
    scheme_of = {site.path: b.scheme for b in shared.layout.banks for site in b.sites}
    expected = {
        f"stage{g}/block{b}/basis{n}/kernel"
        for g, blocks in enumerate(model.blocks, 1)
        for b in range(2, blocks + 1)
        for n in (1, 2)
    }
    others = sorted(scheme_of.keys() ^ expected) or [
        f"{path}, under {scheme}"
        for path, scheme in scheme_of.items()
        if not isinstance(scheme, FilterBasis)
    ]
    if others:
        raise ConversionError(
            "factorise needs a plan that shares every basis, and nothing else, by FilterBasis; "
            f"check {others[0]}"
        )
    return model
