"""Metrics of a run: JSON lines, and TensorBoard event files on request."""

import contextlib
import json
import pathlib
from typing import Any

from paramshare.storage import write_text

METRICS = "metrics.jsonl"


class MetricsFile:
    """`metrics.jsonl`: one JSON object a line, each with `step` and `kind`.

    The kinds are "train", "epoch" and "similarity". Opening the file for a resumed run drops the
    lines after the step that the run resumes from, so no line appears twice; a run that starts at
    step 0 keeps none.

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
        if not write:
            return
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._events = SummaryWriter(
                str(folder / "tensorboard"), purge_step=step + 1 if step else None
            )
        if self.path.exists():
            kept = [
                json.dumps(line) for line in read_metrics(self.path) if 0 < step >= line["step"]
            ]
            write_text(self.path, "".join(line + "\n" for line in kept))
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Appends a line and flushes it to disk."""
        if self._file is not None:
            self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
            self._file.flush()
        if self._events is not None:
            for name, value in values.items():
                if isinstance(value, float):
                    self._events.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Closes the files."""
        for file in (self._file, self._events):
            if file is not None:
                file.close()


def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; none if there is no file.

    A last line that is cut short, because the run was killed, and lines of another format are
    skipped.
    """
    lines = []
    for text in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError):
            line = json.loads(text)
            if isinstance(line, dict) and isinstance(line.get("step"), int) and "kind" in line:
                lines.append(line)
    return lines
