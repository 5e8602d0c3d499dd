"""How the command reports errors: one line on standard error, and an exit code."""

import os
import sys
from collections.abc import Callable

from paramshare.errors import ParamshareError, one_line, warn

# Modules of the extra "train". Others are the user's, whose traceback is worth more.
EXTRA = (
    "PIL",
    "flatbuffers",
    "grain",
    "importlib_resources",
    "jinja2",
    "matplotlib",
    "orbax",
    "pydantic",
    "sklearn",
    "tensorflow_datasets",
    "tqdm",
)


class CommandError(ParamshareError):
    """The command line is wrong."""


def run_command(run: Callable[[], int | None]) -> int:
    """Runs a command and returns its exit code.

    0: done. 1: training failed, because a loss was not finite. 2: bad input. 130, 143: interrupted
    by SIGINT or SIGTERM. Errors that the user can fix are printed in one line; others are raised.
    """
    try:
        return run() or 0
    except KeyboardInterrupt:
        return print_error("interrupted", 130)
    except BrokenPipeError:
        # `paramshare models | head`: the reader is gone, so the interpreter must not flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ParamshareError as error:
        return print_error(str(error), error.exit_code)
    except MemoryError as error:
        return print_error(f"not enough memory ({one_line(error)}); choose smaller sizes", 2)
    except (RuntimeError, AssertionError) as error:
        if _without_devices():
            platforms = os.environ.get("JAX_PLATFORMS", "")
            return print_error(
                f"JAX finds no device ({one_line(error, 100)}); JAX_PLATFORMS is {platforms!r}: "
                "unset it, or install the jax of that platform",
                2,
            )
        if "RESOURCE_EXHAUSTED" in str(error):  # XLA's
            return print_error(f"not enough memory ({one_line(error)}); choose smaller sizes", 2)
        raise
    except OSError as error:  # such as a full disk behind standard output
        return print_error(f"{one_line(error)}; fix the cause, then rerun the same command", 2)
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module not in EXTRA:
            raise
        return print_error(f'{module} is not installed; run: pip install "paramshare[train]"', 2)


def _without_devices() -> bool:
    """Whether JAX, if it is imported, cannot start."""
    jax = sys.modules.get("jax")
    try:
        return jax is not None and not jax.devices()
    except Exception:  # which one depends on the platform
        return True


def print_error(message: str, code: int) -> int:
    """Prints a message in one line on standard error; returns the code."""
    warn(message)
    return code
