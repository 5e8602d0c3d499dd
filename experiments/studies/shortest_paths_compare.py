"""Compares plain, shared, recurrent and looped networks on shortest paths over several seeds.

    python experiments/studies/shortest_paths_compare.py CONFIG --out DIR --seeds 0 1 2 3 4 \\
        --processes 2

Further options override the configuration. For every seed and every arm (see `arms`; sizes are
those of CONFIG's network) trains a network on the curriculum, tests it on all problem sets, folds
it if its layers are similar, and runs loops for more iterations than in training. Every run has
its own workdir in DIR; rerun the study to continue it. With --processes, several networks train
at a time, each on its share of the CPU's cores. Writes DIR/measured.json, DIR/table.md,
DIR/curves.png, DIR/grids.png and DIR/reach.png.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import sweep
from shortest_paths_pictures import beyond_training, draw, far
from shortest_paths_tables import tables
from tqdm import tqdm

from paramshare.cli import run_command
from paramshare.data import Grids
from paramshare.training.config import Config, ConfigError

MORE = (1.0, 1.2, 1.5, 2.0)  # iterations at test time, relative to training


@dataclasses.dataclass(frozen=True)
class Arm:
    """A network of the comparison.

    Attributes:
      label: label in tables and pictures.
      form: form of its name, with depth, width and the size of a kernel in braces.
      recurrence: weight of the recurrence penalty.
    """

    label: str
    form: str
    recurrence: float = 0.0


@dataclasses.dataclass(frozen=True)
class Job:
    """One training run: an arm with a seed."""

    arm: str
    config: Config
    workdir: pathlib.Path


def arms(depth: int) -> dict[str, Arm]:
    """The networks of one depth, by the names of their workdirs."""
    soft = "spathnet-{depth}-{width}-"
    return {
        "cnn": Arm("CNN", "pathnet-{depth}-{width}"),
        f"scnn{depth}": Arm(f"SCNN, k = {depth}", soft + str(depth)),
        f"scnn{depth}r": Arm(f"SCNN, k = {depth}, recurrence .01", soft + str(depth), 0.01),
        "loop1": Arm("hard loop", "pathnet-{depth}-{width}-loop-1"),
        **{f"scnn{k}": Arm(f"SCNN, k = {k}", soft + str(k)) for k in (4, 2, 1)},
        "rpg": Arm("ring of one kernel's size", "pathnet-{depth}-{width}-rpg-{kernel}"),
    }


def main() -> None:
    """Runs the study that the command line describes."""
    parser = sweep.parser(__doc__ or "", seeds=(0, 1, 2, 3, 4))
    parser.add_argument(
        "--arms", nargs="+", default=None, help="names of workdirs without the seed, or all"
    )
    parser.add_argument("--processes", type=int, default=1, help="networks trained at a time")
    parser.add_argument(
        "--together", action="store_true", help="train all seeds of an arm in one program"
    )
    args, config = sweep.parse(parser)
    table, names = choose(args, config)
    jobs = [
        Job(name, configure(config, table[name], seed), args.out / f"{name}-seed{seed}")
        for seed in args.seeds
        for name in names
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    if args.together:
        train_together(jobs)
    records = spread(jobs, args.processes)
    (args.out / "measured.json").write_text(json.dumps(records) + "\n")
    labels = {name: table[name].label for name in names}
    draw(records, labels, args.out)
    sweep.publish(args.out, tables(records, labels), sweep.provenance())


def choose(args: argparse.Namespace, config: Config) -> tuple[dict[str, Arm], list[str]]:
    """The arms that exist and the names of those to compare, after checking all arguments."""
    network = re.fullmatch(r"s?pathnet-(\d+)-(\d+)(-.*)?", config.model.name)
    if network is None or not isinstance(config.data, Grids):
        raise ConfigError(
            f"{args.config} trains {config.model.name} on {config.data.name}; this study needs a "
            "path net on grids"
        )
    curriculum = config.data.curriculum
    if not (config.data.validation and config.validate_every == 1):
        raise ConfigError(
            f"data.validation is {config.data.validation} and validate_every is "
            f"{config.validate_every}; this study needs a validation after each epoch"
        )
    if not (curriculum.far_windows and curriculum.far_sizes):
        raise ConfigError(
            f"curriculum.far_windows is {curriculum.far_windows} and far_sizes is "
            f"{curriculum.far_sizes}; this study needs at least one far window and one far size"
        )
    table = arms(int(network[1]))
    names = list(table) if args.arms == ["all"] else args.arms or list(table)[:4]
    unknown = sorted(set(names) - set(table))
    if unknown:
        raise ConfigError(f"--arms {unknown[0]}: the arms are {', '.join(table)}")
    if args.processes < 1:
        raise ConfigError(f"--processes {args.processes}: it must be 1 or more")
    return table, names


def configure(config: Config, arm: Arm, seed: int) -> Config:
    """The configuration of one run."""
    _, depth, width, *_ = config.model.name.split("-")
    kernel = 9 * int(width) ** 2
    model = arm.form.format(depth=depth, width=width, kernel=kernel)
    return dataclasses.replace(
        config,
        seed=seed,
        model=dataclasses.replace(config.model, name=model),
        penalty=dataclasses.replace(config.penalty, recurrence=arm.recurrence),
    )


# --- Training and measuring, in separate processes ---


def spread(jobs: Sequence[Job], processes: int) -> list[dict[str, Any]]:
    """Runs some jobs at a time, each on its own cores; returns their records in order."""
    with tqdm(total=len(jobs), unit="network", smoothing=0) as bar:
        if processes == 1:
            records = []
            for job in jobs:
                records.append(measure(job))
                bar.update()
            return records
        context = multiprocessing.get_context("spawn")  # JAX runs threads, which a fork would lose
        places = context.Queue()
        for place in range(processes):
            places.put(place)
        with concurrent.futures.ProcessPoolExecutor(
            processes, context, initializer=settle, initargs=(places, processes)
        ) as pool:
            futures = [pool.submit(measure, job) for job in jobs]
            try:
                for future in concurrent.futures.as_completed(futures):
                    future.result()  # raises at once, not after all others have been trained
                    bar.update()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
            return [future.result() for future in futures]


def train_together(jobs: Sequence[Job]) -> None:
    """Trains all seeds of each arm in one program."""
    from paramshare.training.loop import fit_together
    from paramshare.training.run import prepare

    for arm in dict.fromkeys(job.arm for job in jobs):
        runs = [(prepare(job.config), job.workdir) for job in jobs if job.arm == arm]
        fit_together(*zip(*runs, strict=True))


def settle(places: Any, processes: int) -> None:
    """Binds a process to its share of the cores, where the system can.

    Two networks on one core each are faster than one network on both.
    """
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        place = places.get()
        os.sched_setaffinity(0, set(cores[place::processes] or cores))


def measure(job: Job) -> dict[str, Any]:
    """Trains a network and takes all its measurements; returns a record."""
    from paramshare.training.derive import load_run
    from paramshare.training.evaluation import make_evaluate
    from paramshare.training.loop import train
    from paramshare.training.metrics import read_metrics

    config = job.config
    result = train(config, job.workdir, quiet=True)
    lines = read_metrics(job.workdir / "metrics.jsonl")
    score = result.score.name
    record: dict[str, Any] = {
        "arm": job.arm,
        "seed": config.seed,
        "model": config.model.name,
        "trainable": result.counts["trainable"],
        "seconds": result.seconds,
        "phases": list(config.data.curriculum.windows),  # pyright: ignore[reportAttributeAccessIssue]
        "epochs": [
            {
                "epoch": line["epoch"],
                "phase": line["phase"],
                "training": line[score],
                "validation": line[f"validation_{score}"],
            }
            for line in lines
            if line["kind"] == "epoch"
        ],
        "steps": [(line["step"], line[score]) for line in lines if line["kind"] == "train"],
        "steps_per_epoch": result.steps // result.epochs,
        "similar": [
            (line["epoch"], off_diagonal(matrix))
            for line in lines
            if line["kind"] == "similarity"
            for matrix in line["matrices"].values()
        ],
        "tests": {kind: test.measures for kind, test in result.others.items()},
    }
    run, variables, _ = load_run(job.workdir)
    beyond = beyond_training(run.data.others, config.data.curriculum.windows[-1])  # pyright: ignore[reportAttributeAccessIssue]
    data = dataclasses.replace(run.data, others={**run.data.others, **beyond})
    run = dataclasses.replace(run, data=data)
    evaluate = make_evaluate(run)
    record["tests"] |= {kind: evaluate(variables, beyond[kind]).measures for kind in beyond}
    network, period = run.model, int(job.arm in ("cnn", "loop1"))
    if "scnn" in job.arm:
        record["fold"], network, variables, period = fold_and_test(run, variables)
    if period and ("fold" not in record or config.penalty.recurrence):
        kinds = [name for kind in far(config) for name in (kind, f"{kind}, beyond")]
        kinds = [name for name in kinds if name in data.others]
        record["longer"] = longer(run, network, variables, period, kinds)
    return record


def fold_and_test(
    run: Any, variables: Mapping[str, Any]
) -> tuple[dict[str, Any], Any, Mapping[str, Any], int]:
    """What folding finds and costs; the network to go on with, its variables and its period."""
    from paramshare.measure.similarity import similarity
    from paramshare.shared import count
    from paramshare.training.evaluation import make_evaluate
    from paramshare.transform.folding import fold

    folded = fold(run.model, variables)
    bank = folded.banks[0]
    record: dict[str, Any] = {
        "groups": list(bank.groups),
        "period": bank.period,
        "note": bank.note,
        "kernel_error": bank.kernel_error,
        "trainable": count(folded.variables)["trainable"],
        "similarity": off_diagonal(next(iter(similarity(run.model, variables).values()))),
    }
    if not folded.changed:
        return record, run.model, variables, 0
    evaluate = make_evaluate(dataclasses.replace(run, model=folded.shared))
    record["tests"] = {
        kind: evaluate(folded.variables, source).measures
        for kind, source in run.data.others.items()
    }
    return record, folded.shared, folded.variables, bank.period or 0


def longer(
    run: Any, network: Any, variables: Mapping[str, Any], period: int, kinds: Sequence[str]
) -> list[dict[str, Any]]:
    """Tests a network that runs for more iterations, with layers repeated in each way of `HOW`.

    Batch statistics are those of training ("kept") or re-estimated ("re-estimated").
    """
    from paramshare.shared import Shared
    from paramshare.training.derive import training_inputs
    from paramshare.training.evaluation import make_evaluate
    from paramshare.transform.batch_statistics import reestimate
    from paramshare.transform.deepening import HOW, deepen

    layers = (network.model if isinstance(network, Shared) else network).depth
    records = []
    for times in MORE:
        depth = layers + round((times - 1) * layers / period) * period
        evaluate = None
        for how in HOW if depth > layers else HOW[:1]:
            deeper, deeper_variables = deepen(network, variables, depth, period=period, how=how)
            evaluate = evaluate or make_evaluate(dataclasses.replace(run, model=deeper))
            reestimated = reestimate(deeper, deeper_variables, training_inputs(run, 16))
            for statistics, chosen in (("kept", deeper_variables), ("re-estimated", reestimated)):
                tests = {kind: evaluate(chosen, run.data.others[kind]).measures for kind in kinds}
                records.append(
                    {"depth": depth, "how": how, "statistics": statistics, "tests": tests}
                )
    return records


def off_diagonal(matrix: Any) -> float:
    """The mean similarity of two different layers."""
    import numpy as np

    square = np.asarray(matrix, float)
    return float(square[~np.eye(len(square), dtype=bool)].mean())


if __name__ == "__main__":
    sys.exit(run_command(main))
