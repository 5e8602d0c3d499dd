"""Commands that derive a new run from a trained one: fold, convert; and what `compress` shares."""

import argparse
import dataclasses
import json
import shlex
from typing import TYPE_CHECKING, Any

from paramshare.cli.errors import CommandError
from paramshare.cli.overrides import override
from paramshare.cli.parsing import add_checkpoint
from paramshare.storage import is_new, run_path

if TYPE_CHECKING:
    from paramshare.training.config import Config
    from paramshare.training.derive import Derived
    from paramshare.training.run import Run

EPILOG = "Options of `paramshare train`, such as --epochs, override the new run's configuration."


def add(command: Any) -> None:
    """Declares the commands."""
    fold = command(
        "fold",
        _fold,
        "tie the similar layers of a trained network",
        takes_overrides=True,
        epilog=EPILOG,
    )
    fold.add_argument("workdir", metavar="WORKDIR", help="run of a shared network")
    fold.add_argument(
        "--threshold",
        type=float,
        default=0.9,
        help="tie layers with at least this similarity, in (0, 1] (default: 0.9)",
    )
    fold.add_argument(
        "--drop-scales", action="store_true", help="do not keep a signed scale per layer"
    )
    fold.add_argument(
        "--banks",
        nargs="+",
        metavar="BANK",
        help="fold only these banks (regular expressions that match whole names)",
    )
    fold.add_argument(
        "--by",
        choices=("coefficients", "weights"),
        default="coefficients",
        help="compare layers by their mixing coefficients (the default) or by their weights",
    )
    add_common_options(fold)

    convert = command(
        "convert",
        _convert,
        "convert a trained network to another network with the same layers",
        takes_overrides=True,
        epilog=EPILOG,
    )
    convert.add_argument("workdir", metavar="WORKDIR", help="run of a plain or shared network")
    convert.add_argument(
        "--model",
        required=True,
        metavar="NAME",
        help="the network to convert to, such as swrn-28-10-2 from wrn-28-10",
    )
    add_common_options(convert)


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """The options of every command that derives a run."""
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="create this workdir for the new network; without it, only report",
    )
    add_checkpoint(parser)
    parser.add_argument(
        "--reestimate",
        type=int,
        default=0,
        metavar="N",
        help="re-estimate batch statistics on N training batches",
    )
    parser.add_argument(
        "--fine-tune",
        type=int,
        default=0,
        metavar="N",
        help="fine-tune in DIR for N epochs, from a tenth of the learning rate down to zero",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def _fold(args: argparse.Namespace, overrides: list[str]) -> int:
    from paramshare.shared import Shared
    from paramshare.training.derive import one_input, with_ties
    from paramshare.transform.folding import fold

    run, variables, step = load_source(args, overrides)
    if not isinstance(run.model, Shared):
        raise CommandError(
            f"{run.config.model.name} shares no weights, so there is nothing to fold; "
            f"`paramshare convert {shlex.quote(args.workdir)} --model NAME` converts it "
            "to a shared network"
        )
    folded = fold(
        run.model,
        variables,
        one_input(run),
        threshold=args.threshold,
        scale=not args.drop_scales,
        banks=args.banks,
        by=args.by,
        train=False,
    )
    if not args.json:
        print(folded, end="\n\n")
    details = {
        "threshold": folded.threshold,
        "scales": not args.drop_scales,
        "banks": [dataclasses.asdict(bank) for bank in folded.banks],
    }
    if not folded.changed:
        not_made = f"; {args.output} was not created" if args.output else ""
        print(json.dumps(details) if args.json else f"nothing was folded{not_made}")
        return 0
    target = target_run(with_ties(run.config, folded), args, overrides)
    derived = derive_run(args, run, variables, target, folded.variables, step, details)
    return _print(derived, args)


def _convert(args: argparse.Namespace, overrides: list[str]) -> int:
    from paramshare.training.derive import convert_variables, with_model

    run, variables, step = load_source(args, overrides)
    target = target_run(with_model(run.config, name=args.model, tied=()), args, overrides)
    converted, conversion = convert_variables(run, variables, target)
    details: dict[str, Any] = {"model": args.model}
    if conversion is not None:
        details["banks"] = [dataclasses.asdict(bank) for bank in conversion.banks]
        if not args.json:
            print(conversion, end="\n\n")
    return _print(derive_run(args, run, variables, target, converted, step, details), args)


def load_source(
    args: argparse.Namespace, overrides: list[str], *, resume: bool = False
) -> tuple["Run", dict[str, Any], int]:
    """Checks the options, before anything takes minutes, and loads the run.

    Args:
      args: the options.
      overrides: options of `train`.
      resume: whether the output may exist.
    """
    from paramshare.training.derive import fine_tuning, load_run
    from paramshare.training.workdir import stored_config
    from paramshare.zoo import options_of

    if args.output is not None and not resume and not is_new(run_path(args.output)):
        raise CommandError(f"{args.output} exists; give --output a folder that does not exist")
    if args.fine_tune < 0 or (args.fine_tune and not args.output):
        raise CommandError(
            f"--fine-tune is {args.fine_tune}; it must be a number of epochs, or 0 for none, "
            "and needs --output DIR to train in"
        )
    if args.reestimate < 0:
        raise CommandError(
            f"--reestimate is {args.reestimate}; it must be a number of batches, or 0 for none"
        )
    config = stored_config(run_path(args.workdir))
    config = fine_tuning(config, args.fine_tune) if args.fine_tune else config
    override(config, overrides).check()
    if args.command != "compress" and config.compression.active:
        raise CommandError(
            f"{args.workdir} is compressed; {args.command} the run that it was made from, and "
            "compress the result"
        )
    if args.command == "convert":
        options_of(args.model)  # raises if there is no such network
    return load_run(args.workdir, args.checkpoint)


def target_run(config: "Config", args: argparse.Namespace, overrides: list[str]) -> "Run":
    """The new run: a configuration, fine-tuned on request, with the overrides applied."""
    from paramshare.training.derive import fine_tuning
    from paramshare.training.run import prepare

    config = fine_tuning(config, args.fine_tune) if args.fine_tune else config
    return prepare(override(config, overrides))


def derive_run(
    args: argparse.Namespace,
    run: "Run",
    variables: dict[str, Any],
    target: "Run",
    target_variables: dict[str, Any],
    step: int,
    details: dict[str, Any],
    *,
    resume: bool = False,
) -> "Derived":
    """Evaluates both networks, creates the workdir and fine-tunes, as the options say.

    Args:
      args: the options.
      run: the source.
      variables: its variables.
      target: the new run.
      target_variables: where it starts.
      step: the step of the source's variables.
      details: what to note of the command in the workdir.
      resume: continue in the workdir if it exists.
    """
    from paramshare.training.derive import derive

    origin = {
        "command": args.command,
        "workdir": str(args.workdir),
        "checkpoint": args.checkpoint,
        "step": step,
    }
    return derive(
        run,
        variables,
        target,
        target_variables,
        reestimate_batches=args.reestimate,
        workdir=args.output,
        origin=origin | details,
        fine_tune=args.fine_tune > 0,
        resume=resume,
        quiet=args.json,
    )


def _print(derived: "Derived", args: argparse.Namespace) -> int:
    print(json.dumps(derived.as_json()) if args.json else describe(derived, args))
    return 0


def describe(derived: "Derived", args: argparse.Namespace) -> str:
    """The test measures before and after, and the new workdir."""
    score, lines = derived.run.facts.score, []
    tests = {"before": derived.before, "after": derived.after, "fine-tuned": derived.fine_tuned}
    for name, test in tests.items():
        if test is not None:
            trainable = derived.trainable["before" if name == "before" else "after"]
            lines.append(
                f"{name:<14} {trainable:,} trainable, test {score.title} {test.describe(score)}, "
                f"loss {test.loss:.4f}"
            )
    if args.output:
        command = f"paramshare train --workdir {shlex.quote(args.output)}"
        remark = "" if args.fine_tune else f"; train it with: {command}"
        lines.append(f"workdir        {args.output}{remark}")
    return "\n".join(lines)
