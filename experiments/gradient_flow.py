"""Gradients of shared filter bases while training: with and without the orthogonality penalty, with and without inner batch norms.

    python experiments/gradient_flow.py CONFIG --model NAME --out DIR [--overrides]

NAME is a network of factored convolutions, such as resnet32-s16u1. Four runs, each with a workdir of its own below DIR; started again,
finished runs are read and interrupted ones go on. Draws DIR/gradient_flow.png and writes DIR/table.md: the mean and the largest |gradient|
of every basis, over training, and each run's test accuracy (Kang & Kim, NeurIPS 2021, whose figure is of ResNet34 on CIFAR-100).
"""

import argparse
import dataclasses
import pathlib
import shlex
import statistics
import sys

from paramshare import create_model
from paramshare.analysis.pictures import gradient_flow
from paramshare.cli import override, run_told
from paramshare.training.config import Penalty, load_file
from paramshare.training.loop import fit
from paramshare.training.metrics import read_metrics
from paramshare.training.run import prepare


def main() -> None:
    """Runs what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--title", default=None, help="of the picture")
    known, rest = parser.parse_known_args()
    base = override(load_file(known.config), rest, known.config)
    weight = base.penalty.orthogonality or 10.0
    base = dataclasses.replace(base, model=dataclasses.replace(base.model, name=known.model), gradient_flow=True)
    data = prepare(base).data

    lines, rows = {}, []
    for norms in (True, False):
        for penalty in (weight, 0.0):
            label = f"{'all' if norms else 'no inner'} batch norms, {f'penalty x {penalty:g}' if penalty else 'no penalty'}"
            model = create_model(known.model, data.num_classes, data.image_shape, inner_norm=norms)
            config = dataclasses.replace(base, penalty=dataclasses.replace(base.penalty, orthogonality=penalty) if penalty else Penalty())
            workdir = known.out / label.replace(", ", "-").replace(" ", "-")
            result = fit(prepare(config, model=model, data=data), workdir)
            lines[label] = read_metrics(workdir / "metrics.jsonl")
            rows.append(
                f"| {label} | {_of(lines[label], 'mean')} | {_of(lines[label], 'max')} | {result['last']['test']['accuracy']:.2%} |"
            )
    picture = known.out / "gradient_flow.png"
    gradient_flow(lines, picture, title=known.title or f"{known.model} on {data.name}: gradients of the shared bases")
    head = "| | median of mean abs. gradient, by basis | median of largest | test accuracy |"
    table = "\n".join([head, "|---|---|---|---|", *rows])
    (known.out / "table.md").write_text(f"{table}\n\n    python {shlex.join(sys.argv)}\n")
    print(f"\n{table}\n\npicture        {picture}")


def _of(lines: list[dict], what: str) -> str:
    """The median over training of a bank's mean or largest gradient, bank by bank."""
    train = [line for line in lines if line["kind"] == "train"]
    names = [name for name in train[0] if name.startswith(f"gradient_{what}/")]
    return ", ".join(f"{statistics.median(line[name] for line in train):.1e}" for name in names)


if __name__ == "__main__":
    sys.exit(run_told(main))
