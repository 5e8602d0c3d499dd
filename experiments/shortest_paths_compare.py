"""Who learns shortest paths faster, and who gets farther: plain, shared, recurrent and looped networks over several seeds.

    python experiments/shortest_paths_compare.py CONFIG --out DIR --seeds 0 1 2 3 4 --processes 2 [--overrides]

For every seed and every arm (see `arms`; sizes are those of CONFIG's network) trains a network on the curriculum, tests it on all problem
sets, folds it where its layers are similar, and runs loops for more iterations than they were trained for. Every run has a workdir of its
own below DIR; started again, finished runs are read and interrupted ones go on. With --processes, so many networks are trained at a time,
each on its share of the CPU's cores. Writes DIR/measured.json, DIR/tables.md, DIR/curves.png, DIR/grids.png and DIR/reach.png.
"""

import argparse
import concurrent.futures
import dataclasses
import datetime
import json
import multiprocessing
import os
import pathlib
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from shortest_paths_pictures import beyond_training, draw, far
from shortest_paths_tables import tables
from tqdm import tqdm

from paramshare.cli import override, run_told
from paramshare.training.config import Config, ConfigError, load_file

MORE = (1.0, 1.2, 1.5, 2.0)  # iterations at test time, times those of training


@dataclasses.dataclass(frozen=True)
class Arm:
    """A network that is compared."""

    label: str
    form: str
    recurrence: float = 0.0


def arms(depth: int) -> dict[str, Arm]:
    """What is compared, for networks of a depth: by the name of their workdirs."""
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
    """Runs what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("config")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--arms", nargs="+", default=None, help="names of workdirs without their seed, or all; four unless given")
    parser.add_argument("--processes", type=int, default=1, help="networks trained at a time")
    parser.add_argument("--together", action="store_true", help="train the seeds of an arm in one program, for an accelerator")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    known, rest = parser.parse_known_args()
    base = override(load_file(known.config), rest, known.config)
    found = re.fullmatch(r"s?pathnet-(\d+)-(\d+)(-.*)?", base.model.name)
    if found is None or base.data.name != "grids":
        raise ConfigError(f"{known.config} trains {base.model.name} on {base.data.name}; a path net on grids is wanted")
    if not (base.data.validation and base.validate_every == 1 and base.data.curriculum.far_windows and base.data.curriculum.far_sizes):
        raise ConfigError(
            f"{known.config}: data.validation={base.data.validation}, validate_every={base.validate_every}, curriculum.far_windows="
            f"{base.data.curriculum.far_windows}, far_sizes={base.data.curriculum.far_sizes}: what is compared takes a validation each "
            "epoch, and a far window and a far size or more"
        )
    depth, width = int(found[1]), int(found[2])
    table = arms(depth)
    wanted = list(table) if known.arms == ["all"] else known.arms or list(table)[:4]
    unknown = sorted(set(wanted) - set(table))
    if unknown or known.processes < 1:
        raise ConfigError(f"--arms {unknown}, --processes {known.processes}: arms are {', '.join(table)}, processes 1 or more")
    tasks = []
    for seed in known.seeds:
        for name in wanted:
            model = table[name].form.format(depth=depth, width=width, kernel=9 * width * width)
            config = dataclasses.replace(
                base,
                seed=seed,
                model=dataclasses.replace(base.model, name=model),
                penalty=dataclasses.replace(base.penalty, recurrence=table[name].recurrence),
            )
            tasks.append((name, config, known.out / f"{name}-seed{seed}"))
    known.out.mkdir(parents=True, exist_ok=True)
    if known.together:
        train_together(tasks)
    records = spread(tasks, known.processes)
    (known.out / "measured.json").write_text(json.dumps(records) + "\n")
    labels = {name: table[name].label for name in wanted}
    about = f"{datetime.date.today()}\n\n    python {shlex.join(sys.argv)}\n"
    text = f"{tables(records, labels)}\n\n{about}"
    (known.out / "tables.md").write_text(text)
    draw(records, labels, known.out)
    print(f"\n{text}")


# --- Training and measuring, in processes of their own ---


def spread(tasks: Sequence[tuple[str, Config, pathlib.Path]], processes: int) -> list[dict[str, Any]]:
    """Runs tasks, some at a time, each on its own cores; their records, in order."""
    with tqdm(total=len(tasks), unit="network", smoothing=0) as bar:
        if processes == 1:
            found = []
            for task in tasks:
                found.append(one(task))
                bar.update()
            return found
        context = multiprocessing.get_context("spawn")  # JAX runs threads, which a fork would lose
        places = context.Queue()
        for place in range(processes):
            places.put(place)
        with concurrent.futures.ProcessPoolExecutor(processes, context, initializer=settle, initargs=(places, processes)) as pool:
            waiting = [pool.submit(one, task) for task in tasks]
            try:
                for done in concurrent.futures.as_completed(waiting):
                    done.result()  # a failure is told at once, not when all others have been trained
                    bar.update()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
            return [task.result() for task in waiting]


def train_together(tasks: Sequence[tuple[str, Config, pathlib.Path]]) -> None:
    """Trains all seeds of an arm at once."""
    from paramshare.training.loop import fit_together
    from paramshare.training.run import prepare

    for arm in dict.fromkeys(name for name, _, _ in tasks):
        its = [(prepare(config), workdir) for name, config, workdir in tasks if name == arm]
        fit_together(*zip(*its, strict=True))


def settle(places: Any, processes: int) -> None:
    """Keeps a process to its share of the cores, where the system can: two networks on a core each are faster than one on both."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        place = places.get()
        os.sched_setaffinity(0, set(cores[place::processes] or cores))


