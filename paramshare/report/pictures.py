"""Pictures of a run as PNG files: learning curves and the similarity of layers."""

import io
import pathlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from paramshare.measure.snapshots import THRESHOLDS, Snapshot, near_pairs, spread
from paramshare.storage import run_path, write_bytes
from paramshare.tasks import Measure


def learning_curves(
    lines: Sequence[Mapping[str, Any]],
    file: str | pathlib.Path,
    *,
    score: Measure,
    title: str = "",
    test: Mapping[str, float] | None = None,
) -> None:
    """Draws the loss and the score by epoch.

    Args:
      lines: lines of `metrics.jsonl`; those of kind "epoch" are drawn.
      file: the PNG to write.
      score: score of the run's task.
      title: the picture's title.
      test: test scores by label, drawn as horizontal lines.
    """
    figure, (left, right) = blank(1, 2, (10, 4))
    epochs = [line for line in lines if line["kind"] == "epoch"]
    marker = "o" if len(epochs) < 3 else None
    for axes, name, heading in ((left, "loss", "loss"), (right, score.name, score.title)):
        for number, (label, key) in enumerate(
            (("training", name), ("validation", f"validation_{name}"))
        ):
            points = [(line["epoch"], line[key]) for line in epochs if key in line]
            if points:
                x, y = zip(*points, strict=True)
                axes.plot(x, y, color=f"C{number}", marker=marker, label=label)
        axes.set_xlabel("epoch")
        axes.set_title(heading)
        axes.grid(alpha=0.3)
    left.set_yscale("log")
    for number, (label, value) in enumerate((test or {}).items(), start=2):
        text = f"test, {label}: {score.format(value)}"
        right.axhline(value, color=f"C{number}", linestyle=":", label=text)
    if right.get_legend_handles_labels()[0]:
        right.legend(loc="lower right")
    figure.suptitle(title)
    save(figure, file)


