"""Dense residual networks turned into factored ones, whose 3x3s are shared filter bases, batch norm, and 1x1 coefficients."""

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paramshare.analysis.conversion import ConversionError, Converted, bake, change, check_variables, plain, report
from paramshare.layout import SharedBank
from paramshare.models import ResNet
from paramshare.schemes import UNIQUE, FilterBasis, Site
from paramshare.shared import Shared

ROUNDS = 3  # of fitting shared and unique filters in turn; the second gains a percent or so of the error, later ones little
EPSILON = 1e-5  # of the networks' batch norms (paramshare.models.layers)
BASIS = re.compile(r"(?P<block>.+)/basis(?P<number>\d)/kernel")


def factorise(shared: Shared, variables: Mapping[str, Any], images: Any = None) -> Converted:
    r"""Variables of a factored network that computes nearly what a dense one of the same depth and widths does.

    The 3x3s W_l of the blocks that share, (P, T) matrices of T filters of P numbers, become products of a basis and 1x1 coefficients,

    .. math:: W_l \approx [U_l, S] A_l

    with s shared filters S and u unique ones U_l. With u = 0, S are the leading left singular vectors of all layers of a basis side by
    side, and the squared error is the sum of the squared singular values left out (Eckart & Young 1936): no other s filters do better. With
    u > 0, unique filters are the leading ones of each layer's residual, and shared ones are fitted again to what these leave over, in a few
    rounds, each of them no worse than the one before. Coefficients are least squares. Filters of a basis are orthonormal, as they are when
    drawn; those of two bases of a bank ("double") each for itself, not jointly.

    The batch norm between basis and coefficients does nothing at first: with `images` its statistics are those of the basis outputs there,
    and scale and bias undo them, so that it does next to nothing in training mode too; without, statistics are 0 and 1. All other
    parameters and statistics are taken over. `reestimate` then fits the statistics behind the error of the kernels.

    Args:
      shared: the factored network, such as `create_model("resnet32-s16u1")`.
      variables: of the dense one, `create_model("resnet32")`.
      images: a batch, normalised, of which outputs of bases are measured; all of it goes through the network at once.

    Returns:
      The variables and a report, with outputs compared on the images; a bank's numbers after take in coefficients and inner batch norms.

    Raises:
      ConversionError: if `shared` is no factored residual network, or a variable is missing or has another shape than the dense one's.

    Example:
      >>> import jax, paramshare
      >>> from paramshare.analysis.factorise import factorise
      >>> x = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
      >>> dense = paramshare.create_model("resnet14", input_shape=(8, 8, 3)).init(jax.random.key(1), x)
      >>> converted = factorise(paramshare.create_model("resnet14-s32u0", input_shape=(8, 8, 3)), dense, x)  # more than enough filters
      >>> [(bank.name, bank.layers, bank.before, bank.after) for bank in converted.banks]
      [('stage1', 2, 4608, 5760), ('stage2', 2, 18432, 22784), ('stage3', 2, 73728, 90624)]
      >>> converted.output_change < 1e-5
      True

    References:
      Kang & Kim, NeurIPS 2021, arXiv:2006.05066, for the network; the way from a dense one is this library's own.
    """
    model = _check_factored(shared)
    variables = plain(variables)
    params, statistics = variables.get("params", {}), variables.get("batch_stats", {})
    stem = params.get("stem", {}).get("kernel")
    channels = stem.shape[2] if np.ndim(stem) == 4 else 3
    dense_model = model.clone(rank=0, parent=None, name=None)
    check_variables(dense_model, variables, jnp.zeros((1, 32, 32, channels)))  # kernels do not depend on the images' size

    params, statistics = copy.deepcopy(jax.device_get(params)), copy.deepcopy(jax.device_get(statistics))
    banks, coefficients, reports = {}, {}, []
    for bank in shared.layout.banks:
        dense = [_block(params, site)[0][f"conv{_block(params, site)[1]}"]["kernel"] for site in bank.sites]
        banks[bank.name], own, mixed_LxRxT = _fit(bank, dense)
        if own:
            coefficients[bank.name] = own
        for site, mixed_RxT in zip(bank.sites, mixed_LxRxT, strict=True):
            _put(params, statistics, site, mixed_RxT)
        made = [np.tensordot(kernel, a, 1) for kernel, a in zip(_kernels(bank, banks, coefficients), mixed_LxRxT, strict=True)]
        after = sum(bank.trainable) + sum(a.size + 2 * len(a) for a in mixed_LxRxT)  # and a scale and a bias a filter
        reports.append(report(bank, made, dense, after))
    own = {"coefficients": coefficients} if coefficients else {}
    fresh = {"banks": banks, "params": {**own, "model": params}, "batch_stats": {"model": statistics}}
    fresh = jax.tree.map(jnp.asarray, fresh)
    if images is None:
        return Converted(shared, fresh, tuple(reports))
    fresh = _with_moments(shared, fresh, images)
    return Converted(shared, fresh, tuple(reports), change(dense_model, variables, shared, fresh, (images,)))


