"""The report is a whole page that needs no other file, and shows what the run left."""

import dataclasses
import html.parser
import json
import re
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from paramshare import Plan, Rule, Soft, share
from paramshare.errors import ParamshareError
from paramshare.measure.cost import cost
from paramshare.measure.snapshots import THRESHOLDS, Snapshot
from paramshare.report import page
from paramshare.report.charts import heat_colours
from paramshare.report.page import html_report, write_report
from paramshare.report.record import Record
from paramshare.report.similarity_section import MAX_SNAPSHOTS
from paramshare.tasks import Curves, Measure
from paramshare.training.config import Config, Model, Schedule
from paramshare.transform.folding import Folded, FoldedBank
from tests.report.conftest import Small

CONFIG = Config(model=Model("small"), epochs=3, schedule=Schedule(milestones=(1, 2)))
SHAPE = (4,)
VOID = {"meta", "input", "br", "hr", "img", "link"}
SECTIONS = (
    "Learning curves",
    "Test",
    "Similarity of layers",
    "Who shares what",
    "Cost",
    "Folding",
    "Sharing",
)


class Page(html.parser.HTMLParser):
    """Checks that every tag is closed; keeps tags, attributes, scripts and the remaining text."""

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

    @property
    def sections(self) -> list[str]:
        return [title for title in re.split(r"\s*\n\s*", self.text) if title in SECTIONS]


@pytest.fixture(scope="module")
def record(shared, result, facts) -> Record:
    """Real banks and invented results; the similarity grows with the epochs."""
    matrices = {
        "stage1": np.array([[1, 0.25, 0.5], [0.25, 1, 0.875], [0.5, 0.875, 1]]),
        "stage2": np.ones((3, 3)),
    }
    lines = [
        {
            "kind": "epoch",
            "step": epoch,
            "epoch": epoch,
            "loss": 1 / epoch,
            "hits": epoch / 4,
            "validation_loss": 2 / epoch,
            "validation_hits": epoch / 5,
        }
        for epoch in (1, 2, 3)
    ]
    past = [
        Snapshot(i, 20 * i, {name: i / 3 * matrix for name, matrix in matrices.items()})
        for i in range(4)
    ]
    banks = (
        FoldedBank("stage1", (0, 1, 2), None, (), 0.0, 38, 38, "no two layers are similar"),
        FoldedBank("stage2", (0, 0, 0), 1, (1.0, 2.0, -1.0), 1.5e-3, 4321, 39),
    )
    foldings = [Folded(shared, {}, threshold, banks) for threshold in THRESHOLDS]
    return Record(
        CONFIG,
        lines,
        result,
        facts,
        shared.layout,
        cost(shared, SHAPE),
        past,
        past[-1],
        foldings,
    )


@pytest.fixture(scope="module")
def text(record) -> str:
    return html_report(record)


def test_ticks_of_the_score_keep_its_format(record, monkeypatch):
    monkeypatch.setattr(page, "line_chart", lambda *series, tick=None, **options: tick)

    def ticks(format_spec):
        score = dataclasses.replace(record.result.score, format_spec=format_spec)
        result = dataclasses.replace(record.result, score=score)
        tick: Any = page._curves(dataclasses.replace(record, result=result))[1]
        return [tick(value) for value in (0.002, 0.5)]

    assert ticks(".3f") == ["0.002", "0.500"]
    assert ticks(".2%") == ["0.20%", "50%"]


def test_the_page_shows_the_result(record, text):
    page = Page(text)
    sections = ["Learning curves", "Similarity of layers", "Who shares what", "Cost", "Folding"]
    assert page.sections == sections and "not finished" not in page.text
    for shown in (
        "small on digits",
        "87.65%",
        "test hit rate after the last epoch, 200 examples",
        "86.42%",
        "test hit rate at epoch 2, selected by validation",
        "123,456",
        "346",
        "12 s",
        "schedule.milestones",
        "1, 2",
        f"{record.cost.use:,}",
        f"{record.cost.bytes:,}",
    ):
        assert shown in page.text, shown
    for bank in record.layout.banks:
        assert page.text.count(bank.name) >= 4 and str(bank.scheme) in page.text
        assert all(str(site) in page.text for site in bank.sites)
    assert len(page.all("details")) == 1 + 2 + 1 + len(THRESHOLDS)


