"""Where a run's numbers go: JSON lines, TensorBoard on request, a progress bar."""

import contextlib
import json
import os
import pathlib
from typing import Any


class MetricsFile:
    """`metrics.jsonl`: one JSON object a line, each with its `step` and `kind` ("train", "epoch", "similarity").

    Opening it for a resumed run drops the lines beyond the step that the run resumes from, so that no line stands twice; a run that
    begins anew keeps none.

    Args:
      folder: the workdir.
      step: updates made so far.
      tensorboard: write event files as well.
      write: whether this process is the one that writes.
    """

    def __init__(self, folder: pathlib.Path, step: int, *, tensorboard: bool = False, write: bool = True):
        self.path, self._file, self._events = folder / "metrics.jsonl", None, None
        if not write:
            return
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)
        if self.path.exists():
            kept = [json.dumps(line) for line in read_metrics(self.path) if 0 < step >= line["step"]]
            fresh = self.path.with_suffix(".tmp")
            fresh.write_text("".join(line + "\n" for line in kept))
            os.replace(fresh, self.path)
        self._file = self.path.open("a")

    def write(self, kind: str, step: int, **numbers: Any) -> None:
        """Adds a line, at once on disk."""
        if self._file is not None:
            self._file.write(json.dumps({"kind": kind, "step": step, **numbers}) + "\n")
            self._file.flush()
        if self._events is not None:
            for name, value in numbers.items():
                if isinstance(value, float):
                    self._events.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Closes the files."""
        for file in (self._file, self._events):
            if file is not None:
                file.close()


def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, none if there is none; a line cut short by a kill, or that is not ours, is left out."""
    lines = []
    for text in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError):
            line = json.loads(text)
            if isinstance(line, dict) and isinstance(line.get("step"), int) and "kind" in line:
                lines.append(line)
    return lines
