"""Trains soft-shared networks with and without the recurrence penalty, folds and fine-tunes them.

    python experiments/studies/folding.py CONFIG --model swrn-40-1-8 --seeds 0 1 2 --out DIR

Further options override the configuration. For every seed: how many pairs of layers are similar,
the groups that `fold` makes at each threshold, and the test score before folding, after folding,
and after one epoch of fine-tuning. Folding with period 2 regardless of similarity is measured
too. Every run has its own workdir in DIR; rerun the study to continue it. Writes DIR/table.md,
DIR/folding.json and a picture of the similarity over training for each penalty.
"""

import dataclasses
import json
import pathlib
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import sweep

from paramshare.cli import run_command
from paramshare.measure.similarity import similarity
from paramshare.measure.snapshots import THRESHOLDS, near_pairs, snapshots
from paramshare.report.pictures import similarity_over_training
from paramshare.shared import Shared
from paramshare.training.config import Config
from paramshare.training.derive import derive, fine_tuning, load_run, with_ties
from paramshare.training.evaluation import make_evaluate
from paramshare.training.loop import train
from paramshare.training.metrics import read_metrics
from paramshare.training.run import prepare
from paramshare.transform.folding import FoldedBank, fold

UNFOLDED = "not folded"


def main() -> None:
    """Runs the study that the command line describes."""
    parser = sweep.parser(__doc__ or "")
    parser.add_argument("--model", required=True)
    parser.add_argument("--recurrence", type=float, default=0.01, help="weight of the penalty")
    parser.add_argument("--thresholds", nargs="+", type=float, default=THRESHOLDS)
    args, base = sweep.parse(parser)
    base = sweep.with_network(base, args.model)
    weights = (0.0, args.recurrence)
    records: list[dict[str, Any]] = []
    for seed in args.seeds:
        for weight in weights:
            penalty = dataclasses.replace(base.penalty, recurrence=weight)
            config = dataclasses.replace(base, seed=seed, penalty=penalty)
            records += measure(config, args.out / name(weight, seed), args.thresholds)
            (args.out / "folding.json").write_text(json.dumps(records, indent=1) + "\n")
    for weight in weights:
        lines = read_metrics(args.out / name(weight, args.seeds[0]) / "metrics.jsonl")
        similarity_over_training(
            snapshots(lines),
            args.out / f"similarity-recurrence{weight:g}.png",
            title=f"{args.model}, penalty.recurrence {weight:g}, seed {args.seeds[0]}",
        )
    sweep.publish(args.out, tables(records), sweep.provenance())


def name(weight: float, seed: int) -> str:
    """The workdir of a run, in the study's folder."""
    return f"recurrence{weight:g}-seed{seed}"


def measure(
    config: Config, workdir: pathlib.Path, thresholds: Sequence[float]
) -> list[dict[str, Any]]:
    """Trains a network and folds it at each threshold and with period 2; one record for each."""
    train(config, workdir)
    source, variables, _ = load_run(workdir)
    assert isinstance(source.model, Shared)
    score = source.task.score
    before = make_evaluate(source)(variables, source.data.test)
    pairs = {
        bank: {f"{t:g}": near_pairs(matrix, t) for t in THRESHOLDS}
        | {"of": len(matrix) * (len(matrix) - 1) // 2}
        for bank, matrix in similarity(source.model, variables).items()
    }
    layers = {bank.name: len(bank.sites) for bank in source.model.layout.banks}
    period2 = {bank: [i % 2 for i in range(count)] for bank, count in layers.items()}
    ways: list[tuple[str, dict[str, Any] | None]] = [(UNFOLDED, None)]
    ways += [(f"{t:g}", {"threshold": t}) for t in thresholds]
    ways.append(("period 2", {"groups": period2}))

    records = []
    for label, options in ways:
        folded = None if options is None else fold(source.model, variables, **options)
        target = config if folded is None else with_ties(config, folded)
        unchanged = folded is not None and not folded.changed
        derived = derive(
            source,
            variables,
            prepare(fine_tuning(target)),
            variables if folded is None else folded.variables,
            workdir=None
            if unchanged
            else workdir.with_name(f"{workdir.name}-{label.replace(' ', '-')}"),
            origin={"command": "fold", "workdir": workdir.name},
            fine_tune=not unchanged,
            resume=True,
            before=before,
        )
        record = {
            "recurrence": config.penalty.recurrence,
            "seed": config.seed,
            "fold": label,
            "score": dataclasses.asdict(score),
            "near": pairs,
            "banks": [dataclasses.asdict(bank) for bank in folded.banks] if folded else [],
            "trainable": derived.trainable["after"],
            "before": derived.before.measures[score.name],
            "after": derived.after.measures[score.name],
        }
        if derived.fine_tuned is not None:
            record["tuned"] = derived.fine_tuned.measures[score.name]
        records.append(record)
    return records


def tables(records: list[dict[str, Any]]) -> str:
    """Pairs of layers by threshold, and scores by the way of folding, as means over seeds."""
    weights = list(dict.fromkeys(record["recurrence"] for record in records))
    spec, title = records[0]["score"]["format_spec"], records[0]["score"]["title"]
    pairs = []
    for weight in weights:
        near = [
            record["near"]
            for record in records
            if record["recurrence"] == weight and record["fold"] == UNFOLDED
        ]
        for bank in records[0]["near"]:
            means = (statistics.mean(x[bank][f"{t:g}"] for x in near) for t in THRESHOLDS)
            pairs.append([f"{weight:g}", bank, near[0][bank]["of"], *(f"{m:.1f}" for m in means)])
    folds = []
    for weight in weights:
        for label in dict.fromkeys(record["fold"] for record in records):
            runs = [r for r in records if r["recurrence"] == weight and r["fold"] == label]
            errors = [bank["kernel_error"] for run in runs for bank in run["banks"]]
            tuned = [run["tuned"] for run in runs if "tuned" in run]
            some = "" if len(tuned) in (0, len(runs)) else f" ({len(tuned)} folded)"
            folds.append(
                [
                    f"{weight:g}",
                    label,
                    "; ".join(" ".join(map(groups, run["banks"])) for run in runs).strip("; "),
                    " / ".join(dict.fromkeys(f"{run['trainable']:,}" for run in runs)),
                    f"{max(errors):.2f}" if errors else "",
                    sweep.mean_and_std([run["before"] for run in runs], spec),
                    sweep.mean_and_std([run["after"] for run in runs], spec),
                    sweep.mean_and_std(tuned, spec) + some,
                ]
            )
    head = ["penalty.recurrence", "bank", "pairs", *(f">= {t:g}" for t in THRESHOLDS)]
    columns = ["groups, each seed", "trainable", "worst kernel error", f"{title} before"]
    return "\n\n".join(
        (
            "Pairs of layers by similarity (means over seeds):",
            sweep.table(head, pairs),
            sweep.table(["recurrence", "folded at", *columns, "after", "fine-tuned"], folds),
        )
    )


def groups(bank: dict[str, Any]) -> str:
    """The number of groups in a bank, and its period if it was folded."""
    report = FoldedBank(**bank)
    count = len(set(report.groups))
    if report.note:
        return f"{count}"
    return f"{count} (period {report.period})*" if report.period else f"{count}*"


if __name__ == "__main__":
    sys.exit(run_command(main))
