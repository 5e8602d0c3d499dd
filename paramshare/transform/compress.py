"""Smaller banks: pruning and quantising what the layers of a trained network share.

Three functions, each a network in and a network out: `prune` sets the smallest parameters of the
banks to 0; `quantise` rounds them to a few levels, in a form that can be fine-tuned; `finalise`
gives the plain shared network whose banks hold the rounded values, which
`paramshare.transform.packing` stores.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paramshare.errors import ParamshareError
from paramshare.layout import Layout, PlanError, separated, table
from paramshare.measure.change import relative_change
from paramshare.schemes import Compressed, SchemeError, Weights
from paramshare.schemes.compressed import Method
from paramshare.shared import Shared, check_shared
from paramshare.transform.conversion import sharing_variables
from paramshare.transform.kmeans import kmeans


class CompressError(ParamshareError):
    """A network cannot be pruned or quantised as asked."""


@dataclasses.dataclass(frozen=True)
class CompressedBank:
    """What has become of one bank.

    Attributes:
      name: the bank's name.
      parameters: its size.
      zeros: how many of them are 0.
      levels: how many different values there are, 0 included.
      change: |W' - W| / |W| over the bank, W before and W' after.
    """

    name: str
    parameters: int
    zeros: int
    levels: int
    change: float


def prune(
    shared: Shared,
    variables: Mapping[str, Any],
    fraction: float,
    banks: Sequence[str] = (),
) -> dict[str, Any]:
    """Sets the smallest parameters of the banks to 0 (magnitude pruning, Han et al. 2015).

    Of every array of a bank, `round(fraction * size)` parameters become 0, at least those that are
    0 already; of equal ones the first. Training keeps them at 0 with `Config.compression`.

    Args:
      shared: the shared model.
      variables: its variables.
      fraction: in [0, 1).
      banks: regular expressions of whole names; `()` is all banks.

    Returns:
      Variables of the same model. The input is not changed.

    Raises:
      CompressError: if an argument is invalid, or an expression matches no bank.

    Example:
      >>> import jax, paramshare
      >>> from paramshare.transform.compress import prune
      >>> shared = paramshare.create_model("pathnet-2-4-rpg-160", input_shape=(6, 6, 2))
      >>> variables = jax.jit(shared.init)(jax.random.key(0), jax.numpy.ones((1, 6, 6, 2)))
      >>> pruned = prune(shared, variables, 0.75)
      >>> int((pruned["banks"]["ring"]["ring"] == 0).sum())
      120
    """
    check_shared("prune", shared, CompressError)
    if isinstance(fraction, bool) or not 0 <= fraction < 1:
        raise CompressError(
            f"fraction={fraction!r}: must be in [0, 1), the part of each bank that becomes 0"
        )

    def leaf(values: Any) -> jax.Array:
        flat = np.array(values).ravel()
        order = np.argsort(np.abs(flat), kind="stable")
        flat[order[: round(fraction * flat.size)]] = 0
        return jnp.asarray(flat.reshape(np.shape(values)))

    names = matching_banks(shared.layout, banks)
    apart = separated(variables)
    changed = {
        name: jax.tree.map(leaf, bank) if name in names else bank
        for name, bank in apart.get("banks", {}).items()
    }
    return shared.stored({**apart, "banks": changed})


def quantise(
    shared: Shared,
    variables: Mapping[str, Any],
    bits: int,
    method: Method = "kmeans",
    banks: Sequence[str] = (),
) -> tuple[Shared, dict[str, Any]]:
    """Rounds the parameters of the banks to 2^bits levels, separately for each array.

    The banks stay as they are; their schemes become `Compressed`, and the levels are added to the
    coefficients. So the network can be fine-tuned. Parameters that are 0 stay 0 and take no level.

    Args:
      shared: the shared model.
      variables: its variables.
      bits: 2 to 8.
      method: "kmeans" fits a codebook; "uniform" a grid that is symmetric around 0.
        Both minimise the squared error. A codebook is never worse, but stores 2^bits values.
      banks: regular expressions of whole names; `()` is all banks.

    Returns:
      The model with quantised banks, and its variables.

    Raises:
      CompressError: if an argument is invalid, an expression matches no bank, a bank is quantised
        already or has values that are not finite.

    Example:
      >>> import jax, paramshare
      >>> from paramshare.transform.compress import finalise, quantise
      >>> x = jax.numpy.ones((1, 6, 6, 2))
      >>> shared = paramshare.create_model("pathnet-2-4-rpg-160", input_shape=(6, 6, 2))
      >>> small, variables = quantise(shared, jax.jit(shared.init)(jax.random.key(0), x), bits=4)
      >>> small.layout["ring"].scheme
      Compressed(scheme=Ring(size=160, ...), bits=4, method='kmeans')
      >>> plain, final = finalise(small, variables)
      >>> len(set(final["banks"]["ring"]["ring"].tolist())), plain.layout == shared.layout
      (16, True)
      >>> bool((plain.apply(final, x) == small.apply(variables, x)).all())
      True
    """
    check_shared("quantise", shared, CompressError)
    layout = quantised_layout(shared.layout, bits, method, banks)
    weights = shared.layout.weights(variables)
    for bank in layout.banks:
        scheme = bank.scheme
        if not isinstance(scheme, Compressed) or scheme == shared.layout[bank.name].scheme:
            continue
        arrays = weights[bank.name]
        for leaf in jax.tree.leaves(arrays.bank):
            if not np.isfinite(np.asarray(leaf)).all():
                raise CompressError(
                    f"bank {bank.name!r} has values that are not finite; use an earlier checkpoint"
                )
        levels = jax.jit(scheme.uniform_levels)(arrays.bank)
        if method == "kmeans":
            levels = jax.tree.map(_codebook, arrays.bank, levels)
        weights[bank.name] = scheme.with_levels(arrays, levels)
    return shared.clone(layout=layout), shared.stored(
        _with_weights(variables, weights), like=variables
    )


def finalise(shared: Shared, variables: Mapping[str, Any]) -> tuple[Shared, dict[str, Any]]:
    """The shared network without quantisers, whose banks hold the rounded values.

    It computes the same, from the same bits. Where a scheme makes kernels by a matrix product, they
    may differ in the last digits, because XLA can fuse the rounding with the product.

    Args:
      shared: a shared model; banks that are not quantised stay as they are.
      variables: its variables.

    Returns:
      The model under its plain schemes, and its variables.
    """
    check_shared("finalise", shared, CompressError)
    quantised = {b.name: b.scheme for b in shared.layout.banks if isinstance(b.scheme, Compressed)}
    if not quantised:
        return shared, dict(variables)
    layout = shared.layout.with_schemes({n: scheme.scheme for n, scheme in quantised.items()})

    @jax.jit
    def rounded(weights: dict[str, Weights]) -> dict[str, Weights]:
        return {name: scheme.rounded(weights[name]) for name, scheme in quantised.items()}

    weights = shared.layout.weights(variables)
    weights |= rounded({name: weights[name] for name in quantised})
    return shared.clone(layout=layout), shared.stored(
        _with_weights(variables, weights), like=variables
    )


def compressed_banks(
    before: Mapping[str, Any], after: Mapping[str, Any]
) -> tuple[CompressedBank, ...]:
    """A report on each bank.

    Args:
      before: the variables of the network.
      after: those that `finalise` gave.
    """
    reports = []
    for name, bank in after["banks"].items():
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(bank)]
        reports.append(
            CompressedBank(
                name,
                sum(leaf.size for leaf in leaves),
                sum(int(np.sum(leaf == 0)) for leaf in leaves),
                sum(len(np.unique(leaf)) for leaf in leaves),
                relative_change(before["banks"][name], bank),
            )
        )
    return tuple(reports)


def banks_table(banks: Sequence[CompressedBank]) -> str:
    """The reports as a table of text."""
    rows: list[tuple[str, ...]] = [("bank", "parameters", "zeros", "different values", "change")]
    for bank in banks:
        zeros = f"{bank.zeros:,} ({bank.zeros / bank.parameters:.1%})"
        rows.append(
            (bank.name, f"{bank.parameters:,}", zeros, f"{bank.levels:,}", f"{bank.change:.2e}")
        )
    return "\n".join(table(rows, right={1, 2, 3, 4}))


def quantised_layout(
    layout: Layout, bits: int, method: Method = "kmeans", banks: Sequence[str] = ()
) -> Layout:
    """The layout with some banks under `Compressed`.

    Raises:
      CompressError: as `quantise`.
    """
    names = matching_banks(layout, banks)
    try:
        return layout.with_schemes({n: Compressed(layout[n].scheme, bits, method) for n in names})
    except (PlanError, SchemeError) as error:
        raise CompressError(str(error)) from None


def matching_banks(layout: Layout, patterns: Sequence[str]) -> tuple[str, ...]:
    """Names of the banks that the regular expressions match; all banks for `()`.

    Raises:
      CompressError: if an expression matches no bank, or is none.
    """
    names = []
    for pattern in patterns or (".*",):
        try:
            matches = [name for name in layout if re.fullmatch(pattern, name)]
        except re.error as error:
            raise CompressError(f"banks: {pattern!r} is no regular expression: {error}") from None
        if not matches:
            raise CompressError(f"banks: {pattern!r} matches no bank; the banks are {list(layout)}")
        names += matches
    return tuple(dict.fromkeys(names))


def _codebook(values: Any, uniform_K: Any) -> jax.Array:
    kept = np.asarray(values)[np.asarray(values) != 0]
    levels_K = kmeans(kept, len(uniform_K), uniform_K)
    return jnp.asarray(levels_K, uniform_K.dtype)


def _with_weights(variables: Mapping[str, Any], weights: Mapping[str, Weights]) -> dict[str, Any]:
    """The variables with the arrays of all banks replaced."""
    others = {name: value for name, value in variables.items() if name not in ("banks", "params")}
    return sharing_variables(weights, variables.get("params", {}).get("model", {})) | others