def shared_filters(filters: Sequence[np.ndarray], s: int, u: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """The s shared and u unique filters that several layers' filters are combinations of, up to the least error found.

    Args:
      filters: of every layer a (P, T) matrix, a filter a column.
      s: how many are shared.
      u: how many are unique to each layer.

    Returns:
      (P, s) orthonormal columns, and a (P, u) matrix of orthonormal columns for every layer.
    """
    parts = [np.zeros_like(layer) for layer in filters]  # what unique filters do
    unique: list[np.ndarray] = []
    shared_PxS = np.zeros((len(filters[0]), s))
    for _ in range(ROUNDS if u else 1):
        shared_PxS = _leading(np.concatenate([layer - part for layer, part in zip(filters, parts, strict=True)], axis=1), s)
        rest = [layer - shared_PxS @ (shared_PxS.T @ layer) for layer in filters]
        unique = [_leading(layer, u) for layer in rest]
        parts = [own @ (own.T @ layer) for own, layer in zip(unique, rest, strict=True)]
    return shared_PxS, unique


def _leading(matrix: np.ndarray, count: int) -> np.ndarray:
    """The leading left singular vectors, so many columns."""
    return np.linalg.svd(matrix, full_matrices=matrix.shape[1] < count)[0][:, :count]


def _fit(bank: SharedBank, dense: list[Any]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], list[np.ndarray]]:
    """The bank, its coefficients, and for every layer the (R, T) matrix of its 1x1, unique filters' rows first."""
    scheme: Any = bank.scheme
    (*cell, _), dtype = bank.sites[0].shape, np.dtype(dense[0].dtype)
    filters = [np.asarray(kernel, np.float64).reshape(-1, kernel.shape[-1]) for kernel in dense]
    if not all(np.isfinite(layer).all() for layer in filters):
        raise ConversionError(f"bank {bank.name!r}: its layers hold numbers that are not finite; take an earlier checkpoint")
    found, unique = [], [np.zeros((0, 0))] * len(filters)
    for i in range(scheme.bases):
        shared_PxS, unique[i :: scheme.bases] = shared_filters(filters[i :: scheme.bases], scheme.shared, scheme.unique)
        found.append(shared_PxS)
    mixed = [
        np.linalg.lstsq(np.concatenate([unique[i], found[i % scheme.bases]], axis=1), layer, rcond=None)[0]
        for i, layer in enumerate(filters)
    ]
    own = {UNIQUE: np.stack([layer.reshape(*cell, -1) for layer in unique]).astype(dtype)} if scheme.unique else {}
    return {"filters": np.stack([basis.reshape(*cell, -1) for basis in found]).astype(dtype)}, own, [a.astype(dtype) for a in mixed]


