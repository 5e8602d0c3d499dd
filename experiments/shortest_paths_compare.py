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
from collections.abc import Callable, Mapping, Sequence
from typing import Any

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


def beyond_training(sets: Mapping[str, Any], window: int) -> dict[str, Any]:
    """Of every test set those problems alone whose points lie farther apart than trained on, where there are any."""
    from paramshare.training.data import ArraySource
    from paramshare.training.data.grids import apart

    chosen = {kind: apart(source.image) > window for kind, source in sets.items()}
    return {f"{kind}, beyond": ArraySource(sets[kind].image[some], sets[kind].label[some]) for kind, some in chosen.items() if some.any()}


def far(config: Config) -> list[str]:
    """The test sets on which loops are run for longer: what was trained on last, and what lies farthest beyond it."""
    curriculum = config.data.curriculum
    last, size = curriculum.windows[-1], curriculum.far_sizes[-1]
    return [f"window {last}", f"window {curriculum.far_windows[-1]}", f"size {size}, window {size}"]


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


# --- Tables ---

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


# --- Pictures ---


def draw(records: list[dict[str, Any]], labels: Mapping[str, str], out: pathlib.Path) -> None:
    """Learning curves, grids with predictions, and how far what is learned reaches."""
    import jax.numpy as jnp
    import numpy as np

    from paramshare.analysis.batch_statistics import reestimate
    from paramshare.analysis.deepening import deepen
    from paramshare.analysis.path_pictures import curves, grids, reach
    from paramshare.training.data import normalise
    from paramshare.training.derive import trained, training_images

    by_arm = {name: [record for record in records if record["arm"] == name] for name in labels}
    shown = [name for name in labels if name in ("cnn", "loop1", "rpg") or name.endswith("r") or name == max_templates(labels)]
    whole, early = {}, {}
    first = records[0]
    phases, steps = len(first["phases"]), first["steps_per_epoch"]
    starts = [line["epoch"] - 1 for line in first["epochs"] if line["epoch"] == 1 or of_phase(first, line["phase"])[0] is line]
    for name in shown:
        its = by_arm[name]
        epochs = [line["epoch"] for line in its[0]["epochs"]]
        whole[labels[name]] = (epochs, [[line["validation_f1"] for line in record["epochs"]] for record in its])
        x = [step for step, _ in first["steps"] if step <= steps]
        early[labels[name]] = (x, [np.mean([first_steps(record, start * steps, x) for start in starts[1:]], axis=0) for record in its])
    panels = {"validation F1 by epoch": whole, f"the first epoch of phases 2 to {phases}, by step (mean)": early}
    marks = {"validation F1 by epoch": [start + 0.5 for start in starts[1:]]}
    curves(panels, out / "curves.png", xlabels=("epoch", "step"), marks=marks, floor=0.3)

    # --- Of every test set a problem with as many path cells as is usual there, beyond what was trained on: nothing picked by hand
    networks = {labels[name]: trained(out / f"{name}-seed{first['seed']}")[:2] for name in shown}
    run = next(iter(networks.values()))[0]
    if "loop1" in by_arm:
        loop, variables = networks[labels["loop1"]]
        trained_loop: Any = loop.model
        layers = trained_loop.model.depth
        deeper, its = deepen(trained_loop, variables, layers + layers // 2)
        its = reestimate(deeper, its, training_images(loop, 16))
        networks[f"{labels['loop1']}, {deeper.depth} layers"] = dataclasses.replace(loop, model=deeper), its
    rows, predictions = {}, {label: [] for label in networks}
    beyond = beyond_training(run.data.others, run.config.data.curriculum.windows[-1])
    for kind in far(run.config):
        source: Any = beyond.get(f"{kind}, beyond", run.data.others[kind])
        cells = source.label.sum(axis=(1, 2))
        usual = int(np.argsort(cells, kind="stable")[len(cells) // 2])
        rows[kind] = source.image[usual], source.label[usual]
        for label, (its, variables) in networks.items():
            logits = its.model.apply(variables, normalise(jnp.asarray(rows[kind][0][None]), run.data.mean, run.data.std))
            predictions[label].append(np.asarray(logits[0]) > 0)
    grids(rows, predictions, out / "grids.png")

    # --- How far it reaches: kernels, folding, iterations
    sets = [f"{kind}, beyond" if f"{kind}, beyond" in first["tests"] else kind for kind in far(run.config)]
    kinds = dict(zip(("as trained", "points farther apart", "and a larger grid"), sets, strict=True))
    names = {f"scnn{k}": str(k) for k in (1, 2, 4)} | {max_templates(labels): max_templates(labels)[4:], "cnn": "own (CNN)"}
    ways = {max_templates(labels): "SCNN", f"{max_templates(labels)}r": "SCNN, recurrence", "fold": "... folded", "loop1": "hard loop"}

    def line(places: Mapping[str, str], kind: str) -> tuple[list[str], Any]:
        found = {}
        for place, text in places.items():
            its = by_arm.get(f"{max_templates(labels)}r" if place == "fold" else place, [])
            tests = [record["fold"].get("tests") if place == "fold" else record["tests"] for record in its]
            tests = [test for test in tests if test]  # some may not fold
            if tests:
                found[text] = [test[kind]["f1"] for test in tests]
        return list(found), np.array(list(found.values())).T

    panels = {
        "fewer kernels": {f"{about}: {kind}": line(names, kind) for about, kind in kinds.items()},
        "a loop, encouraged, folded, or from the start": {f"{about}: {kind}": line(ways, kind) for about, kind in kinds.items()},
    }
    for name, title in (("loop1", "the hard loop, its middle iteration repeated"), ("cnn", "the CNN, its middle layer repeated")):
        its = by_arm.get(name, [])
        if its:
            depths = list(dict.fromkeys(entry["depth"] for entry in its[0]["longer"]))
            panels[title] = {
                f"{about}: {kind}": (depths, [[iterated(record, depth, kind) for depth in depths] for record in its])
                for about, kind in kinds.items()
            }
    xlabels = ["templates of the bank", "", *["layers at test time"] * (len(panels) - 2)]  # there may be neither
    reach(panels, out / "reach.png", xlabels=xlabels, ylabel="F1")


def iterated(record: dict[str, Any], depth: int, kind: str) -> float:
    """F1 of a network whose middle layer is repeated, with batch statistics gathered anew, also at the depth that it was trained with."""
    wanted = (depth, "middle", "anew")
    return next(e["tests"][kind]["f1"] for e in record["longer"] if (e["depth"], e["how"], e["statistics"]) == wanted)


def first_steps(record: dict[str, Any], start: int, x: Sequence[int]) -> Any:
    """Training F1 at so many steps behind `start`: in a phase's first epoch that is of problems not seen before."""
    import numpy as np

    steps, values = zip(*record["steps"], strict=True)
    return np.interp(np.asarray(x) + start, steps, values)


def max_templates(labels: Mapping[str, str]) -> str:
    """The arm with a template for each layer."""
    return max((name for name in labels if re.fullmatch(r"scnn\d+", name)), key=lambda name: int(name[4:]), default="")


if __name__ == "__main__":
    sys.exit(run_told(main))
