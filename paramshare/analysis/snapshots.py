"""Similarity over training: what a run keeps of it, and how it is read back."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from paramshare.analysis.similarity import layers, similarity
from paramshare.shared import Shared

THRESHOLDS = (0.8, 0.9, 0.95, 0.99)  # from which on pairs of layers are counted as near 1
DIGITS = 4  # that are kept of a similarity
ROUNDING = 1e-6  # of a cosine in float32


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """How alike the layers were after an epoch.

    Attributes:
      epoch: after which; 0 is before the first step.
      step: updates made by then.
      matrices: `{name: (L, L)}`, as `paramshare.similarity` returns them; those of two layers or more.
    """

    epoch: int
    step: int
    matrices: dict[str, np.ndarray]


def make_snapshot(model: nn.Module) -> Callable[[Mapping[str, Any]], dict[str, list[list[float]]]] | None:
    """A function from variables to what a line of metrics keeps; None for a network in which no two layers share.

    It looks at banks and coefficients alone, on one device. Compiled once.
    """
    if not isinstance(model, Shared):
        return None
    compared = [name for name, sites in layers(model.layout).items() if len(sites) > 1]
    if not compared:
        return None

    @jax.jit
    def matrices(banks, coefficients):
        found = similarity(model, {"banks": banks, "params": {"coefficients": coefficients}})
        return {name: found[name] for name in compared}

    def snapshot(variables: Mapping[str, Any]) -> dict[str, list[list[float]]]:
        kept = variables["banks"], variables["params"].get("coefficients", {})
        # Replicated over devices, perhaps of several processes: the first copy will do.
        local = jax.tree.map(lambda x: x.addressable_data(0) if isinstance(x, jax.Array) else x, kept)
        found = jax.device_get(matrices(*local))
        return {name: np.round(np.asarray(found[name], np.float64), DIGITS).tolist() for name in compared}

    return snapshot


def snapshots(lines: Iterable[Mapping[str, Any]]) -> list[Snapshot]:
    """The snapshots among the lines of `metrics.jsonl`, in order; those that are damaged are left out."""
    return [found for found in map(_snapshot, lines) if found is not None]


def near_pairs(matrix_LxL: Any, threshold: float) -> int:
    """How many pairs of layers are similar by `threshold` or more.

    Example:
      >>> from paramshare.analysis.snapshots import near_pairs
      >>> near_pairs([[1, 0.95, 0.2], [0.95, 1, 0.9], [0.2, 0.9, 1]], 0.9)
      2
    """
    matrix_LxL = np.asarray(matrix_LxL, np.float64)
    pairs = matrix_LxL[np.triu_indices(len(matrix_LxL), 1)]
    return int(np.sum(pairs >= threshold - ROUNDING))


def spread(items: list[Any], most: int) -> list[Any]:
    """At most so many of them, evenly spaced, the first and the last among them.

    Example:
      >>> from paramshare.analysis.snapshots import spread
      >>> spread(list(range(31)), 4)
      [0, 10, 20, 30]
    """
    if len(items) <= most:
        return list(items)
    return [items[i] for i in np.unique(np.round(np.linspace(0, len(items) - 1, most)).astype(int))]


def _snapshot(line: Mapping[str, Any]) -> Snapshot | None:
    if line.get("kind") != "similarity" or not isinstance(line.get("epoch"), int) or not isinstance(line.get("matrices"), dict):
        return None
    try:
        matrices = {str(name): np.asarray(rows, np.float64) for name, rows in line["matrices"].items()}
    except (TypeError, ValueError):
        return None
    square = all(matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1] for matrix in matrices.values())
    return Snapshot(line["epoch"], line.get("step", 0), matrices) if matrices and square else None
