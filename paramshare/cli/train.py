"""`paramshare train`."""

import argparse
import dataclasses
import pathlib
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from paramshare.cli import cache, supervise
from paramshare.cli.errors import CommandError
from paramshare.cli.overrides import add_options, overridden, override, with_data_name
from paramshare.cli.parsing import CHECKPOINTS, Parser
from paramshare.errors import warn
from paramshare.storage import in_bucket, is_new, run_path

if TYPE_CHECKING:
    from paramshare.tasks import Measure
    from paramshare.training.config import Config
    from paramshare.training.result import Result, RunFacts
    from paramshare.training.run import Run

INDENT = " " * 15
ABOUT = """Trains a network, or resumes an interrupted run. CONFIG is a Python file that sets
`config`; the options below override its fields. Leave CONFIG out to resume the run in DIR."""


def add(command: Any) -> None:
    """Declares the command."""
    parser = command(
        "train",
        run,
        "train a network, or resume an interrupted run",
        takes_overrides=True,
        add_help=False,  # the help shows the values of CONFIG, which is loaded first
    )
    add_own_options(parser)


def add_own_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that are not fields of the configuration."""
    parser.add_argument(
        "--workdir",
        metavar="DIR",
        help="folder of the run; rerun the same command to resume the run in it",
    )
    parser.add_argument(
        "--init-from",
        metavar="RUN",
        help="start a new DIR with the variables of another run (its workdir) or of an exported "
        "variables.npz, such as to train a finished run for more epochs",
    )
    parser.add_argument(
        "--init-only",
        nargs="+",
        metavar="REGEX",
        help="with --init-from, take only the arrays whose whole path matches, such as "
        "'banks/.*' or 'params/model/conv1/kernel'; RUN may then be of another network",
    )
    parser.add_argument(
        "--init-into",
        metavar="MODULE",
        help="with --init-from: RUN is of a network that the new one holds, such as a classifier "
        "of a detector's 'backbone'; all else keeps the initial values of the seed",
    )
    parser.add_argument(
        "--init-checkpoint",
        choices=CHECKPOINTS,
        default="last",
        help="with --init-from: of RUN, the newest state (last, the default), the epoch selected "
        "by validation (best), or the moving average (ema)",
    )
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        metavar="SEED",
        help="train one network per seed, all at once, in DIR/seed0, DIR/seed1, ...; "
        "for an accelerator that one small network does not fill (slower on a CPU)",
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="trace ten steps into DIR/profile, for TensorBoard's profiler or ui.perfetto.dev",
    )
    cache.add_option(parser)
    supervise.add_options(parser)


def run(args: argparse.Namespace, overrides: list[str]) -> int:
    """Trains, draws the pictures, writes the report and prints the result."""
    from paramshare.training import config as configs
    from paramshare.training.loop import fit_together
    from paramshare.training.processes import united

    supervise.check_options(args)
    if args.distributed and not supervise.is_child():
        return supervise.run(args.words)
    # argparse would take the value of an override for CONFIG, so that it is not declared.
    file = overrides.pop(0) if overrides and not overrides[0].startswith("-") else None
    if {"-h", "--help"} & set(overrides):
        config = configs.load_file(file) if file else configs.Config()
        return _print_help(with_data_name(config, overrides, file or "CONFIG")[0], file or "CONFIG")
    cache.use(args)
    if args.distributed:
        supervise.join(args)  # before anything starts JAX; from here on processes fail together
    with supervise.leave_lost_peers():
        with united():
            runs, workdirs = _runs(args, file, overrides)
            options = (args.init_only, args.init_into, args.init_checkpoint != "last")
            if any(options) and args.init_from is None:
                raise CommandError(
                    "--init-only, --init-into and --init-checkpoint need --init-from RUN"
                )
            if args.init_from is not None:
                _init_from(args, runs, workdirs)
        results = fit_together(runs, workdirs, profile=args.profile)
    for trained, folder, result in zip(runs, workdirs, results, strict=True):
        report(trained, folder, result)
    return 0


def _runs(
    args: argparse.Namespace, file: str | None, overrides: list[str]
) -> tuple[list["Run"], list[pathlib.Path]]:
    """The runs that the arguments describe, one for each seed, and their workdirs."""
    from paramshare.training import config as configs
    from paramshare.training.run import prepare
    from paramshare.training.workdir import stored_config

    workdir = run_path(args.workdir) if args.workdir else None
    if file is None and (workdir is None or not (workdir / "config.json").is_file()):
        raise CommandError(
            "train needs a configuration: a Python file such as experiments/recipes/quickstart.py; "
            "see `paramshare train --help`"
        )
    if workdir is None:
        raise CommandError("train needs --workdir DIR, the folder to store the run in")
    base = configs.load_file(file) if file else stored_config(workdir)
    config = override(base, overrides, file or "CONFIG")
    if args.seeds is None:
        return [prepare(config)], [workdir]
    if "seed" in overridden(base, overrides):
        seeds = " ".join(map(str, args.seeds))
        raise CommandError(f"--seeds {seeds} and --seed {config.seed} exclude each other; give one")
    runs = [prepare(dataclasses.replace(config, seed=seed)) for seed in args.seeds]
    return runs, [workdir / f"seed{seed}" for seed in args.seeds]


def _init_from(
    args: argparse.Namespace, runs: Sequence["Run"], workdirs: Sequence[pathlib.Path]
) -> None:
    """Makes new workdirs whose first state has the variables of another run or of a file.

    Of several processes the first one does.
    """
    import jax

    from paramshare.shared import Shared
    from paramshare.training.derive import begin, with_arrays_of
    from paramshare.training.workdir import network_variables, stored_network, stored_origin
    from paramshare.transform.conversion import bake
    from paramshare.transform.variables_file import load_variables

    if args.init_only and args.init_into:
        raise CommandError("--init-only and --init-into exclude each other; give one of them")
    if jax.process_index() != 0:
        return
    source = run_path(args.init_from)
    source = source if in_bucket(source) else source.resolve()
    origin = {"command": "train --init-from", "workdir": str(source)}
    origin |= {"checkpoint": args.init_checkpoint} if args.init_checkpoint != "last" else {}
    origin |= {"only": args.init_only} if args.init_only else {}
    origin |= {"into": args.init_into} if args.init_into else {}
    new = []
    for run, folder in zip(runs, workdirs, strict=True):
        if is_new(folder):
            new.append((run, folder))
            continue
        stored = stored_origin(folder)
        names = ("workdir", "checkpoint", "only", "into")
        if any(stored.get(name) != origin.get(name) for name in names):
            raise CommandError(
                f"{folder} exists and did not start from these variables of {source}; use a new "
                "--workdir, or leave --init-from and its options out to resume"
            )
    if not new:
        return
    if source.is_dir():
        stored = stored_network(source)
        if not (args.init_only or args.init_into):
            _check_same_network(source, stored[0], stored[1], new[0][0])
        variables, step = network_variables(source, *stored, args.init_checkpoint)
        if args.init_into and isinstance(stored[2], Shared):
            variables = bake(stored[2], variables)
    elif args.init_checkpoint != "last":
        raise CommandError(
            f"--init-checkpoint is {args.init_checkpoint}, but {source} is not a workdir; leave it "
            "out"
        )
    else:
        variables, step = load_variables(source), 0
    origin |= {"step": step}
    for run, folder in new:
        first, taken = variables, origin
        if args.init_only:
            first, paths, count = with_arrays_of(run, variables, args.init_only)
            taken = origin | {"arrays": paths}
            print(f"initial values {len(paths)} of {count} arrays are those of {source}")
        if args.init_into:
            first, left_out = _grafted(run, args.init_into, variables, str(source))
            taken = origin | {"left_out": left_out}
        begin(run, first, folder, taken)


def _grafted(
    run: "Run", module: str, variables: dict[str, Any], source: str
) -> tuple[dict[str, Any], list[str]]:
    """The initial variables of a run with a network inside it replaced, and what has no place.

    Says what is taken, and warns of banks that cannot make the kernels.
    """
    from paramshare.transform.grafting import INEXACT, graft

    grafted = graft(run.model, run.init().variables, module, variables)
    print(f"initial values {len(grafted.taken)} arrays of {module} are those of {source}")
    if grafted.left_out:
        print(f"left out       {', '.join(grafted.left_out)}")
    for bank in grafted.banks:
        if bank.kernel_error > INEXACT:
            warn(
                f"bank {bank.name!r} ({bank.scheme}) cannot make the kernels of {source}: it errs "
                f"by {bank.kernel_error:.1%} of their norm"
            )
    return grafted.variables, list(grafted.left_out)


def _check_same_network(
    source: pathlib.Path, config: "Config", facts: "RunFacts", run: "Run"
) -> None:
    """Variables may fit another network that computes something else, such as other ties."""
    changed = [
        f"model.{name}: {getattr(config.model, name)} -> {getattr(run.config.model, name)}"
        for name in ("name", "tied", "form", "stem", "options")
        if getattr(config.model, name) != getattr(run.config.model, name)
    ]
    if changed:
        raise CommandError(
            f"{source} holds another network ({'; '.join(changed)}); use the same one, or "
            "`paramshare convert`"
        )
    same_config = config.model == run.config.model and facts.jax == run.facts.jax
    if same_config and facts.program not in ("", run.facts.program):
        raise CommandError(
            f"the network of {source} was trained with other code, with another task, or on other "
            "shapes; restore them"
        )


def _print_help(config: "Config", file: str) -> int:
    parser = Parser(
        prog=f"paramshare train {file}", usage="%(prog)s --workdir DIR [options]", description=ABOUT
    )
    add_own_options(parser)
    add_options(parser, config)
    parser.print_help()
    return 0


def report(run: "Run", workdir: pathlib.Path, result: "Result") -> None:
    """Draws the pictures of a finished run, writes its report and prints its result."""
    import jax

    from paramshare.cli.report import draw
    from paramshare.measure.snapshots import THRESHOLDS
    from paramshare.report.page import write_report
    from paramshare.report.pictures import learning_curves
    from paramshare.report.predictions import PREDICTIONS, draw_examples
    from paramshare.report.record import read_run
    from paramshare.training.workdir import stored_variables

    if jax.process_index() != 0:
        return
    variables, _ = stored_variables(workdir, run.shapes)
    examples = [workdir / PREDICTIONS]
    if not draw_examples(run, variables, examples[0]):
        examples = []
    record = read_run(workdir, model=run.model)
    marks = {"last epoch": result.last_score}
    if result.selected_score is not None:
        marks["selected by validation"] = result.selected_score
    pictures = [workdir / "learning_curves.png"]
    learning_curves(record.epochs, pictures[0], score=result.score, title=record.title, test=marks)
    if record.now and record.layout:  # a plain network has no layers to compare
        pictures += draw(
            workdir, record.now, record.snapshots, record.layout, THRESHOLDS, record.title
        )
    pictures += examples
    page = write_report(record, workdir)
    print(f"\n{record.title}: {describe(result, run.task.measures)}")
    for picture in pictures:
        print(f"picture        {picture}")
    print(f"report         {page}")


def describe(result: "Result", measures: Sequence["Measure"]) -> str:
    """A result in a few lines: speed, parameters, scores."""
    counts, score, rate = result.counts, result.score, result.images_per_second
    speed = f"training at {rate:,.0f} examples/s " if rate else ""
    parts = ", ".join(f"{name} {counts[name]:,}" for name in ("banks", "coefficients", "private"))
    lines = [
        f"{result.epochs} epochs in {result.seconds:.0f} s, {speed}on {result.devices}",
        f"parameters     {counts['trainable']:,} trainable: {parts}",
        f"{'test ' + score.title:<14} {result.last.describe(score)} after the last epoch",
    ]
    more = [f"{m.title} {m.format(result.last.measures[m.name])}" for m in measures]
    lines += textwrap.wrap(", ".join(more[1:]), 90, initial_indent=INDENT, subsequent_indent=INDENT)
    if result.selected:
        lines.append(
            f"{'':<14} {result.selected.test.describe(score)} at epoch {result.selected.epoch}, "
            f"selected by validation ({score.format(result.selected.validation)} there)"
        )
    if result.ema:
        lines.append(f"{'':<14} {result.ema.describe(score)} with the moving average")
    if result.skipped:
        lines.append(f"skipped        {result.skipped:,} updates that were not finite")
    for name, test in result.others.items():
        values = (f"{m.title} {m.format(test.measures[m.name])}" for m in measures)
        lines.append(f"  {name:<23} {', '.join(values)}")
    return "\n".join(lines)
