"""Pictures of shortest_paths_compare.py, and the far problems that it measures and shows."""

import dataclasses
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from shortest_paths_tables import Arms, Record, of_phase

from paramshare.training.config import Config


def beyond_training(sets: Mapping[str, Any], window: int) -> dict[str, Any]:
    """The problems of each test set whose points lie farther apart than in training, if any."""
    from paramshare.data import ArraySource
    from paramshare.data.grid_problems import smallest_window

    chosen = {kind: smallest_window(source.input) > window for kind, source in sets.items()}
    return {
        f"{kind}, beyond": ArraySource(sets[kind].input[some], sets[kind].label[some])
        for kind, some in chosen.items()
        if some.any()
    }


def far(config: Config) -> list[str]:
    """The test sets on which loops run for longer: the last phase, and the farthest beyond it."""
    curriculum = config.data.curriculum  # pyright: ignore[reportAttributeAccessIssue]
    last, size = curriculum.windows[-1], curriculum.far_sizes[-1]
    return [f"window {last}", f"window {curriculum.far_windows[-1]}", f"size {size}, window {size}"]


def draw(records: list[Record], labels: Mapping[str, str], out: pathlib.Path) -> None:
    """Draws learning curves, grids with predictions, and F1 on problems beyond training."""
    from paramshare.training.derive import load_run

    by_arm = {name: [record for record in records if record["arm"] == name] for name in labels}
    arms = [
        name
        for name in labels
        if name in ("cnn", "loop1", "rpg") or name.endswith("r") or name == max_templates(labels)
    ]
    draw_curves({labels[name]: by_arm[name] for name in arms}, out / "curves.png")
    seed = records[0]["seed"]
    networks = {labels[name]: load_run(out / f"{name}-seed{seed}")[:2] for name in arms}
    config = next(iter(networks.values()))[0].config
    draw_grids(networks, labels.get("loop1"), out / "grids.png")
    draw_reach(by_arm, labels, config, out / "reach.png")


def draw_curves(by_label: Arms, file: pathlib.Path) -> None:
    """Validation F1 by epoch, and F1 on new problems after a change of phase."""
    import numpy as np

    from paramshare.report.path_pictures import curves

    first = next(iter(by_label.values()))[0]
    steps = first["steps_per_epoch"]
    starts = [  # of each phase but the first, in epochs
        of_phase(first, phase)[0]["epoch"] - 1 for phase in range(2, len(first["phases"]) + 1)
    ]
    epochs = [line["epoch"] for line in first["epochs"]]
    x = [step for step, _ in first["steps"] if step <= steps]
    whole, early = {}, {}
    for label, runs in by_label.items():
        validation = [[line["validation"] for line in record["epochs"]] for record in runs]
        whole[label] = epochs, validation
        means = [
            np.mean([first_steps(record, start * steps, x) for start in starts], axis=0)
            for record in runs
        ]
        early[label] = x, means
    panels = {
        "validation F1 by epoch": whole,
        f"the first epoch of phases 2 to {len(first['phases'])}, by step (mean)": early,
    }
    marks = {"validation F1 by epoch": [start + 0.5 for start in starts]}
    curves(panels, file, xlabels=("epoch", "step"), marks=marks, floor=0.3)


