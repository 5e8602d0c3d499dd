"""`train --distributed`: one process of several, watched by a parent.

JAX's distributed runtime aborts a process, deep in C++ and with pages of log, when another one is
lost, does not arrive, or when its port is taken. So the training runs in a child process. The
parent passes on what the child prints and the signals that it gets itself, and turns an abort into
one line and an exit code of its own.
"""

import argparse
import collections
import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from typing import IO, Any

from paramshare.cli.errors import CommandError, print_error
from paramshare.errors import ParamshareError, one_line

LOST = 4  # exit code: another process is lost, or never came
LOST_PEER = "another process was lost"
HEARTBEAT_SECONDS = 20
LONGEST, MOST = 10**6, 10**6  # seconds to wait, processes
_CHILD = "PARAMSHARE_SUPERVISED"
# The log of the runtime in C++, its stack traces, and what C++ prints when it aborts.
_NOISE = re.compile(
    rb"[IWEF]\d{4} [\d:.]+ +\d+ |\s+@ +0x|\[Gloo\]|\*\*\* |terminate called|  what\(\):|"
    rb"Additional GRPC|:?UNKNOWN:|\d+\s*$|Barrier result|The tasks have crashed|#\d+ |RPC: /|"
    rb"Fatal Python error"
)

_PEER = re.compile(
    r"Gloo|NCCL|UNAVAILABLE|DEADLINE_EXCEEDED|coordination service|heartbeat|barrier", re.IGNORECASE
)
_OWN = re.compile(rb"^paramshare: |^Traceback|(img|seq)/s")


def is_child() -> bool:
    """Whether this process has a parent that watches it."""
    return _CHILD in os.environ


def run(words: Sequence[str]) -> int:
    """Runs the command in a child process; returns its exit code, or `LOST` if it was aborted."""
    child = subprocess.Popen(
        [sys.executable, "-m", "paramshare", *words],
        env=os.environ | {_CHILD: str(os.getpid())},
        stderr=subprocess.PIPE,
    )
    assert child.stderr is not None

    def pass_on(number: int, frame: Any) -> None:
        child.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    log: collections.deque[bytes] = collections.deque(maxlen=200)
    said = [False]
    relay = threading.Thread(target=_relay, args=(child.stderr, log, said), daemon=True)
    relay.start()
    try:
        code = child.wait()
        relay.join(5)
    finally:
        child.stderr.close()
        for number, handler in before.items():
            signal.signal(number, handler)
    if code >= 0:
        if code and not said[0]:  # the log is all there is
            sys.stderr.buffer.writelines(log)
        return code
    if code in (-signal.SIGKILL, -signal.SIGINT, -signal.SIGTERM):
        return print_error(f"the training was killed by {signal.Signals(-code).name}", 128 - code)
    return print_error(f"{_reason(log)}; rerun the same command on all hosts to resume", LOST)


@contextlib.contextmanager
def leave_lost_peers() -> Iterator[None]:
    """Ends the process at once, with one line, if an operation of all processes fails for a peer.

    So it does, with a traceback for errors that are not ours, if this process fails alone: its
    missing heartbeat ends the others, which wait for it. What fails in all processes is raised.
    """
    from paramshare.training.evaluation import NonFinite
    from paramshare.training.processes import ProcessError
    from paramshare.training.signals import Interrupted

    try:
        yield
    except (ProcessError, NonFinite, Interrupted):
        raise
    except BaseException as error:
        if not is_child():
            raise
        # A save that waits in vain for a peer fails with an error of the peer's below it.
        reason = error.__cause__ if isinstance(error, ParamshareError) else error
        if reason is not None and _PEER.search(str(reason)):
            text = f"{LOST_PEER} ({one_line(reason, 150)})"
            os._exit(print_error(f"{text}; rerun the same command on all hosts to resume", LOST))
        if isinstance(error, ParamshareError):
            os._exit(print_error(str(error), error.exit_code))
        if isinstance(error, KeyboardInterrupt):
            os._exit(print_error("interrupted", 128 + signal.SIGINT))
        traceback.print_exception(error)
        sys.stderr.flush()
        os._exit(1)  # else it would wait at the exit for the others, and they for it


