"""The report of a run: one HTML page that needs nothing but itself. From what a run left to text; nothing is read or written."""

import dataclasses
import html
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from paramshare.analysis.charts import line_chart
from paramshare.analysis.cost import Cost
from paramshare.analysis.folding import Folded
from paramshare.analysis.page import details, page, paragraph, section, table
from paramshare.analysis.report_similarity import comparable, similarity_section
from paramshare.analysis.snapshots import Snapshot
from paramshare.layout import Layout

KINDS = ("banks", "coefficients", "private", "trainable")


SCORES = {"accuracy": "accuracy", "f1": "F1"}  # as they are shown


@dataclasses.dataclass(frozen=True)
class Record:
    """What a run left.

    Attributes:
      config: the configuration, as stored.
      lines: of `metrics.jsonl`.
      result: as in `result.json`; None for a run that has not finished.
      layout: who shares what; None for a network that shares nothing, and for one that could not be built.
      cost: of the network; None where it could not be built.
      snapshots: of the layers' similarity, in order, as training kept them.
      now: the snapshot of the last state.
      foldings: what `paramshare.fold` makes of the last state, a threshold each.
      notes: what could not be found out, and why.
    """

    config: Mapping[str, Any]
    lines: Sequence[Mapping[str, Any]] = ()
    result: Mapping[str, Any] | None = None
    layout: Layout | None = None
    cost: Cost | None = None
    snapshots: Sequence[Snapshot] = ()
    now: Snapshot | None = None
    foldings: Sequence[Folded] = ()
    notes: Sequence[str] = ()

    @property
    def title(self) -> str:
        """Which network on which images."""
        return f"{self.config['model']['name']} on {self.config['data']['name']}"

    @property
    def score(self) -> str:
        """The measure that tells good from better: "accuracy", or the "f1" of cells on paths."""
        told = (self.result or {}).get("score")
        return told if told in SCORES else "f1" if any("f1" in line for line in self.lines) else "accuracy"

    @property
    def epochs(self) -> list[Mapping[str, Any]]:
        """The whole lines of kind "epoch"."""
        wanted = ("epoch", "loss", self.score)
        return [line for line in self.lines if line.get("kind") == "epoch" and all(isinstance(line.get(x), int | float) for x in wanted)]


def html_report(record: Record) -> str:
    """The page.

    Example:
      >>> from paramshare.analysis.report import Record, html_report
      >>> text = html_report(Record({"model": {"name": "wrn-16-1"}, "data": {"name": "digits"}, "epochs": 3}))
      >>> "<h1>wrn-16-1 on digits</h1>" in text, "has not finished" in text
      (True, True)
    """
    snapshots = list(record.snapshots) or [one for one in [record.now] if one]
    if record.layout is None:
        sharing, folding = _nothing_shared(record), ""
    else:
        sharing, folding = similarity_section(record.layout, snapshots) + "\n" + _sharing(record, record.layout), _folding(record)
    cost = _cost(record.cost) if record.cost else ""
    body = [part for part in (_result(record), _curves(record), sharing, cost, folding) if part]
    return page(record.title, body, script=record.layout is not None and len(comparable(snapshots)) > 1)


def _result(record: Record) -> str:
    parts = [f"<h1>{html.escape(record.title)}</h1>"]
    epochs, result, cards = record.config.get("epochs"), record.result, []
    name = SCORES[record.score]
    if result is None:
        done = record.epochs[-1]["epoch"] if record.epochs else 0
        parts.append(paragraph(f"This run has not finished: {done} of {epochs} epochs.", "note"))
        held = [line for line in record.epochs if isinstance(line.get(f"validation_{record.score}"), int | float)]
        if held:
            cards.append((_percent(held[-1][f"validation_{record.score}"]), f"validation {name} after epoch {held[-1]['epoch']}"))
    else:
        parts.append(paragraph(f"{result['epochs']} epochs, {result['steps']:,} steps, on {result['devices']}", "about"))
        test = result["last"]["test"]
        cards.append((_percent(test[record.score]), f"test {name} after the last epoch, {test['count']:,.0f} images"))
        if result.get("selected"):
            chosen = result["selected"]
            cards.append((_percent(chosen["test"][record.score]), f"test {name} at epoch {chosen['epoch']}, chosen by validation"))
    counts = result["counts"] if result else record.cost.counts if record.cost else None
    if counts:
        plain = record.layout.plain if record.layout else None
        of = f", {counts['trainable'] / plain:.1%} of {plain:,} without sharing" if plain else ""
        cards.append((f"{counts['trainable']:,}", f"trainable numbers{of}"))
    if result and result.get("images_per_second"):
        cards.append((f"{result['images_per_second']:,.0f}", "images a second, training"))
    if result:
        cards.append((_duration(result["seconds"]), "in all"))
    parts.append('<div class="cards">' + "".join(_card(*card) for card in cards) + "</div>" if cards else "")
    parts += [paragraph(note, "note") for note in record.notes]
    parts.append(details("Configuration", table([("setting", "value"), *_flat(record.config)])))
    return "\n".join(part for part in parts if part)


