"""Trains several networks on one configuration, several seeds each, and writes a table of what came out.

    python experiments/compare.py CONFIG --models NAME ... --seeds 0 1 2 --out DIR [--overrides]

A NAME in quotes may bring overrides of its own: "resnet20-s16u1 --penalty.orthogonality 10". Every run has a workdir of its own below
DIR; started again, finished runs are read and interrupted ones go on. The table is printed, and written to DIR/table.md.
"""

import argparse
import dataclasses
import datetime
import os
import pathlib
import platform
import re
import shlex
import statistics
import sys

import jax

from paramshare.cli import override, run_told
from paramshare.training.config import load_file
from paramshare.training.loop import train


def main() -> None:
    """Runs what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    known, rest = parser.parse_known_args()
    base = override(load_file(known.config), rest, known.config)

    configs = {}
    for name in known.models:
        network, *own = shlex.split(name)
        config = override(base, own, known.config)
        configs[name] = dataclasses.replace(config, model=dataclasses.replace(config.model, name=network))

    rows = []
    # Seed by seed, so that an unfinished comparison still compares like with like.
    results: dict[str, list[dict]] = {name: [] for name in known.models}
    for seed in known.seeds:
        for name, config in configs.items():
            folder = re.sub(r"[^\w.]+", "-", name)
            results[name].append(train(dataclasses.replace(config, seed=seed), known.out / f"{folder}-seed{seed}"))
    for name, found in results.items():
        last = [r["last"]["test"]["accuracy"] for r in found]
        chosen = [r["selected"]["test"]["accuracy"] for r in found if r["selected"]]
        rows.append(
            f"| {name} | {found[0]['counts']['trainable']:,} | {_mean(last)} | {_mean(chosen)} | {', '.join(f'{a:.2%}' for a in last)} |"
        )

    head = f"| network | trainable | test accuracy, last epoch, mean of {len(known.seeds)} seeds (std) | chosen by validation | each seed |"
    table = "\n".join([head, "|---|---|---|---|---|", *rows])
    some = next(iter(results.values()))[0]
    about = (
        f"{datetime.date.today()}, {some['devices']} ({os.cpu_count()} cores, {platform.machine()}), "
        f"Python {platform.python_version()}, jax {jax.__version__}; "
        f"{some['epochs']} epochs of {some['steps'] // some['epochs']} steps.\n\n    python {shlex.join(sys.argv)}\n"
    )
    (known.out / "table.md").write_text(f"{table}\n\n{about}")
    print(f"\n{table}\n\n{about}")


def _mean(values: list[float]) -> str:
    if not values:
        return ""
    return f"{statistics.mean(values):.2%} ({statistics.stdev(values) if len(values) > 1 else 0:.2%})"


if __name__ == "__main__":
    sys.exit(run_told(main))
