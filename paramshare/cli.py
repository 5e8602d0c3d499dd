"""The `paramshare` command."""

import argparse
import contextlib
import difflib
import io
import itertools
import json
import os
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paramshare.training.config import Config
    from paramshare.training.run import Run

USAGE, FAILED = 2, 1


class CommandError(ValueError):
    """The command line itself is wrong."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code.

    0: done. 1: a run failed (a loss was not finite). 2: bad input, said in one line on standard error. 130, 143: interrupted, state saved.
    """
    parser = _parser()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    known, rest = parser.parse_known_args(arguments)
    if rest and known.command != "train":
        return _say(f"unrecognised argument {rest[0]!r}; see `paramshare {known.command} --help`")
    try:
        return known.run(known, rest)
    except KeyboardInterrupt:
        return _say("interrupted", 130)
    except BrokenPipeError:  # `paramshare models | head`: nobody reads on, and the interpreter must not try to flush
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        code = _code(error)
        if code is None:
            raise
        return _say(" ".join(str(error).split()), code)


def _code(error: Exception) -> int | None:
    """The exit code for an error that is the user's to mend; None for one of ours."""
    from paramshare import ModelError, PenaltyError, PlanError, SchemeError
    from paramshare.training.checkpoint import CheckpointError
    from paramshare.training.config import ConfigError
    from paramshare.training.data import DataError
    from paramshare.training.loop import Interrupted, NonFinite

    if isinstance(error, CommandError | ConfigError | DataError | ModelError | PenaltyError | PlanError | SchemeError | CheckpointError):
        return USAGE
    if isinstance(error, NonFinite):
        return FAILED
    return 128 + error.signum if isinstance(error, Interrupted) else None


def _say(message: str, code: int = USAGE) -> int:
    print(f"paramshare: {message}", file=sys.stderr)
    return code


# ---------------------------------------------------------------- train


def _train(known: argparse.Namespace, rest: list[str]) -> int:
    from paramshare.training import config as configs
    from paramshare.training.loop import fit
    from paramshare.training.run import prepare

    if {"-h", "--help"} & set(rest):
        override(configs.load_file(known.config) if known.config else configs.Config(), ["--help"], known.config or "CONFIG")
    if known.config is None:
        raise CommandError("train needs a configuration: a Python file such as experiments/quickstart.py; see `paramshare train --help`")
    if known.workdir is None:
        raise CommandError("train needs --workdir DIR: where the run is kept, and found again when the same command is given again")
    config = override(configs.load_file(known.config), rest, known.config)
    if known.distributed:
        _join()
    run, workdir = prepare(config), pathlib.Path(known.workdir)
    report(run, workdir, fit(run, workdir))
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
            "its fields. With --distributed this is one process of several (TPU pods, Slurm): give the same command on every host, "
            "with a workdir that all can reach."
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
    import dataclasses

    names = []
    for field in dataclasses.fields(value):
        part = getattr(value, field.name)
        names += _field_names(part, f"{prefix}{field.name}.") if dataclasses.is_dataclass(part) else [prefix + field.name]
    return names


def report(run: "Run", workdir: pathlib.Path, result: dict[str, Any]) -> None:
    """Draws the pictures of a finished run into its workdir, and prints its result."""
    import jax

    if jax.process_index() != 0:
        return
    from paramshare.analysis.pictures import learning_curves, similarity_maps, site_labels
    from paramshare.analysis.similarity import similarity
    from paramshare.shared import Shared
    from paramshare.training.checkpoint import Checkpoints
    from paramshare.training.metrics import read_metrics

    title = f"{result['model']} on {result['data']}"
    marks = {"last epoch": result["last"]["test"]["accuracy"]}
    if result["selected"]:
        marks["chosen by validation"] = result["selected"]["test"]["accuracy"]
    pictures = [workdir / "learning_curves.png"]
    learning_curves(read_metrics(workdir / "metrics.jsonl"), pictures[0], title=title, test=marks)
    if isinstance(run.model, Shared):
        with Checkpoints(workdir / "checkpoints") as checkpoints:
            state, _ = checkpoints.restore(jax.eval_shape(run.init))
        matrices = {name: matrix for name, matrix in similarity(run.model, state.variables).items() if len(matrix) > 1}
        if matrices:  # not where sites differ in shape
            pictures.append(workdir / "similarity.png")
            labels = {bank.name: site_labels(bank.sites) for bank in run.model.layout.banks}
            similarity_maps(matrices, pictures[1], labels=labels, title=f"{title}: layer similarity after training")

    counts, seconds = result["counts"], result["seconds"]
    speed = f"training at {result['images_per_second']:,.0f} images/s " if result["images_per_second"] else ""
    parts = ", ".join(f"{name} {counts[name]:,}" for name in ("banks", "coefficients", "private"))
    print(f"\n{title}: {result['epochs']} epochs in {seconds:.0f} s, {speed}on {result['devices']}")
    print(f"parameters     {counts['trainable']:,} trainable: {parts}")
    print(f"test accuracy  {_percent(result['last']['test'])} after the last epoch")
    if result["selected"]:
        chosen = result["selected"]
        there = f"{chosen['validation_accuracy']:.2%} there"
        print(f"               {_percent(chosen['test'])} at epoch {chosen['epoch']}, chosen by validation ({there})")
    for picture in pictures:
        print(f"picture        {picture}")