def _curves(record: Record) -> str:
    epochs = record.epochs
    if not epochs:
        return section("Learning curves", paragraph("No epoch has been finished yet."))
    levels = {}
    if record.result:
        levels = {"test, after the last epoch": record.result["last"]["test"][record.score]}

    def series(name: str) -> dict[str, list[tuple[float, float]]]:
        held = [(line["epoch"], line[f"validation_{name}"]) for line in epochs if f"validation_{name}" in line]
        return {"training, as augmented": [(line["epoch"], line[name]) for line in epochs], "validation": held}

    charts = (
        line_chart(series("loss"), title="Loss", log=True),
        line_chart(series(record.score), title=SCORES[record.score].capitalize(), percent=True, levels=levels),
    )
    return section("Learning curves", f'<div class="charts">{"".join(charts)}</div>')


def _nothing_shared(record: Record) -> str:
    if record.cost is None:
        return section("Sharing", paragraph("The network could not be built again, so who shares what is not known here."))
    return section("Sharing", paragraph("The layers of this network share nothing; there is no similarity, and nothing to fold."))


def _sharing(record: Record, layout: Layout) -> str:
    rows = [("bank", "scheme", "layers", "shapes", "trained numbers", "weights made", "saved")]
    for bank in layout.banks:
        shapes = list(dict.fromkeys("x".join(map(str, site.shape)) for site in bank.sites))
        trained = sum(bank.trainable)
        shape = ", ".join(shapes) if len(shapes) < 3 else f"{len(shapes)} shapes"
        rows.append(
            (bank.name, str(bank.scheme), str(len(bank.sites)), shape, f"{trained:,}", f"{bank.dense:,}", f"{bank.dense - trained:,}")
        )
    rows.append(("(private)", "", "", "", f"{layout.private:,}", "", ""))
    total = sum(len(bank.sites) for bank in layout.banks)
    generated = sum(bank.dense for bank in layout.banks)
    rows.append(("total", "", str(total), "", f"{layout.trainable:,}", f"{generated:,}", f"{layout.plain - layout.trainable:,}"))
    sites = [details(f"{bank.name}: {len(bank.sites)} layers", table([("layer", "shape"), *_sites(bank.sites)])) for bank in layout.banks]
    strip = _strip(record.cost) if record.cost else []
    return section("Who shares what", *strip, table(rows, right=(2, 4, 5, 6), sums=1), *sites)


def _strip(cost: Cost) -> list[str]:
    """The network's layers as a row of squares. Batch norms, which do next to no work, are left out."""
    hues, squares = _hues([layer.bank for layer in cost.layers if layer.bank]), []
    for layer in cost.layers:
        told = html.escape(f"{layer.path}: {layer.bank or 'its own weights'}")
        if layer.bank:
            squares.append(f'<i style="--h:{hues[layer.bank]}" title="{told}"></i>')
        elif layer.multiply_adds:
            squares.append(f'<i class="own" title="{told}"></i>')
    keys = [f'<li class="bank" style="--h:{hue}">{html.escape(name)}</li>' for name, hue in hues.items()]
    return [
        paragraph("The layers in the order in which they run, coloured by their banks; grey ones have weights of their own.", "about"),
        f'<div class="layers">{"".join(squares)}</div><ul class="keys">{"".join(keys)}</ul>',
    ]


def _sites(sites: Sequence[Any]) -> list[tuple[str, str]]:
    return [(str(site), "x".join(map(str, site.shape))) for site in sites]


