"""How recurrent a trained soft-sharing network is, and what folding it costs: with and without the recurrence penalty, several seeds.

    python experiments/folding.py CONFIG --model swrn-40-1-8 --seeds 0 1 2 --out DIR [--overrides]

For every seed, with penalty.recurrence 0 and with --recurrence, trains a network; then folds it at every threshold, and into loops of
period 2 whatever its similarity; measures test accuracy before and after, and after fine-tuning by one epoch from a tenth of the learning
rate down to zero. The unfolded network is fine-tuned as well, to compare with. Every run has a workdir of its own below DIR; started again,
finished runs are read and interrupted ones go on. Draws DIR/similarity-*.png of the first seed, writes DIR/table.md and DIR/folding.json.
"""

import argparse
import dataclasses
import datetime
import json
import pathlib
import shlex
import statistics
import sys
from collections.abc import Sequence
from typing import Any

from paramshare.analysis.folding import FoldedBank, fold
from paramshare.analysis.pictures import similarity_over_training
from paramshare.analysis.similarity import similarity
from paramshare.analysis.snapshots import THRESHOLDS, near_pairs, snapshots
from paramshare.cli import override, run_told
from paramshare.shared import Shared, count
from paramshare.training.config import Config, load_file
from paramshare.training.derive import begin, fine_tuning, trained, with_model
from paramshare.training.evaluation import make_evaluate
from paramshare.training.loop import train
from paramshare.training.metrics import read_metrics
from paramshare.training.run import prepare, tied_text


def main() -> None:
    """Runs what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--model", required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--recurrence", type=float, default=0.01)
    parser.add_argument("--thresholds", nargs="+", type=float, default=THRESHOLDS, help="to fold at")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    known, rest = parser.parse_known_args()
    base = override(load_file(known.config), rest, known.config)
    found: list[dict[str, Any]] = []
    for seed in known.seeds:
        for weight in (0.0, known.recurrence):
            config = dataclasses.replace(
                base,
                seed=seed,
                model=dataclasses.replace(base.model, name=known.model),
                penalty=dataclasses.replace(base.penalty, recurrence=weight),
            )
            found += one(config, known.out / f"recurrence{weight:g}-seed{seed}", known.thresholds)
            (known.out / "folding.json").write_text(json.dumps(found, indent=1) + "\n")
    for weight in (0.0, known.recurrence):
        workdir = known.out / f"recurrence{weight:g}-seed{known.seeds[0]}"
        title = f"{known.model}, penalty.recurrence {weight:g}, seed {known.seeds[0]}"
        similarity_over_training(
            snapshots(read_metrics(workdir / "metrics.jsonl")), known.out / f"similarity-recurrence{weight:g}.png", title=title
        )
    table = tables(found)
    about = f"{datetime.date.today()}\n\n    python {shlex.join(sys.argv)}\n"
    (known.out / "table.md").write_text(f"{table}\n\n{about}")
    print(f"\n{table}\n\n{about}")


def one(config: Config, workdir: pathlib.Path, thresholds: Sequence[float]) -> list[dict[str, Any]]:
    """Trains a network, and folds it in every way: a record each."""
    train(config, workdir)
    run, variables, _ = trained(workdir)
    assert isinstance(run.model, Shared)
    before = make_evaluate(run)(variables, run.data.test)["accuracy"]
    pairs = {
        name: {f"{t:g}": near_pairs(matrix, t) for t in THRESHOLDS} | {"of": len(matrix) * (len(matrix) - 1) // 2}
        for name, matrix in similarity(run.model, variables).items()
    }
    layers = {bank.name: len(bank.sites) for bank in run.model.layout.banks}
    period2: dict[str, Any] = {"groups": {name: [i % 2 for i in range(number)] for name, number in layers.items()}}
    records = []
    for label, options in [("not folded", None), *((f"{t:g}", {"threshold": t}) for t in thresholds), ("period 2", period2)]:
        record = {"recurrence": config.penalty.recurrence, "seed": config.seed, "fold": label, "before": before, "near": pairs}
        if options is None:
            banks, its, tied = (), variables, ()
        else:
            folded = fold(run.model, variables, **options)
            banks, its = folded.banks, folded.variables
            tied = tuple(tied_text(folded.shared.layout[b.name]) for b in banks if not b.note)
        fresh = prepare(fine_tuning(with_model(config, tied=tied)))
        record |= {
            "banks": [dataclasses.asdict(bank) for bank in banks],
            "trainable": count(its)["trainable"],
            "after": make_evaluate(fresh)(its, run.data.test)["accuracy"],
        }
        if options is None or tied:
            place = workdir.with_name(f"{workdir.name}-{label.replace(' ', '-')}")
            if not place.exists():
                begin(fresh, its, place, {"command": "fold", "workdir": workdir.name})
            record["tuned"] = train(fresh.config, place)["last"]["test"]["accuracy"]
        records.append(record)
    return records


def tables(found: list[dict[str, Any]]) -> str:
    """Pairs by threshold, and accuracy by way of folding, as means over seeds."""
    weights = list(dict.fromkeys(record["recurrence"] for record in found))
    banks = list(found[0]["near"])
    lines = [
        "Pairs of layers, by similarity (means over seeds):",
        "",
        "| penalty.recurrence | bank | pairs | " + " | ".join(f">= {t:g}" for t in THRESHOLDS) + " |",
    ]
    lines.append("|---|---|---|" + "---|" * len(THRESHOLDS))
    for weight in weights:
        its = [record["near"] for record in found if record["recurrence"] == weight and record["fold"] == "not folded"]
        for bank in banks:
            cells = (f"{statistics.mean(near[bank][f'{t:g}'] for near in its):.1f}" for t in THRESHOLDS)
            lines.append(f"| {weight:g} | {bank} | {its[0][bank]['of']} | {' | '.join(cells)} |")
    lines += [
        "",
        "| recurrence | folded at | groups, each seed | trainable | worst kernel error | accuracy before | after | fine-tuned |",
    ]
    lines.append("|---|---|---|---|---|---|---|---|")
    for weight in weights:
        for label in dict.fromkeys(record["fold"] for record in found):
            its = [record for record in found if record["recurrence"] == weight and record["fold"] == label]
            groups = "; ".join(" ".join(show(bank) for bank in record["banks"]) for record in its) if its[0]["banks"] else ""
            errors = [bank["kernel_error"] for record in its for bank in record["banks"]]
            trainable = " / ".join(f"{number:,}" for number in dict.fromkeys(record["trainable"] for record in its))
            tuned = [record["tuned"] for record in its if "tuned" in record]
            cells = (
                mean([r["before"] for r in its]),
                mean([r["after"] for r in its]),
                mean(tuned) + ("" if len(tuned) in (0, len(its)) else f" ({len(tuned)} folded)"),
            )
            lines.append(
                f"| {weight:g} | {label} | {groups} | {trainable} | {f'{max(errors):.2f}' if errors else ''} | {' | '.join(cells)} |"
            )
    return "\n".join(lines)


def show(bank: dict[str, Any]) -> str:
    """How many groups the layers of a bank make, and their period where it is folded."""
    report = FoldedBank(**bank)
    number = len(set(report.groups))
    return f"{number}" if report.note else f"{number}{f' (period {report.period})' if report.period else ''}*"


def mean(values: list[float]) -> str:
    """Mean and standard deviation, in percent."""
    if not values:
        return ""
    return f"{statistics.mean(values):.2%} ({statistics.stdev(values) if len(values) > 1 else 0:.2%})"


if __name__ == "__main__":
    sys.exit(run_told(main))
