"""Folding: layers of a trained network that use nearly the same kernel are tied, and runs of tied layers are recurrent networks."""

import dataclasses
import numbers
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paramshare.analysis.similarity import By, check_by, rows_of
from paramshare.layout import SharedBank, table
from paramshare.models.looped import period
from paramshare.schemes import Soft, Tied
from paramshare.schemes.tied import leading
from paramshare.shared import Shared

ROUNDING = 1e-9  # of a cosine, in float64, of rows that float32 has rounded: far below any threshold's last digit


class FoldError(ValueError):
    """A network cannot be folded as asked."""


@dataclasses.dataclass(frozen=True)
class FoldedBank:
    """What became of one bank.

    Attributes:
      name: of the bank.
      groups: the group of each layer.
      period: the smallest p with group[i] = group[i + p] for all layers, where p is less than their number; else None.
      scales: the signed scale of each layer's kernel; `()` where there are none.
      flipped: layers whose kernel points against their group's, and whose sign was dropped with the scale.
      kernel_error: max_l |W_l - c_l R| / |W_l|, over the bank's layers.
      before: trainable numbers of the bank and its coefficients before folding.
      after: and after.
      note: why the bank was left as it was; "" if it was folded.
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
class Folded:
    """A folded network.

    Attributes:
      shared: the same model, its folded banks under `Tied(groups=...)`.
      variables: of `shared`.
      threshold: the similarity from which layers were tied.
      banks: what became of each bank.
      output_change: |y' - y| / |y| over the inputs given, y and y' the outputs before and after; None without inputs.
    """

    shared: Shared
    variables: dict[str, Any]
    threshold: float
    banks: tuple[FoldedBank, ...]
    output_change: float | None = None

    @property
    def saved(self) -> int:
        """Trainable numbers that folding did away with."""
        return sum(bank.before - bank.after for bank in self.banks)

    @property
    def changed(self) -> bool:
        """Whether any bank was folded."""
        return any(not bank.note for bank in self.banks)

    def __str__(self) -> str:
        rows = [("bank", "layers", "groups", "period", "kernel error", "numbers before", "after", "")]
        for bank in self.banks:
            groups = " ".join(map(str, bank.groups))
            error = "" if bank.note else f"{bank.kernel_error:.2e}"
            note = bank.note or (f"{bank.flipped} layers lose a negative sign: keep scales" if bank.flipped else "")
            rows.append(
                (bank.name, str(len(bank.groups)), groups, str(bank.period or "-"), error, f"{bank.before:,}", f"{bank.after:,}", note)
            )
        lines = table(rows, right={1, 3, 4, 5, 6})
        lines += [
            "",
            f"threshold      {self.threshold:g}",
            f"trainable      {self.shared.layout.trainable:,}, {self.saved:,} less than before",
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
) -> Folded:
    """Ties the layers of every bank that are similar, and drops what they no longer need.

    Layers are grouped by complete linkage on 1 - S, S as `paramshare.similarity` measures it: within a group every pair is similar by
    `threshold` or more. A group's kernel is made of the leading singular vector of its rows (coefficients under soft sharing, else
    kernels), and every layer keeps a signed scale, <row, r> / <r, r>; or, without `scale`, none: the kernel then has the mean length of its
    group's. Batch norms stay a layer's own.

    A bank is left as it is where no two layers are similar, where its groups would store more than it does, and where its sites differ in
    shape; the report says so. A network that shares nothing folds too: convert it to `Soft(templates=L)` first (`paramshare.convert`), and
    fold by kernels.

    Dropping scales changes the function: a batch norm behind a convolution absorbs a positive scale, but only in training mode, and
    behind a block's last convolution there is the residual sum. `reestimate` then fits batch statistics anew. Nothing absorbs a negative
    one: the report counts the layers that lose their sign, whose kernels are then worse than none.

    Args:
      shared: the shared model.
      variables: its variables.
      *example_inputs: of the model; where given, the change of its outputs is measured.
      threshold: in (0, 1]; 1 ties only layers that are equal up to rounding and a scale.
      scale: whether layers keep signed scales.
      banks: regular expressions that match whole names of banks to fold; None for all.
      groups: the groups of some banks as you want them, whatever their similarity.
      by: what layers are compared by, and made of, under soft sharing: "coefficients" (the paper's) or "kernels", as `similarity`.
      **options: further arguments of `shared.apply`, such as `train=False`.

    Returns:
      The folded network and a report; nothing of the input is changed.

    Raises:
      FoldError: if the threshold is outside (0, 1], an expression matches no bank, or a bank that is asked for by name has one layer.
      PlanError: if the variables are of another model.

    Example:
      >>> import jax, paramshare
      >>> x = jax.numpy.ones((1, 8, 8, 3))
      >>> shared = paramshare.create_model("swrn-16-1-1", input_shape=(8, 8, 3))  # one template a stage: a loop by construction
      >>> folded = paramshare.fold(shared, shared.init(jax.random.key(0), x), x)
      >>> [(bank.name, bank.groups, bank.period) for bank in folded.banks]
      [('stage1', (0, 0), 1), ('stage2', (0, 0), 1), ('stage3', (0, 0), 1)]
      >>> folded.output_change < 1e-5
      True

    References:
      Savarese & Maire, ICLR 2019, section 3.2, for the idea; threshold, grouping, representative and scales are this library's own.
    """
    if not isinstance(shared, Shared):
        raise FoldError(f"fold takes a Shared, as `share` and `create_model` return it, got {type(shared).__name__}")
    if not isinstance(scale, bool):
        raise FoldError(f"scale={scale!r}; it is True to keep a signed scale a layer, or False")
    threshold = check_threshold(threshold)
    check_by(by)
    own = variables.get("params", {}).get("coefficients", {})
    jax.eval_shape(shared.layout.expand, variables.get("banks", {}), own)  # raises if they are of another model
    asked, given = _asked(shared, banks), _given(shared, groups)
    new_banks, new_coefficients = dict(variables["banks"]), dict(own)
    schemes, reports = {}, []
    for bank in shared.layout.banks:
        report, scheme, arrays = _fold_bank(bank, variables, threshold, scale, by, bank.name in asked, given.get(bank.name))
        reports.append(report)
        if scheme is not None:
            schemes[bank.name] = scheme
            new_banks[bank.name] = arrays[0]
            new_coefficients.pop(bank.name, None)
            if scheme.scaled:
                new_coefficients[bank.name] = arrays[1]
    folded = Shared(shared.model, shared.layout.with_schemes(schemes))
    params = {name: value for name, value in variables.get("params", {}).items() if name != "coefficients"}
    if new_coefficients:
        params["coefficients"] = new_coefficients
    fresh = {**{name: value for name, value in variables.items() if name != "params"}, "banks": new_banks}
    if params:
        fresh["params"] = params
    change = None
    if example_inputs:
        before = shared.apply(variables, *example_inputs, **options)
        after = folded.apply(fresh, *example_inputs, **options)
        change = relative_change(before, after)
    return Folded(folded, fresh, threshold, tuple(reports), change)


def check_threshold(threshold: float) -> float:
    """The threshold as a float; `FoldError` unless it lies in (0, 1]."""
    if isinstance(threshold, bool) or not isinstance(threshold, numbers.Real) or not 0 < threshold <= 1:
        raise FoldError(f"threshold={threshold!r}; it is a similarity above 0 and up to 1: 1 ties only layers that are equal up to a scale")
    return float(threshold)


def group(similarity_LxL: Any, threshold: float) -> tuple[int, ...]:
    """Groups of layers by complete linkage: within each, every pair is similar by `threshold` or more. Numbered by their first layer.

    Example:
      >>> from paramshare.analysis.folding import group
      >>> group([[1, 0.2, 0.95], [0.2, 1, 0.3], [0.95, 0.3, 1]], 0.9)
      (0, 1, 0)
    """
    distance_LxL = 1 - np.asarray(similarity_LxL, np.float64)
    if len(distance_LxL) < 2:
        return (0,) * len(distance_LxL)
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform

    np.fill_diagonal(distance_LxL, 0)
    tree = linkage(squareform(np.clip(distance_LxL, 0, None), checks=False), "complete")
    return in_order(fcluster(tree, 1 - threshold + ROUNDING, "distance"))


def in_order(labels: Sequence[Any]) -> tuple[int, ...]:
    """Labels renumbered from 0 in the order in which they first come."""
    number = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    return tuple(number[label] for label in labels)


def relative_change(before: Any, after: Any) -> float:
    """|after - before| / |before|, over all numbers of two pytrees."""
    pairs = list(zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))
    difference = sum(float(np.sum((np.asarray(b, np.float64) - np.asarray(a, np.float64)) ** 2)) for a, b in pairs)
    size = sum(float(np.sum(np.asarray(a, np.float64) ** 2)) for a, _ in pairs)
    return float(np.sqrt(difference / size)) if size else float(np.sqrt(difference))


def _asked(shared: Shared, patterns: Sequence[str] | None) -> set[str]:
    if patterns is None:
        return set(shared.layout)
    asked = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        try:
            found = [name for name in shared.layout if re.fullmatch(pattern, name)]
        except (re.error, TypeError) as error:
            raise FoldError(f"banks: {pattern!r} is not a regular expression: {error}") from None
        if not found:
            raise FoldError(f"banks: {pattern!r} matches no bank; the banks are {list(shared.layout)}")
        for name in found:
            _check_foldable(shared.layout[name])
        asked |= set(found)
    return asked


def _given(shared: Shared, groups: Mapping[str, Sequence[int]] | None) -> dict[str, tuple[int, ...]]:
    given = {}
    if groups is not None and not isinstance(groups, Mapping):
        raise FoldError(f"groups={groups!r}; give a dictionary from names of banks to a group for each layer")
    for name, its in (groups or {}).items():
        if name not in list(shared.layout):
            raise FoldError(f"groups: no bank {name!r}; the banks are {list(shared.layout)}")
        bank = shared.layout[name]
        _check_foldable(bank)
        if not isinstance(its, Sequence) or not all(isinstance(label, int | str) for label in its):
            raise FoldError(f"groups: bank {name!r} has {its!r}; give a group for each layer, such as (0, 1, 0, 1)")
        if len(its) != len(bank.sites):
            raise FoldError(
                f"groups: bank {name!r} has {len(bank.sites)} layers, but {tuple(its)} has {len(its)} groups; give one for each"
            )
        given[name] = in_order(its)
    return given


def _check_foldable(bank: SharedBank) -> None:
    reason = _unfoldable(bank)
    if reason:
        raise FoldError(f"bank {bank.name!r} cannot be folded: {reason}")


def _unfoldable(bank: SharedBank) -> str:
    if len(bank.sites) == 1:
        return "one layer"
    return "layers of several shapes" if len({site.shape for site in bank.sites}) > 1 else ""


def _fold_bank(
    bank: SharedBank, variables: Mapping[str, Any], threshold: float, scale: bool, by: By, asked: bool, given: tuple[int, ...] | None
) -> tuple[FoldedBank, Tied | None, Any]:
    before = sum(bank.trainable)

    def left(note: str, groups: tuple[int, ...] | None = None):
        groups = groups or tuple(range(len(bank.sites)))
        return FoldedBank(bank.name, groups, period(groups), (), 0.0, before, before, note), None, None

    if not asked and given is None:
        return left("not asked for")
    if _unfoldable(bank):
        return left(f"left: {_unfoldable(bank)}")
    rows_LxN = np.stack([np.asarray(row, np.float64).reshape(-1) for row in rows_of(bank, variables, by)])
    if not np.isfinite(rows_LxN).all():
        raise FoldError(f"bank {bank.name!r} holds numbers that are not finite; take an earlier checkpoint")
    groups = given or group(_cosines(rows_LxN), threshold)
    if isinstance(bank.scheme, Tied) and (groups == bank.scheme.groups_of(bank.sites)) and (not bank.scheme.scaled or scale):
        return left("folded already", groups)
    if len(set(groups)) == len(groups):
        return left("left: every layer is a group of its own" if given else "left: no two layers are that similar", groups)
    after = (max(groups) + 1) * bank.sites[0].size + (len(groups) if scale else 0)
    if after > before:
        return left(f"left: {max(groups) + 1} kernels would be {after:,} numbers", groups)

    # --- One row a group, and a signed scale a layer
    rows, scales_L = [], np.ones(len(groups))
    for number in range(max(groups) + 1):
        members = [i for i, its in enumerate(groups) if its == number]
        with jax.enable_x64(True):
            row, own = leading(jnp.asarray(rows_LxN[members], jnp.float64))
            rows.append(np.asarray(row))
            scales_L[members] = np.asarray(own)
    rows_GxN = np.stack(rows)
    kernels_GxP = rows_GxN
    if isinstance(bank.scheme, Soft) and by == "coefficients":
        kernels_GxP = rows_GxN @ np.asarray(variables["banks"][bank.name]["templates"], np.float64)
    flipped = 0 if scale else int(np.sum(scales_L < 0))
    if not scale:
        scales_L[:] = 1

    # --- The bank that takes its place
    scheme = Tied(groups=groups, scaled=scale)
    old = _expand(bank, variables)
    dtype = jax.tree.leaves(variables["banks"][bank.name])[0].dtype
    arrays = {"kernels": jnp.asarray(kernels_GxP.reshape(-1, *bank.sites[0].shape), dtype)}, jnp.asarray(scales_L, dtype)
    new = scheme.expand(arrays[0], arrays[1] if scale else {}, bank.sites)
    error = max(relative_change(a, b) for a, b in zip(old, new, strict=True))
    kept = tuple(float(c) for c in scales_L) if scale else ()
    return FoldedBank(bank.name, groups, period(groups), kept, error, before, after, flipped=flipped), scheme, arrays


def _expand(bank: SharedBank, variables: Mapping[str, Any]) -> tuple[jax.Array, ...]:
    own = variables.get("params", {}).get("coefficients", {}).get(bank.name, {})
    return bank.scheme.expand(variables["banks"][bank.name], own, bank.sites)


def _cosines(rows_LxN: np.ndarray) -> np.ndarray:
    """As `paramshare.schemes.soft.cosines`, in float64: a threshold of 1 must find rows that float32 has rounded."""
    length_Lx1 = np.linalg.norm(rows_LxN, axis=1, keepdims=True)
    unit_LxN = rows_LxN / np.where(length_Lx1 == 0, 1, length_Lx1)
    return np.clip(np.abs(unit_LxN @ unit_LxN.T), 0, 1)
