"""Grouping of similar layers by complete linkage, and the groups that a caller asks for."""

import numbers
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from paramshare.errors import ParamshareError
from paramshare.layout import Layout, SharedBank

# Rounding error of a cosine in float64 between rows stored in float32. It is far smaller than the
# last digit of any threshold.
ROUNDING = 1e-9


class FoldError(ParamshareError):
    """A network cannot be folded as asked."""


def check_threshold(threshold: float) -> float:
    """The threshold as a float; `FoldError` unless it lies in (0, 1]."""
    real = isinstance(threshold, numbers.Real) and not isinstance(threshold, bool)
    if not real or not 0 < threshold <= 1:
        raise FoldError(
            f"threshold={threshold!r}: must be a similarity in (0, 1]; 1 ties only layers that "
            "are equal up to a scale"
        )
    return float(threshold)


def cosines(rows_LxN: np.ndarray) -> np.ndarray:
    """|cosine| between all pairs of rows, (L, L), in float64; 0 for a row of zeros.

    At a threshold of 1, float32 would miss equal rows.
    """
    length_Lx1 = np.linalg.norm(rows_LxN, axis=1, keepdims=True)
    unit_LxN = rows_LxN / np.where(length_Lx1 == 0, 1, length_Lx1)
    return np.clip(np.abs(unit_LxN @ unit_LxN.T), 0, 1)


def group(similarity_LxL: Any, threshold: float) -> tuple[int, ...]:
    """Groups layers by complete linkage on 1 - similarity.

    Within a group every pair of layers has a similarity of at least `threshold`. Groups are
    numbered in the order of their first layer.

    Example:
      >>> from paramshare.transform.grouping import group
      >>> group([[1, 0.2, 0.95], [0.2, 1, 0.3], [0.95, 0.3, 1]], 0.9)
      (0, 1, 0)
    """
    distance_LxL = 1 - np.asarray(similarity_LxL, np.float64)
    if len(distance_LxL) < 2:
        return (0,) * len(distance_LxL)
    # Imported here: it takes a noticeable part of the time of `import paramshare`.
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform

    np.fill_diagonal(distance_LxL, 0)
    tree = linkage(squareform(np.clip(distance_LxL, 0, None), checks=False), "complete")
    return in_order(fcluster(tree, 1 - threshold + ROUNDING, "distance"))


def in_order(labels: Sequence[Any]) -> tuple[int, ...]:
    """Labels renumbered from 0, in the order of their first occurrence."""
    number = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    return tuple(number[label] for label in labels)


def select_banks(layout: Layout, patterns: Sequence[str] | None) -> set[str]:
    """Names of the banks that the regular expressions match; all banks for None.

    Raises:
      FoldError: if an expression matches no bank, or matches a bank that cannot be folded.
    """
    if patterns is None:
        return set(layout)
    selected = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        try:
            names = [name for name in layout if re.fullmatch(pattern, name)]
        except (re.error, TypeError) as error:
            raise FoldError(f"banks: {pattern!r} is not a regular expression: {error}") from None
        if not names:
            raise FoldError(f"banks: {pattern!r} matches no bank; the banks are {list(layout)}")
        for name in names:
            _check_foldable(layout[name])
        selected |= set(names)
    return selected


def check_groups(
    layout: Layout, groups: Mapping[str, Sequence[int]] | None
) -> dict[str, tuple[int, ...]]:
    """The caller's groups, renumbered by `in_order`.

    Raises:
      FoldError: if a bank does not exist or cannot be folded, or has not one group per layer.
    """
    if groups is not None and not isinstance(groups, Mapping):
        raise FoldError(
            f"groups={groups!r}: must be a dictionary from bank name to one group per layer"
        )
    checked = {}
    for name, labels in (groups or {}).items():
        if name not in list(layout):
            raise FoldError(f"groups: no bank {name!r}; the banks are {list(layout)}")
        bank = layout[name]
        _check_foldable(bank)
        if not isinstance(labels, Sequence) or not all(isinstance(x, int | str) for x in labels):
            raise FoldError(
                f"groups: bank {name!r} got {labels!r}; give one group per layer, "
                "such as (0, 1, 0, 1)"
            )
        if len(labels) != len(bank.sites):
            raise FoldError(
                f"groups: bank {name!r} has {len(bank.sites)} layers, but {tuple(labels)} has "
                f"{len(labels)} groups; give one group per layer"
            )
        checked[name] = in_order(labels)
    return checked


def unfoldable(bank: SharedBank) -> str:
    """Why a bank cannot be folded, "" if it can."""
    if len(bank.sites) == 1:
        return "one layer"
    return "layers of several shapes" if len({site.shape for site in bank.sites}) > 1 else ""


def _check_foldable(bank: SharedBank) -> None:
    if reason := unfoldable(bank):
        raise FoldError(f"bank {bank.name!r} cannot be folded: {reason}")