def _relay(stream: IO[bytes], log: "collections.deque[bytes]", said: list[bool]) -> None:
    """Copies a stream to standard error as it comes, without the runtime's log.

    Sets `said[0]` when a line of the command itself comes by.
    """
    line, noise, header = b"", False, False
    while piece := os.read(stream.fileno(), 65536):
        for part in re.split(rb"(?<=[\r\n])", piece):
            line += part
            if not line.endswith((b"\r", b"\n")) and not line.startswith(b"\r"):
                continue  # what follows decides
            # Errors of the runtime may have several lines, with a traceback below the first.
            own = _OWN.search(line) and not (header and line.startswith(b"Traceback"))
            header = line[:1] in b"EF" and bool(_NOISE.match(line))
            noise = header or (noise and not own)
            if noise or _NOISE.match(line):
                log.append(line)
            else:
                said[0] = said[0] or line.startswith((b"paramshare: ", b"Traceback"))
                sys.stderr.buffer.write(line)
                sys.stderr.flush()
            line = b""
    sys.stderr.buffer.write(line)
    sys.stderr.flush()


def _reason(log: Sequence[bytes]) -> str:
    """What the runtime's log says of why it aborted."""
    text = b" ".join(log).decode(errors="replace")
    if "Connect()" in text or "DEADLINE_EXCEEDED" in text or "Barrier timed out" in text:
        return "another process did not arrive in time, or the coordinator's port is taken"
    if "heartbeat" in text or "unhealthy" in text or "UNAVAILABLE" in text:
        return LOST_PEER
    last = next((line for line in reversed(log) if line.startswith((b"E", b"F"))), b"")
    return f"the process was aborted ({' '.join(last.decode(errors='replace').split())[:200]})"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds --distributed and its options."""
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="run as one process of several (TPU pods, Slurm): give the same command on every "
        "host, with a DIR that all hosts can reach",
    )
    parser.add_argument(
        "--init-timeout",
        type=int,
        default=300,
        metavar="SECONDS",
        help="with --distributed: how long to wait for the other processes (default: 300)",
    )
    parser.add_argument(
        "--heartbeat-timeout",
        type=int,
        default=HEARTBEAT_SECONDS,
        metavar="SECONDS",
        help="with --distributed: a process that is silent for so long is lost (default: "
        f"{HEARTBEAT_SECONDS})",
    )
    parser.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="with --distributed, where no cluster is found: address of process 0 and a free port",
    )
    parser.add_argument("--num-processes", type=int, metavar="N", help="with --coordinator")
    parser.add_argument("--process-id", type=int, metavar="I", help="with --coordinator: from 0")


def check_options(args: argparse.Namespace) -> None:
    """Raises `CommandError` unless the options fit each other."""
    by_hand = (args.coordinator, args.num_processes, args.process_id)
    timeouts = {
        "--init-timeout": args.init_timeout,
        "--heartbeat-timeout": args.heartbeat_timeout,
    }
    for option, seconds in timeouts.items():
        if not 1 <= seconds <= LONGEST:
            raise CommandError(f"{option} is {seconds}; it must be 1 to {LONGEST:,} seconds")
    if any(value is not None for value in by_hand):
        if not args.distributed or None in by_hand:
            raise CommandError(
                "--coordinator, --num-processes and --process-id go together, with --distributed"
            )
        port = re.fullmatch(r".+:(\d{1,5})", args.coordinator)
        if not port or not 1 <= int(port[1]) < 2**16:
            raise CommandError(f"--coordinator is {args.coordinator!r}; it must be HOST:PORT")
        if not 1 <= args.num_processes <= MOST:
            raise CommandError(f"--num-processes is {args.num_processes}; it must be 1 to {MOST:,}")
        if not 0 <= args.process_id < args.num_processes:
            raise CommandError(
                f"--process-id is {args.process_id}; it must be from 0 to {args.num_processes - 1}"
            )


def join(args: argparse.Namespace) -> None:
    """Makes this process one of several.

    Raises:
      CommandError: if there is no cluster.
    """
    import jax
    from absl import logging

    logging.set_verbosity(logging.FATAL)  # Orbax logs, with tracebacks, what it also raises
    # Gloo writes to the standard output of the process; the parent filters the other stream.
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w", buffering=1, encoding=sys.stdout.encoding)
    os.dup2(2, 1)
    if sys.platform == "linux":  # die with the parent: nobody else would notice
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    try:
        jax.distributed.initialize(
            args.coordinator,
            args.num_processes,
            args.process_id,
            initialization_timeout=args.init_timeout,
            heartbeat_timeout_seconds=args.heartbeat_timeout,
        )
    except (RuntimeError, ValueError) as error:
        raise CommandError(
            f"--distributed finds no cluster ({error}); it detects TPU pods, Slurm, Open MPI and "
            "Kubernetes by their environment variables; pass --coordinator, or leave --distributed "
            "out on a single machine"
        ) from None
