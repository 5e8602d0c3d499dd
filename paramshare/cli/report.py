"""Commands that look at a run: similarity, report."""

import argparse
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from paramshare.cli.errors import CommandError


def add(command: Any) -> None:
    """Declares the commands."""
    similarity = command("similarity", _similarity, "how alike the layers of every bank are, as numbers and as pictures over training")
    similarity.add_argument("workdir", metavar="WORKDIR", help="of a training run, finished or not")
    similarity.add_argument(
        "--checkpoint", choices=("last", "best"), default="last", help="the last state, or the one that validation chose"
    )
    similarity.add_argument(
        "--threshold", type=float, nargs="+", default=None, metavar="T", help="count pairs of layers from these similarities on"
    )
    similarity.add_argument("--json", action="store_true", help="as JSON")

    report = command("report", _report, "write a run's report: report.html, one page with everything in it")
    report.add_argument("workdir", metavar="WORKDIR", help="of a training run, finished or not")


def _similarity(known: argparse.Namespace, rest: list[str]) -> int:
    from paramshare.analysis.folding import check_threshold
    from paramshare.analysis.snapshots import THRESHOLDS, near_pairs, snapshots
    from paramshare.shared import Shared
    from paramshare.training.metrics import read_metrics
    from paramshare.training.report import images_of, snapshot_of, variables_of
    from paramshare.training.run import named_network
    from paramshare.training.workdir import stored_config

    thresholds = tuple(check_threshold(threshold) for threshold in known.threshold or THRESHOLDS)
    workdir = pathlib.Path(known.workdir)
    config = stored_config(workdir)
    shape, classes = images_of(workdir)
    model = named_network(config, classes, shape)
    if not isinstance(model, Shared):
        raise CommandError(
            f"{config.model.name} in {workdir} has no banks, so no plan says which layers to compare; `paramshare convert` makes it a "
            "shared network, or in Python: paramshare.similarity(paramshare.share(model, plan, x), variables)"
        )
    variables, step = variables_of(workdir, config, model, shape, known.checkpoint)
    lines = read_metrics(workdir / "metrics.jsonl")
    snapshot = snapshot_of(model, variables, step, lines)
    if snapshot is None:
        raise CommandError(f"no bank of {config.model.name} has two layers of one shape, so there is nothing to compare")
    labels = layer_labels(model.layout)
    title = f"{config.model.name} on {config.data.name}"
    pictures = draw(workdir, snapshot, snapshots(lines), model.layout, thresholds, title)

    if known.json:
        banks = {
            name: {
                "layers": labels[name],
                "similarity": matrix.tolist(),
                "pairs": len(matrix) * (len(matrix) - 1) // 2,
                "near": {f"{t:g}": near_pairs(matrix, t) for t in thresholds},
            }
            for name, matrix in snapshot.matrices.items()
        }
        told = {"model": config.model.name, "checkpoint": known.checkpoint, "step": step, "epoch": snapshot.epoch}
        print(json.dumps({**told, "banks": banks, "pictures": [str(picture) for picture in pictures]}))
        return 0
    print(f"{title}, {known.checkpoint} state, step {step:,}: |cosine| between layers")
    for name, matrix in snapshot.matrices.items():
        print(f"\n{name}")
        print("\n".join(matrix_table(matrix, labels[name])))
        near = ", ".join(f"{near_pairs(matrix, t)} at {t:g}" for t in thresholds)
        print(f"pairs near 1   of {len(matrix) * (len(matrix) - 1) // 2}: {near}")
    print()
    for picture in pictures:
        print(f"picture        {picture}")
    return 0


def _report(known: argparse.Namespace, rest: list[str]) -> int:
    from paramshare.training.report import read_run, write_report

    print(f"report         {write_report(read_run(known.workdir), known.workdir)}")
    return 0


def matrix_table(matrix_LxL: Any, labels: Sequence[str]) -> list[str]:
    """Lines of a table: a row a layer under its name, the columns by number.

    Example:
      >>> from paramshare.cli.report import matrix_table
      >>> print("\\n".join(matrix_table([[1, 0.25], [0.25, 1]], ["block2/conv1", "block3/conv1"])))
                         0     1
      0 block2/conv1  1.00  0.25
      1 block3/conv1  0.25  1.00
    """
    digits, width = len(str(len(labels) - 1)), max(map(len, labels))
    head = " " * (digits + 1 + width + 2) + "".join(f"{i:>4}  " for i in range(len(labels))).rstrip()
    rows = [
        f"{i:>{digits}} {label:<{width}}  " + "  ".join(f"{value:.2f}" for value in row)
        for i, (label, row) in enumerate(zip(labels, matrix_LxL, strict=True))
    ]
    return [head, *rows]


def layer_labels(layout: Any) -> dict[str, list[str]]:
    """Short names of the layers of every similarity matrix."""
    from paramshare.analysis.pictures import site_labels
    from paramshare.analysis.similarity import layers

    return {name: site_labels(sites) for name, sites in layers(layout).items()}


def draw(workdir: pathlib.Path, now: Any, kept: Sequence[Any], layout: Any, thresholds: Sequence[float], title: str) -> list[pathlib.Path]:
    """Writes `similarity.png`, and with the snapshots that training kept `similarity_over_training.png`; returns their paths."""
    from paramshare.analysis.pictures import similarity_maps, similarity_over_training

    labels = layer_labels(layout)
    pictures = [workdir / "similarity.png"]
    try:
        similarity_maps(now.matrices, pictures[0], labels=labels, title=f"{title}: layer similarity after epoch {now.epoch}")
        if len(kept) > 1:
            pictures.append(workdir / "similarity_over_training.png")
            similarity_over_training(kept, pictures[1], thresholds=thresholds, title=f"{title}: layer similarity over training")
    except OSError as error:
        raise CommandError(
            f"{pictures[-1]} cannot be written: {error.strerror}; move it away, or see to the folder's permissions"
        ) from None
    return pictures