def draw_grids(
    networks: Mapping[str, tuple[Any, Any]], loop: str | None, file: pathlib.Path
) -> None:
    """Predictions for one problem of each far test set.

    Each problem has the median number of path cells among those beyond training; nothing is picked
    by hand. If there is a loop, it is also shown with half as many layers again.
    """
    import jax.numpy as jnp
    import numpy as np

    from paramshare.report.path_pictures import grids
    from paramshare.training.derive import training_inputs
    from paramshare.transform.batch_statistics import reestimate
    from paramshare.transform.deepening import deepen

    networks = dict(networks)
    run = next(iter(networks.values()))[0]
    if loop in networks:
        trained, variables = networks[loop]
        layers = trained.model.model.depth
        deeper, variables = deepen(trained.model, variables, layers + layers // 2)
        variables = reestimate(deeper, variables, training_inputs(trained, 16))
        label = f"{loop}, {deeper.depth} layers"
        networks[label] = dataclasses.replace(trained, model=deeper), variables
    rows, predictions = {}, {label: [] for label in networks}
    beyond = beyond_training(run.data.others, run.config.data.curriculum.windows[-1])
    for kind in far(run.config):
        source: Any = beyond.get(f"{kind}, beyond", run.data.others[kind])
        cells = source.label.sum(axis=(1, 2))
        median = int(np.argsort(cells, kind="stable")[len(cells) // 2])
        rows[kind] = source.input[median], source.label[median]
        inputs = run.data.normalise(jnp.asarray(rows[kind][0][None]))
        for label, (trained_run, variables) in networks.items():
            predictions[label].append(np.asarray(trained_run.model.apply(variables, inputs)[0]) > 0)
    grids(rows, predictions, file)


def draw_reach(by_arm: Arms, labels: Mapping[str, str], config: Config, file: pathlib.Path) -> None:
    """F1 beyond training by number of kernels, way to a loop, and iterations at test time."""
    import numpy as np

    from paramshare.report.path_pictures import reach

    tests = next(iter(by_arm.values()))[0]["tests"]
    sets = [f"{kind}, beyond" if f"{kind}, beyond" in tests else kind for kind in far(config)]
    about = ("as trained", "points farther apart", "and a larger grid")
    kinds = dict(zip(about, sets, strict=True))
    soft = max_templates(labels)
    kernels = {f"scnn{k}": str(k) for k in (1, 2, 4)} | {soft: soft[4:], "cnn": "own (CNN)"}
    ways = {
        soft: "SCNN",
        f"{soft}r": "SCNN, recurrence",
        "fold": "... folded",
        "loop1": "hard loop",
    }

    def line(places: Mapping[str, str], kind: str) -> tuple[list[str], Any]:
        values = {}
        for place, text in places.items():
            runs = by_arm.get(f"{soft}r" if place == "fold" else place, [])
            results = [
                record["fold"].get("tests") if place == "fold" else record["tests"]
                for record in runs
            ]
            results = [result for result in results if result]  # some do not fold
            if results:
                values[text] = [result[kind]["f1"] for result in results]
        return list(values), np.array(list(values.values())).T

    def panel(places: Mapping[str, str]) -> dict[str, Any]:
        return {f"{text}: {kind}": line(places, kind) for text, kind in kinds.items()}

    panels = {
        "fewer kernels": panel(kernels),
        "a loop, encouraged, folded, or from the start": panel(ways),
    }
    for name, title in (
        ("loop1", "the hard loop, its middle iteration repeated"),
        ("cnn", "the CNN, its middle layer repeated"),
    ):
        runs = by_arm.get(name, [])
        if runs:
            depths = list(dict.fromkeys(entry["depth"] for entry in runs[0]["longer"]))
            panels[title] = {
                f"{text}: {kind}": (
                    depths,
                    [[iterated(record, depth, kind) for depth in depths] for record in runs],
                )
                for text, kind in kinds.items()
            }
    xlabels = ["templates of the bank", "", *["layers at test time"] * (len(panels) - 2)]
    reach(panels, file, xlabels=xlabels, ylabel="F1")


def iterated(record: Record, depth: int, kind: str) -> float:
    """F1 with the middle layer repeated and batch statistics re-estimated, at any depth."""
    way = (depth, "middle", "re-estimated")
    return next(
        entry["tests"][kind]["f1"]
        for entry in record["longer"]
        if (entry["depth"], entry["how"], entry["statistics"]) == way
    )


def first_steps(record: Record, start: int, x: Sequence[int]) -> Any:
    """Training F1 at steps `x` after `start`; in a phase's first epoch, problems are new."""
    import numpy as np

    steps, values = zip(*record["steps"], strict=True)
    return np.interp(np.asarray(x) + start, steps, values)


def max_templates(labels: Mapping[str, str]) -> str:
    """The arm with as many templates as layers."""
    return max(
        (name for name in labels if re.fullmatch(r"scnn\d+", name)),
        key=lambda name: int(name[4:]),
        default="",
    )