def _cost(cost: Cost) -> str:
    rows = [("", "trained numbers", "of the weights made", "of the network without sharing")]
    for kind in KINDS if cost.generated else ("trainable",):
        number = cost.counts[kind]
        rows.append((kind, f"{number:,}", f"{number / max(1, cost.generated):.2%}", f"{number / cost.plain:.2%}"))
    memory = [("bytes", "", "of the network without sharing")]
    for name, told in (("bytes", "stored"), ("optimizer", "optimizer's state"), ("all_reduce", "averaged over devices, a step")):
        memory.append((told, f"{getattr(cost, name):,}", f"{getattr(cost, name) / max(1, cost.unshared[name]):.2%}"))
    if not cost.generated:  # nothing to compare with
        rows, memory = [row[:2] for row in rows], [row[:2] for row in memory]
    parts = [table(rows, right=(1, 2, 3), sums=1), table(memory, right=(1, 2))]
    work = [("multiply-adds", ""), ("an image", f"{cost.use:,}"), ("of them in convolutions", f"{cost.convolutions:,}")]
    if cost.generation:
        work.append(("a step, to make the shared kernels", f"{cost.generation:,}"))
    parts.append(table(work, right=(1,)))
    by_layer = [("layer", "bank", "weights", "private", "multiply-adds")]
    for layer in cost.layers:
        work_done = f"{layer.multiply_adds:,}" if layer.multiply_adds else ""
        by_layer.append((layer.path, layer.bank, f"{layer.weights:,}", f"{layer.private:,}", work_done))
    parts.append(details("Layer by layer", table(by_layer, right=(2, 3, 4))))
    return section("Cost", *parts)


def _folding(record: Record) -> str:
    if not record.foldings:
        return section("Folding", paragraph("Not computed: there is no state of the network to fold."))
    about = (
        "What paramshare.fold makes of the last state: layers that are similar by a threshold or more are tied to one kernel, each with a "
        "scale. A bank is left as it is where its groups would be more numbers than it has."
    )
    rows = [("threshold", "banks folded", "with a period", "worst kernel error", "numbers saved", "trainable after")]
    unfolded = []
    for folded in record.foldings:
        done = [bank for bank in folded.banks if not bank.note]
        loops = [bank for bank in done if bank.period]
        error = f"{max(bank.kernel_error for bank in done):.1e}" if done else ""
        left = f"{folded.shared.layout.trainable:,}"
        rows.append((f"{folded.threshold:g}", f"{len(done)} of {len(folded.banks)}", str(len(loops)), error, f"{folded.saved:,}", left))
        unfolded.append(details(f"threshold {folded.threshold:g}, bank by bank", _folded_banks(folded)))
    return section("Folding", paragraph(about, "about"), table(rows, right=range(6)), *unfolded)


def _folded_banks(folded: Folded) -> str:
    rows = [("bank", "groups of layers", "period", "kernel error", "numbers before", "after", "")]
    for bank in folded.banks:
        hues = _hues(bank.groups)
        chips = "".join(f'<span class="chip" style="--h:{hues[group]}">{group}</span>' for group in bank.groups)
        error = "" if bank.note else f"{bank.kernel_error:.1e}"
        rows.append((bank.name, chips, str(bank.period or "-"), error, f"{bank.before:,}", f"{bank.after:,}", bank.note))
    return table(rows, right=(2, 3, 4, 5), raw=(1,))


def _card(number: str, about: str) -> str:
    return f'<div class="card"><b>{html.escape(number)}</b><span>{html.escape(about)}</span></div>'


def _hues(names: Sequence[Any]) -> dict[Any, int]:
    """A hue for each name, neighbours far apart: steps of the golden angle."""
    return {name: round(210 + 137.5 * number) % 360 for number, name in enumerate(dict.fromkeys(names))}


def _flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    if not isinstance(value, Mapping):
        return [(prefix, ", ".join(map(str, value)) or "-" if isinstance(value, list | tuple) else str(value))]
    return [row for name, part in value.items() for row in _flat(part, f"{prefix}.{name}" if prefix else str(name))]


def _percent(share: float) -> str:
    return f"{share:.2%}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    units: tuple[tuple[str, Callable[[float], float]], ...] = (("min", lambda s: s / 60), ("h", lambda s: s / 3600))
    name, scale = units[0] if seconds < 7200 else units[1]
    amount = scale(seconds)
    return f"{amount:.0f} {name}" if amount >= 10 else f"{math.floor(10 * amount + 0.5) / 10:g} {name}"
