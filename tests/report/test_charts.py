"""Charts draw every usable point, name their ticks apart, and share no id."""

import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from paramshare.report.charts import LINES, heat_colours, hundredths, line_chart


def lines(chart) -> list[np.ndarray]:
    """The vertices of the drawn curves, (n, 2), in the order of the legend; y grows downwards."""
    drawn = {}
    for element in ElementTree.fromstring(chart.svg).iter("path"):
        style = element.get("style", "")
        colour = next((key.colour for key in chart.keys if f"stroke: {key.colour}" in style), None)
        if colour and "clip-path" in element.attrib:
            vertices = re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", element.get("d", ""))
            drawn[colour] = np.array(vertices, float)
    return [drawn[key.colour] for key in chart.keys]


def ticks(chart) -> list[str]:
    """The texts of both axes."""
    return [text.text or "" for text in ElementTree.fromstring(chart.svg).iter("text")]


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, 0.0, "x", None, True])
def test_values_that_cannot_be_drawn_are_left_out(value):
    chart = line_chart({"a": [(1, value), (2, 3.0), (3, 4.0)]}, name="a", title="t", log=True)
    assert lines(chart)[0].shape == (2, 2)
    nothing = line_chart({"a": [(1, math.nan)]}, name="a", title="t", levels={"b": 1.0})
    assert not nothing.svg and not nothing.keys


@pytest.mark.parametrize(
    ("log", "ys"),
    [
        (False, [0.0, 0.0]),
        (False, [1e-9, 3e7]),
        (True, [2e-9, 3e7]),
        (True, [2.1, 2.4]),
        (False, [5.0]),
        (True, [5.0]),
    ],
)
def test_points_lie_inside_and_ticks_are_distinct(log, ys):
    chart = line_chart({"a": list(enumerate(ys))}, name="a", title="t", log=log)
    *_, width, height = map(float, re.findall(r'viewBox="([^"]*)"', chart.svg)[0].split())
    points = lines(chart)[0]
    assert len(points) == len(ys) and np.all(points > 0) and np.all(points < (width, height))
    texts = ticks(chart)
    across, up = texts[: texts.index("epoch")], texts[texts.index("epoch") + 1 :]
    assert len(set(across)) == len(across) >= 1 and 2 <= len(set(up)) == len(up) <= 9
    assert not any("." in text for text in across)  # epochs are whole


@pytest.mark.parametrize("high", [4, 21_000, 2.5e6])
def test_ticks_of_counts_are_whole(high):
    texts = ticks(line_chart({"a": [(0, 3), (1, high)]}, name="a", title="t", whole=True))
    values = [int(text.replace(",", "")) for text in texts[texts.index("epoch") + 1 :]]
    assert values == sorted(set(values)) and len(values) >= 2


def test_ticks_are_written_as_asked():
    chart = line_chart({"a": [(0, 0.2), (1, 0.9)]}, name="a", title="t", tick="{:.0%}".format)
    assert "40%" in ticks(chart)


def test_higher_is_up_and_in_proportion():
    series = {"a": [(2, 10.0), (0, 0.0), (1, 5.0)], "b": [(0, 1.0), (2, 10.0)]}
    chart = line_chart(series, name="a", title="t", levels={"c": 5.0})
    (x, y), other, level = lines(chart)[0].T, lines(chart)[1], lines(chart)[2]
    assert x[0] < x[1] < x[2] and y[0] > y[1] > y[2]
    # Six decimals are written.
    np.testing.assert_allclose((x[1] - x[0], y[1] - y[0]), (x[2] - x[1], y[2] - y[1]), atol=1e-5)
    np.testing.assert_allclose(other[1], (x[2], y[2]), atol=1e-5)
    np.testing.assert_allclose(level[:, 1], y[1], atol=1e-5)
    assert [(key.label, key.colour, key.dotted) for key in chart.keys] == [
        ("a", LINES[0], False),
        ("b", LINES[1], False),
        ("c", LINES[2], True),
    ]


def test_equal_charts_are_equal_and_share_no_id():
    series = {"a": [(1, 2.0), (2, 3.0)]}
    first, again, other = (line_chart(series, name=name, title="t") for name in ("a", "a", "b"))
    assert first == again
    ids = [re.findall(r' id="([^"]*)"', chart.svg) for chart in (first, other)]
    assert ids[0] and len({*ids[0], *ids[1]}) == len(ids[0]) + len(ids[1])
    references = re.findall(r'(?:href="#|url\(#)([^")]*)', first.svg)
    assert references and set(references) <= set(ids[0])


def test_labels_stay_out_of_the_svg():
    """matplotlib would read "$" as mathematics; the page writes title and legend."""
    bad = "$\\frac{</svg><script>"
    chart = line_chart({bad: [(1, 1.0)]}, name="a", title=bad, levels={bad: 2.0})
    assert "<script" not in chart.svg and chart.title == bad
    root = ElementTree.fromstring(chart.svg)
    assert root.get("aria-label") == f"{bad} by epoch" and "style" not in {
        element.tag for element in root.iter()
    }


def test_colours_of_heat_maps():
    assert heat_colours()[0] == "#440154" and heat_colours()[100] == "#fde725"  # viridis
    assert len(set(heat_colours())) == 101
    values = hundredths(np.array([[1, math.nan], [-math.inf, math.inf]]))
    assert values.tolist() == [[100, 0], [0, 0]]