def test_the_curves(text):
    page = Page(text)
    assert [a["aria-label"] for a in page.all("svg") if "by epoch" in a["aria-label"]] == [
        "Loss by epoch",
        "Hit rate by epoch",
        "Pairs of similar layers, all banks together by epoch",
    ]
    assert page.text.count("training") > 1 and "test, after the last epoch" in page.text
    assert re.search(r">\d+%</text>", text)  # the score's axis is written as the score is
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)


def test_nothing_is_fetched(text):
    """No attribute or style takes an address, and the browser is not allowed to fetch one."""
    page = Page(text)
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", text)
    fetching = {"src", "srcset", "data", "action"}
    assert not [attributes for _, attributes in page.tags if fetching & set(attributes)]
    assert all(attributes.get("href", "#")[0] == "#" for _, attributes in page.tags)
    policy = [a["content"] for a in page.all("meta") if "http-equiv" in a]
    assert len(policy) == 1 and "default-src 'none'" in policy[0]


def test_folding_shows_groups_period_error_and_savings(text):
    page = Page(text)
    shown = ("1 of 2", "1.5e-03", "4,321", "4,282", "no two layers are similar")
    assert not [figure for figure in shown if figure not in page.text]
    chips = [a["style"] for a in page.all("span") if a.get("class") == "chip"]
    assert len(chips) == 6 * len(THRESHOLDS)
    assert len({*chips[:3]}) == 3 and len({*chips[3:6]}) == 1  # a colour per group


def test_the_slider_has_every_snapshot(record, text):
    """The page shows the last one; without the script the slider stays hidden."""
    page = Page(text)
    data = json.loads(page.scripts[0])
    assert data["epochs"] == [0, 1, 2, 3] and data["colours"] == list(heat_colours())
    upper = [0, 0, 0, 1, 1, 2], [0, 1, 2, 1, 2, 2]
    matrices = [np.array(snapshot.matrices["stage1"]) for snapshot in record.snapshots]
    assert data["maps"][0] == [np.round(100 * m[upper]).astype(int).tolist() for m in matrices]
    squares = [a["fill"] for a in page.all("rect") if "fill" in a]
    assert squares[9:] == [heat_colours()[100]] * 9  # stage 2 in the end
    slider = page.all("input")[0]
    assert (slider["min"], slider["max"], slider["value"]) == ("0", "3", "3")
    bar = next(a for a in page.all("div") if a.get("id") == "bar")
    assert "hidden" in bar and page.all("noscript")


