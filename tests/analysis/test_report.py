"""The report is a whole page that needs nothing but itself, and tells what the run left."""

import html.parser
import json
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paramshare import Plan, Rule, Soft, create_model, fold, share
from paramshare.analysis.charts import VIRIDIS, colour, heat_map, line_chart
from paramshare.analysis.cost import cost
from paramshare.analysis.report import Record, html_report
from paramshare.analysis.report_similarity import MOST_SNAPSHOTS
from paramshare.analysis.snapshots import THRESHOLDS, Snapshot, make_snapshot
from paramshare.models import WideResNet

SHAPE = (8, 8, 3)
VOID = {"meta", "input", "br", "hr", "img", "link"}
CONFIG = {"model": {"name": "swrn-16-1-2"}, "data": {"name": "digits", "path": None}, "epochs": 3, "schedule": {"milestones": [1, 2]}}
RESULT = {
    "epochs": 3,
    "steps": 60,
    "devices": "1 x cpu",
    "seconds": 12.0,
    "images_per_second": 345.6,
    "counts": {"banks": 2, "coefficients": 3, "private": 4, "trainable": 123_456},
    "last": {"epoch": 3, "test": {"accuracy": 0.8765, "count": 200.0}},
    "selected": {"epoch": 2, "validation_accuracy": 0.5, "test": {"accuracy": 0.8642, "count": 200.0}},
}


