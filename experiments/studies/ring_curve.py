"""Draws the score against the ring size from the runs of a comparison.

    python experiments/studies/compare.py experiments/recipes/fashion_mnist.py \\
        --models resnet14 resnet14-rpg-171 resnet14-rpg-1705 ... --out DIR
    python experiments/studies/ring_curve.py DIR

Reads the `result.json` of every run in DIR and writes DIR/ring_curve.png. Networks without a ring
are drawn as horizontal lines at their means.
"""

import argparse
import collections
import pathlib

from paramshare.report.pictures import ring_curve
from paramshare.training.result import Result


def main() -> None:
    """Draws the curve that the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--title", default="")
    args = parser.parse_args()
    results = [Result.read(file) for file in sorted(args.out.glob("*/result.json"))]
    rings = [(run.counts["banks"], run.last_score) for run in results if "-rpg" in run.model]
    if not rings:
        raise SystemExit(f"{args.out} holds no finished run of a network with a ring")
    levels = collections.defaultdict(list)
    for run in results:
        if not run.counts["banks"]:
            label = f"{run.model}, {run.counts['trainable']:,} parameters"
            levels[label].append(run.last_score)
    picture = args.out / "ring_curve.png"
    ring_curve(rings, levels, picture, title=args.title)
    print(f"picture        {picture}")


if __name__ == "__main__":
    main()
