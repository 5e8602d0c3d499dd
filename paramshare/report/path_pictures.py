"""Pictures for shortest paths: curves over seeds, predictions on grids, and generalisation."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from paramshare.report.pictures import blank, save

CELLS = {  # colours of a grid's cells
    "free": "#ffffff",
    "obstacle": "#3b3b3b",
    "path, found": "#4aa564",
    "path, missed": "#f2b134",
    "no path, but predicted": "#d1495b",
    "end": "#2155a3",
}


def interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """The mean and half the width of its confidence interval (Student's t); nan for one value.

    Example:
      >>> from paramshare.report.path_pictures import interval
      >>> mean, half = interval([1.0, 2.0, 3.0])
      >>> mean, round(half, 4)
      (2.0, 2.4841)
    """
    from scipy.stats import t  # installed with jax

    count = len(values)
    if count < 2:
        return float(np.mean(values)), float("nan")
    spread = np.std(values, ddof=1) / np.sqrt(count)
    return float(np.mean(values)), float(spread * t.ppf((1 + confidence) / 2, count - 1))


def curves(
    panels: Mapping[str, Mapping[str, Any]],
    file: str | pathlib.Path,
    *,
    xlabels: Sequence[str],
    ylabel: str = "F1",
    marks: Mapping[str, Sequence[float]] | None = None,
    title: str = "",
    floor: float = 0.0,
) -> None:
    """Draws means over seeds as curves, with bands of their confidence intervals.

    Args:
      panels: by title, the curves of each panel by label: `(x, values)`, x (n,) and values
        (seeds, n). Equal labels have the same colour in all panels.
      file: the PNG to write.
      xlabels: labels of the panels' x axes.
      ylabel: label of the y axis.
      marks: by panel title, the x of vertical lines (changes of phase).
      title: the picture's title.
      floor: lower end of the y axis.
    """
    figure, axes = blank(
        1, len(panels), (max(6.0, 5.2 * len(panels)), 4.2), squeeze=False, sharey=True
    )
    labels = list(dict.fromkeys(label for lines in panels.values() for label in lines))
    for axis, (name, lines), xlabel in zip(axes[0], panels.items(), xlabels, strict=True):
        for label, (x, values) in lines.items():
            pairs = np.array([interval(column) for column in np.asarray(values).T])
            mean, half = pairs[:, 0], np.nan_to_num(pairs[:, 1])
            colour = f"C{labels.index(label)}"
            axis.plot(x, mean, color=colour, label=label, linewidth=1.5)
            axis.fill_between(x, mean - half, mean + half, color=colour, alpha=0.18, linewidth=0)
        for x in (marks or {}).get(name, ()):
            axis.axvline(x, color="0.6", linewidth=0.8, linestyle=":")
        axis.set(xlabel=xlabel, title=name, ylim=(floor, 1.0))
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel(ylabel)
    axes[0][-1].legend(loc="lower right", fontsize=9)
    figure.suptitle(title)
    save(figure, file, dpi=110)


def grids(
    rows: Mapping[str, tuple[Any, Any]],
    predictions: Mapping[str, Sequence[Any]],
    file: str | pathlib.Path,
    *,
    title: str = "",
) -> None:
    """Draws grids and predictions: one row per problem, the target first, then the networks.

    Args:
      rows: by the problem's name, its image (H, W, 2) and target (H, W).
      predictions: by the network's name, one (H, W) bool per row.
      file: the PNG to write.
      title: the picture's title.
    """
    columns = 1 + len(predictions)
    figure, axes = blank(
        len(rows), columns, (2.1 * columns + 0.4, 2.2 * len(rows) + 0.9), squeeze=False
    )
    for number, (name, (image, target)) in enumerate(rows.items()):
        panels = {"shortest paths": target} | {
            label: cells[number] for label, cells in predictions.items()
        }
        for axis, (label, cells) in zip(axes[number], panels.items(), strict=True):
            axis.imshow(painted(image, target, cells), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            if number == 0:
                axis.set_title(label, fontsize=9)
        axes[number][0].set_ylabel(name, fontsize=9)
    handles = [_patch(colour, label) for label, colour in CELLS.items()]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=len(handles) if columns > 3 else 3,
        fontsize=8,
        frameon=False,
    )
    figure.suptitle(title)
    save(figure, file, dpi=110)


def painted(image_HxWx2: Any, target_HxW: Any, prediction_HxW: Any) -> np.ndarray:
    """A grid in the colours of `CELLS`, (H, W, 3) in [0, 1]."""
    arrays = (image_HxWx2, target_HxW, prediction_HxW)
    image, target, prediction = (np.asarray(array) > 0 for array in arrays)
    picture = np.full((*target.shape, 3), 1.0)
    for label, cells in (
        ("obstacle", image[..., 0]),
        ("path, found", target & prediction),
        ("path, missed", target & ~prediction),
        ("no path, but predicted", prediction & ~target),
        ("end", image[..., 1]),
    ):
        picture[cells] = [int(CELLS[label][i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return picture


def reach(
    panels: Mapping[str, Mapping[str, tuple[Sequence[Any], Any]]],
    file: str | pathlib.Path,
    *,
    xlabels: Sequence[str],
    ylabel: str,
    title: str = "",
) -> None:
    """Draws panels of lines with error bars over seeds.

    Args:
      panels: by title, the lines of each panel by label: `(x, values)`, x (n,) numbers or names,
        values (seeds, n). Values of nan are left out.
      file: the PNG to write.
      xlabels: labels of the panels' x axes.
      ylabel: label of the y axis.
      title: the picture's title.
    """
    figure, axes = blank(1, len(panels), (4.4 * len(panels), 4.6), squeeze=False, sharey=True)
    for axis, (name, lines), xlabel in zip(axes[0], panels.items(), xlabels, strict=True):
        names = list(dict.fromkeys(x for line in lines.values() for x in line[0]))
        for label, (x, values) in lines.items():
            columns = (
                [v for v in column if not np.isnan(v)] or [np.nan]
                for column in np.asarray(values, float).T
            )
            pairs = np.array([interval(column) for column in columns]).reshape(
                -1, 2
            )  # also without points
            places = [names.index(value) for value in x]
            axis.errorbar(
                places,
                pairs[:, 0],
                yerr=np.nan_to_num(pairs[:, 1]),
                marker="o",
                markersize=4,
                capsize=2,
                label=label,
            )
        axis.set(
            xlabel=xlabel,
            title=name,
            ylim=(0.0, 1.02),
            xticks=range(len(names)),
            xticklabels=list(map(str, names)),
        )
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel(ylabel)
    if len({tuple(lines) for lines in panels.values()}) == 1:
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    else:
        for axis in axes[0]:
            axis.legend(fontsize=8, loc="lower left")
    figure.suptitle(title)
    save(figure, file, dpi=110)


def _patch(colour: str, label: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(facecolor=colour, edgecolor="0.5", linewidth=0.5, label=label)
