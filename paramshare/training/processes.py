"""Checks that all processes agree, before the first collective operation.

A process that fails alone, or computes something else, would leave the others waiting in a
collective operation. So before the first one, all processes exchange short texts through the
key-value store of JAX's distributed runtime.
"""

import contextlib
import importlib.metadata
import itertools
import json
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax._src import distributed  # the key-value store has no public name; Orbax uses this one

from paramshare.errors import ParamshareError, one_line

HOUR = 3600.0  # one process may download data meanwhile; one that died is noticed by its heartbeat
PACKAGES = ("paramshare", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
VISIBLE = 8.0  # seconds until a file that one host has written is seen by the others

_rounds = itertools.count()


class ProcessError(ParamshareError):
    """Another process cannot go on, or does something else."""

    exit_code: int  # pyright: ignore[reportIncompatibleVariableOverride] (of each instance)

    def __init__(self, message: str, exit_code: int = 2):
        super().__init__(message)
        self.exit_code = exit_code


def exchange(text: str) -> list[str]:
    """The texts of all processes, in their order. All call it, equally often.

    Example:
      >>> exchange("of the only process")
      ['of the only process']
    """
    if jax.process_count() == 1:
        return [text]
    client: Any = distributed.global_state.client
    number, me = next(_rounds), jax.process_index()
    client.key_value_set(f"paramshare/{number}/{me}", text)
    texts = [
        client.blocking_key_value_get(f"paramshare/{number}/{process}", int(HOUR * 1000))
        for process in range(jax.process_count())
    ]
    if number:  # all have come here, so that nobody still reads the texts of the round before
        client.key_value_delete(f"paramshare/{number - 1}/{me}")
    return texts


@contextlib.contextmanager
def united() -> Iterator[None]:
    """What fails here in one process fails in all of them, with the same line.

    Raises:
      ProcessError: with the process that failed first in their order, and its message.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    if jax.process_count() > 1:
        known = isinstance(failure, ParamshareError)
        text = "" if failure is None else str(failure) if known else one_line(failure)
        code = failure.exit_code if isinstance(failure, ParamshareError) else 2
        answers = [json.loads(each) for each in exchange(json.dumps([text, code]))]
        for process, (text, code) in enumerate(answers):
            if text and (failure is None or known):
                raise ProcessError(f"process {process} of {len(answers)}: {text}", code) from None
    if failure is not None:
        raise failure


def agree(values: Mapping[str, Any]) -> None:
    """Checks that all processes have the same values, which JSON can hold.

    Raises:
      ProcessError: in all of them, with the names and values that differ.

    Example:
      >>> agree({"seed": 0})
    """
    answers = [json.loads(text) for text in exchange(json.dumps(values))]
    first, differences = answers[0], []
    for process, other in enumerate(answers):
        for name in dict.fromkeys((*first, *other)):
            if first.get(name) != other.get(name):
                differences.append(
                    f"{name} is {first.get(name)!r} in process 0 and {other.get(name)!r} in "
                    f"process {process}"
                )
    if differences:
        raise ProcessError(
            f"the processes disagree: {'; '.join(differences[:5])}; give every process the same "
            "command, data, code and packages"
        )


def versions() -> dict[str, str]:
    """The versions of the packages that decide what is computed; those that are installed."""
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[f"version of {package}"] = importlib.metadata.version(package)
    return found


def check_shared(file: pathlib.Path) -> None:
    """Checks that all processes see a file that the first one has written.

    Raises:
      ProcessError: in all processes, if one does not see it.
    """

    def read() -> str:
        with contextlib.suppress(OSError):
            return file.read_text()
        return ""

    expected, *_ = exchange(read())
    deadline = time.monotonic() + VISIBLE
    while read() != expected and time.monotonic() < deadline:
        time.sleep(0.2)
    for process, seen in enumerate(exchange(str(read() == expected))):
        if seen != "True":
            raise ProcessError(
                f"workdir {file.parent} is not shared: process {process} does not see what "
                "process 0 writes; give a --workdir that all hosts share"
            )
