"""Argument parsers, whose errors are one line."""

import argparse
from typing import NoReturn

from paramshare.cli.errors import CommandError

CHECKPOINTS = ("last", "best", "ema")


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that raises `CommandError` and accepts no abbreviated options."""

    def __init__(self, *args, **options):
        super().__init__(*args, **{"allow_abbrev": False} | options)

    def error(self, message: str) -> NoReturn:
        """Raises `CommandError`."""
        raise CommandError(f"{message}; see `{self.prog} --help`")


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Adds --checkpoint."""
    parser.add_argument(
        "--checkpoint",
        choices=CHECKPOINTS,
        default="last",
        help="the newest state (last, the default), the epoch selected by validation (best), or "
        "the moving average in the newest state (ema)",
    )
