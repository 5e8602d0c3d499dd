"""Folding: ties layers of a trained network that use nearly the same kernel.

Where the pattern of tied layers repeats, the layers form a recurrent network.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from paramshare.layout import (
    COLLECTIONS,
    HasLayout,
    Layout,
    SharedBank,
    separated,
    table,
    variables_of,
)
from paramshare.measure.change import output_change, relative_change
from paramshare.measure.similarity import By, check_by, layer_rows
from paramshare.schemes import Tied, Weights
from paramshare.schemes.interface import path_order
from paramshare.schemes.tied import leading
from paramshare.shared import Shared, check_shared
from paramshare.transform.grouping import (
    FoldError,
    check_groups,
    check_threshold,
    cosines,
    group,
    in_order,
    select_banks,
    unfoldable,
)
from paramshare.transform.looped import period

Model = TypeVar("Model", bound=HasLayout)


@dataclasses.dataclass(frozen=True)
class FoldedBank:
    """Report on one bank.

    Attributes:
      name: the bank's name.
      groups: the group of each layer.
      period: the smallest p < L with group[i] = group[i + p] for all layers; None if there is none.
      scales: the signed scale of each layer's kernel; `()` where there are none.
      kernel_error: max_l |W_l - c_l R| / |W_l| over the bank's layers, R being the group's kernel
        and c_l the layer's scale.
      before: trainable parameters of the bank and its sites before folding.
      after: the same after folding.
      note: why the bank was not folded; "" if it was.
      flipped: number of layers that lost a negative sign because scales were dropped.
    """

    name: str
    groups: tuple[int, ...]
    period: int | None
    scales: tuple[float, ...]
    kernel_error: float
    before: int
    after: int
    note: str = ""
    flipped: int = 0


@dataclasses.dataclass(frozen=True)
class Folded(Generic[Model]):
    """A folded network.

    Attributes:
      shared: the same model, with its folded banks under `Tied(groups=...)`.
      variables: the variables of `shared`.
      threshold: layers of at least this similarity were tied.
      banks: a report on each bank.
      output_change: |y' - y| / |y| over the example inputs, y and y' being the outputs before and
        after folding; None without inputs.
    """

    shared: Model
    variables: dict[str, Any]
    threshold: float
    banks: tuple[FoldedBank, ...]
    output_change: float | None = None

    @property
    def saved(self) -> int:
        """Number of trainable parameters that folding removed."""
        return sum(bank.before - bank.after for bank in self.banks)

    @property
    def changed(self) -> bool:
        """Whether any bank was folded."""
        return any(not bank.note for bank in self.banks)

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [
            ("bank", "layers", "groups", "period", "kernel error", "parameters", "after", "")
        ]
        for bank in self.banks:
            flipped = f"{bank.flipped} negative scales were dropped; keep scales to avoid this"
            rows.append(
                (
                    bank.name,
                    str(len(bank.groups)),
                    " ".join(map(str, bank.groups)),
                    str(bank.period or "-"),
                    "" if bank.note else f"{bank.kernel_error:.2e}",
                    f"{bank.before:,}",
                    f"{bank.after:,}",
                    bank.note or (flipped if bank.flipped else ""),
                )
            )
        lines = table(rows, right={1, 3, 4, 5, 6})
        lines += [
            "",
            f"threshold      {self.threshold:g}",
            f"trainable      {self.shared.layout.trainable:,}, {self.saved:,} fewer than before",
        ]
        if self.output_change is not None:
            lines.append(f"output change  {self.output_change:.2e} of the outputs' norm")
        return "\n".join(lines)


def fold(
    shared: Shared,
    variables: Mapping[str, Any],
    *example_inputs: Any,
    threshold: float = 0.9,
    scale: bool = True,
    banks: Sequence[str] | None = None,
    groups: Mapping[str, Sequence[int]] | None = None,
    by: By = "coefficients",
    **options: Any,
) -> Folded[Shared]:
    """Ties the similar layers of every bank and removes the parameters that become redundant.

    Layers are grouped by complete linkage on 1 - S, where S is `paramshare.similarity`: within
    a group every pair has a similarity of at least `threshold`. Each layer is a row: its
    coefficients under soft sharing, otherwise its flattened weight. The leading singular vector r
    of a group's rows gives the group's kernel, and every layer keeps a signed scale,
    <row, r> / <r, r>. Without `scale` there are no scales, and the kernel has the mean norm of its
    group's kernels. Batch norms stay private.

    A bank is not folded where no two layers are similar, where its groups would need more
    parameters than the bank has, or where its sites differ in shape; the report says so. To fold a
    network that shares nothing, first convert its L layers to `Soft(templates=L)`
    (`paramshare.convert`), then fold by weights.

    Dropping scales changes the function. In training mode, a batch norm right after a convolution
    absorbs a positive scale; for evaluation, re-estimate its statistics with `reestimate`. A
    block's last convolution has no such batch norm: the residual sum comes next. Nothing absorbs a
    negative scale: the report counts the layers that lose one. For these layers, even a zero kernel
    would be closer to the original than the tied one.

    Args:
      shared: the shared model.
      variables: its variables.
      *example_inputs: the model's inputs; if given, the change of its outputs is measured.
      threshold: in (0, 1]; 1 ties only layers that are equal up to rounding and a scale.
      scale: whether layers keep signed scales.
      banks: regular expressions that match the whole names of the banks to fold; None for all.
      groups: for each bank named here, the group number of each layer; similarity and threshold
        are then ignored.
      by: under soft sharing, compare layers and build group kernels with "coefficients" (as in the
        paper) or "weights"; see `similarity`.
      **options: further arguments of `shared.apply`, such as `train=False`.

    Returns:
      The folded network and a report. The input is not changed.

    Raises:
      FoldError: if the threshold is outside (0, 1], an expression matches no bank, a bank named by
        `banks` or `groups` cannot be folded, or weights are not finite.
      PlanError: if the variables do not match the layout.

    Example:
      >>> import jax, paramshare
      >>> x = jax.numpy.ones((1, 8, 8, 3))
      >>> # One template per stage: all layers of a stage use the same kernel, up to a scale.
      >>> shared = paramshare.create_model("swrn-16-1-1", input_shape=(8, 8, 3))
      >>> folded = paramshare.fold(shared, jax.jit(shared.init)(jax.random.key(0), x), x)
      >>> [(bank.name, bank.groups, bank.period) for bank in folded.banks]
      [('stage1', (0, 0), 1), ('stage2', (0, 0), 1), ('stage3', (0, 0), 1)]
      >>> folded.output_change < 1e-5
      True

    References:
      Savarese & Maire, ICLR 2019, section 3.2, for the idea. The threshold, the grouping, the group
      kernel and the scales are this library's own choices.
    """
    check_shared("fold", shared, FoldError)
    layout, weights, reports = tie(
        shared.layout, shared.layout.weights(variables), threshold, scale, banks, groups, by
    )
    folded = shared.clone(layout=layout)
    new_variables = shared.stored(_replaced(separated(variables), weights), like=variables)
    change = None
    if example_inputs:
        pairs = (shared, variables), (folded, new_variables)
        change = output_change(*pairs, *example_inputs, **options)
    return Folded(folded, new_variables, float(threshold), reports, change)


def tie(
    layout: Layout,
    weights: Mapping[str, Weights],
    threshold: float,
    scale: bool,
    banks: Sequence[str] | None,
    groups: Mapping[str, Sequence[int]] | None,
    by: By,
) -> tuple[Layout, dict[str, Weights], tuple[FoldedBank, ...]]:
    """Folds the banks of a layout; the arguments are those of `fold`.

    Returns:
      The layout with `Tied` schemes, the weights of the banks that were folded, and a report on
      each bank.
    """
    if not isinstance(scale, bool):
        raise FoldError(f"scale={scale!r}: must be True (keep a signed scale per layer) or False")
    threshold = check_threshold(threshold)
    check_by(by)
    selected, groups_of = select_banks(layout, banks), check_groups(layout, groups)
    results = {
        bank.name: _fold_bank(
            bank, weights[bank.name], threshold, scale, by, groups_of.get(bank.name)
        )
        if bank.name in selected or bank.name in groups_of
        else _unchanged(bank, "not selected")
        for bank in layout.banks
    }
    tied = {name: new for name, (_, new) in results.items() if new is not None}
    schemes = {name: scheme for name, (scheme, _) in tied.items()}
    reports = tuple(report for report, _ in results.values())
    return layout.with_schemes(schemes), {name: new for name, (_, new) in tied.items()}, reports


Result = tuple[FoldedBank, tuple[Tied, Weights] | None]


def _unchanged(bank: SharedBank, note: str, groups: tuple[int, ...] | None = None) -> Result:
    groups, size = groups or tuple(range(len(bank.sites))), sum(bank.trainable)
    return FoldedBank(bank.name, groups, period(groups), (), 0.0, size, size, note), None


def _fold_bank(
    bank: SharedBank,
    weights: Weights,
    threshold: float,
    scale: bool,
    by: By,
    given: tuple[int, ...] | None,
) -> Result:
    if reason := unfoldable(bank):
        return _unchanged(bank, f"not folded: {reason}")
    rows_LxN = np.stack(
        [np.asarray(row, np.float64).reshape(-1) for row in layer_rows(bank, weights, by)]
    )
    if not np.isfinite(rows_LxN).all():
        raise FoldError(
            f"bank {bank.name!r} has weights that are not finite; use an earlier checkpoint"
        )
    groups = given or group(cosines(rows_LxN), threshold)
    count, before = max(groups) + 1, sum(bank.trainable)
    tied_already = bank.scheme.groups_of(bank.sites)
    if tied_already and in_order(tied_already) == groups and (scale or not weights.coefficients):
        return _unchanged(bank, "already folded", groups)
    if count == len(groups):
        reason = "every layer is a group of its own" if given else "no two layers are similar"
        return _unchanged(bank, f"not folded: {reason}", groups)
    after = count * bank.sites[0].size + (len(groups) if scale else 0)
    if after > before:
        reason = f"{count} kernels would need {after:,} parameters, more than the {before:,} now"
        return _unchanged(bank, f"not folded: {reason}", groups)

    rows_GxN, scales_L = _representatives(rows_LxN, groups)
    flipped = 0 if scale else int(np.sum(scales_L < 0))
    if not scale:
        scales_L[:] = 1
    initial = "model" if bank.scheme.measures_initializer else "paper"
    # `Tied` numbers groups in the order of paths, which calls may not follow.
    by_path = [groups[i] for i in path_order(bank.sites)]
    scheme = Tied(groups=in_order(by_path), scaled=scale, initial=initial)
    dtype = jax.tree.leaves(weights.bank)[0].dtype
    rows_GxN = rows_GxN[list(dict.fromkeys(by_path))]
    kernels = jnp.asarray(_kernels(bank, weights, rows_GxN, by), dtype)
    tied = scheme.weights(kernels, jnp.asarray(scales_L, dtype), bank.sites)
    before_and_after = zip(
        bank.scheme.expand(weights, bank.sites), scheme.expand(tied, bank.sites), strict=True
    )
    report = FoldedBank(
        bank.name,
        groups,
        period(groups),
        tuple(map(float, scales_L)) if scale else (),
        max(relative_change(a, b) for a, b in before_and_after),
        before,
        after,
        flipped=flipped,
    )
    return report, (scheme, tied)


def _kernels(bank: SharedBank, weights: Weights, rows_GxN: np.ndarray, by: By) -> np.ndarray:
    """The kernels, (G, *shape), made from rows of coefficients or of weights, in float64."""
    site = bank.sites[0]
    if by == "weights" or bank.scheme.mixing(weights, bank.sites) is None:
        return rows_GxN.reshape(-1, *site.shape)
    with jax.enable_x64(True):
        double = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), weights.bank)
        return np.asarray(bank.scheme.combine(double, jnp.asarray(rows_GxN, jnp.float64), site))


def _replaced(variables: Mapping[str, Any], weights: Mapping[str, Weights]) -> dict[str, Any]:
    """A copy of `variables` in which the weights of the banks in `weights` are replaced."""
    banks, entries = variables_of(weights)
    params = dict(variables.get("params", {}))
    for collection in COLLECTIONS:
        others = params.pop(collection, {})
        others = {name: value for name, value in others.items() if name not in weights}
        if merged := others | entries.get(collection, {}):
            params[collection] = merged
    collections = {name: value for name, value in variables.items() if name != "params"}
    collections["banks"] = {**variables["banks"], **banks}
    return collections | ({"params": params} if params else {})


def _representatives(
    rows_LxN: np.ndarray, groups: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """One row per group, (G, N), and a signed scale per layer, (L,), in float64."""
    rows, scales_L = [], np.ones(len(groups))
    for number in range(max(groups) + 1):
        members = np.flatnonzero(np.equal(groups, number))
        with jax.enable_x64(True):
            row, scales = leading(jnp.asarray(rows_LxN[members], jnp.float64))
            rows.append(np.asarray(row))
            scales_L[members] = np.asarray(scales)
    return np.stack(rows), scales_L
