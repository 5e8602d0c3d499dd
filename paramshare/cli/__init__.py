"""The `paramshare` command. Each file declares a group of commands in a function `add`."""

import argparse
import gc
import importlib
import sys
from collections.abc import Sequence
from typing import Any

from paramshare.cli import bench, compress, derive, export, look, predict, report, sample, train
from paramshare.cli.errors import CommandError, run_command
from paramshare.cli.overrides import override
from paramshare.cli.parsing import Parser
from paramshare.ops.xla import compute_convolutions_without_ynnpack

__all__ = ["main", "override", "run_command"]


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code, see `run_command`."""
    # Tracing creates many long-lived objects; frequent garbage collection took a fifth of the time.
    gc.set_threshold(200_000, 50, 100)
    if args is None:  # else the process is another program's
        compute_convolutions_without_ynnpack()
    return run_command(lambda: _run(list(sys.argv[1:] if args is None else args)))


def _run(words: list[str]) -> int:
    args, overrides = _parser().parse_known_args(words)
    args.words = words
    if overrides and not args.takes_overrides:
        raise CommandError(
            f"unrecognised argument {overrides[0]!r}; see `paramshare {args.command} --help`"
        )
    return args.run(args, overrides)


class _Version(argparse.Action):
    """Prints the version; the package's public face is imported only then."""

    def __call__(self, parser, namespace, values, option_string=None):
        print(f"paramshare {importlib.import_module('paramshare').__version__}")
        parser.exit()


def _parser() -> Parser:
    parser = Parser(
        prog="paramshare", description="Cross-layer parameter sharing for JAX and Flax."
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(
        name: str, run: Any, about: str, *, takes_overrides: bool = False, **options: Any
    ) -> argparse.ArgumentParser:
        options = {"description": f"{about[0].upper()}{about[1:]}."} | options
        added = commands.add_parser(name, help=about, **options)
        added.set_defaults(run=run, takes_overrides=takes_overrides)
        return added

    for group in (train, look, predict, sample, derive, compress, export, report, bench):
        group.add(command)
    return parser
