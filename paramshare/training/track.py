"""What one run stores beside its state: checkpoints, metrics, the selected epoch, the result."""

import contextlib
import math
import os
import pathlib
from collections.abc import Callable
from typing import Any

import flax
import jax
import jaxlib.version
import numpy as np
import optax

from paramshare.errors import warn
from paramshare.ops.xla import ynnpack_convolutions
from paramshare.shared import Shared, count
from paramshare.training.checkpoint import CheckpointError, Checkpoints
from paramshare.training.compression import pack_run
from paramshare.training.evaluation import NonFinite
from paramshare.training.metrics import METRICS, MetricsFile, metrics_digest, read_metrics
from paramshare.training.processes import ProcessError, united
from paramshare.training.progress import Progress
from paramshare.training.pruning import last_pruning
from paramshare.training.result import Evaluation, Result, Selected
from paramshare.training.run import OPERATIONS, Run
from paramshare.training.state import State
from paramshare.training.workdir import RESULT, check_origin
from paramshare.transform.packing import PACKED

# A run that is killed while it saves its first checkpoint may have lines of these further epochs.
UNSAVED_EPOCHS = 2
Evaluate = Callable[..., Evaluation]  # as `make_evaluate` returns it


class Track:
    """What one run stores beside its state: checkpoints, metrics, the selected epoch, the result.

    Args:
      run: the run.
      workdir: its folder.
      stack: closes what is opened here.
    """

    def __init__(self, run: Run, workdir: pathlib.Path, stack: contextlib.ExitStack):
        self.run, self.workdir = run, workdir
        self.newest = stack.enter_context(
            Checkpoints(
                workdir / "checkpoints", keep=run.config.keep_last, period=run.config.keep_every
            )
        )
        self.best = stack.enter_context(Checkpoints(workdir / "best", keep=1))
        self.progress = Progress()
        self._last: dict[str, float] = {}  # the last line
        self._warned = False  # of a validation score that is not finite
        self._stack = stack

    def restore(self, step: int) -> tuple[State, Progress]:
        """The state and the progress at a step; the initial ones if no checkpoint is stored.

        Raises:
          CheckpointError: if the checkpoint cannot be read, or all checkpoints were lost.
        """
        if self.newest.latest is not None:
            state, notes = self.newest.restore(self.run.shapes, step)
            try:
                return state, Progress(**notes)
            except TypeError:
                raise CheckpointError(
                    f"checkpoint {self.newest.folder / str(step)} has the notes {sorted(notes)}, "
                    "which are not of this version of paramshare; use the version that wrote it"
                ) from None
        check_origin(self.workdir)
        lines = read_metrics(self.workdir / METRICS)
        epochs = sum(line["kind"] == "epoch" for line in lines)
        if epochs > UNSAVED_EPOCHS + self.run.config.checkpoint_every:
            raise CheckpointError(
                f"{self.workdir} has trained {epochs} epochs, but its checkpoints are gone; "
                "restore its folder checkpoints, or train again in a new workdir"
            )
        if lines:
            warn(f"{self.workdir} has no checkpoint: its {epochs} epochs are trained again")
        return self.run.init(), Progress()

    def start(self, state: State, progress: Progress) -> None:
        """Continues from a state; what was stored after it is dropped.

        Warns if the machine or the packages have changed: parameters then differ in the last
        digits from those of an uninterrupted run.
        """
        self.progress, now = progress, environment(self.run)
        before = progress.environment
        changed = [
            f"{name} {before.get(name, 'unknown')} -> {value}"
            for name, value in now.items()
            if before and before.get(name) != value
        ]
        if changed and jax.process_index() == 0:
            warn(
                f"{self.workdir} is resumed with {', '.join(changed)}: the parameters will differ "
                "slightly from those of an uninterrupted run"
            )
        progress.environment = now
        self.metrics = MetricsFile(  # before anything is dropped: it may fail
            self.workdir,
            int(state.step),
            tensorboard=self.run.config.tensorboard,
            write=jax.process_index() == 0,
        )
        self._stack.callback(self.metrics.close)
        self.newest.drop_after(int(state.step))
        self.best.drop_after(int(state.step))
        if jax.process_index() == 0:
            (self.workdir / PACKED).unlink(missing_ok=True)  # of variables that now change

    def add(self, lines: list[dict[str, float]]) -> None:
        """Adds the metrics of steps; those of skipped updates are counted only.

        Raises:
          NonFinite: if too many updates were skipped.
        """
        skipped = sum(not line["finite"] for line in lines)
        if skipped:
            self.progress.skipped += skipped
            total, limit = self.progress.skipped, self.run.config.non_finite_limit
            warn(f"skipped {skipped} updates that were not finite ({total} so far)")
            if total > limit:
                raise NonFinite(
                    f"{total} updates were not finite, and non_finite_limit is {limit}; resume "
                    "with a higher one, or lower the learning rate in a new workdir"
                )
        lines = [line for line in lines if line["finite"]]
        self.progress.add(lines, epoch_metrics(self.run, lines[0]) if lines else ())

    @property
    def recent(self) -> dict[str, float]:
        """Means of the newest steps; {} if there are none."""
        return self.progress.line_means() or self._last

    def write_line(self, step: int) -> dict[str, float]:
        """Writes the means since the last line; of `gradient_max/BANK` the maximum."""
        means, progress = self.progress.line_means(), self.progress
        if not means:  # all updates were skipped
            return {}
        first = epoch_metrics(self.run, means)
        line = {name: means[name] for name in dict.fromkeys((*first, *means))}
        # The schedule counts the updates that were made.
        rate = float(np.asarray(self.run.rate(step - progress.skipped - 1)))
        line["learning_rate"] = rate
        self.metrics.write("train", step, **line)
        self._last, progress.line_sums, progress.line_batches = means, {}, 0
        progress.line_without = {}
        return line

    def finish_epoch(
        self,
        epoch: int,
        step: int,
        variables: dict[str, Any],
        average: dict[str, Any] | None,
        evaluate: Evaluate,
        validate: bool = False,
    ) -> dict[str, Any]:
        """Validates, stores the variables if they are the best so far, and writes the epoch's line.

        Args:
          epoch: counted from 1.
          step: updates made.
          variables: the variables after this epoch.
          average: their moving average, which is validated too; None for none.
          evaluate: measures variables on a set.
          validate: validate this epoch even if `validate_every` leaves it out.

        Returns:
          The line.
        """
        run = self.run
        line: dict[str, Any] = {"epoch": epoch}
        line |= {"phase": run.phase(epoch - 1) + 1} if run.data.phases > 1 else {}
        line |= self.progress.means()
        if run.config.non_finite == "skip":
            line["skipped"] = self.progress.skipped
        if validate or epoch % run.config.validate_every == 0 or epoch == run.config.epochs:
            line |= self._validate(epoch, step, variables, average, evaluate)
        self.metrics.write("epoch", step, **line)
        return line

    def validate_between(
        self,
        epoch: int,
        step: int,
        variables: dict[str, Any],
        average: dict[str, Any] | None,
        evaluate: Evaluate,
    ) -> dict[str, Any]:
        """As `finish_epoch`, within an epoch."""
        line = self._validate(epoch, step, variables, average, evaluate)
        if line:
            self.metrics.write("validation", step, **line)
        return line

    def _validate(
        self,
        epoch: int,
        step: int,
        variables: dict[str, Any],
        average: dict[str, Any] | None,
        evaluate: Evaluate,
    ) -> dict[str, float]:
        """What is measured on the validation set; stores the variables if they are the best."""
        run, progress = self.run, self.progress
        score, phase, line = run.task.score.name, run.phase(epoch - 1), {}
        if not len(run.data.validation):
            return line
        source = run.data.of_phase("validation", phase)
        for prefix, measured in (("", variables), ("ema_", average)):
            if measured is None:
                continue
            try:
                evaluation = evaluate(measured, source)
            except NonFinite as error:
                of = " of the moving average" if prefix else ""
                selected = "" if prefix else "; they will not be selected"
                warn(f"validation{of} in epoch {epoch}, step {step}: {error}{selected}")
                continue
            value = evaluation.measures[score]
            line |= {
                f"{prefix}validation_loss": evaluation.loss,
                f"{prefix}validation_{score}": value,
            }
            # Scores of early phases of a curriculum are not comparable with those of the last one.
            # After NaN or infinity no later score would be larger.
            best = progress.best_score
            better = best is None or run.task.score.is_better(value, best)
            last_phase = phase == run.data.phases - 1
            if not math.isfinite(value) and not self._warned:
                self._warned = True
                warn(
                    f"validation {score} is {value} in epoch {epoch}; such epochs are not selected"
                )
            # Nor are scores of networks that are not yet pruned as much as asked.
            settings = run.config.compression
            pruned = not settings.gradual or (
                step - progress.skipped >= last_pruning(settings, run.steps)
            )
            if not prefix and better and math.isfinite(value) and last_phase and pruned:
                progress.best_score, progress.best_epoch, progress.best_step = value, epoch, step
                # On disk before any checkpoint that refers to it.
                self.best.save(step, variables, {"epoch": epoch, "validation": value}, wait=True)
        return line

    def finish(
        self, variables: dict[str, Any], average: dict[str, Any] | None, evaluate: Evaluate
    ) -> Result:
        """Evaluates the last and the selected epoch on the test set, and writes the result.

        Args:
          variables: the variables at the end.
          average: their moving average, which is tested too; None for none.
          evaluate: measures variables on a set.
        """
        run, progress = self.run, self.progress
        try:
            last = evaluate(variables, run.data.test, curves=True)
        except NonFinite as error:
            selected = f"; epoch {progress.best_epoch} is in {self.best.folder}"
            raise NonFinite(
                f"{self.workdir} has no result: {error}{selected if progress.best_step else ''}"
            ) from None
        others = {}
        for name, source in run.data.others.items():
            try:
                others[name] = evaluate(variables, source)
            except NonFinite as error:
                warn(f"the result leaves out {name}: {error}")
        self.metrics.sync()
        selected, speed = None, None
        if progress.best_score is not None:
            try:
                with united():  # all evaluate together, or none
                    best, _ = self.best.restore(self.run.shapes.variables, progress.best_step)
                test = evaluate(best, run.data.test)
                selected = Selected(progress.best_epoch, progress.best_score, test)
            except (CheckpointError, ProcessError, NonFinite) as error:
                warn(f"the result has no selected epoch: {error}")
        ema = None
        if average is not None:
            try:
                ema = evaluate(average, run.data.test)
            except NonFinite as error:
                warn(f"the result leaves out the moving average: {error}")
        if progress.training_examples:
            speed = round(progress.training_examples / progress.training_seconds, 1)
        result = Result(
            model=run.config.model.name,
            data=run.data.name,
            counts=count(variables),
            epochs=run.config.epochs,
            steps=run.steps,
            score=run.facts.score,
            measures=run.task.measures,
            last=last,
            others=others,
            selected=selected,
            ema=ema,
            skipped=progress.skipped,
            seconds=round(progress.seconds, 1),
            images_per_second=speed,
            devices=f"{run.devices.count} x {run.devices.devices[0].device_kind}",
            jax=jax.__version__,
            metrics=metrics_digest(self.workdir / METRICS),
        )
        if jax.process_index() == 0:
            if isinstance(run.model, Shared) and run.config.compression.active:
                pack_run(run.model, variables, self.workdir)
            result.write(self.workdir / RESULT)
        return result


def cores() -> int:
    """The number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def environment(run: Run) -> dict[str, str]:
    """What the last digits of a run depend on, beside its configuration, data and code."""
    convolutions = "YNNPACK" if ynnpack_convolutions() else "XLA"
    return {
        "devices": f"{run.devices.count} x {run.devices.devices[0].device_kind}",
        "processes": str(jax.process_count()),
        "banks": "divided" if run.config.shard_banks else "whole",
        "operations": f"{run.config.ops}, {convolutions}, generation {OPERATIONS}",
        "cores": str(cores()),
        "backend": " ".join(run.devices.devices[0].client.platform_version.split()),
        "jax": jax.__version__,
        "jaxlib": jaxlib.version.__version__,
        "flax": flax.__version__,
        "optax": optax.__version__,
    }


def epoch_metrics(run: Run, line: dict[str, float]) -> tuple[str, ...]:
    """The metrics of a step that an epoch's line averages: losses, then measures of the task."""
    losses = (name for name in line if name.startswith("loss/"))
    measures = (measure.name for measure in run.task.measures if measure.name in line)
    return ("loss", *losses, *measures)
