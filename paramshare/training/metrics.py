"""Metrics of a run: JSON lines, and TensorBoard event files on request."""

import contextlib
import hashlib
import json
import pathlib
import sys
import time
from typing import Any

from paramshare.errors import warn
from paramshare.storage import StorageError, in_bucket, json_text, not_written, write_text
from paramshare.training.checkpoint import CheckpointError

METRICS = "metrics.jsonl"
NUMBERED = {
    "train": ("step",),
    "epoch": ("step", "epoch"),
    "validation": ("step",),
    "similarity": ("step", "epoch"),
}
BUCKET_SECONDS = 30.0
LARGEST = sys.float_info.max


class MetricsFile:
    """`metrics.jsonl`: one JSON object a line, each with `step` and `kind`.

    The kinds are "train", "epoch", "validation" (between epochs) and "similarity". Opening the file
    for a resumed run drops the lines after the step that the run resumes from, so no line appears
    twice; a run that starts at step 0 keeps none.

    Args:
      folder: the workdir.
      step: updates made so far.
      tensorboard: write event files too.
      write: whether this process writes.
    """

    def __init__(
        self, folder: pathlib.Path, step: int, *, tensorboard: bool = False, write: bool = True
    ):
        self.path, self._file, self._events = folder / METRICS, None, None
        self._lines: list[str] | None = None  # all of them, if they go to a bucket
        self._written, self._unwritten = time.monotonic(), False
        if not write:
            return
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._events = SummaryWriter(
                str(folder / "tensorboard"), purge_step=step + 1 if step else None
            )
        texts = _texts(self.path)
        lines = [(text, line) for text in texts if (line := _parsed(text)) is not None]
        damaged = len(texts) - len(lines) - (bool(texts) and _parsed(texts[-1]) is None)
        if step and damaged:  # the last line may have been cut short
            warn(f"{self.path}: {damaged} damaged lines are left out")
        kept = [text + "\n" for text, line in lines if 0 < step >= line["step"]]
        write_text(self.path, "".join(kept))
        if in_bucket(self.path):
            self._lines = kept
        else:
            self._file = self.path.open("a", encoding="utf-8")

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Appends a line and flushes it to disk. Values that are not finite become null.

        To a file in a bucket nothing can be appended: it is written anew, at most every
        `BUCKET_SECONDS`, by `sync` and by `close`.

        Raises:
          StorageError: if it cannot be written.
        """
        line = json_text({"kind": kind, "step": step, **values}) + "\n"
        if self._file is not None:
            try:
                self._file.write(line)
                self._file.flush()
            except OSError as error:
                raise not_written(self.path, error) from None
        elif self._lines is not None:
            self._lines.append(line)
            self._unwritten = True
            if time.monotonic() - self._written > BUCKET_SECONDS:
                self.sync()
        if self._events is not None:
            for name, value in values.items():
                if isinstance(value, float):
                    self._events.add_scalar(f"{kind}/{name}", value, step)

    def sync(self) -> None:
        """Writes what has not been written yet; `StorageError` if it cannot be."""
        if self._unwritten:
            write_text(self.path, "".join(self._lines or ()))
            self._written, self._unwritten = time.monotonic(), False

    def close(self) -> None:
        """Closes the files."""
        try:
            self.sync()
        except StorageError as error:
            warn(f"{error}")
        for file in (self._file, self._events):
            if file is not None:
                with contextlib.suppress(OSError):  # `write` has reported it
                    file.close()


def metrics_digest(path: pathlib.Path) -> str:
    """A hash of a metrics file; "" if it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except OSError:
        return ""


def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; none if there is no file.

    A last line that is cut short, because the run was killed, and lines of another format are
    skipped. Lines of kind "train" and "epoch" hold finite numbers only: what was not finite is left
    out.

    Raises:
      CheckpointError: if the file cannot be read.
    """
    return [line for text in _texts(path) if (line := _parsed(text)) is not None]


def _texts(path: pathlib.Path) -> list[str]:
    try:
        text = path.read_bytes().decode(errors="replace") if path.is_file() else ""
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; remove it") from None
    return text.splitlines()


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or line.get("kind") not in list(NUMBERED):
        return None
    counts = [line.get(name) for name in NUMBERED[line["kind"]]]
    if not all(type(count) is int and 0 <= count < 2**31 for count in counts):
        return None
    if line["kind"] == "similarity":
        return line
    return {
        name: value
        for name, value in line.items()
        if name == "kind" or (type(value) in (int, float) and abs(value) < LARGEST)
    }