def similarity_maps(
    matrices: Mapping[str, Any],
    file: str | pathlib.Path,
    *,
    labels: Mapping[str, list[str]] | None = None,
    title: str = "",
) -> None:
    """Draws the layer similarity matrix of every bank as a heat map.

    Args:
      matrices: `{bank: (L, L)}`, as `paramshare.similarity` returns them.
      file: the PNG to write.
      labels: short names of each bank's layers.
      title: the picture's title.
    """
    columns = min(3, len(matrices))
    rows = -(-len(matrices) // columns)
    figure, axes = blank(rows, columns, (4.2 * columns + 0.8, 3.9 * rows + 0.6))
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
                cell.text(
                    j,
                    i,
                    f"{value:.2f}",
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="black" if value > 0.6 else "white",
                )
    for cell in flat[len(matrices) :]:
        cell.axis("off")
    if image is not None:
        figure.colorbar(image, ax=list(flat), label="|cosine| between layers", shrink=0.8)
    figure.suptitle(title)
    save(figure, file)


def similarity_over_training(
    snapshots: Sequence[Snapshot],
    file: str | pathlib.Path,
    *,
    thresholds: Sequence[float] = THRESHOLDS,
    title: str = "",
) -> None:
    """Draws the similarity of layers over training, one row per bank.

    A row has heat maps of up to six epochs, and a chart of the number of similar pairs of layers.

    Args:
      snapshots: one or more, in order; the banks of the last one are drawn.
      file: the PNG to write.
      thresholds: similarities at which pairs are counted, one line each.
      title: the picture's title.
    """
    banks, shown = list(snapshots[-1].matrices), spread(list(snapshots), 6)
    figure, axes = blank(
        len(banks),
        len(shown) + 1,
        (1.9 * len(shown) + 4.2, 2.0 * len(banks) + 0.9),
        squeeze=False,
        width_ratios=[*(1 for _ in shown), 1.6],
    )
    image = None
    for row, bank in enumerate(banks):
        for column, snapshot in enumerate(shown):
            cell = axes[row, column]
            cell.set_xticks([])
            cell.set_yticks([])
            if row == 0:
                cell.set_title(f"epoch {snapshot.epoch}", fontsize=10)
            if column == 0:
                cell.set_ylabel(bank, fontsize=10 if max(map(len, banks)) < 14 else 7)
            if bank in snapshot.matrices:
                image = cell.imshow(snapshot.matrices[bank], vmin=0, vmax=1, cmap="viridis")
        near, marker = axes[row, -1], "o" if len(snapshots) < 3 else None
        for threshold in thresholds:
            counts = [
                (snapshot.epoch, near_pairs(snapshot.matrices[bank], threshold))
                for snapshot in snapshots
                if bank in snapshot.matrices
            ]
            near.plot(*zip(*counts, strict=True), marker=marker, label=f"\u2265 {threshold:g}")
        size = len(snapshots[-1].matrices[bank])
        near.set_ylim(-0.04 * size * (size - 1) / 2, 1.04 * size * (size - 1) / 2)
        near.grid(alpha=0.3)
        near.xaxis.get_major_locator().set_params(integer=True)
        near.yaxis.get_major_locator().set_params(integer=True)
        near.yaxis.set_label_position("right")
        near.set_ylabel(f"of {size * (size - 1) // 2} pairs", fontsize=8)
        near.tick_params(labelsize=8)
    axes[0, -1].set_title("pairs of similar layers", fontsize=10)
    axes[0, -1].legend(fontsize=7)
    axes[-1, -1].set_xlabel("epoch", fontsize=8)
    if image is not None:
        figure.colorbar(image, ax=axes[:, -1].tolist(), label="|cosine| between layers", shrink=0.9)
    figure.suptitle(title)
    save(figure, file)


def gradient_flow(
    runs: Mapping[str, list[dict[str, Any]]], file: str | pathlib.Path, *, title: str = ""
) -> None:
    """Draws the mean and the largest |gradient| of every bank over training, one column per run.

    Args:
      runs: the lines of `metrics.jsonl` by the run's label. The runs must have been trained with
        `gradient_flow`; their lines of kind "train" are drawn.
      file: the PNG to write.
      title: the picture's title.
    """
    figure, axes = blank(
        2, len(runs), (3.6 * len(runs) + 0.6, 6), sharex=True, sharey="row", squeeze=False
    )
    for column, (label, lines) in enumerate(runs.items()):
        train = [line for line in lines if line["kind"] == "train"]
        for row, what in enumerate(("mean", "max")):
            cell = axes[row, column]
            for number, name in enumerate(
                name for name in train[0] if name.startswith(f"gradient_{what}/")
            ):
                points = [line for line in train if name in line]
                cell.plot(
                    [line["step"] for line in points],
                    [line[name] for line in points],
                    color=f"C{number}",
                    label=name.split("/", 1)[1],
                )
            cell.set_yscale("log")
            cell.grid(alpha=0.3)
        axes[0, column].set_title(label, fontsize=9)
        axes[1, column].set_xlabel("step")
    axes[0, 0].set_ylabel("mean |gradient|")
    axes[1, 0].set_ylabel("largest |gradient|")
    axes[0, 0].legend(fontsize=8)
    figure.suptitle(title)
    save(figure, file)


def ring_curve(
    rings: Sequence[tuple[int, float]],
    levels: Mapping[str, Sequence[float]],
    file: str | pathlib.Path,
    *,
    score: str = "score",
    title: str = "",
) -> None:
    """Draws the test score against the size of the ring, on a logarithmic axis.

    Args:
      rings: (parameters in the ring, score) of each run; a line connects the mean scores.
      levels: scores of each run of other networks, by label; a horizontal line marks each mean.
      file: the PNG to write.
      score: its title.
      title: the picture's title.
    """
    figure, axes = blank(1, 1, (7, 4.5))
    sizes = sorted({size for size, _ in rings})
    means = [float(np.mean([value for size, value in rings if size == at])) for at in sizes]
    axes.plot(*zip(*rings, strict=True), "o", color="C0", alpha=0.5, markersize=4)
    axes.plot(sizes, means, color="C0", label="one ring, mean; dots are single runs")
    for number, (label, values) in enumerate(levels.items(), start=1):
        axes.axhline(
            float(np.mean(values)),
            color=f"C{number}",
            linestyle=":",
            label=f"{label}: {np.mean(values):.2%}",
        )
    axes.set(xscale="log", xlabel="parameters in the ring", ylabel=f"test {score}", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, file)


def conversion_curve(
    converted: Sequence[tuple[int, float, float]],
    dense: Sequence[float],
    file: str | pathlib.Path,
    *,
    score: str = "score",
    title: str = "",
) -> None:
    """Draws the test score of a converted dense network against the number of templates.

    Args:
      converted: (templates, score after conversion, score after fine-tuning) of each run; lines
        connect the means.
      dense: scores of the dense network after the same fine-tuning; a horizontal line marks the
        mean.
      file: the PNG to write.
      score: its title.
      title: the picture's title.
    """
    figure, axes = blank(1, 1, (7, 4.5))
    counts = sorted({k for k, _, _ in converted})
    for number, (what, label) in enumerate(
        ((2, "converted, after one more epoch"), (1, "converted, without training"))
    ):
        axes.plot(
            [run[0] for run in converted],
            [run[what] for run in converted],
            "o",
            color=f"C{number}",
            alpha=0.5,
            markersize=4,
        )
        means = [float(np.mean([run[what] for run in converted if run[0] == k])) for k in counts]
        axes.plot(counts, means, color=f"C{number}", label=f"{label}; dots are single runs")
    axes.axhline(
        float(np.mean(dense)),
        color="C2",
        linestyle=":",
        label=f"dense, after one more epoch: {np.mean(dense):.2%}",
    )
    axes.set(xlabel="number of templates", ylabel=f"test {score}", title=title, xticks=counts)
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, file)


