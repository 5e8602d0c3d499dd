"""Draws accuracy against ring size from the runs of a comparison.

    python experiments/compare.py experiments/fashion_mnist.py --models resnet14 resnet14-rpg-171 resnet14-rpg-1705 ... --out DIR
    python experiments/ring_curve.py DIR

Reads the `result.json` of every run below DIR, and writes DIR/ring_curve.png: accuracy against ring size, with the means of the networks
that have no ring as levels.
"""

import argparse
import collections
import json
import pathlib

from paramshare.analysis.pictures import ring_curve


def main() -> None:
    """Runs what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--title", default="")
    known = parser.parse_args()
    results = [json.loads(file.read_text()) for file in sorted(known.out.glob("*/result.json"))]
    rings = [(result["counts"]["banks"], result["last"]["test"]["accuracy"]) for result in results if "-rpg" in result["model"]]
    if not rings:
        raise SystemExit(f"no finished run with a ring below {known.out}")
    levels = collections.defaultdict(list)
    for result in results:
        if not result["counts"]["banks"]:
            levels[f"{result['model']}, {result['counts']['trainable']:,} numbers"].append(result["last"]["test"]["accuracy"])
    picture = known.out / "ring_curve.png"
    ring_curve(rings, levels, picture, title=known.title)
    print(f"picture        {picture}")


if __name__ == "__main__":
    main()
