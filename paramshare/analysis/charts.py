"""Charts as inline SVG: lines over epochs, and heat maps that a slider can move through time. From numbers to text alone."""

import functools
import html
import math
from collections.abc import Mapping, Sequence

import numpy as np

WIDTH, HEIGHT = 420, 250
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 36  # room around the plot
COLOURS = 6  # classes c0 .. c5 of the page's style
CELL = 22  # side of a heat map's cell
NUMBERED = 12  # layers up to which a heat map's cells carry their numbers
POINTED = 40  # layers up to which its cells tell their layers under the pointer
VIRIDIS = ("440154", "482878", "3e4a89", "31688e", "26828e", "1f9e89", "35b779", "6ece58", "b5de2b", "fde725")


def line_chart(
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    title: str,
    x_label: str = "epoch",
    log: bool = False,
    percent: bool = False,
    whole: bool = False,
    levels: Mapping[str, float] | None = None,
) -> str:
    """A figure of lines through points (x, y), with a legend.

    Args:
      series: points by label; those that are not finite, or not above 0 on a logarithmic axis, are left out.
      title: above the figure.
      x_label: below it.
      log: whether the y axis is logarithmic.
      percent: whether y is a share, to be written in percent.
      whole: whether y counts something.
      levels: dotted horizontal lines by label.

    Returns:
      An HTML `figure`; without any point a line that says so.
    """
    shown = {label: [(x, y) for x, y in points if _drawable(x, log=False) and _drawable(y, log)] for label, points in series.items()}
    shown = {label: sorted(points) for label, points in shown.items() if points}
    straight = {label: y for label, y in (levels or {}).items() if _drawable(y, log)}
    if not shown:
        return f"<figure><figcaption>{html.escape(title)}</figcaption><p>nothing to draw</p></figure>"
    xs = [x for points in shown.values() for x, _ in points]
    ys = [y for points in shown.values() for _, y in points] + list(straight.values())
    x_low, x_high = min(xs), max(xs)
    y_ticks = _log_ticks(min(ys), max(ys)) if log else _ticks(min(ys), max(ys), whole=whole)
    y_low, y_high = min(*ys, *y_ticks), max(*ys, *y_ticks)
    height = math.log if log else float

    def across(x: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * ((x - x_low) / (x_high - x_low) if x_high > x_low else 0.5)

    def up(y: float) -> float:
        low, high = height(y_low), height(y_high)
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * ((height(y) - low) / (high - low) if high > low else 0.5)

    parts = []
    for y in y_ticks:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{up(y):.1f}" y2="{up(y):.1f}"/>')
        parts.append(
            f'<text x="{LEFT - 6}" y="{up(y) + 4:.1f}" text-anchor="end">{_number(100 * y) + "%" if percent else _number(y)}</text>'
        )
    for x in [tick for tick in _ticks(x_low, x_high, whole=True) if x_low <= tick <= x_high]:
        parts.append(f'<text x="{across(x):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{x:g}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">{html.escape(x_label)}</text>')
    keys = []
    for number, (label, points) in enumerate(shown.items()):
        colour = f"c{number % COLOURS}"
        if len(points) < 3:
            parts += [f'<circle class="{colour}" cx="{across(x):.1f}" cy="{up(y):.1f}" r="3"/>' for x, y in points]
        path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in points)
        parts.append(f'<polyline class="{colour}" points="{path}"/>')
        keys.append(f'<li class="{colour}">{html.escape(label)}</li>')
    for number, (label, y) in enumerate(straight.items(), start=len(shown)):
        colour = f"c{number % COLOURS}"
        parts.append(f'<line class="level {colour}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{up(y):.1f}" y2="{up(y):.1f}"/>')
        keys.append(f'<li class="level {colour}">{html.escape(label)}</li>')
    return (
        f'<figure class="chart"><figcaption>{html.escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)} by {html.escape(x_label)}">{"".join(parts)}</svg>'
        f'<ul class="keys">{"".join(keys)}</ul></figure>'
    )


