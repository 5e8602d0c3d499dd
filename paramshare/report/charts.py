"""Line charts as inline SVG, and the colours of heat maps. Nothing is written to disk."""

import dataclasses
import functools
import io
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

import numpy as np
from markupsafe import Markup
from matplotlib import colormaps, rc_context
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from paramshare.report.pictures import literal_texts

LINES = ("#2f7fc1", "#e07b18", "#2f9e58", "#c2459a", "#8b6cc9", "#b59b00")
GRAY = "#808a94"  # readable on white and on near-black
SIZE = (4.6, 2.8)  # inches; the page scales it
STEPS = (1, 2, 2.5, 5, 10)  # between ticks, times a power of ten
POINTS_WITH_MARKERS = 2  # a line of one or two points is hard to see without markers
XLINK = "{http://www.w3.org/1999/xlink}href"

Lines = Mapping[str, Sequence[tuple[float, float]]]


@dataclasses.dataclass(frozen=True)
class Key:
    """One entry of a chart's legend: a label, its colour, and whether the line is dotted."""

    label: str
    colour: str
    dotted: bool = False


@dataclasses.dataclass(frozen=True)
class Chart:
    """A line chart for the page.

    The title and the legend are text of the page, so that they wrap, follow the page's colours and
    are escaped with everything else. The SVG holds lines, ticks and the axis label only.

    Attributes:
      title: shown above the chart.
      svg: an `<svg>` element; "" if there is nothing to draw.
      keys: the legend.
    """

    title: str
    svg: Markup
    keys: tuple[Key, ...]


def line_chart(
    series: Mapping[str, Sequence[tuple[Any, Any]]],
    *,
    name: str,
    title: str,
    x_label: str = "epoch",
    log: bool = False,
    whole: bool = False,
    tick: Callable[[float], str] = "{:,.10g}".format,
    levels: Mapping[str, float] | None = None,
) -> Chart:
    """Draws lines through points (x, y). Equal arguments give equal text.

    Args:
      series: points by label. Points that are not finite numbers, or not above 0 on a logarithmic
        axis, are left out.
      name: unique in the page; the SVG's ids depend on it.
      title: shown above the chart.
      x_label: shown below the x axis.
      log: makes the y axis logarithmic.
      whole: y is a count; its ticks are whole numbers.
      tick: writes the value of a tick of the y axis.
      levels: dotted horizontal lines, by label.
    """
    lines = {
        label: sorted((x, y) for x, y in points if _drawable(x) and _drawable(y, log))
        for label, points in series.items()
    }
    lines = {label: points for label, points in lines.items() if points}
    if not lines:
        return Chart(title, Markup(""), ())
    dotted = {label: y for label, y in (levels or {}).items() if _drawable(y, log)}

    # Text stays text: smaller than outlines, and the page's style sets its font and colour.
    with rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": name, "font.sans-serif": ["DejaVu Sans"]}
    ):
        figure = Figure(figsize=SIZE, layout="constrained")
        keys = _plot(figure.subplots(), lines, dotted)
        _style(figure.axes[0], lines, x_label=x_label, log=log, whole=whole, tick=tick)
        return Chart(title, _inline_svg(figure, f"{title} by {x_label}"), keys)


def _plot(axes: Any, lines: Lines, dotted: Mapping[str, float]) -> tuple[Key, ...]:
    colours, keys = itertools.cycle(LINES), []
    for label, points in lines.items():
        keys.append(Key(label, next(colours)))
        marker = "o" if len(points) <= POINTS_WITH_MARKERS else None
        axes.plot(*zip(*points, strict=True), color=keys[-1].colour, marker=marker, markersize=4)
    for label, y in dotted.items():
        keys.append(Key(label, next(colours), dotted=True))
        axes.axhline(y, color=keys[-1].colour, linestyle=":")
    return tuple(keys)


def _style(
    axes: Any,
    lines: Lines,
    *,
    x_label: str,
    log: bool,
    whole: bool,
    tick: Callable[[float], str],
) -> None:
    if log:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        few_decades = math.log10(high / low) < 2.5
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few_decades else (1,)))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=STEPS, integer=whole, min_n_ticks=1))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: tick(y)))
    xs = [x for points in lines.values() for x, _ in points]
    if min(xs) == max(xs):
        axes.set_xlim(xs[0] - 0.5, xs[0] + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=STEPS, integer=True, min_n_ticks=1))
    axes.set_xlabel(x_label, color=GRAY, fontsize=10.5)
    axes.tick_params(colors=GRAY, labelsize=10.5)
    axes.grid(color=GRAY, alpha=0.25)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(GRAY)


def hundredths(matrix_LxL: Any) -> np.ndarray:
    """Values in [0, 1] as whole hundredths; 0 where a value is not finite.

    Example:
      >>> from paramshare.report.charts import hundredths
      >>> hundredths([[1.0, 0.256], [float("nan"), 1.2]]).tolist()
      [[100, 26], [0, 100]]
    """
    finite_LxL = np.nan_to_num(matrix_LxL, nan=0, posinf=0, neginf=0)
    return np.round(100 * np.clip(finite_LxL, 0, 1)).astype(int)


@functools.cache
def heat_colours() -> tuple[str, ...]:
    """The colours of 0 to 100 hundredths, from dark violet to yellow (matplotlib's viridis)."""
    return tuple(to_hex(colormaps["viridis"](value / 100)) for value in range(101))


def _inline_svg(figure: Figure, label: str) -> Markup:
    """The figure as an `<svg>` element for an HTML page."""
    file = io.StringIO()
    literal_texts(figure)
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(file.getvalue())
    for parent in list(root.iter()):
        parent.tag = parent.tag.rpartition("}")[2]  # HTML needs no namespaces
        if XLINK in parent.attrib:
            parent.set("href", parent.attrib.pop(XLINK))
        # Groups are numbered alike in every figure, and nothing refers to them. The other ids are
        # hashes, salted with the chart's name.
        if parent.tag == "g":
            parent.attrib.pop("id", None)
        for child in list(parent):
            # Inside HTML, matplotlib's style sheet ("*{...}") would hold for the whole page.
            if child.tag.endswith(("metadata", "style")):
                parent.remove(child)
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": label}
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _drawable(value: Any, log: bool = False) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and (value > 0 or not log)
