"""Commands that show how a run went: similarity, report."""

import argparse
import pathlib
from collections.abc import Sequence
from typing import Any

from paramshare.cli.errors import CommandError
from paramshare.cli.parsing import add_checkpoint
from paramshare.storage import run_path


def add(command: Any) -> None:
    """Declares the commands."""
    similarity = command(
        "similarity",
        _similarity,
        "print and draw the similarity of the layers in every bank",
    )
    similarity.add_argument("workdir", metavar="WORKDIR", help="of a run, finished or not")
    add_checkpoint(similarity)
    similarity.add_argument(
        "--threshold",
        type=float,
        nargs="+",
        metavar="T",
        help="count the pairs of layers with at least these similarities",
    )
    similarity.add_argument("--json", action="store_true", help="print JSON")

    report = command("report", _report, "write the report of a run, report.html, in its workdir")
    report.add_argument("workdir", metavar="WORKDIR", help="of a run, finished or not")


def _similarity(args: argparse.Namespace, overrides: list[str]) -> int:
    from paramshare.measure.snapshots import THRESHOLDS, near_pairs, snapshots
    from paramshare.report.record import snapshot_of
    from paramshare.shared import Shared
    from paramshare.storage import json_text
    from paramshare.training.metrics import METRICS, read_metrics
    from paramshare.training.workdir import network_variables, stored_network
    from paramshare.transform.folding import check_threshold

    thresholds = tuple(check_threshold(threshold) for threshold in args.threshold or THRESHOLDS)
    workdir = run_path(args.workdir)
    config, facts, model = stored_network(workdir)
    if not isinstance(model, Shared):
        raise CommandError(
            f"{config.model.name} in {workdir} shares no weights, so that no layers are compared; "
            "`paramshare convert` converts it to a shared network"
        )
    variables, step = network_variables(workdir, config, facts, model, args.checkpoint)
    lines = read_metrics(workdir / METRICS)
    snapshot = snapshot_of(model, variables, step, lines)
    if snapshot is None:
        raise CommandError(
            f"{config.model.name} has no bank with two layers of one shape, so that no layers are "
            "compared; choose another network"
        )
    labels = layer_labels(model.layout)
    title = f"{config.model.name} on {config.data.name}"
    pictures = draw(workdir, snapshot, snapshots(lines), model.layout, thresholds, title)

    if args.json:
        banks = {
            name: {
                "layers": labels[name],
                "similarity": matrix.tolist(),
                "pairs": len(matrix) * (len(matrix) - 1) // 2,
                "near": {f"{t:g}": near_pairs(matrix, t) for t in thresholds},
            }
            for name, matrix in snapshot.matrices.items()
        }
        about = {
            "model": config.model.name,
            "checkpoint": args.checkpoint,
            "step": step,
            "epoch": snapshot.epoch,
        }
        print(json_text(about | {"banks": banks, "pictures": [str(path) for path in pictures]}))
        return 0
    print(f"{title}, {args.checkpoint} state, step {step:,}: |cosine| between layers")
    for name, matrix in snapshot.matrices.items():
        print(f"\n{name}")
        print("\n".join(matrix_table(matrix, labels[name])))
        near = ", ".join(f"{near_pairs(matrix, t)} at {t:g}" for t in thresholds)
        print(f"similar pairs  of {len(matrix) * (len(matrix) - 1) // 2}: {near}")
    print()
    for picture in pictures:
        print(f"picture        {picture}")
    return 0


def _report(args: argparse.Namespace, overrides: list[str]) -> int:
    from paramshare.report.page import write_report
    from paramshare.report.record import read_run

    print(f"report         {write_report(read_run(args.workdir), args.workdir)}")
    return 0


def matrix_table(matrix_LxL: Any, labels: Sequence[str]) -> list[str]:
    """Lines of a table: one row per layer with its name, columns by number.

    Example:
      >>> from paramshare.cli.report import matrix_table
      >>> print("\\n".join(matrix_table([[1, 0.25], [0.25, 1]], ["block2/conv1", "block3/conv1"])))
                         0     1
      0 block2/conv1  1.00  0.25
      1 block3/conv1  0.25  1.00
    """
    digits, width = len(str(len(labels) - 1)), max(map(len, labels))
    numbers = "".join(f"{i:>4}  " for i in range(len(labels))).rstrip()
    rows = [
        f"{i:>{digits}} {label:<{width}}  " + "  ".join(f"{value:.2f}" for value in row)
        for i, (label, row) in enumerate(zip(labels, matrix_LxL, strict=True))
    ]
    return [" " * (digits + 1 + width + 2) + numbers, *rows]


def layer_labels(layout: Any) -> dict[str, list[str]]:
    """Short names of the layers of every similarity matrix."""
    from paramshare.measure.similarity import layers
    from paramshare.report.pictures import site_labels

    return {name: site_labels(sites) for name, sites in layers(layout).items()}


def draw(
    workdir: pathlib.Path,
    snapshot: Any,
    history: Sequence[Any],
    layout: Any,
    thresholds: Sequence[float],
    title: str,
) -> list[pathlib.Path]:
    """Draws the similarity now, and over training if the run recorded it; returns the files."""
    from paramshare.report.pictures import similarity_maps, similarity_over_training

    pictures = [workdir / "similarity.png"]
    similarity_maps(
        snapshot.matrices,
        pictures[0],
        labels=layer_labels(layout),
        title=f"{title}: layer similarity after epoch {snapshot.epoch}",
    )
    if len(history) > 1:
        pictures.append(workdir / "similarity_over_training.png")
        similarity_over_training(
            history,
            pictures[1],
            thresholds=thresholds,
            title=f"{title}: layer similarity over training",
        )
    return pictures
