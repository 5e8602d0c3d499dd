"""Layer similarity over training: what a run records, and how the record is read back."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from paramshare.layout import separated
from paramshare.measure.similarity import layers, similarity
from paramshare.shared import Shared

THRESHOLDS = (0.8, 0.9, 0.95, 0.99)  # similarities at which pairs of layers are counted
DIGITS = 4  # decimal places recorded
ROUNDING = 1e-6  # rounding error of a cosine in float32


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """Similarity of the layers after one epoch.

    Attributes:
      epoch: number of completed epochs; 0 is before the first step.
      step: number of optimizer steps until then.
      matrices: `{name: (L, L)}` as `paramshare.similarity` returns them, for L of at least 2.
    """

    epoch: int
    step: int
    matrices: dict[str, np.ndarray]


def make_snapshot(
    model: nn.Module,
) -> Callable[[Mapping[str, Any]], dict[str, list[list[float]]]] | None:
    """Makes a function from variables to the matrices of one line of metrics.

    None if no two layers of the model share. The function reads banks and the sites' coefficients
    and weights only, on one device, and compiles once.
    """
    if not isinstance(model, Shared):
        return None
    compared = [name for name, sites in layers(model.layout).items() if len(sites) > 1]
    if not compared:
        return None

    @jax.jit
    def compute(variables):
        matrices = similarity(model, variables)
        return {name: matrices[name] for name in compared}

    def snapshot(variables: Mapping[str, Any]) -> dict[str, list[list[float]]]:
        variables = separated(variables)
        params = variables.get("params", {})
        sharing = {
            "banks": variables["banks"],
            "params": {name: params[name] for name in params if name != "model"},
        }
        # Replicated over devices, perhaps of several processes: read the first copy.
        local = jax.tree.map(
            lambda x: x.addressable_data(0) if isinstance(x, jax.Array) else x, sharing
        )
        matrices = jax.device_get(compute(local))
        return {
            name: np.round(np.asarray(matrices[name], np.float64), DIGITS).tolist()
            for name in compared
        }

    return snapshot


def snapshots(lines: Iterable[Mapping[str, Any]]) -> list[Snapshot]:
    """The snapshots among the lines of `metrics.jsonl`, in order. Skips damaged lines."""
    return [snapshot for snapshot in map(_snapshot, lines) if snapshot is not None]


def near_pairs(matrix_LxL: Any, threshold: float) -> int:
    """Number of pairs of layers whose similarity is at least `threshold`.

    Example:
      >>> from paramshare.measure.snapshots import near_pairs
      >>> near_pairs([[1, 0.95, 0.2], [0.95, 1, 0.9], [0.2, 0.9, 1]], 0.9)
      2
    """
    matrix_LxL = np.asarray(matrix_LxL, np.float64)
    pairs = matrix_LxL[np.triu_indices(len(matrix_LxL), 1)]
    return int(np.sum(pairs >= threshold - ROUNDING))


def spread(items: list[Any], most: int) -> list[Any]:
    """At most `most` of the items, evenly spaced, including the first and the last.

    Example:
      >>> from paramshare.measure.snapshots import spread
      >>> spread(list(range(31)), 4)
      [0, 10, 20, 30]
    """
    if len(items) <= most:
        return list(items)
    return [items[i] for i in np.unique(np.round(np.linspace(0, len(items) - 1, most)).astype(int))]


def _snapshot(line: Mapping[str, Any]) -> Snapshot | None:
    if line["kind"] != "similarity" or not isinstance(line.get("matrices"), dict):
        return None
    try:
        matrices = {
            str(name): np.asarray(rows, np.float64) for name, rows in line["matrices"].items()
        }
    except (TypeError, ValueError):
        return None
    square = all(
        matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1] for matrix in matrices.values()
    )
    return Snapshot(line["epoch"], line["step"], matrices) if matrices and square else None
