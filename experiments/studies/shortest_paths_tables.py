"""Markdown tables of shortest_paths_compare.py: means over seeds with 95% confidence intervals."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sweep

from paramshare.report.path_pictures import interval

MEASURES = {
    "f1": "F1 on each test set, after training",
    "exact": "Fraction of grids solved entirely (every cell right)",
    "shortest": "Fraction of grids where a shortest path can be read off (predicted free cells "
    "join the points in the minimum number of steps)",
}
Record = dict[str, Any]
Arms = Mapping[str, list[Record]]


def tables(records: list[Record], labels: Mapping[str, str]) -> str:
    """All tables."""
    by_arm = {name: [record for record in records if record["arm"] == name] for name in labels}
    windows = [f"window {window}" for window in records[0]["phases"]]
    kinds = list(records[0]["tests"])
    counts = {
        labels[name]: [f"{runs[0]['trainable']:,}", f"{runs[0]['seconds']:.0f} s"]
        for name, runs in by_arm.items()
    }

    def per_phase(measure: Callable[[Record, int], float]) -> str:
        rows = {
            labels[name]: [
                show([measure(record, phase) for record in runs])
                for phase in range(1, len(windows) + 1)
            ]
            for name, runs in by_arm.items()
        }
        return markdown(["network", *windows], rows)

    parts = [
        "Trainable parameters, and the time of the first seed:",
        markdown(["network", "trainable", "time"], counts),
        "F1 over the first epoch of each phase, batch by batch, each batch predicted before it is "
        "trained on:",
        per_phase(first_epoch),
        "Validation F1 after the first epoch of each phase:",
        per_phase(lambda record, phase: of_phase(record, phase)[0]["validation"]),
        "Validation F1, the mean over all epochs of each phase:",
        per_phase(area),
        *differences(by_arm, labels, windows, kinds),
    ]
    for measure, about in MEASURES.items():
        rows = {
            labels[name]: [
                show([record["tests"][kind][measure] for record in runs]) for kind in kinds
            ]
            for name, runs in by_arm.items()
        }
        parts += [f"{about}:", markdown(["network", *kinds], rows)]
    parts += [*folding(by_arm, labels, windows[-1]), *iterations(by_arm, labels)]
    return "\n\n".join(parts)


def differences(
    by_arm: Arms, labels: Mapping[str, str], windows: Sequence[str], kinds: Sequence[str]
) -> list[str]:
    """Every measure as the difference from the CNN of the same seed; nothing without a CNN."""
    plain = {record["seed"]: record for record in by_arm.get("cnn", [])}
    pairs = {
        name: [(record, plain[record["seed"]]) for record in runs if record["seed"] in plain]
        for name, runs in by_arm.items()
        if name != "cnn"
    }
    pairs = {name: runs for name, runs in pairs.items() if runs}
    if not pairs:
        return []
    parts, than = [], "difference from the CNN of the same seed:"
    for measure, about in (
        (first_epoch, "F1 over the first epoch of each phase"),
        (area, "Validation F1 over all epochs of each phase"),
    ):
        rows = {}
        for name, runs in pairs.items():
            values = [
                [measure(a, phase) - measure(b, phase) for phase in range(1, len(windows) + 1)]
                for a, b in runs
            ]
            later = [sum(row[1:]) / max(1, len(row) - 1) for row in values]
            columns = [*zip(*values, strict=True), later]
            rows[labels[name]] = [show(column, signed=True) for column in columns]
        head = ["network", *windows, "all but the first"]
        parts += [f"{about}, {than}", markdown(head, rows)]
    for measure, about in MEASURES.items():
        rows = {
            labels[name]: [
                show(
                    [a["tests"][kind][measure] - b["tests"][kind][measure] for a, b in runs],
                    signed=True,
                )
                for kind in kinds
            ]
            for name, runs in pairs.items()
        }
        parts += [f"{about}, {than}", markdown(["network", *kinds], rows)]
    return parts


def folding(by_arm: Arms, labels: Mapping[str, str], last: str) -> list[str]:
    """What folding finds and costs."""
    rows = {}
    for name, runs in by_arm.items():
        if "fold" not in runs[0]:
            continue
        folds = [record["fold"] for record in runs]
        changed = [record for record in runs if "tests" in record["fold"]]
        after = "nothing to fold"
        if changed:
            after = show([record["fold"]["tests"][last]["f1"] for record in changed])
        rows[labels[name]] = [
            show([fold["similarity"] for fold in folds]),
            ", ".join(str(len(set(fold["groups"]))) for fold in folds),
            ", ".join(str(fold["period"] or "none") for fold in folds),
            " / ".join(dict.fromkeys(f"{fold['trainable']:,}" for fold in folds)),
            f"{max(r['fold']['kernel_error'] for r in changed):.3f}" if changed else "",
            show([record["tests"][last]["f1"] for record in changed]) if changed else "",
            after,
        ]
    if not rows:
        return []
    columns = ["mean similarity", "groups, each seed", "period", "trainable", "worst kernel error"]
    title = "Folding at similarity .9; F1 on the last phase's test set, of the networks that fold:"
    return [title, markdown(["network", *columns, "F1 before", "F1 folded"], rows)]


def iterations(by_arm: Arms, labels: Mapping[str, str]) -> list[str]:
    """What more iterations at test time do, compared with the trained depth.

    Both depths have batch statistics of the same kind.
    """
    parts = []
    for name, all_runs in by_arm.items():
        runs = [record for record in all_runs if "longer" in record]
        if not runs:
            continue
        seeds = [
            {(e["how"], e["statistics"], e["depth"]): e["tests"] for e in record["longer"]}
            for record in runs
        ]
        ways = list(dict.fromkeys(way for tests in seeds for way in tests))
        first, _, depth = ways[0]  # as trained
        kinds = list(seeds[0][ways[0]])
        few = f" ({len(runs)} of {len(all_runs)} seeds)" if len(runs) < len(all_runs) else ""
        for measure, about in MEASURES.items():
            rows = {}
            for how, statistics, layers in sorted(ways, key=lambda way: (way[1], ways.index(way))):
                way, usual = (how, statistics, layers), (first, statistics, depth)
                having = [tests for tests in seeds if way in tests]
                cells = [show([tests[way][kind][measure] for tests in having]) for kind in kinds]
                if layers > depth:
                    for column, kind in enumerate(kinds):
                        gain = [t[way][kind][measure] - t[usual][kind][measure] for t in having]
                        cells[column] += f" ({show(gain, signed=True)})"
                rows[f"{layers}, {how}, {statistics}"] = cells
            head = ["layers, repeated how, batch statistics", *kinds]
            title = f"{about}, {labels[name]}{few}, with more iterations; in brackets the change:"
            parts += [title, markdown(head, rows)]
    return parts


def of_phase(record: Record, phase: int) -> list[dict[str, Any]]:
    """The epochs of a phase, counted from 1."""
    return [line for line in record["epochs"] if line["phase"] == phase]


def first_epoch(record: Record, phase: int) -> float:
    """F1 over the first epoch of a phase; each batch is predicted before it is trained on."""
    return of_phase(record, phase)[0]["training"]


def area(record: Record, phase: int) -> float:
    """Validation F1 over all epochs of a phase."""
    lines = of_phase(record, phase)
    return sum(line["validation"] for line in lines) / len(lines)


def show(values: Sequence[float], *, signed: bool = False) -> str:
    """The mean and half a 95% confidence interval."""
    mean, half = interval(list(values))
    return f"{mean:+.3f} ± {half:.3f}" if signed else f"{mean:.3f} ± {half:.3f}"


def markdown(head: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    """A table whose rows are named by their first cell."""
    return sweep.table(head, [[name, *cells] for name, cells in rows.items()])
