"""What the studies share: networks by seeds, each run in its own workdir; means, intervals, tables.

The studies are scripts in this folder and import this file as `sweep`. Rerun a study to continue
it: finished runs are read and interrupted ones resume.
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
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from paramshare.cli import override
from paramshare.ops.xla import compute_convolutions_without_ynnpack
from paramshare.training.config import Config, load_file
from paramshare.training.loop import train
from paramshare.training.result import Result


def parser(about: str, seeds: Sequence[int] = (0, 1, 2)) -> argparse.ArgumentParser:
    """The arguments that all studies take: CONFIG, --seeds and --out.

    Args:
      about: the script's docstring.
      seeds: the default seeds.
    """
    arguments = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    arguments.add_argument("config", help="a Python file that sets `config`")
    arguments.add_argument("--seeds", nargs="+", type=int, default=list(seeds))
    arguments.add_argument("--out", type=pathlib.Path, required=True, help="folder of all runs")
    return arguments


def parse(arguments: argparse.ArgumentParser) -> tuple[argparse.Namespace, Config]:
    """The arguments, and the configuration with the remaining arguments as overrides."""
    compute_convolutions_without_ynnpack()
    args, overrides = arguments.parse_known_args()
    return args, override(load_file(args.config), overrides)


def with_network(config: Config, name: str, overrides: Sequence[str] = ()) -> Config:
    """The configuration with another network, and overrides for it alone."""
    config = override(config, list(overrides))
    return dataclasses.replace(config, model=dataclasses.replace(config.model, name=name))


def run(
    configs: Mapping[str, Config], seeds: Sequence[int], out: pathlib.Path
) -> dict[str, list[Result]]:
    """Trains every configuration with every seed, in `OUT/LABEL-seedN`.

    Seeds are the outer loop, so that an unfinished comparison still compares like with like.

    Returns:
      The results of each label, in the order of the seeds.
    """
    results: dict[str, list[Result]] = {label: [] for label in configs}
    for seed in seeds:
        for label, config in configs.items():
            folder = re.sub(r"[^\w.]+", "-", label)
            workdir = out / f"{folder}-seed{seed}"
            results[label].append(train(dataclasses.replace(config, seed=seed), workdir))
    return results


def mean_and_std(values: Sequence[float], form: str = ".2%") -> str:
    """The mean and, in brackets, the standard deviation of some values; "" for none.

    Example:
      >>> mean_and_std([0.98, 1.0]), mean_and_std([])
      ('99.00% (1.41%)', '')
    """
    if not values:
        return ""
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{format(statistics.fmean(values), form)} ({format(std, form)})"


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def provenance(result: Result | None = None) -> str:
    """Date, machine, versions and the command, as they stand below a table."""
    about = f"{datetime.date.today()}"
    if result is not None:
        about += (
            f", {result.devices} ({os.cpu_count()} cores, {platform.machine()}), "
            f"Python {platform.python_version()}, jax {jax.__version__}; "
            f"{result.epochs} epochs of {result.steps // result.epochs} steps."
        )
    return f"{about}\n\n    python {shlex.join(sys.argv)}\n"


def publish(out: pathlib.Path, text: str, about: str) -> None:
    """Prints a study's tables with their provenance and writes them to `OUT/table.md`."""
    (out / "table.md").write_text(f"{text}\n\n{about}")
    print(f"\n{text}\n\n{about}")