def test_the_script_reads_every_pair(shared):
    """Row i and column j of a matrix, from the upper triangle in the page."""
    matrix = np.arange(9).reshape(3, 3) / 100
    matrix = np.triu(matrix) + np.triu(matrix, 1).T
    snapshots = [Snapshot(i, i, {"stage1": matrix}) for i in range(2)]
    page = Page(html_report(Record(CONFIG, layout=shared.layout, snapshots=snapshots)))
    values, size = json.loads(page.scripts[0])["maps"][0][1], 3
    assert "values[i * size - (i * (i - 1)) / 2 + j - i]" in page.scripts[1]
    for (row, column), value in np.ndenumerate(matrix):
        i, j = min(row, column), max(row, column)
        assert values[i * size - i * (i - 1) // 2 + j - i] == round(100 * value)
    fills = [a["fill"] for a in page.all("rect") if "fill" in a]
    assert fills == [heat_colours()[round(100 * value)] for value in matrix.ravel()]


def test_long_runs_keep_the_slider_short(record):
    other = Snapshot(-1, 0, {"gone": np.eye(2)})  # of other matrices
    many = [other, *(Snapshot(i, i, record.now.matrices) for i in range(500))]
    page = Page(html_report(Record(CONFIG, layout=record.layout, snapshots=many)))
    epochs = json.loads(page.scripts[0])["epochs"]
    assert len(epochs) == MAX_SNAPSHOTS and (epochs[0], epochs[-1]) == (0, 499)


def test_a_network_that_shares_nothing(shared, result):
    page = Page(html_report(Record(CONFIG, result=result, cost=cost(shared.model, SHAPE))))
    assert page.sections == ["Learning curves", "Sharing", "Cost"]
    assert "shares no weights" in page.text and not page.scripts
    page = Page(html_report(Record(CONFIG, result=result)))
    assert "could not be built" in page.text and "Cost" not in page.text


def test_an_unfinished_run(record):
    unfinished = dataclasses.replace(
        record, lines=record.lines[:2], result=None, foldings=(), notes=["no state in <runs>."]
    )
    page = Page(html_report(unfinished))
    assert "has not finished: 2 of 3 epochs" in page.text
    assert "40.00%" in page.text and "validation hit rate after epoch 2" in page.text
    assert "no state in <runs>." in page.text and "no stored state to fold" in page.text
    page = Page(html_report(Record(CONFIG)))
    assert "0 of 3 epochs" in page.text and "No epoch has been completed" in page.text


def test_a_run_whose_score_is_unknown_keeps_its_loss(record):
    lost = dataclasses.replace(record, result=None, facts=None)
    charts = [a["aria-label"] for a in Page(html_report(lost)).all("svg")]
    assert "Loss by epoch" in charts and "Hit rate by epoch" not in charts


def test_damaged_lines_are_left_out(record):
    lines = [
        {"kind": "epoch", "step": 1},
        {"kind": "epoch", "step": 1, "epoch": "x", "loss": []},
        {"kind": "epoch", "step": 1, "epoch": 1, "loss": float("nan"), "validation_loss": "x"},
    ]
    page = Page(html_report(dataclasses.replace(record, lines=lines)))
    assert "nothing to draw" in page.text and "nan" not in page.text


def test_hostile_names_stay_text(score, result):
    bad = '<script>alert("1")<img src=x onerror="alert(2)">&amp;'  # a bank's name has no "/"
    worse = "</script></style></svg>" + bad
    layer = '<img onerror="alert(3)">'
    rule = Rule(r"stage2/.*\d/kernel", Soft(1), bank=bad)
    shared = share(Small(layer), Plan(rule), jnp.zeros((1, *SHAPE)))
    now = Snapshot(1, 1, {bad: np.eye(3)})
    hostile = dataclasses.replace(score, title=worse)
    record = Record(
        dataclasses.replace(CONFIG, model=Model(worse)),
        [{"kind": "epoch", "step": 1, "epoch": 1, "loss": 1.0, "hits": 0.5}],
        dataclasses.replace(result, devices=worse, score=hostile),
        None,
        shared.layout,
        cost(shared, SHAPE),
        [now, now],
        now,
        (),
        [worse],
    )
    text = html_report(record)
    page = Page(text)
    assert page.text.count(bad) >= 9 and page.text.count(worse) >= 6
    assert page.text.count(f"{layer}3") >= 4
    assert not page.all("img") and len(page.all("script")) == 2
    assert not re.search("<(script|img)[^>]*(alert|onerror)", text)


def test_the_page_is_written_completely_or_not_at_all(record, text, tmp_path):
    assert write_report(record, tmp_path).read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    (tmp_path / "run" / "report.html").mkdir(parents=True)
    with pytest.raises(ParamshareError, match=r"report\.html cannot be written"):
        write_report(record, tmp_path / "run")


def test_measures_curves_and_predictions_of_the_test_set(record):
    """Each measure in its own format; charts over the whole set; the picture inside the page."""
    measures = (record.result.score, Measure("error", "mean error", "err", format_spec=".3g"))
    chart = Curves("Precision", "recall", {"cat": [(0.0, 1.0), (1.0, 0.25)]})
    last = dataclasses.replace(
        record.result.last,
        measures=record.result.last.measures | {"error": 12.3456},
        curves=(chart,),
    )
    test = dataclasses.replace(
        record.result.selected.test, measures=record.result.selected.test.measures | {"error": 7.0}
    )
    selected = dataclasses.replace(record.result.selected, test=test)
    result = dataclasses.replace(
        record.result, measures=measures, last=last, selected=selected, ema=None
    )
    page = Page(
        html_report(dataclasses.replace(record, result=result, examples=b"\x89PNG", packed=4321))
    )
    for text in ("mean error", "12.3", "7", "Precision, test", "cat", "4,321"):
        assert text in page.text
    assert page.sections[:2] == ["Learning curves", "Test"]
    assert [tag["src"] for tag in page.all("img")] == ["data:image/png;base64,iVBORw=="]
    assert "Test" not in Page(html_report(record)).sections