class Page(html.parser.HTMLParser):
    """Sees that every tag is closed in its turn; keeps the tags, their attributes, and the text outside of scripts and styles."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.scripts, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):  # inside SVG
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif not self.open or self.open[-1] != "style":
            self.text += data

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def record() -> Record:
    """Of a network that was never trained: its lines are made up, its banks are real, and stage 2 folds."""
    shared: Any = create_model("swrn-16-1-2", input_shape=SHAPE)
    banks, coefficients = shared.layout.init(jax.random.key(0))
    variables = {"banks": banks, "params": {"coefficients": coefficients | {"stage2": jnp.array([[1.0, 2.0], [-2.0, -4.0]])}}}
    snapshot: Any = make_snapshot(shared)
    matrices = {name: np.array(rows) for name, rows in snapshot(variables).items()}
    lines = [{"kind": "epoch", "step": i, "epoch": i, "loss": 1 / i, "accuracy": i / 4, "validation_accuracy": i / 5} for i in (1, 2, 3)]
    past = [Snapshot(i, 20 * i, {name: i / 3 * matrix for name, matrix in matrices.items()}) for i in range(4)]
    return Record(
        CONFIG,
        lines,
        RESULT,
        shared.layout,
        cost(shared, SHAPE),
        past,
        past[-1],
        [fold(shared, variables, threshold=t) for t in THRESHOLDS],
    )


@pytest.fixture(scope="module")
def text(record) -> str:
    return html_report(record)


def sections(page: Page) -> list[str]:
    wanted = ("Learning curves", "Similarity of layers", "Who shares what", "Cost", "Folding", "Sharing")
    return sorted((title for title in wanted if title in page.text), key=page.text.index)


def test_the_page_is_whole_and_tells_the_result(record, text):
    page = Page(text)
    assert sections(page) == ["Learning curves", "Similarity of layers", "Who shares what", "Cost", "Folding"]
    for told in ("swrn-16-1-2 on digits", "87.65%", "86.42%", "123,456", "346", "12 s", "schedule.milestones", "1, 2"):
        assert told in page.text, told
    assert f"{record.cost.use:,}" in page.text and f"{record.cost.bytes:,}" in page.text
    for bank in record.layout.banks:
        assert page.text.count(bank.name) >= 4 and str(bank.scheme) in page.text
        assert all(str(site) in page.text for site in bank.sites)
    assert len(page.all("details")) == 1 + 3 + 1 + len(THRESHOLDS)


def test_nothing_is_fetched(text):
    """No address anywhere, and no attribute or style that takes one; the browser is told to fetch nothing."""
    page = Page(text)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", text)
    assert not [a for _, a in page.tags if {"src", "href", "srcset", "data", "action"} & set(a)]
    policy = [a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy and "default-src 'none'" in policy[0]


def test_folding_tells_groups_period_error_and_savings(record, text):
    page = Page(text)
    stage2 = next(bank for bank in record.foldings[-1].banks if bank.name == "stage2")
    assert stage2.groups == (0, 0) and stage2.period == 1 and not stage2.note  # as it was made
    for told in (f"{stage2.kernel_error:.1e}", f"{stage2.before:,}", f"{stage2.after:,}", f"{record.foldings[-1].saved:,}"):
        assert told in page.text
    assert [a["style"] for a in page.all("span") if a.get("class") == "chip"][:2]


def test_the_slider_has_every_snapshot_and_the_last_one_stands_without_it(record, text):
    page = Page(text)
    data = json.loads(page.scripts[0])
    assert data["epochs"] == [0, 1, 2, 3] and data["colours"][0] == "#" + VIRIDIS[0] and data["colours"][100] == "#" + VIRIDIS[-1]
    matrices = [np.array(snapshot.matrices["stage2"]) for snapshot in record.snapshots]
    assert data["maps"][1] == [np.round(100 * m[[0, 0, 1], [0, 1, 1]]).astype(int).tolist() for m in matrices]
    assert [a["fill"] for a in page.all("rect")][4:8] == [colour(100)] * 4  # stage 2 now: all alike
    slider = next(a for a in page.all("input"))
    assert (slider["min"], slider["max"], slider["value"]) == ("0", "3", "3")
    bar = next(a for a in page.all("div") if a.get("id") == "bar")
    assert "hidden" in bar and page.all("noscript")


def test_the_script_finds_every_pair():
    """The page's own arithmetic: which number of the upper triangle is that of row i and column j."""
    model, x = WideResNet(22, 1), jnp.zeros((1, *SHAPE))
    layout = share(model, Plan(Rule(r"stage1/block[23]/conv\d/kernel", Soft(1), bank="b")), x).layout
    matrix = np.arange(16).reshape(4, 4) / 100
    matrix = np.triu(matrix) + np.triu(matrix, 1).T
    page = Page(html_report(Record(CONFIG, layout=layout, snapshots=[Snapshot(i, i, {"b": matrix}) for i in range(2)])))
    values, size = json.loads(page.scripts[0])["maps"][0][1], 4
    assert "values[i * size - (i * (i - 1)) / 2 + j - i]" in page.scripts[1]
    for (row, column), value in np.ndenumerate(matrix):
        i, j = min(row, column), max(row, column)
        assert values[i * size - i * (i - 1) // 2 + j - i] == round(100 * value)
    assert [a["fill"] for a in page.all("rect")] == [colour(round(100 * value)) for value in matrix.ravel()]


def test_long_runs_keep_the_slider_short(record):
    matrices = record.snapshots[-1].matrices
    other = Snapshot(-1, 0, {"gone": np.eye(2)})  # of before the network was another
    many = [other, *(Snapshot(i, i, matrices) for i in range(500))]
    data = json.loads(Page(html_report(Record(CONFIG, layout=record.layout, snapshots=many))).scripts[0])
    assert len(data["epochs"]) == MOST_SNAPSHOTS and (data["epochs"][0], data["epochs"][-1]) == (0, 499)


def test_a_network_that_shares_nothing_leaves_the_sharing_out():
    page = Page(html_report(Record(CONFIG, result=RESULT, cost=cost(WideResNet(16, 1), SHAPE))))
    assert sections(page) == ["Learning curves", "Sharing", "Cost"] and "share nothing" in page.text and not page.scripts


def test_an_unfinished_run_says_so(record):
    page = Page(html_report(Record(CONFIG, record.lines[:2], layout=record.layout, cost=record.cost, notes=["no checkpoint in <runs>."])))
    assert "has not finished: 2 of 3 epochs" in page.text and "40.00%" in page.text
    assert "no checkpoint in <runs>." in page.text and "there is no state of the network to fold" in page.text
    assert "no epoch has been finished" in Page(html_report(Record(CONFIG))).text.lower()


def test_hostile_names_stay_text():
    bad = '<script>alert("1")<img src=x onerror="alert(2)">&amp;'  # a bank's name holds no "/"
    worse = "</script></style>" + bad
    model, x = WideResNet(16, 1), jnp.zeros((1, *SHAPE))
    shared = share(model, Plan(Rule(r"stage2/block2/conv\d/kernel", Soft(1), bank=bad)), x)
    banks, coefficients = shared.layout.init(jax.random.key(0))
    variables = {"banks": banks, "params": {"coefficients": coefficients}}
    now = Snapshot(1, 1, {bad: np.eye(2)})
    result = {**RESULT, "devices": worse, "selected": {**RESULT["selected"], "epoch": worse}}
    config = {"model": {"name": worse}, "data": {"name": worse}, "epochs": 1, worse: worse}
    text = html_report(
        Record(
            config,
            (),
            result,
            shared.layout,
            cost(shared, SHAPE),
            [now, now],
            now,
            [fold(shared, variables)],
            [worse],
        )
    )
    page = Page(text)
    assert page.text.count(bad) >= 9 and page.text.count(worse) >= 6
    assert f"at epoch {worse}, chosen" in page.text
    page = Page(text + heat_map(np.eye(2), [worse, bad], "c") + line_chart({worse: [(1, 1)]}, title=bad, levels={bad: 2}))
    assert not page.all("img") and len(page.all("script")) == 2 and not re.search("<(script|img)[^>]*(alert|onerror)", text)


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, 0.0, "x", None, True])
def test_numbers_that_are_none_do_not_break_the_charts(value):
    drawn = line_chart({"a": [(1, value), (2, 3.0), (3, 4.0)]}, title="t", log=True)
    assert "nan" not in drawn and "inf" not in drawn
    Page(drawn)
    assert "nothing to draw" in line_chart({"a": [(1, math.nan)]}, title="t")


