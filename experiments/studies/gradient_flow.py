"""Gradients of shared filter bases in training, with and without the orthogonality penalty.

    python experiments/studies/gradient_flow.py CONFIG --model NAME --out DIR [--overrides]

NAME is a network of factored convolutions, such as resnet32-s16u1. Trains it four times: with and
without the penalty, with and without the inner batch norms. Each run has its own workdir in DIR.
Rerun the study to continue it. Draws DIR/gradient_flow.png and writes DIR/table.md: the mean and
the largest |gradient| of every basis over training, and each run's test score. (Kang & Kim,
NeurIPS 2021, show such a figure for ResNet34 on CIFAR-100.)
"""

import dataclasses
import statistics
import sys

import sweep

from paramshare import create_model
from paramshare.cli import run_command
from paramshare.report.pictures import gradient_flow
from paramshare.training.config import Penalty
from paramshare.training.loop import fit
from paramshare.training.metrics import read_metrics
from paramshare.training.run import prepare


def main() -> None:
    """Runs the study that the command line describes."""
    parser = sweep.parser(__doc__ or "", seeds=(0,))
    parser.add_argument("--model", required=True)
    parser.add_argument("--title", default=None, help="of the picture")
    args, base = sweep.parse(parser)
    weight = base.penalty.orthogonality or 10.0
    base = dataclasses.replace(sweep.with_network(base, args.model), gradient_flow=True)
    base = dataclasses.replace(base, seed=args.seeds[0])
    dataset = prepare(base).data
    options = dataset.task.network_options()

    lines, rows = {}, []
    for inner_norm in (True, False):
        for penalty in (weight, 0.0):
            label = (
                f"{'all' if inner_norm else 'no inner'} batch norms, "
                f"{f'penalty x {penalty:g}' if penalty else 'no penalty'}"
            )
            model = create_model(
                args.model, input_shape=dataset.input_shape, inner_norm=inner_norm, **options
            )
            config = dataclasses.replace(
                base,
                penalty=dataclasses.replace(base.penalty, orthogonality=penalty)
                if penalty
                else Penalty(),
            )
            workdir = args.out / label.replace(", ", "-").replace(" ", "-")
            result = fit(prepare(config, model=model, data=dataset), workdir)
            lines[label] = read_metrics(workdir / "metrics.jsonl")
            score = result.score.format(result.last_score)
            rows.append([label, _median(lines[label], "mean"), _median(lines[label], "max"), score])
    picture = args.out / "gradient_flow.png"
    title = args.title or f"{args.model} on {dataset.name}: gradients of the shared bases"
    gradient_flow(lines, picture, title=title)
    head = [
        "",
        "median of mean abs. gradient, by basis",
        "median of largest",
        f"test {result.score.title}",
    ]
    sweep.publish(args.out, sweep.table(head, rows), sweep.provenance(result))
    print(f"picture        {picture}")


def _median(lines: list[dict], statistic: str) -> str:
    """The median over training of the mean or largest gradient of each bank."""
    train = [line for line in lines if line["kind"] == "train"]
    names = [name for name in train[0] if name.startswith(f"gradient_{statistic}/")]
    medians = (statistics.median(line[name] for line in train) for name in names)
    return ", ".join(f"{median:.1e}" for median in medians)


if __name__ == "__main__":
    sys.exit(run_command(main))
