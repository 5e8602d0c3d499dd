"""Pictures of what shortest_paths_compare.py has measured, and the problems far from training that it measures and shows."""

import dataclasses
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from shortest_paths_tables import of_phase

from paramshare.training.config import Config


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
