"""Draws accuracy against ring size from the runs of a comparison.

    python experiments/compare.py experiments/fashion_mnist.py --models resnet14 resnet14-rpg-171 resnet14-rpg-1705 ... --out DIR
    python experiments/ring_curve.py DIR

Reads the `result.json` of every run below DIR, and writes DIR/ring_curve.png: one point a run, lines through the means, plain
networks beside the rings.
"""

import argparse
import collections
import json
import pathlib

from paramshare.analysis.pictures import accuracy_curve


def main() -> None:
    """Runs what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path)
    out = parser.parse_args().out
    results = [json.loads(file.read_text()) for file in sorted(out.glob("*/result.json"))]
    if not results:
        raise SystemExit(f"no finished run below {out}")
    points = collections.defaultdict(list)
    for result in results:
        kind = "one ring for all convolutions of the stages" if result["counts"]["banks"] else "without sharing, at several widths"
        points[kind].append((result["counts"]["trainable"], result["last"]["test"]["accuracy"]))
    picture = out / "ring_curve.png"
    accuracy_curve(dict(sorted(points.items())), picture, title=f"{results[0]['model'].split('-')[0]} on {results[0]['data']}")
    print(f"picture        {picture}")


if __name__ == "__main__":
    main()