def compress_curve(
    curves: Mapping[str, Sequence[tuple[float, float, float]]],
    file: str | pathlib.Path,
    *,
    score: str = "score",
    title: str = "",
) -> None:
    """Draws test scores against bytes on disk, on a logarithmic axis, with intervals.

    Args:
      curves: by label, the points of a line: (bytes, mean score, half the interval or nan).
      file: the PNG to write.
      score: its title.
      title: the picture's title.
    """
    figure, axes = blank(1, 1, (7, 4.5))
    for number, (label, points) in enumerate(curves.items()):
        sizes, means, halves = (np.array(column, float) for column in zip(*points, strict=True))
        halves = np.nan_to_num(halves)
        axes.errorbar(sizes, means, halves, fmt="o-", color=f"C{number}", capsize=3, label=label)
    axes.set(xscale="log", xlabel="bytes of the packed file", ylabel=f"test {score}", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, file)


def site_labels(sites: Sequence[Any]) -> list[str]:
    """Short names of a bank's sites: their paths without the first and last parts they share."""
    parts = [str(site).split("/") for site in sites]
    while len(parts) > 1 and all(len(p) > 1 and p[0] == parts[0][0] for p in parts):
        parts = [p[1:] for p in parts]
    while len(parts) > 1 and all(len(p) > 1 and p[-1] == parts[0][-1] for p in parts):
        parts = [p[:-1] for p in parts]
    return ["/".join(p) for p in parts]


def blank(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Any, Any]:
    """An empty figure of this size in inches, and its axes as `Figure.subplots` returns them."""
    # Without pyplot, no window system is needed and no global state has to be closed.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, **options)


def literal_texts(figure: Any) -> None:
    """Shows the figure's texts as they are: names may hold what looks like TeX, such as "$x"."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        # Labels of ticks are written when the figure is drawn; those of logarithmic axes are TeX.
        if text.get_text() and not text.get_text().startswith("$\\mathdefault"):
            text.set_parse_math(False)


def save(figure: Any, file: str | pathlib.Path, dpi: int = 120) -> None:
    """Writes a figure as a PNG, completely or not at all; `StorageError` if it cannot be."""
    content = io.BytesIO()
    literal_texts(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a name may have characters of other fonts
        figure.savefig(content, format="png", dpi=dpi)
    write_bytes(run_path(file), content.getvalue())
