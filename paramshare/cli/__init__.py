"""The `paramshare` command: one file a group of commands, each with a function `add` that declares them."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from paramshare.cli import derive, export, look, report, train
from paramshare.cli.errors import run_told, say
from paramshare.cli.train import override

__all__ = ["main", "override", "run_told"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code, as `run_told` says."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    known, rest = _parser().parse_known_args(arguments)
    if rest and not known.overrides:
        return say(f"unrecognised argument {rest[0]!r}; see `paramshare {known.command} --help`")
    return run_told(lambda: known.run(known, rest))


class _OneLine(argparse.ArgumentParser):
    def error(self, message: str):
        raise SystemExit(say(f"{message}; see `{self.prog} --help`"))


def _parser() -> argparse.ArgumentParser:
    parser = _OneLine(prog="paramshare", description="Cross-layer parameter sharing for JAX and Flax.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Any, about: str, overrides: bool = False, **options: Any) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=about, description=about, **options)
        added.set_defaults(run=run, overrides=overrides)
        return added

    for group in (train, look, derive, export, report):
        group.add(command)
    return parser
