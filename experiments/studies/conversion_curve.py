"""Converts dense networks to soft sharing with k = 1 .. L templates, and trains them a little.

    python experiments/studies/conversion_curve.py CONFIG --model wrn-28-1 --seeds 0 1 2 --out DIR
    python experiments/studies/conversion_curve.py CONFIG --model decoder-6-64 --out DIR \\
        --targets decoder-6-64-tied decoder-6-64-relaxed-4

Further options override the configuration. For every seed, trains the dense network; converts it,
without any data, to the soft-shared network of the same name with k templates per stage, by
truncated singular value decomposition; and trains that for one epoch, from a tenth of the
learning rate down to zero. The dense network is trained for the same epoch. With --targets, it is
converted to these networks instead. Every run has its own workdir in DIR; rerun the study to
continue it. Writes DIR/table.md and DIR/conversion.json, and without --targets draws
DIR/conversion.png.
"""

import dataclasses
import json
import pathlib
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import sweep

from paramshare.cli import run_command
from paramshare.report.pictures import conversion_curve
from paramshare.shared import Shared
from paramshare.training.config import Config
from paramshare.training.derive import (
    convert_variables,
    derive,
    fine_tuning,
    load_run,
    with_model,
)
from paramshare.training.evaluation import make_evaluate
from paramshare.training.loop import train
from paramshare.training.run import prepare


def main() -> None:
    """Runs the study that the command line describes."""
    parser = sweep.parser(__doc__ or "")
    parser.add_argument("--model", required=True)
    parser.add_argument("--targets", nargs="+", metavar="NAME", default=[])
    args, base = sweep.parse(parser)
    base = sweep.with_network(base, args.model)
    records: list[dict[str, Any]] = []
    for seed in args.seeds:
        config = dataclasses.replace(base, seed=seed)
        records += measure(config, args.out / f"dense-seed{seed}", args.targets)
        (args.out / "conversion.json").write_text(json.dumps(records, indent=1) + "\n")
    sweep.publish(args.out, tables(records), sweep.provenance())
    if args.targets:
        return
    picture, title = args.out / "conversion.png", records[0]["score"]["title"]
    conversion_curve(
        [(record["k"], record["after"], record["tuned"]) for record in records if record["k"]],
        [record["tuned"] for record in records if not record["k"]],
        picture,
        score=title,
        title=f"{args.model} on {base.data.name}, converted to k templates per stage",
    )
    print(f"picture        {picture}")


def measure(
    config: Config, workdir: pathlib.Path, targets: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Trains a dense network and converts it, to every k or to the targets.

    k = 0 is the dense network itself; a target's k is its name.
    """
    train(config, workdir)
    source, variables, _ = load_run(workdir)
    before = make_evaluate(source)(variables, source.data.test)
    network, score = config.model.name, source.task.score.name
    names: dict[int | str, str] = {0: network, **{name: name for name in targets}}
    if not targets:
        full = prepare(with_model(config, name=f"s{network}-1")).model
        assert isinstance(full, Shared)
        most = max(len(bank.sites) for bank in full.layout.banks)
        names |= {k: f"s{network}-{k}" for k in range(1, most + 1)}
    records = []
    for k, name in names.items():
        run = prepare(fine_tuning(with_model(config, name=name)))
        converted, conversion = convert_variables(source, variables, run)
        derived = derive(
            source,
            variables,
            run,
            converted,
            workdir=workdir.with_name(f"{k if k in targets else f'k{k}'}-seed{config.seed}"),
            origin={"command": "convert", "workdir": workdir.name},
            fine_tune=True,
            resume=True,
            before=before,
        )
        assert derived.fine_tuned is not None
        record: dict[str, Any] = {
            "k": k,
            "seed": config.seed,
            "score": dataclasses.asdict(source.task.score),
            "trainable": derived.trainable["after"],
            "after": derived.after.measures[score],
            "tuned": derived.fine_tuned.measures[score],
        }
        if conversion is not None and isinstance(run.model, Shared):
            kernels = run.model.layout.read(variables["params"])
            record["errors"] = {bank.name: bank.kernel_error for bank in conversion.banks}
            if isinstance(k, int):
                record["tails"] = {bank: tail(stack, k) for bank, stack in kernels.items()}
        records.append(record)
    return records


def tail(kernels: tuple[Any, ...], k: int) -> float:
    """The least relative error of k templates, from the singular values beyond the k-th."""
    stack_LxP = np.stack([np.asarray(kernel, np.float64).ravel() for kernel in kernels])
    squares = np.linalg.svd(stack_LxP, compute_uv=False) ** 2
    return float(np.sqrt(squares[k:].sum() / squares.sum()))


def tables(records: list[dict[str, Any]]) -> str:
    """Means over seeds, by k."""
    spec, title = records[0]["score"]["format_spec"], records[0]["score"]["title"]
    rows = []
    for k in dict.fromkeys(record["k"] for record in records):
        runs = [record for record in records if record["k"] == k]
        errors = distance = ""
        if k:
            means = (statistics.mean(r["errors"][bank] for r in runs) for bank in runs[0]["errors"])
            each = list(means)
            errors = ", ".join(f"{mean:.3f}" for mean in each)
            if len(each) > 4:
                errors = f"{min(each):.3f} to {max(each):.3f}"
            off = [abs(r["errors"][b] - t) for r in runs for b, t in r.get("tails", {}).items()]
            distance = f"{max(off):.1e}" if off else ""
        scores = [sweep.mean_and_std([r[key] for r in runs], spec) for key in ("after", "tuned")]
        rows.append([k or "dense", f"{runs[0]['trainable']:,}", errors, distance, *scores])
    templates = isinstance(records[-1]["k"], int)
    head = [
        "templates k" if templates else "converted to",
        "trainable",
        "relative kernel error by bank",
        "at most off the tail",
    ]
    return sweep.table([*head, f"{title} converted", "after one epoch"], rows)


if __name__ == "__main__":
    sys.exit(run_command(main))
