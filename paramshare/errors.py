"""The base class of the errors that a user can fix."""

import contextlib
import sys
from collections.abc import Iterator
from typing import ClassVar


class ParamshareError(ValueError):
    """An error that the user can fix, described in one line.

    The message names the thing, its value, what is allowed and the remedy. The `paramshare` command
    prints it as it is, without a traceback. Every error class of the library derives from this one
    and stands in the module that raises it.

    Attributes:
      exit_code: what the command exits with; 2 means bad input.

    Example:
      >>> from paramshare.errors import ParamshareError
      >>> issubclass(ParamshareError, ValueError), ParamshareError.exit_code
      (True, 2)
    """

    exit_code: ClassVar[int] = 2


def warn(message: str) -> None:
    """Prints a line about something that went wrong but does not stop the work."""
    print(f"paramshare: {' '.join(message.split())}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def without_logs() -> Iterator[None]:
    """Silences absl's log: Orbax and tensorflow-datasets log what they also raise."""
    from absl import logging

    level = logging.get_verbosity()
    logging.set_verbosity(logging.FATAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)


def one_line(error: BaseException, limit: int = 300) -> str:
    """Another library's error as `Type: first line of its message`, cut at `limit` characters.

    Example:
      >>> one_line(OSError("disk full\\nmore"))
      'OSError: disk full'
    """
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."
