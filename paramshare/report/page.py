"""The report of a run: one HTML page that needs no other file and fetches nothing.

The Python prepares plain data. The HTML, its style and its script are in `templates/`; jinja2
escapes every value that it puts into them.
"""

import base64
import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jinja2

from paramshare.report.charts import Chart, heat_colours, line_chart
from paramshare.report.record import Record
from paramshare.report.similarity_section import similarity_section
from paramshare.report.tables import Table, cost_tables, folding_tables, layer_strip, sharing_tables
from paramshare.storage import run_path, write_text
from paramshare.training import config as configs

PAGE = "report.html"


@dataclasses.dataclass(frozen=True)
class Card:
    """A figure at the top of the page, and what it is."""

    figure: str
    about: str


def write_report(record: Record, workdir: str | pathlib.Path) -> pathlib.Path:
    """Writes `report.html` into a workdir and returns its path.

    Raises:
      StorageError: if it cannot be written.
    """
    page = run_path(workdir) / PAGE
    write_text(page, html_report(record))
    return page


def html_report(record: Record) -> str:
    """The report as HTML.

    Example:
      >>> from paramshare.report.page import html_report
      >>> from paramshare.report.record import Record
      >>> from paramshare.training.config import Config, Model
      >>> text = html_report(Record(Config(Model("wrn-16-1"))))
      >>> "<h1>wrn-16-1 on digits</h1>" in text, "has not finished" in text
      (True, True)
    """
    snapshots = list(record.snapshots) or ([record.now] if record.now else [])
    strip, bank_colours = layer_strip(record.cost) if record.cost else ([], [])
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            title=record.title,
            progress=_progress(record),
            finished=record.result is not None,
            cards=_cards(record),
            notes=record.notes,
            settings=_settings(record),
            curves=_curves(record),
            measures=_measures(record),
            examples=base64.b64encode(record.examples).decode() if record.examples else "",
            built=record.cost is not None,
            layout=record.layout is not None,
            similarity=similarity_section(record.layout, snapshots) if record.layout else None,
            colours=heat_colours(),
            sharing=sharing_tables(record.layout) if record.layout else [],
            strip=strip,
            bank_colours=bank_colours,
            cost=cost_tables(record.cost) if record.cost else [],
            folding=folding_tables(record.foldings) if record.foldings else [],
        )
    )


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("paramshare.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _progress(record: Record) -> str:
    if record.result is None:
        done = record.epochs[-1]["epoch"] if record.epochs else 0
        return f"This run has not finished: {done} of {record.config.epochs} epochs."
    result = record.result
    return f"{result.epochs} epochs, {result.steps:,} steps, on {result.devices}"


def _cards(record: Record) -> list[Card]:
    result, score, cards = record.result, record.score, []
    if result:
        name, count = result.score.title, f"{result.last.count:,} examples"
        figure = result.score.format(result.last_score)
        cards.append(Card(figure, f"test {name} after the last epoch, {count}"))
        if result.selected and result.selected_score is not None:
            figure = result.score.format(result.selected_score)
            about = f"test {name} at epoch {result.selected.epoch}, selected by validation"
            cards.append(Card(figure, about))
        if result.ema:
            figure = result.score.format(result.ema.measures[result.score.name])
            cards.append(Card(figure, f"test {name} with the moving average of the variables"))
        if result.skipped:
            about = "updates were skipped, since a loss or gradient was not finite"
            cards.append(Card(f"{result.skipped:,}", about))
    elif score:
        points = _points(record, f"validation_{score.name}")
        if points:
            epoch, value = points[-1]
            about = f"validation {score.title} after epoch {epoch}"
            cards.append(Card(score.format(value), about))
    counts = result.counts if result else record.cost.counts if record.cost else {}
    if "trainable" in counts:
        share, plain = "", record.layout.plain if record.layout else 0
        if plain:
            share = f", {counts['trainable'] / plain:.1%} of {plain:,} without sharing"
        cards.append(Card(f"{counts['trainable']:,}", f"trainable parameters{share}"))
    if record.packed is not None:
        cards.append(Card(f"{record.packed:,}", "bytes of the compressed variables, packed"))
    if result and result.images_per_second:
        cards.append(Card(f"{result.images_per_second:,.0f}", "training examples per second"))
    if result:
        cards.append(Card(duration(result.seconds), "total time"))
    return cards


def _curves(record: Record) -> list[Chart]:
    if not record.epochs:
        return []
    charts = [line_chart(_series(record, "loss"), name="loss", title="Loss", log=True)]
    score = record.score
    if score:
        levels = {"test, after the last epoch": record.result.last_score} if record.result else {}
        charts.append(
            line_chart(
                _series(record, score.name),
                name="score",
                title=score.title[:1].upper() + score.title[1:],
                tick=lambda value: short_percent(score.format(value)),
                levels=levels,
            )
        )
    for number, chart in enumerate(record.result.last.curves if record.result else ()):
        drawn = line_chart(
            chart.lines, name=f"test{number}", title=f"{chart.title}, test", x_label=chart.x_label
        )
        charts.append(drawn)
    return charts


def _measures(record: Record) -> Table | None:
    """All measures on the test set; None for tasks with one."""
    result = record.result
    if result is None or len(result.measures) < 2:
        return None
    tests = {"last epoch": result.last}
    if result.selected:
        tests[f"epoch {result.selected.epoch}, selected"] = result.selected.test
    if result.ema:
        tests["moving average"] = result.ema
    rows = [
        (measure.title, *(measure.format(test.measures[measure.name]) for test in tests.values()))
        for measure in result.measures
    ]
    return Table(("test", *tests), rows, right=range(1, len(tests) + 1))


def _series(record: Record, name: str) -> dict[str, list[tuple[Any, Any]]]:
    return {
        "training": _points(record, name),
        "validation": _points(record, f"validation_{name}"),
    }


def _points(record: Record, name: str) -> list[tuple[int, Any]]:
    return [(line["epoch"], line[name]) for line in record.epochs if name in line]


def _settings(record: Record) -> Table:
    """The configuration, nested fields with dots in their names."""

    def flat(value: Any, name: str) -> list[tuple[str, str]]:
        if isinstance(value, Mapping):
            prefix = f"{name}." if name else ""
            return [row for key, part in value.items() for row in flat(part, f"{prefix}{key}")]
        text = ", ".join(map(str, value)) or "-" if isinstance(value, list) else str(value)
        return [(name, text)]

    rows = flat(json.loads(configs.to_json(record.config)), "")
    return Table(("setting", "value"), rows, summary="Configuration")


def short_percent(text: str) -> str:
    """Whole percentages without decimals; other text as it is.

    Example:
      >>> from paramshare.report.page import short_percent
      >>> short_percent("50.00%"), short_percent("12.50%"), short_percent("0.005")
      ('50%', '12.50%', '0.005')
    """
    return text.removesuffix(".00%") + "%" if text.endswith(".00%") else text


def duration(seconds: float) -> str:
    """A duration in seconds, minutes or hours.

    Example:
      >>> from paramshare.report.page import duration
      >>> duration(12), duration(150), duration(9000)
      ('12 s', '2.5 min', '2.5 h')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    amount, unit = (seconds / 60, "min") if seconds < 7200 else (seconds / 3600, "h")
    return f"{amount:.0f} {unit}" if amount >= 10 else f"{round(amount, 1):g} {unit}"