def _percent(test: dict[str, float]) -> str:
    return f"{test['accuracy']:.2%} ({round(test['accuracy'] * test['count'])} of {test['count']:.0f} images)"


# ---------------------------------------------------------------- eval, models, summary


def _eval(known: argparse.Namespace, rest: list[str]) -> int:
    import jax

    from paramshare.training.checkpoint import Checkpoints
    from paramshare.training.config import ConfigError
    from paramshare.training.evaluation import make_evaluate
    from paramshare.training.run import prepare
    from paramshare.training.workdir import stored_config

    workdir = pathlib.Path(known.workdir)
    run = prepare(stored_config(workdir))
    if known.checkpoint == "best" and not len(run.data.validation):
        raise ConfigError("the run had no validation images (data.validation=0), so no epoch was chosen; take --checkpoint last")
    source = getattr(run.data, known.split)
    if not len(source):
        raise ConfigError(
            f"data set {run.data.name!r} has no {known.split} images in this run (data.validation={run.config.data.validation})"
        )
    shapes = jax.eval_shape(run.init)
    with Checkpoints(workdir / ("best" if known.checkpoint == "best" else "checkpoints")) as checkpoints:
        step = checkpoints.latest
        state, _ = checkpoints.restore(shapes.variables if known.checkpoint == "best" else shapes)
    variables = state if known.checkpoint == "best" else state.variables
    found = make_evaluate(run)(variables, source)
    print(
        json.dumps(
            {
                "model": run.config.model.name,
                "data": run.data.name,
                "split": known.split,
                "checkpoint": known.checkpoint,
                "step": step,
                **found,
            }
        )
    )
    return 0


def _models(known: argparse.Namespace, rest: list[str]) -> int:
    from paramshare.zoo import FAMILIES, list_models

    names = list_models(known.pattern)
    if not names:
        raise CommandError(f"no model matches {known.pattern!r}; `paramshare models` lists them all")
    for family in FAMILIES:
        mine = [name for name in names if name in family.examples]
        if mine:
            print(f"{family.form}: {family.about}")
            print("".join(f"  {name}\n" for name in mine), end="")
    return 0


def _summary(known: argparse.Namespace, rest: list[str]) -> int:
    from paramshare.analysis.cost import cost
    from paramshare.shared import Shared
    from paramshare.zoo import create_model, default_input_shape

    shape = tuple(known.input_shape) if known.input_shape else default_input_shape(known.name, known.stem)
    model = create_model(known.name, known.num_classes, shape, **({"stem": known.stem} if known.stem else {}))
    found = cost(model, shape)
    if known.json:
        print(found.as_json())
        return 0
    print(f"{known.name}, images of {'x'.join(map(str, shape))}\n")
    if isinstance(model, Shared):
        print(model.describe(), end="\n\n")
    print(found)
    return 0


# ---------------------------------------------------------------- the command line


class _OneLine(argparse.ArgumentParser):
    def error(self, message: str):
        raise SystemExit(_say(f"{message}; see `{self.prog} --help`"))


def _parser() -> argparse.ArgumentParser:
    parser = _OneLine(prog="paramshare", description="Cross-layer parameter sharing for JAX and Flax.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Any, about: str, **options: Any) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=about, description=about, **options)
        added.set_defaults(run=run)
        return added

    train = command("train", _train, "train a network, or go on with an interrupted run", add_help=False)
    train.add_argument("config", metavar="CONFIG", nargs="?")
    train.add_argument("--workdir", metavar="DIR")
    train.add_argument("--distributed", action="store_true")

    evaluate = command("eval", _eval, "evaluate a trained network")
    evaluate.add_argument("workdir", metavar="WORKDIR", help="of a training run")
    evaluate.add_argument("--split", choices=("test", "validation", "train"), default="test")
    evaluate.add_argument("--checkpoint", choices=("last", "best"), default="last", help="the last state, or the one that validation chose")

    models = command("models", _models, "list networks by name")
    models.add_argument("pattern", nargs="?", default="*", help="a shell pattern, such as 'swrn-*'")

    summary = command("summary", _summary, "layers, banks, counts, multiply-adds and bytes of a network")
    summary.add_argument("name", metavar="NAME")
    summary.add_argument("--num-classes", type=int, default=None)
    summary.add_argument("--input-shape", type=int, nargs=3, default=None, metavar=("H", "W", "C"))
    summary.add_argument("--stem", default=None, help="'imagenet' or 'cifar', for networks that have both")
    summary.add_argument("--json", action="store_true", help="as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
