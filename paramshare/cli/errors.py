"""Errors that are the user's to mend, in one line on standard error."""

import os
import sys
from collections.abc import Callable

USAGE, FAILED = 2, 1


class CommandError(ValueError):
    """The command line itself is wrong."""


def run_told(run: Callable[[], int | None]) -> int:
    """Runs a command; returns its exit code.

    0: done. 1: a run failed (a loss was not finite). 2: bad input, said in one line on standard error. 130, 143: interrupted, state saved.
    """
    try:
        return run() or 0
    except KeyboardInterrupt:
        return say("interrupted", 130)
    except BrokenPipeError:  # `paramshare models | head`: nobody reads on, and the interpreter must not try to flush
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        code = _code(error)
        if code is None:
            raise
        return say(" ".join(str(error).split()), code)


def _code(error: Exception) -> int | None:
    """The exit code for an error that is the user's to mend; None for one of ours."""
    from paramshare.analysis.batch_statistics import StatisticsError
    from paramshare.analysis.conversion import ConversionError
    from paramshare.analysis.export import ExportError
    from paramshare.analysis.folding import FoldError
    from paramshare.analysis.loop_plan import LoopError
    from paramshare.layout import PlanError
    from paramshare.models import ModelError
    from paramshare.penalties import PenaltyError
    from paramshare.schemes import SchemeError
    from paramshare.training.checkpoint import CheckpointError
    from paramshare.training.config import ConfigError
    from paramshare.training.data import DataError
    from paramshare.training.loop import Interrupted, NonFinite

    theirs = (CommandError, ConfigError, DataError, CheckpointError, ModelError, PenaltyError, PlanError, SchemeError)
    theirs += (ConversionError, ExportError, FoldError, LoopError, StatisticsError)
    if isinstance(error, theirs):
        return USAGE
    if isinstance(error, NonFinite):
        return FAILED
    return 128 + error.signum if isinstance(error, Interrupted) else None


def say(message: str, code: int = USAGE) -> int:
    """Prints one line on standard error; returns the code."""
    print(f"paramshare: {message}", file=sys.stderr)
    return code