def heat_map(matrix_LxL: np.ndarray, labels: Sequence[str], caption: str) -> str:
    """A figure of an (L, L) matrix with values in [0, 1]: one square a pair of layers, in reading order.

    Args:
      matrix_LxL: symmetrical; what is not finite shows as 0.
      labels: the layers' names.
      caption: HTML.

    Returns:
      An HTML `figure` of class "map".
    """
    values_LxL = hundredths(matrix_LxL)
    room = 8 + 6.2 * max(map(len, labels), default=0)
    side = room + CELL * len(labels) + 2
    parts = []
    for i, label in enumerate(labels):
        middle = room + CELL * (i + 0.5)
        parts.append(f'<text x="{room - 5:.1f}" y="{middle + 3.5:.1f}" text-anchor="end">{html.escape(label)}</text>')
        parts.append(f'<text transform="translate({middle + 3.5:.1f} {room - 5:.1f}) rotate(-90)">{html.escape(label)}</text>')
    names = list(labels)
    for (i, j), value in np.ndenumerate(values_LxL):
        x, y = room + CELL * j, room + CELL * i
        told = f"<title>{html.escape(names[i])}, {html.escape(names[j])}</title>" if len(labels) <= POINTED else ""
        parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{CELL}" height="{CELL}" fill="{colour(value)}">{told}</rect>')
    if len(labels) <= NUMBERED:
        for (i, j), value in np.ndenumerate(values_LxL):
            x, y = room + CELL * (j + 0.5), room + CELL * (i + 0.5) + 3
            parts.append(f'<text class="n {_ink(value)}" x="{x:.1f}" y="{y:.1f}">{_short(value)}</text>')
    return (
        f'<figure class="map"><figcaption>{caption}</figcaption>'
        f'<svg viewBox="0 0 {side:.0f} {side:.0f}" style="max-width:{1.5 * side:.0f}px" role="img" aria-label="similarity of layers">'
        f"{''.join(parts)}</svg></figure>"
    )


def hundredths(matrix_LxL: np.ndarray) -> np.ndarray:
    """Values in [0, 1] as whole hundredths; 0 for what is not finite."""
    return np.round(100 * np.clip(np.nan_to_num(matrix_LxL, nan=0, posinf=0, neginf=0), 0, 1)).astype(int)


@functools.cache
def colour(value: int) -> str:
    """Of 0 .. 100 hundredths, between the stops of `VIRIDIS`."""
    place = value / 100 * (len(VIRIDIS) - 1)
    low = min(int(place), len(VIRIDIS) - 2)
    a, b = (np.array([int(VIRIDIS[i][k : k + 2], 16) for k in (0, 2, 4)]) for i in (low, low + 1))
    return "#" + "".join(f"{int(part):02x}" for part in np.floor(a + (b - a) * (place - low) + 0.5))


def _ink(value: int) -> str:
    return "dark" if value > 60 else "light"


def _short(value: int) -> str:
    return "1" if value == 100 else f".{value:02d}"


def _number(value: float) -> str:
    return f"{value:g}".replace("e+0", "e").replace("e-0", "e-").replace("e+", "e")


def _drawable(value: float, log: bool) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and (value > 0 or not log)


def _ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """About five round numbers, two at least, from at or below `low` to at or above `high`."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 5))
    step = next(power * m for m in (1, 2, 5, 10) if span / (power * m) <= 6)
    step = max(step, 1.0) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 times powers of ten that enclose both, fewer where that would be more than eight."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for factors in ((1, 2, 5), (1,)):
        marks = [float(f"{m}e{p}") for p in range(first, last + 1) for m in factors]
        below, above = [m for m in marks if m <= low][-1:], [m for m in marks if m >= high][:1]
        marks = [*below, *(m for m in marks if low < m < high), *above]
        if len(marks) <= 8:
            return marks
    return marks[:: -(-len(marks) // 8)]