def _put(params: dict[str, Any], statistics: dict[str, Any], site: Site, mixed_RxT: np.ndarray) -> None:
    """A factored convolution in the place of a dense one; its basis itself is in the bank."""
    (block, number), rank, dtype = _block(params, site), len(mixed_RxT), mixed_RxT.dtype
    bias = {name: value for name, value in block.pop(f"conv{number}").items() if name == "bias"}
    block[f"coefficients{number}"] = {"kernel": mixed_RxT[None, None], **bias}
    if bias:
        block[f"basis{number}"] = {"bias": np.zeros(rank, dtype)}
    block[f"basis_bn{number}"] = {"scale": np.full(rank, np.sqrt(1 + EPSILON), dtype), "bias": np.zeros(rank, dtype)}
    _block(statistics, site)[0][f"basis_bn{number}"] = {"mean": np.zeros(rank, dtype), "var": np.ones(rank, dtype)}


def _with_moments(shared: Shared, variables: Any, images: Any) -> Any:
    """The variables with the moments of the bases' outputs in statistics, scales and biases of the batch norms behind them."""

    @jax.jit
    def moments(dense: Any, images: Any) -> Any:
        _, seen = shared.model.apply(
            dense,
            images,
            train=False,
            capture_intermediates=lambda module, _: bool(re.fullmatch(r"basis\d", module.name or "")),
            mutable=["intermediates"],
        )
        return jax.tree.map(lambda y: (jnp.mean(y, axis=(0, 1, 2)), jnp.var(y, axis=(0, 1, 2))), seen["intermediates"])

    found = moments(bake(shared, variables), images)
    variables = plain(variables)
    params, statistics = variables["params"]["model"], variables["batch_stats"]["model"]
    for bank in shared.layout.banks:
        for site in bank.sites:
            block, number = _block(params, site)
            ((mean, var),) = _block(found, site)[0][f"basis{number}"]["__call__"]
            block[f"basis_bn{number}"] = {"scale": jnp.sqrt(var + EPSILON), "bias": mean}
            _block(statistics, site)[0][f"basis_bn{number}"] = {"mean": mean, "var": var}
    return variables


def _check_factored(shared: Any) -> ResNet:
    model = shared.model if isinstance(shared, Shared) else shared
    if not isinstance(shared, Shared) or not isinstance(model, ResNet) or not model.rank:
        raise ConversionError(
            f"factorise takes a shared network of factored blocks, such as resnet32-s16u1, got {type(model).__name__}; `convert` is for "
            "networks whose shared kernels are the dense ones'"
        )
    if not model.inner_norm:
        raise ConversionError(
            "factorise needs the inner batch norms of a dense network's blocks; build the factored one with inner_norm=True"
        )
    sites = {site.path for bank in shared.layout.banks for site in bank.sites}
    wanted = {
        f"stage{g}/block{b}/basis{n}/kernel" for g, blocks in enumerate(model.blocks, 1) for b in range(2, blocks + 1) for n in (1, 2)
    }
    if sites != wanted or not all(isinstance(bank.scheme, FilterBasis) for bank in shared.layout.banks):
        odd = ", ".join(sorted(sites ^ wanted)[:1]) or next(
            str(b.scheme) for b in shared.layout.banks if not isinstance(b.scheme, FilterBasis)
        )
        raise ConversionError(f"factorise needs a plan that makes every basis, and nothing else, by FilterBasis; not so {odd}")
    return model


def _block(tree: Any, site: Site) -> tuple[dict[str, Any], str]:
    """The residual block of a site in a tree of variables, and the number of the convolution."""
    match = BASIS.fullmatch(site.path)
    assert match is not None  # _check_factored has seen them all
    for name in match["block"].split("/"):
        tree = tree[name]
    return tree, match["number"]


def _kernels(bank: SharedBank, banks: dict[str, Any], coefficients: dict[str, Any]) -> tuple[Any, ...]:
    return jax.device_get(bank.scheme.expand(banks[bank.name], coefficients.get(bank.name, {}), bank.sites))
