"""Signals that stop a training after its current step, with the state saved."""

import signal
import sys
import threading
from typing import Any

import jax

from paramshare.errors import ParamshareError


class Interrupted(ParamshareError):
    """The run was interrupted, and its state saved.

    Attributes:
      signum: the signal.
      exit_code: 128 + signum.
    """

    exit_code: int  # pyright: ignore[reportIncompatibleVariableOverride] (of each instance)

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.signum, self.exit_code = signum, 128 + signum

    def __reduce__(self) -> tuple[Any, ...]:  # by default pickle would pass only the message
        return type(self), (str(self), self.signum)


class Signals:
    """SIGINT and SIGTERM set a flag that the loop reads between steps.

    A second SIGINT raises `KeyboardInterrupt` at once.

    With several processes, SIGTERM to any of them stops all after the same step; SIGINT is not
    caught.
    """

    def __enter__(self) -> "Signals":
        self.signum, self._before = 0, {}
        # Several processes must stop after the same step. JAX's preemption service arranges that,
        # and it handles SIGTERM.
        if threading.current_thread() is threading.main_thread() and jax.process_count() == 1:
            self._before = {
                s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)
            }
        return self

    def __exit__(self, *exception: Any) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, frame: Any) -> None:
        if self.signum and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.signum = signum
        print("\nparamshare: stopping after this step", file=sys.stderr, flush=True)

    def stop(self, step: int) -> int:
        """The signal if training must stop after this step, else 0; equal on all processes."""
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            return signal.SIGTERM if multihost_utils.reached_preemption_sync_point(step) else 0
        return self.signum
