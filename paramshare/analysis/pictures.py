"""Pictures of a run: learning curves, and how alike the layers of each bank are."""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np


def learning_curves(
    lines: list[dict[str, Any]], file: str | pathlib.Path, *, title: str = "", test: Mapping[str, float] | None = None
) -> None:
    """Draws loss and accuracy by epoch as a PNG.

    Args:
      lines: of `metrics.jsonl`; those of kind "epoch" are drawn.
      file: the PNG to write.
      title: above the picture.
      test: test accuracies to mark, by their label.
    """
    figure, (left, right) = _axes(1, 2, (10, 4))
    epochs = [line for line in lines if line["kind"] == "epoch"]
    marker = "o" if len(epochs) < 3 else None
    for axes, name in ((left, "loss"), (right, "accuracy")):
        axes.plot(
            [line["epoch"] for line in epochs], [line[name] for line in epochs], color="C0", marker=marker, label="training (augmented)"
        )
        held = [line for line in epochs if f"validation_{name}" in line]
        if held:
            values = [line[f"validation_{name}"] for line in held]
            axes.plot([line["epoch"] for line in held], values, color="C1", marker=marker, label="validation")
        axes.set_xlabel("epoch")
        axes.set_title(name)
        axes.grid(alpha=0.3)
    left.set_yscale("log")
    for number, (label, value) in enumerate((test or {}).items()):
        right.axhline(value, color=f"C{2 + number}", linestyle=":", label=f"test, {label}: {value:.2%}")
    right.legend(loc="lower right")
    figure.suptitle(title)
    figure.savefig(file, dpi=120)


def similarity_maps(
    matrices: Mapping[str, Any], file: str | pathlib.Path, *, labels: Mapping[str, list[str]] | None = None, title: str = ""
) -> None:
    """Draws the layer similarity matrix of every bank as a PNG of heat maps.

    Args:
      matrices: `{bank: (L, L)}`, as `paramshare.similarity` returns them.
      file: the PNG to write.
      labels: names of each bank's layers; short ones.
      title: above the picture.
    """
    columns = min(3, len(matrices))
    rows = -(-len(matrices) // columns)
    figure, axes = _axes(rows, columns, (4.2 * columns + 0.8, 3.9 * rows + 0.6))
    flat = np.ravel(np.array(axes, dtype=object))
    image = None
    for cell, (bank, matrix) in zip(flat, matrices.items(), strict=False):
        matrix = np.asarray(matrix)
        image = cell.imshow(matrix, vmin=0, vmax=1, cmap="viridis")
        names = (labels or {}).get(bank) or [str(i) for i in range(len(matrix))]
        cell.set_xticks(range(len(matrix)), names, rotation=90, fontsize=7)
        cell.set_yticks(range(len(matrix)), names, fontsize=7)
        cell.set_title(bank)
        if len(matrix) <= 12:
            for (i, j), value in np.ndenumerate(matrix):
                cell.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color="black" if value > 0.6 else "white")
    for cell in flat[len(matrices) :]:
        cell.axis("off")
    if image is not None:
        figure.colorbar(image, ax=list(flat), label="|cosine| between layers' coefficients", shrink=0.8)
    figure.suptitle(title)
    figure.savefig(file, dpi=120)


def site_labels(sites: tuple) -> list[str]:
    """Short names for the sites of a bank: their paths without the parts that all of them share."""
    parts = [str(site).split("/") for site in sites]
    while len(parts) > 1 and all(len(p) > 1 and p[0] == parts[0][0] for p in parts):
        parts = [p[1:] for p in parts]
    while len(parts) > 1 and all(len(p) > 1 and p[-1] == parts[0][-1] for p in parts):
        parts = [p[:-1] for p in parts]
    return ["/".join(p) for p in parts]


def _axes(rows: int, columns: int, size: tuple[float, float]):
    # Without pyplot there is no window system to be found, and nothing global to close.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns)