def polyline(drawn: str) -> list[str]:
    return re.findall('points="([^"]*)"', drawn)[0].split()


@pytest.mark.parametrize(("log", "ys"), [(False, [0.0, 0.0]), (False, [1e-9, 3e7]), (True, [2e-9, 3e7]), (False, [5.0]), (True, [5.0])])
def test_points_lie_inside_the_chart(log, ys):
    """Whatever the range, and the ticks enclose them."""
    drawn = line_chart({"a": list(enumerate(ys))}, title="t", log=log)
    points = polyline(drawn)
    ((width, height),) = re.findall('viewBox="0 0 ([0-9]+) ([0-9]+)"', drawn)
    assert len(points) == len(ys)
    for x, y in (map(float, point.split(",")) for point in points):
        assert 0 < x < int(width) and 0 < y < int(height)
    assert 2 <= drawn.count('class="grid"') <= 9


def test_counts_have_whole_ticks():
    assert re.findall('text-anchor="end">([^<]*)<', line_chart({"a": [(0, 0), (1, 0)]}, title="t", whole=True)) == ["0", "1"]
    assert re.findall('text-anchor="end">([^<]*)<', line_chart({"a": [(0, 3), (1, 4)]}, title="t", whole=True)) == ["3", "4"]


@pytest.mark.parametrize(
    ("high", "said"),
    [(21_000, ["5000", "10000", "15000", "20000", "25000"]), (2.5e6, ["0", "500000", "1e6", "1.5e6", "2e6", "2.5e6"])],
)
def test_ticks_are_written_whole(high, said):
    """No two ticks under one name."""
    drawn = line_chart({"a": [(0, 5000), (1, high)]}, title="t", whole=True)
    assert re.findall('text-anchor="end">([^<]*)<', drawn) == said


def test_higher_is_up_and_in_proportion():
    drawn = line_chart({"a": [(0, 0.0), (1, 5.0), (2, 10.0)], "b": [(0, 1.0), (2, 10.0)]}, title="t")
    first = [tuple(map(float, point.split(","))) for point in polyline(drawn)]
    (x0, y0), (x1, y1), (x2, y2) = first
    assert x0 < x1 < x2 and y0 > y1 > y2
    # Coordinates are written to a tenth.
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11) and y0 - y1 == pytest.approx(y1 - y2, abs=0.11)


def test_a_matrix_that_is_not_finite_shows_as_zero():
    drawn = heat_map(np.array([[1, math.nan], [math.nan, math.inf]]), ["a", "b"], "c")
    assert re.findall('fill="([^"]*)"', drawn) == [colour(100), colour(0), colour(0), colour(0)]
