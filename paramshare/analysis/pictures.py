"""Pictures of a run: learning curves, and how alike the layers of each bank are."""

import pathlib
from collections.abc import Mapping, Sequence
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
        figure.colorbar(image, ax=list(flat), label="|cosine| between layers", shrink=0.8)
    figure.suptitle(title)
    figure.savefig(file, dpi=120)


def gradient_flow(runs: Mapping[str, list[dict[str, Any]]], file: str | pathlib.Path, *, title: str = "") -> None:
    """Draws the mean and the largest |gradient| of every bank over training as a PNG, a column a run.

    Args:
      runs: lines of `metrics.jsonl` by the run's label; of runs with `gradient_flow` on, their lines of kind "train" are drawn.
      file: the PNG to write.
      title: above the picture.
    """
    figure, axes = _axes(2, len(runs), (3.6 * len(runs) + 0.6, 6), sharex=True, sharey="row", squeeze=False)
    for column, (label, lines) in enumerate(runs.items()):
        train = [line for line in lines if line["kind"] == "train"]
        for row, what in enumerate(("mean", "max")):
            cell = axes[row, column]
            for number, name in enumerate(name for name in train[0] if name.startswith(f"gradient_{what}/")):
                cell.plot([line["step"] for line in train], [line[name] for line in train], color=f"C{number}", label=name.split("/", 1)[1])
            cell.set_yscale("log")
            cell.grid(alpha=0.3)
        axes[0, column].set_title(label, fontsize=9)
        axes[1, column].set_xlabel("step")
    axes[0, 0].set_ylabel("mean |gradient|")
    axes[1, 0].set_ylabel("largest |gradient|")
    axes[0, 0].legend(fontsize=8)
    figure.suptitle(title)
    figure.savefig(file, dpi=120)


def ring_curve(
    rings: Sequence[tuple[int, float]], levels: Mapping[str, Sequence[float]], file: str | pathlib.Path, *, title: str = ""
) -> None:
    """Draws test accuracy against ring size as a PNG, on a logarithmic axis.

    Args:
      rings: (numbers in the ring, accuracy) of single runs; the line goes through the means of equal sizes.
      levels: accuracies of single runs of other networks, by label: a horizontal line at each mean.
      file: the PNG to write.
      title: above the picture.
    """
    figure, axes = _axes(1, 1, (7, 4.5))
    axes = np.ravel(np.array(axes, dtype=object))[0]
    sizes = sorted({size for size, _ in rings})
    means = [float(np.mean([accuracy for size, accuracy in rings if size == at])) for at in sizes]
    axes.plot(*zip(*rings, strict=True), "o", color="C0", alpha=0.5, markersize=4)
    axes.plot(sizes, means, color="C0", label="one ring; dots are single runs")
    for number, (label, accuracies) in enumerate(levels.items(), start=1):
        axes.axhline(float(np.mean(accuracies)), color=f"C{number}", linestyle=":", label=f"{label}: {np.mean(accuracies):.2%}")
    axes.set(xscale="log", xlabel="numbers in the ring", ylabel="test accuracy", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=120)


def site_labels(sites: tuple) -> list[str]:
    """Short names for the sites of a bank: their paths without the parts that all of them share."""
    parts = [str(site).split("/") for site in sites]
    while len(parts) > 1 and all(len(p) > 1 and p[0] == parts[0][0] for p in parts):
        parts = [p[1:] for p in parts]
    while len(parts) > 1 and all(len(p) > 1 and p[-1] == parts[0][-1] for p in parts):
        parts = [p[:-1] for p in parts]
    return ["/".join(p) for p in parts]


def _axes(rows: int, columns: int, size: tuple[float, float], **options: Any):
    # Without pyplot there is no window system to be found, and nothing global to close.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, **options)
