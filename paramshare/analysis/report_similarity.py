"""The part of a run's report that is about how alike the layers are, and were. From snapshots to HTML."""

import html
import json
from collections.abc import Sequence

import numpy as np

from paramshare.analysis.charts import colour, heat_map, hundredths, line_chart
from paramshare.analysis.page import paragraph, section, table
from paramshare.analysis.pictures import site_labels
from paramshare.analysis.similarity import layers
from paramshare.analysis.snapshots import THRESHOLDS, Snapshot, near_pairs, spread
from paramshare.layout import Layout
from paramshare.schemes import Soft

MOST_SNAPSHOTS = 60  # that the slider moves through


def comparable(snapshots: Sequence[Snapshot]) -> list[Snapshot]:
    """The snapshots of the same matrices as the last one, few enough for a slider."""
    if not snapshots:
        return []
    shapes = {name: matrix.shape for name, matrix in snapshots[-1].matrices.items()}
    same = [one for one in snapshots if {name: matrix.shape for name, matrix in one.matrices.items()} == shapes]
    return spread(same, MOST_SNAPSHOTS)


def similarity_section(layout: Layout, snapshots: Sequence[Snapshot]) -> str:
    """Heat maps of the last snapshot, a slider through the others, and how many pairs of layers are near 1.

    Args:
      layout: whose layers they are.
      snapshots: in order.

    Returns:
      An HTML section; with two snapshots or more it needs the page's script.
    """
    title, shown = "Similarity of layers", comparable(snapshots)
    if not shown:
        return section(title, paragraph("No bank has two layers of one shape, or no similarity was kept."))
    last, named = shown[-1], layers(layout)
    compared = " or ".join(dict.fromkeys("coefficients" if isinstance(bank.scheme, Soft) else "kernels" for bank in layout.banks))
    about = (
        f"|cosine| between the {compared} of every two layers of a bank. 1 means that two layers use the same "
        "kernel up to a scale: they can be folded into one, and a pattern that repeats is a loop."
    )
    maps = []
    for name, matrix in last.matrices.items():
        sites = named.get(name, ())
        labels = site_labels(sites) if len(sites) == len(matrix) else [str(i) for i in range(len(matrix))]
        maps.append(heat_map(matrix, labels, f"{html.escape(name)}<small>{len(matrix)} layers</small>"))
    parts = [paragraph(about, "about"), _scale()]
    if len(shown) > 1:
        parts += [_slider(shown), _embedded(shown)]
    else:
        parts.append(paragraph(f"After epoch {last.epoch}.", "small"))
    parts.append(f'<div class="maps">{"".join(maps)}</div>')
    rows = [("bank", "pairs", *(f"\u2265 {t:g}" for t in THRESHOLDS))]
    for name, matrix in last.matrices.items():
        rows.append((name, str(len(matrix) * (len(matrix) - 1) // 2), *(str(near_pairs(matrix, t)) for t in THRESHOLDS)))
    parts.append(
        paragraph(f"How many pairs of layers are near 1, that is similar by a threshold or more, after epoch {last.epoch}:", "about")
    )
    parts.append(table(rows, right=range(1, 2 + len(THRESHOLDS))))
    if len(shown) > 1:
        series = {
            f"{t:g} or more": [(one.epoch, float(sum(near_pairs(matrix, t) for matrix in one.matrices.values()))) for one in shown]
            for t in THRESHOLDS
        }
        parts.append(line_chart(series, title="Pairs of layers near 1, all banks together", whole=True))
    return section(title, *parts)


def _scale() -> str:
    stops = ",".join(colour(value) for value in range(0, 101, 10))
    return f'<div class="scale">0 <i style="background:linear-gradient(90deg,{stops})"></i> 1</div>'


def _slider(shown: Sequence[Snapshot]) -> str:
    last = len(shown) - 1
    return (
        f'<div class="slider" id="bar" hidden><label for="slider">after epoch <output id="shown" for="slider">{shown[-1].epoch}</output>'
        f'</label><input type="range" id="slider" min="0" max="{last}" value="{last}" autocomplete="off"></div>'
        f'<noscript><p class="small">After epoch {shown[-1].epoch}; with JavaScript a slider moves through training.</p></noscript>'
    )


def _embedded(shown: Sequence[Snapshot]) -> str:
    """The numbers for the slider: of every map the upper triangle at every snapshot. Numbers and colours alone: nothing to be escaped."""

    def triangle(matrix_LxL: np.ndarray) -> list[int]:
        return hundredths(matrix_LxL)[np.triu_indices(len(matrix_LxL))].tolist()

    data = {
        "epochs": [one.epoch for one in shown],
        "colours": [colour(value) for value in range(101)],
        "maps": [[triangle(one.matrices[name]) for one in shown] for name in shown[-1].matrices],
    }
    return f'<script type="application/json" id="snapshots">{json.dumps(data, separators=(",", ":"))}</script>'
