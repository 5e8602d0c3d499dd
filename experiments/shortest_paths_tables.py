"""Tables of what shortest_paths_compare.py has measured, in Markdown: means over seeds with 95 % confidence intervals."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

MEASURES = {
    "f1": "F1 on each test set, after training",
    "exact": "Share of grids solved entirely (every cell right)",
    "shortest": "Share of grids where a shortest path can be read off (predicted free cells join the points in as few steps as can be)",
}


def tables(records: list[dict[str, Any]], labels: Mapping[str, str]) -> str:
    """Everything that was measured, as means over seeds with 95 % confidence intervals."""
    by_arm = {name: [record for record in records if record["arm"] == name] for name in labels}
    phases = records[0]["phases"]
    kinds = list(records[0]["tests"])
    parts = []

    def per_phase(measure: Callable[[dict[str, Any], int], float], title: str) -> None:
        rows = {}
        for name, its in by_arm.items():
            rows[labels[name]] = [show([measure(record, phase) for record in its]) for phase in range(1, len(phases) + 1)]
        parts.append(f"{title}\n\n{markdown(['network', *(f'window {window}' for window in phases)], rows)}")

    counts = {labels[name]: [f"{its[0]['trainable']:,}", f"{its[0]['seconds']:.0f} s"] for name, its in by_arm.items()}
    parts.append(f"Trainable numbers, and the time of the first seed:\n\n{markdown(['network', 'trainable', 'time'], counts)}")
    per_phase(first_epoch, "F1 over the first epoch of each phase, on problems not seen before, while learning (batch by batch):")
    per_phase(lambda record, phase: of_phase(record, phase)[0]["validation_f1"], "Validation F1 after the first epoch of each phase:")
    per_phase(area, "Validation F1, the mean over all epochs of each phase:")
    if "cnn" in by_arm:
        plain = {record["seed"]: record for record in by_arm["cnn"]}
        pairs = {name: [(record, plain[record["seed"]]) for record in its if record["seed"] in plain] for name, its in by_arm.items()}
        pairs = {name: its for name, its in pairs.items() if its and name != "cnn"}
        for measure, about in ((first_epoch, "F1 over the first epoch"), (area, "Validation F1 over all epochs")):
            rows = {}
            for name, its in pairs.items():
                more = [[measure(a, phase) - measure(b, phase) for phase in range(1, len(phases) + 1)] for a, b in its]
                columns = [*zip(*more, strict=True), [sum(values[1:]) / max(1, len(values) - 1) for values in more]]
                rows[labels[name]] = [show(column, signed=True) for column in columns]
            head = ["network", *(f"window {window}" for window in phases), "all but the first"]
            parts.append(f"{about} of each phase less that of the CNN of the same seed:\n\n{markdown(head, rows)}")
        for measure, about in MEASURES.items():
            rows = {
                labels[name]: [show([a["tests"][kind][measure] - b["tests"][kind][measure] for a, b in its], signed=True) for kind in kinds]
                for name, its in pairs.items()
            }
            parts.append(f"{about}, less that of the CNN of the same seed:\n\n{markdown(['network', *kinds], rows)}")
    for measure, about in MEASURES.items():
        rows = {labels[name]: [show([record["tests"][kind][measure] for record in its]) for kind in kinds] for name, its in by_arm.items()}
        parts.append(f"{about}:\n\n{markdown(['network', *kinds], rows)}")
    parts += [folding(by_arm, labels, phases), iterations(by_arm, labels)]
    return "\n\n".join(part for part in parts if part)


def folding(by_arm: Mapping[str, list[dict[str, Any]]], labels: Mapping[str, str], phases: Sequence[int]) -> str:
    """What folding finds and costs."""
    rows = {}
    for name, its in by_arm.items():
        if "fold" not in its[0]:
            continue
        last = f"window {phases[-1]}"
        changed = [record for record in its if "tests" in record["fold"]]
        rows[labels[name]] = [
            show([record["fold"]["similarity"] for record in its]),
            ", ".join(str(len(set(record["fold"]["groups"]))) for record in its),
            ", ".join(str(record["fold"]["period"] or "none") for record in its),
            " / ".join(dict.fromkeys(f"{record['fold']['trainable']:,}" for record in its)),
            f"{max(record['fold']['kernel_error'] for record in changed):.3f}" if changed else "",
            show([record["tests"][last]["f1"] for record in changed]) if changed else "",
            show([record["fold"]["tests"][last]["f1"] for record in changed]) if changed else "nothing to fold",
        ]
    head = ["network", "mean similarity", "groups, each seed", "period", "trainable", "worst kernel error", "F1 before", "F1 folded"]
    return (
        f"Folding at similarity .9; F1 of the networks that fold, on the last phase's test set:\n\n{markdown(head, rows)}" if rows else ""
    )


def iterations(by_arm: Mapping[str, list[dict[str, Any]]], labels: Mapping[str, str]) -> str:
    """What more iterations at test time do, beside as many layers as trained with batch statistics of the same kind."""
    parts = []
    for name, its in by_arm.items():
        its = [record for record in its if "longer" in record]
        if not its:
            continue
        found = [{(e["how"], e["statistics"], e["depth"]): e["tests"] for e in record["longer"]} for record in its]
        ways = list(dict.fromkeys(way for tests in found for way in tests))
        first, _, depth = ways[0]  # as trained
        kinds = list(found[0][ways[0]])
        few = f" ({len(its)} of {len(by_arm[name])} seeds)" if len(its) < len(by_arm[name]) else ""
        for measure, about in MEASURES.items():
            rows = {}
            for how, statistics, layers in sorted(ways, key=lambda way: (way[1], ways.index(way))):
                way, usual = (how, statistics, layers), (first, statistics, depth)
                cells = [show([tests[way][kind][measure] for tests in found if way in tests]) for kind in kinds]
                if layers > depth:
                    than = [[t[way][kind][measure] - t[usual][kind][measure] for t in found if way in t] for kind in kinds]
                    cells = [f"{cell} ({show(values, signed=True)})" for cell, values in zip(cells, than, strict=True)]
                rows[f"{layers}, {how}, {statistics}"] = cells
            head = markdown(["layers, repeated how, batch statistics", *kinds], rows)
            parts.append(f"{about}, {labels[name]}{few}, run for more iterations; in brackets the change:\n\n{head}")
    return "\n\n".join(parts)


def of_phase(record: dict[str, Any], phase: int) -> list[dict[str, Any]]:
    """The epochs of a phase, counted from 1."""
    return [line for line in record["epochs"] if line["phase"] == phase]


def first_epoch(record: dict[str, Any], phase: int) -> float:
    """F1 over the first epoch of a phase: each batch is predicted before it is learned from."""
    return of_phase(record, phase)[0]["f1"]


def area(record: dict[str, Any], phase: int) -> float:
    """Validation F1 over all epochs of a phase."""
    its = of_phase(record, phase)
    return sum(line["validation_f1"] for line in its) / len(its)


def show(values: Sequence[float], *, signed: bool = False) -> str:
    """Mean and half a 95 % confidence interval."""
    from paramshare.analysis.path_pictures import interval

    mean, half = interval(list(values))
    return f"{mean:+.3f} ± {half:.3f}" if signed else f"{mean:.3f} ± {half:.3f}"


def markdown(head: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    """A table, the rows by their first cell."""
    lines = [head, ["---"] * len(head), *([name, *cells] for name, cells in rows.items())]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
