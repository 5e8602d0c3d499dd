"""What one network's run keeps, beside its state: checkpoints, lines of metrics, sums, the best epoch, the result."""

import contextlib
import dataclasses
import json
import pathlib
from typing import Any

import jax
import numpy as np

from paramshare.shared import count
from paramshare.training.checkpoint import Checkpoints
from paramshare.training.metrics import MetricsFile
from paramshare.training.run import Run
from paramshare.training.state import State
from paramshare.training.workdir import check_origin

RESULT = "result.json"
RENAMED = {"accuracy": "score", "best_accuracy": "best_score"}  # fields of `Progress`, as earlier versions noted them


@dataclasses.dataclass
class Progress:
    """What a run remembers beside its state: sums over the current epoch, the best validation so far, and time.

    Attributes:
      seconds: of the whole run, compilation, validation and checkpoints included.
      training_seconds: of training steps alone, and `training_images` that they took; the first steps, which compile, left out.
    """

    loss: float = 0.0
    score: float = 0.0
    batches: int = 0
    best_score: float = -1.0
    best_epoch: int = 0
    best_step: int = 0
    seconds: float = 0.0
    training_seconds: float = 0.0
    training_images: int = 0

    def add(self, metrics: list[dict[str, Any]], score: str) -> None:
        """Adds steps to the epoch's sums; `score` names the measure that tells good from better."""
        self.loss += sum(m["loss"] for m in metrics)
        self.score += sum(m[score] for m in metrics)
        self.batches += len(metrics)


class Track:
    """What one network's run keeps, beside its state: checkpoints, lines of metrics, sums.

    Args:
      run: the run.
      workdir: its folder.
      stack: closes what is opened here.
    """

    def __init__(self, run: Run, workdir: pathlib.Path, stack: contextlib.ExitStack):
        self.run, self.workdir = run, workdir
        self.newest = stack.enter_context(Checkpoints(workdir / "checkpoints"))
        self.best = stack.enter_context(Checkpoints(workdir / "best", keep=1))
        self.shapes = jax.eval_shape(run.init)
        self.progress = Progress()
        self.window: list[dict[str, float]] = []  # fetched, not yet in a line of metrics
        self.last: list[dict[str, float]] = []  # those in the latest line
        self._stack = stack

    def start(self, step: int | None = None) -> State:
        """The state to go on from: a fresh one, or that of the newest checkpoint, or of a step; what is kept beyond it is dropped."""
        if self.newest.latest is None:
            check_origin(self.workdir)
            state = jax.jit(self.run.init)()
        else:
            state, notes = self.newest.restore(self.shapes, step)
            self.progress = Progress(**{RENAMED.get(name, name): value for name, value in notes.items()})
            self.newest.drop_after(int(state.step))
        self.metrics = MetricsFile(self.workdir, int(state.step), tensorboard=self.run.config.tensorboard, write=jax.process_index() == 0)
        self._stack.callback(self.metrics.close)
        return state

    def add(self, lines: list[dict[str, float]]) -> None:
        """Takes in what steps have measured."""
        self.progress.add(lines, self.run.data.task.score)
        self.window += lines

    def write_line(self, step: int) -> None:
        """Writes the means of what was measured since the last line."""
        rate = float(np.asarray(self.run.rate(step - 1)))
        self.metrics.write("train", step, **_line(self.window, self.run.data.task.score), learning_rate=rate)
        self.window, self.last = [], self.window

    def finish_epoch(self, epoch: int, step: int, variables: dict[str, Any], evaluate: Any) -> float | None:
        """Validates, keeps the variables if they are the best so far, writes the epoch's line, and clears the epoch's sums.

        Returns the validation score; None where this epoch is not validated.
        """
        run, progress = self.run, self.progress
        score, phase, held = run.data.task.score, run.phase(epoch - 1), None
        line: dict[str, Any] = {"epoch": epoch} | ({"phase": phase + 1} if run.data.phases > 1 else {})
        line |= {"loss": progress.loss / progress.batches, score: progress.score / progress.batches}
        if len(run.data.validation) and (epoch % run.config.validate_every == 0 or epoch == run.config.epochs):
            found = evaluate(variables, run.data.of_phase("validation", phase))
            held = found[score]
            line |= {"validation_loss": found["loss"], f"validation_{score}": held}
            # What is good in an early phase of a curriculum says little of the last one.
            if held > progress.best_score and phase == run.data.phases - 1:
                progress.best_score, progress.best_epoch, progress.best_step = held, epoch, step
                # On disk before any checkpoint that says so.
                self.best.save(step, variables, {"epoch": epoch, f"validation_{score}": held}, wait=True)
        self.metrics.write("epoch", step, **line)
        progress.loss = progress.score = 0.0
        progress.batches = 0
        return held

    def finish(self, variables: dict[str, Any], evaluate: Any) -> dict[str, Any]:
        """Tests, once, what was trained last and what validation chose; writes the result, and returns it."""
        run, progress = self.run, self.progress
        last = evaluate(variables, run.data.test)
        others: dict[str, Any] = {name: evaluate(variables, source) for name, source in run.data.others.items()}
        others = {"others": others} if others else {}
        result: dict[str, Any] = {
            "model": run.config.model.name,
            "data": run.data.name,
            "counts": count(variables),
            "epochs": run.config.epochs,
            "steps": run.steps,
            "score": run.data.task.score,
            "last": {"epoch": run.config.epochs, "test": last, **others},
            "selected": None,
            "seconds": round(progress.seconds, 1),
            "images_per_second": round(progress.training_images / progress.training_seconds, 1) if progress.training_images else None,
            "devices": f"{run.devices.count} x {run.devices.devices[0].device_kind}",
            "jax": jax.__version__,
        }
        if progress.best_epoch:
            chosen, notes = self.best.restore(self.shapes.variables, progress.best_step)
            result["selected"] = {**notes, "test": evaluate(chosen, run.data.test)}
        if jax.process_index() == 0:
            fresh = (self.workdir / RESULT).with_suffix(".tmp")
            fresh.write_text(json.dumps(result, indent=2) + "\n")
            fresh.replace(self.workdir / RESULT)
        return result


def mean(lines: list[dict[str, float]], name: str) -> float:
    """The mean of one number over lines."""
    return float(np.mean([line[name] for line in lines]))


def _line(lines: list[dict[str, float]], score: str) -> dict[str, float]:
    """The means of what was measured since the last line; of `gradient_max/BANK` the largest."""
    names = ["loss", score, *(name for name in lines[0] if name not in ("loss", score, "finite"))]
    return {name: max(line[name] for line in lines) if name.startswith("gradient_max/") else mean(lines, name) for name in names}
