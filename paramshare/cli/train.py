"""`paramshare train`."""

import argparse
import contextlib
import dataclasses
import difflib
import io
import itertools
import pathlib
import re
from typing import TYPE_CHECKING, Any

from paramshare.cli.errors import CommandError

if TYPE_CHECKING:
    from paramshare.training.config import Config
    from paramshare.training.run import Run


def add(command: Any) -> None:
    """Declares the command."""
    train = command(
        "train", run, "train a network, or go on with an interrupted run", overrides=True, add_help=False, allow_abbrev=False
    )  # `--seed` is no short form of `--seeds`
    train.add_argument("--workdir", metavar="DIR")
    train.add_argument("--seeds", nargs="+", type=int, metavar="SEED", default=None)
    train.add_argument("--distributed", action="store_true")


def run(known: argparse.Namespace, rest: list[str]) -> int:
    """Trains, and reports."""
    from paramshare.training import config as configs
    from paramshare.training.loop import fit_together
    from paramshare.training.run import prepare
    from paramshare.training.workdir import stored_config

    # Not left to argparse, which would take the value of an override for it.
    file, rest = (rest[0], rest[1:]) if rest and not rest[0].startswith("-") else (None, rest)
    if {"-h", "--help"} & set(rest):
        override(configs.load_file(file) if file else configs.Config(), ["--help"], file or "CONFIG")
    stored = known.workdir is not None and (pathlib.Path(known.workdir) / "config.json").is_file()
    if file is None and not stored:
        raise CommandError("train needs a configuration: a Python file such as experiments/quickstart.py; see `paramshare train --help`")
    if known.workdir is None:
        raise CommandError("train needs --workdir DIR: where the run is kept, and found again when the same command is given again")
    # A workdir knows its own configuration.
    base = configs.load_file(file) if file else stored_config(pathlib.Path(known.workdir))
    config = override(base, rest, file or "CONFIG")
    if known.seeds is not None and any(word.partition("=")[0] == "--seed" for word in rest):
        several = " ".join(map(str, known.seeds))
        raise configs.ConfigError(f"--seeds {several} and --seed {config.seed} are both given; leave one of them out")
    if known.distributed:
        _join()
    workdir = pathlib.Path(known.workdir)
    if known.seeds is None:
        runs = [(prepare(config), workdir)]
    else:
        runs = [(prepare(dataclasses.replace(config, seed=seed)), workdir / f"seed{seed}") for seed in known.seeds]
    results = fit_together(*zip(*runs, strict=True))
    for (prepared, place), result in zip(runs, results, strict=True):
        report(prepared, place, result)
    return 0


def _join() -> None:
    """Makes this one process of several."""
    import jax

    try:
        jax.distributed.initialize()
    except (RuntimeError, ValueError) as error:
        raise CommandError(
            f"--distributed finds no cluster ({error}); it knows TPU pods, Slurm, Open MPI and Kubernetes by their environment"
        ) from None


def override(config: "Config", rest: list[str], file: str) -> "Config":
    """The configuration with `--field value` put over it; tyro knows the fields, their types and their help."""
    import tyro

    from paramshare.training.config import Config

    if {"-h", "--help"} & set(rest):
        about = (
            "Trains a network, or goes on with an interrupted run. CONFIG is a Python file that sets `config`; the options override "
            "its fields. With --seeds 0 1 2, networks of several seeds are trained at once, in DIR/seed0, DIR/seed1, ...: meant for an "
            "accelerator that one small network leaves idle, and slower on a CPU. With --distributed this is one process of several "
            "(TPU pods, Slurm): give the same command on every host, with a workdir that all can reach."
        )
        return tyro.cli(Config, default=config, args=["--help"], prog=f"paramshare train {file} --workdir DIR", description=about)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            config, unknown = tyro.cli(Config, default=config, args=rest, prog="paramshare train", return_unknown_args=True)
    except SystemExit:
        # tyro draws a box: a title, the error, and the help of the argument it is about. The error is what a line has room for.
        lines = [" ".join(re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]", " ", line).split()) for line in said.getvalue().splitlines()]
        body = itertools.takewhile(lambda line: not line.startswith(("Argument helptext", "For full helptext")), lines[1:])
        message = " ".join(line for line in body if line.strip("- "))
        raise CommandError(f"{message}; see `paramshare train {file} --help`") from None
    if unknown:
        options = [f"--{name.replace('_', '-')}" for name in _field_names(config)]
        near = difflib.get_close_matches(unknown[0], options, n=2, cutoff=0.5)
        raise CommandError(
            f"no override {unknown[0]!r}; " + (f"nearest: {', '.join(near)}; " if near else "") + f"see `paramshare train {file} --help`"
        )
    return config


def _field_names(value: Any, prefix: str = "") -> list[str]:
    names = []
    for field in dataclasses.fields(value):
        part = getattr(value, field.name)
        names += _field_names(part, f"{prefix}{field.name}.") if dataclasses.is_dataclass(part) else [prefix + field.name]
    return names


def report(run: "Run", workdir: pathlib.Path, result: dict[str, Any]) -> None:
    """Draws the pictures of a finished run and writes its report, into its workdir, and prints its result."""
    import jax

    if jax.process_index() != 0:
        return
    from paramshare.analysis.pictures import learning_curves
    from paramshare.analysis.report import SCORES
    from paramshare.analysis.snapshots import THRESHOLDS
    from paramshare.cli.report import draw
    from paramshare.training.report import read_run, write_report

    record = read_run(workdir, model=run.model)
    score = result.get("score", "accuracy")
    marks = {"last epoch": result["last"]["test"][score]}
    if result["selected"]:
        marks["chosen by validation"] = result["selected"]["test"][score]
    pictures = [workdir / "learning_curves.png"]
    learning_curves(record.epochs, pictures[0], score=score, title=record.title, test=marks)
    if record.now and record.layout:  # not of a network that shares nothing, or of which no two layers can be compared
        pictures += draw(workdir, record.now, record.snapshots, record.layout, THRESHOLDS, record.title)
    page = write_report(record, workdir)

    counts, seconds = result["counts"], result["seconds"]
    speed = f"training at {result['images_per_second']:,.0f} images/s " if result["images_per_second"] else ""
    parts = ", ".join(f"{name} {counts[name]:,}" for name in ("banks", "coefficients", "private"))
    print(f"\n{record.title}: {result['epochs']} epochs in {seconds:.0f} s, {speed}on {result['devices']}")
    print(f"parameters     {counts['trainable']:,} trainable: {parts}")
    print(f"{'test ' + SCORES[score]:<14} {_percent(result['last']['test'], score)} after the last epoch")
    if result["selected"]:
        chosen = result["selected"]
        there = f"{chosen[f'validation_{score}']:.2%} there"
        print(f"               {_percent(chosen['test'], score)} at epoch {chosen['epoch']}, chosen by validation ({there})")
    for name, test in result["last"].get("others", {}).items():
        print(f"  {name:<23} " + ", ".join(f"{measure} {value:.2%}" for measure, value in test.items() if measure not in ("loss", "count")))
    for picture in pictures:
        print(f"picture        {picture}")
    print(f"report         {page}")


def _percent(test: dict[str, float], score: str) -> str:
    of = f"{round(test[score] * test['count'])} of {test['count']:.0f} images" if score == "accuracy" else f"{test['count']:.0f} images"
    return f"{test[score]:.2%} ({of})"
