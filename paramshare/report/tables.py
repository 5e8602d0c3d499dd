"""The report's tables: who shares what, cost and folding. Plain data for the page's template."""

import dataclasses
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from paramshare.layout import Layout
from paramshare.measure.cost import Cost
from paramshare.schemes import Site
from paramshare.transform.folding import Folded

KINDS = ("banks", "coefficients", "private", "trainable")
MEMORY = {
    "bytes": "stored",
    "optimizer": "optimizer state",
    "all_reduce": "all-reduce per step of data-parallel training",
}


@dataclasses.dataclass(frozen=True)
class Chip:
    """A label on a coloured square; the hue is in degrees."""

    label: str
    hue: int


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
      head: the columns' titles.
      rows: rows of text; a cell may also be a sequence of chips.
      right: numbers of the right-aligned columns.
      sums: how many of the last rows are sums.
      summary: if given, the table is folded away behind this text.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str | Sequence[Chip]]]
    right: Collection[int] = ()
    sums: int = 0
    summary: str = ""


@dataclasses.dataclass(frozen=True)
class Square:
    """One layer in the strip of layers: its tooltip and its bank's hue (None: no bank)."""

    title: str
    hue: int | None


def sharing_tables(layout: Layout) -> list[Table]:
    """The banks, then the layers of each bank."""
    rows = []
    for bank in layout.banks:
        shapes = list(dict.fromkeys(_shape(site.shape) for site in bank.sites))
        trained = sum(bank.trainable)
        rows.append(
            (
                bank.name,
                str(bank.scheme),
                str(len(bank.sites)),
                ", ".join(shapes) if len(shapes) < 3 else f"{len(shapes)} shapes",
                f"{trained:,}",
                f"{bank.dense:,}",
                f"{bank.dense - trained:,}",
            )
        )
    generated = sum(bank.dense for bank in layout.banks)
    layers = sum(len(bank.sites) for bank in layout.banks)
    saved = layout.plain - layout.trainable
    rows += [
        ("(private)", "", "", "", f"{layout.private:,}", "", ""),
        ("total", "", f"{layers}", "", f"{layout.trainable:,}", f"{generated:,}", f"{saved:,}"),
    ]
    head = ("bank", "scheme", "layers", "shapes", "parameters", "generated weights", "saved")
    return [
        Table(head, rows, right=(2, 4, 5, 6), sums=1),
        *(_sites(bank.name, bank.sites) for bank in layout.banks),
    ]


def layer_strip(cost: Cost) -> tuple[list[Square], list[Chip]]:
    """The layers in the order in which they run, and the colours of the banks.

    Layers without a bank and without multiply-adds (batch norms) are left out.
    """
    hues = _hues(layer.bank for layer in cost.layers if layer.bank)
    squares = [
        Square(f"{layer.path}: {layer.bank or 'private weights'}", hues.get(layer.bank))
        for layer in cost.layers
        if layer.bank or layer.multiply_adds
    ]
    return squares, [Chip(name, hue) for name, hue in hues.items()]


def cost_tables(cost: Cost) -> list[Table]:
    """Parameters, bytes and multiply-adds, then the same layer by layer."""
    shared = bool(cost.generated)  # otherwise there is nothing to compare with
    of_unshared = "of the network without sharing"
    parameters = [
        (
            kind,
            f"{cost.counts[kind]:,}",
            f"{cost.counts[kind] / max(1, cost.generated):.2%}",
            f"{cost.counts[kind] / cost.plain:.2%}",
        )
        for kind in (KINDS if shared else ("trainable",))
    ]
    memory = [
        (
            title,
            f"{getattr(cost, name):,}",
            f"{getattr(cost, name) / max(1, cost.unshared[name]):.2%}",
        )
        for name, title in MEMORY.items()
    ]
    heads = ("", "parameters", "of the generated weights", of_unshared), ("", "bytes", of_unshared)
    work = [
        ("per example", f"{cost.use:,}"),
        ("of these in convolutions", f"{cost.convolutions:,}"),
    ]
    if cost.generation:
        work.append(("per step, to generate the shared weights", f"{cost.generation:,}"))
    layers = [
        (
            layer.path,
            layer.bank,
            f"{layer.weights:,}",
            f"{layer.private:,}",
            f"{layer.multiply_adds:,}" if layer.multiply_adds else "",
        )
        for layer in cost.layers
    ]
    width = 4 if shared else 2
    return [
        Table(heads[0][:width], [row[:width] for row in parameters], right=(1, 2, 3), sums=1),
        Table(heads[1][:width], [row[:width] for row in memory], right=(1, 2)),
        Table(("", "multiply-adds"), work, right=(1,)),
        Table(
            ("layer", "bank", "weights", "private", "multiply-adds"),
            layers,
            right=(2, 3, 4),
            summary="Layer by layer",
        ),
    ]


def folding_tables(foldings: Sequence[Folded]) -> list[Table]:
    """What folding saves at each threshold, then the same bank by bank."""
    rows = []
    for folded in foldings:
        banks = [bank for bank in folded.banks if not bank.note]
        rows.append(
            (
                f"{folded.threshold:g}",
                f"{len(banks)} of {len(folded.banks)}",
                str(sum(bank.period is not None for bank in banks)),
                f"{max(bank.kernel_error for bank in banks):.1e}" if banks else "",
                f"{folded.saved:,}",
                f"{folded.shared.layout.trainable:,}",
            )
        )
    head = (
        "threshold",
        "banks folded",
        "of these periodic",
        "largest kernel error",
        "parameters saved",
        "trainable parameters left",
    )
    return [Table(head, rows, right=range(6)), *map(_folded_banks, foldings)]


def _folded_banks(folded: Folded) -> Table:
    rows = []
    for bank in folded.banks:
        hues = _hues(bank.groups)
        rows.append(
            (
                bank.name,
                [Chip(str(group), hues[group]) for group in bank.groups],
                str(bank.period or "-"),
                "" if bank.note else f"{bank.kernel_error:.1e}",
                f"{bank.before:,}",
                f"{bank.after:,}",
                bank.note,
            )
        )
    head = ("bank", "group of each layer", "period", "kernel error", "parameters", "after", "")
    title = f"Threshold {folded.threshold:g}, bank by bank"
    return Table(head, rows, right=(2, 3, 4, 5), summary=title)


def _sites(name: str, sites: Sequence[Site]) -> Table:
    rows = [(str(site), _shape(site.shape)) for site in sites]
    return Table(("layer", "shape"), rows, summary=f"{name}: {len(sites)} layers")


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _hues(names: Iterable[Any]) -> dict[Any, int]:
    """A hue for each name; steps of the golden angle keep neighbours far apart."""
    return {
        name: round(210 + 137.5 * number) % 360 for number, name in enumerate(dict.fromkeys(names))
    }