def one(task: tuple[str, Config, pathlib.Path]) -> dict[str, Any]:
    """Trains a network, and measures it in every way: a record."""
    from paramshare.analysis.folding import fold
    from paramshare.analysis.similarity import similarity
    from paramshare.shared import Shared, count
    from paramshare.training.derive import trained
    from paramshare.training.evaluation import make_evaluate
    from paramshare.training.loop import train
    from paramshare.training.metrics import read_metrics

    name, config, workdir = task
    result = train(config, workdir, quiet=True)
    lines = read_metrics(workdir / "metrics.jsonl")
    record: dict[str, Any] = {
        "arm": name,
        "seed": config.seed,
        "model": config.model.name,
        "trainable": result["counts"]["trainable"],
        "seconds": result["seconds"],
        "phases": list(config.data.curriculum.windows),
        "epochs": [{key: line[key] for key in ("epoch", "phase", "f1", "validation_f1")} for line in lines if line["kind"] == "epoch"],
        "steps": [(line["step"], line["f1"]) for line in lines if line["kind"] == "train"],
        "steps_per_epoch": result["steps"] // result["epochs"],
        "similar": [
            (line["epoch"], off_diagonal(matrix)) for line in lines if line["kind"] == "similarity" for matrix in line["matrices"].values()
        ],
        "tests": result["last"]["others"],
    }
    run, variables, _ = trained(workdir)
    beyond = beyond_training(run.data.others, config.data.curriculum.windows[-1])
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, others={**run.data.others, **beyond}))
    evaluate = make_evaluate(run)
    record["tests"] |= {kind: evaluate(variables, source) for kind, source in beyond.items()}
    network, its, period = run.model, variables, int(name in ("cnn", "loop1"))
    if isinstance(network, Shared) and "scnn" in name:
        folded = fold(network, variables)
        bank = folded.banks[0]
        record["fold"] = {
            "groups": list(bank.groups),
            "period": bank.period,
            "note": bank.note,
            "kernel_error": bank.kernel_error,
            "trainable": count(folded.variables)["trainable"],
            "similarity": off_diagonal(next(iter(similarity(network, variables).values()))),
        }
        if folded.changed:
            again = dataclasses.replace(run, model=folded.shared)
            evaluate = make_evaluate(again)
            record["fold"]["tests"] = {kind: evaluate(folded.variables, source) for kind, source in run.data.others.items()}
            network, its, period = folded.shared, folded.variables, bank.period or 0
    if period and ("fold" not in record or config.penalty.recurrence):
        kinds = [name for kind in far(config) for name in (kind, f"{kind}, beyond") if name in run.data.others]
        record["longer"] = longer(run, network, its, period, kinds)
    return record


def longer(run: Any, network: Any, variables: Mapping[str, Any], period: int, kinds: Sequence[str]) -> list[dict[str, Any]]:
    """F1 of a network that is run for more iterations, in every way, with batch statistics as they were and gathered anew."""
    from paramshare.analysis.batch_statistics import reestimate
    from paramshare.analysis.deepening import HOW, deepen
    from paramshare.shared import Shared
    from paramshare.training.derive import training_images
    from paramshare.training.evaluation import make_evaluate

    layers = (network.model if isinstance(network, Shared) else network).depth
    found = []
    for times in MORE:
        depth = layers + round((times - 1) * layers / period) * period
        evaluate = None
        for how in HOW if depth > layers else HOW[:1]:
            deeper, its = deepen(network, variables, depth, period=period, how=how)
            evaluate = evaluate or make_evaluate(dataclasses.replace(run, model=deeper))
            fresh = reestimate(deeper, its, training_images(run, 16))
            for statistics, chosen in (("kept", its), ("anew", fresh)):
                tests = {kind: evaluate(chosen, run.data.others[kind]) for kind in kinds}
                found.append({"depth": depth, "how": how, "statistics": statistics, "tests": tests})
    return found


def off_diagonal(matrix: Any) -> float:
    """The mean similarity of two different layers."""
    import numpy as np

    square = np.asarray(matrix, float)
    return float(square[~np.eye(len(square), dtype=bool)].mean())


if __name__ == "__main__":
    sys.exit(run_told(main))
