"""The report's section on the similarity of layers. Plain data for the page's template."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from paramshare.layout import Layout
from paramshare.measure.similarity import layers
from paramshare.measure.snapshots import THRESHOLDS, Snapshot, near_pairs, spread
from paramshare.report.charts import Chart, heat_colours, hundredths, line_chart
from paramshare.report.pictures import site_labels
from paramshare.report.tables import Table

MAX_SNAPSHOTS = 60  # positions of the slider


@dataclasses.dataclass(frozen=True)
class HeatMap:
    """A similarity matrix: its name, the layers' labels, and (L, L) whole hundredths."""

    name: str
    labels: Sequence[str]
    values: Sequence[Sequence[int]]


@dataclasses.dataclass(frozen=True)
class SimilaritySection:
    """Similarity of layers in the last snapshot and over training.

    Attributes:
      epoch: epoch of the last snapshot.
      maps: its matrices.
      pairs: the number of similar pairs of layers in it.
      chart: the number of similar pairs over training; None for a single snapshot.
      slider: what the slider's script reads; None for a single snapshot.
    """

    epoch: int
    maps: Sequence[HeatMap]
    pairs: Table
    chart: Chart | None = None
    slider: dict[str, Any] | None = None


def similarity_section(layout: Layout, snapshots: Sequence[Snapshot]) -> SimilaritySection | None:
    """Prepares the section; None without snapshots."""
    kept_snapshots = comparable(snapshots)
    if not kept_snapshots:
        return None
    last, sites = kept_snapshots[-1], layers(layout)
    maps = []
    for name, matrix in last.matrices.items():
        labels = site_labels(sites.get(name, ()))
        if len(labels) != len(matrix):
            labels = list(map(str, range(len(matrix))))
        maps.append(HeatMap(name, labels, hundredths(matrix).tolist()))
    rows = [
        (name, str(_pairs(matrix)), *(str(near_pairs(matrix, t)) for t in THRESHOLDS))
        for name, matrix in last.matrices.items()
    ]
    head = ("bank", "pairs", *(f"\u2265 {threshold:g}" for threshold in THRESHOLDS))
    table = Table(head, rows, right=range(1, len(head)))
    if len(kept_snapshots) == 1:
        return SimilaritySection(last.epoch, maps, table)
    return SimilaritySection(
        last.epoch, maps, table, _pairs_chart(kept_snapshots), _slider(kept_snapshots)
    )


def comparable(snapshots: Sequence[Snapshot]) -> list[Snapshot]:
    """The snapshots with the same matrices as the last one, at most `MAX_SNAPSHOTS` of them."""
    if not snapshots:
        return []

    def shapes(snapshot: Snapshot) -> dict[str, tuple[int, ...]]:
        return {name: matrix.shape for name, matrix in snapshot.matrices.items()}

    last = shapes(snapshots[-1])
    return spread([one for one in snapshots if shapes(one) == last], MAX_SNAPSHOTS)


def _pairs(matrix_LxL: np.ndarray) -> int:
    return len(matrix_LxL) * (len(matrix_LxL) - 1) // 2


def _pairs_chart(kept_snapshots: Sequence[Snapshot]) -> Chart:
    def total(snapshot: Snapshot, threshold: float) -> int:
        return sum(near_pairs(matrix, threshold) for matrix in snapshot.matrices.values())

    series = {
        f"\u2265 {threshold:g}": [(one.epoch, total(one, threshold)) for one in kept_snapshots]
        for threshold in THRESHOLDS
    }
    title = "Pairs of similar layers, all banks together"
    return line_chart(series, name="pairs", title=title, whole=True)


def _slider(kept_snapshots: Sequence[Snapshot]) -> dict[str, Any]:
    """For each map, the upper triangle of the matrix in each snapshot."""

    def triangle(matrix_LxL: np.ndarray) -> list[int]:
        return hundredths(matrix_LxL)[np.triu_indices(len(matrix_LxL))].tolist()

    return {
        "epochs": [one.epoch for one in kept_snapshots],
        "colours": heat_colours(),
        "maps": [
            [triangle(one.matrices[name]) for one in kept_snapshots]
            for name in kept_snapshots[-1].matrices
        ],
    }
