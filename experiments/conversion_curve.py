"""Converts dense networks to soft sharing with k = 1 .. L templates: kernel error, and accuracy before and after an epoch of training.

    python experiments/conversion_curve.py CONFIG --model wrn-28-1 --seeds 0 1 2 --out DIR [--overrides]

For every seed trains the dense network; then converts it, without any data, to the network of the same name with soft sharing and k
templates a stage, by truncated singular value decomposition; and trains that for one epoch from a tenth of the learning rate down to zero.
The dense network is trained on by the same epoch, to compare with. Every run has a workdir of its own below DIR; started again, finished
runs are read and interrupted ones go on. Draws DIR/conversion.png and writes DIR/table.md and DIR/conversion.json.
"""

import argparse
import dataclasses
import datetime
import json
import pathlib
import shlex
import statistics
import sys
from typing import Any

import numpy as np

from paramshare.analysis.conversion import convert
from paramshare.analysis.pictures import conversion_curve
from paramshare.cli import override, run_told
from paramshare.shared import Shared, count
from paramshare.training.config import Config, load_file
from paramshare.training.derive import begin, fine_tuning, trained, with_model
from paramshare.training.evaluation import make_evaluate
from paramshare.training.loop import train
from paramshare.training.run import prepare


def main() -> None:
    """Runs what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--model", required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    known, rest = parser.parse_known_args()
    base = override(load_file(known.config), rest, known.config)
    base = dataclasses.replace(base, model=dataclasses.replace(base.model, name=known.model))
    found: list[dict[str, Any]] = []
    for seed in known.seeds:
        found += one(dataclasses.replace(base, seed=seed), known.out / f"dense-seed{seed}")
        (known.out / "conversion.json").write_text(json.dumps(found, indent=1) + "\n")
    curve = [(record["k"], record["after"], record["tuned"]) for record in found if record["k"]]
    dense = [record["tuned"] for record in found if not record["k"]]
    picture = known.out / "conversion.png"
    conversion_curve(curve, dense, picture, title=f"{known.model} on {base.data.name}, converted to k templates a stage")
    table = tables(found)
    about = f"{datetime.date.today()}\n\n    python {shlex.join(sys.argv)}\n"
    (known.out / "table.md").write_text(f"{table}\n\n{about}")
    print(f"\n{table}\n\n{about}\npicture        {picture}")


def one(config: Config, workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Trains a dense network, and converts it to every number of templates: a record each; k = 0 is the dense network itself."""
    train(config, workdir)
    run, variables, _ = trained(workdir)
    name = config.model.name
    full = prepare(with_model(config, name=f"s{name}-1")).model
    assert isinstance(full, Shared)
    records = []
    for k in range(max(len(bank.sites) for bank in full.layout.banks) + 1):
        fresh = prepare(fine_tuning(with_model(config, name=f"s{name}-{k}") if k else config))
        record: dict[str, Any] = {"k": k, "seed": config.seed}
        its = variables
        if k:
            assert isinstance(fresh.model, Shared)
            converted = convert(fresh.model, variables)
            its = converted.variables
            record["errors"] = {bank.name: bank.kernel_error for bank in converted.banks}
            record["tails"] = {bank: tail(kernels, k) for bank, kernels in fresh.model.layout.read(variables["params"]).items()}
        place = workdir.with_name(f"k{k}-seed{config.seed}")
        if not place.exists():
            begin(fresh, its, place, {"command": "convert", "workdir": workdir.name})
        record |= {
            "trainable": count(its)["trainable"],
            "after": make_evaluate(fresh)(its, run.data.test)["accuracy"],
            "tuned": train(fresh.config, place)["last"]["test"]["accuracy"],
        }
        records.append(record)
    return records


def tail(kernels: tuple[Any, ...], k: int) -> float:
    """sqrt of the squared singular values from the (k + 1)-th on, over that of all: the least error that k templates can make."""
    squares = np.linalg.svd(np.stack([np.asarray(kernel, np.float64).ravel() for kernel in kernels]), compute_uv=False) ** 2
    return float(np.sqrt(squares[k:].sum() / squares.sum()))


def tables(found: list[dict[str, Any]]) -> str:
    """Means over seeds, by k."""
    lines = [
        "| templates k | trainable | relative kernel error by bank | at most off the tail | accuracy converted | after one epoch |",
        "|---|---|---|---|---|---|",
    ]
    for k in dict.fromkeys(record["k"] for record in found):
        its = [record for record in found if record["k"] == k]
        errors = differences = ""
        if k:
            errors = ", ".join(f"{statistics.mean(r['errors'][bank] for r in its):.3f}" for bank in its[0]["errors"])
            differences = f"{max(abs(r['errors'][bank] - r['tails'][bank]) for r in its for bank in r['errors']):.1e}"
        accuracies = [mean([r[what] for r in its]) for what in ("after", "tuned")]
        lines.append(f"| {k or 'dense'} | {its[0]['trainable']:,} | {errors} | {differences} | {' | '.join(accuracies)} |")
    return "\n".join(lines)


def mean(values: list[float]) -> str:
    """Mean and standard deviation, in percent."""
    return f"{statistics.mean(values):.2%} ({statistics.stdev(values) if len(values) > 1 else 0:.2%})"


if __name__ == "__main__":
    sys.exit(run_told(main))
