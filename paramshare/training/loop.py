"""The training loop, as one story: prepare, resume or start, train and validate, test, tell."""

import dataclasses
import json
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from tqdm import tqdm

from paramshare.analysis.snapshots import make_snapshot
from paramshare.shared import count
from paramshare.training.checkpoint import Checkpoints, read_json
from paramshare.training.config import Config
from paramshare.training.data import ArraySource, ImageSet, train_batches, train_indices
from paramshare.training.evaluation import make_evaluate
from paramshare.training.metrics import MetricsFile
from paramshare.training.run import Run, check_batch, prepare
from paramshare.training.state import State
from paramshare.training.step import make_train_step
from paramshare.training.workdir import check_origin, claim

REFRESH_SECONDS = 1.0  # of the progress bar; each refresh waits for the step under way


class NonFinite(RuntimeError):
    """A loss or a gradient was not finite. The update was not applied."""


class Interrupted(RuntimeError):
    """The run was told to stop, and has saved its state."""

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.signum = signum


@dataclasses.dataclass
class Progress:
    """What a run remembers beside its state: sums over the current epoch, the best validation so far, and time.

    Attributes:
      seconds: of the whole run, compilation, validation and checkpoints included.
      training_seconds: of training steps alone, and `training_images` that they took; the first steps, which compile, left out.
    """

    loss: float = 0.0
    accuracy: float = 0.0
    batches: int = 0
    best_accuracy: float = -1.0
    best_epoch: int = 0
    best_step: int = 0
    seconds: float = 0.0
    training_seconds: float = 0.0
    training_images: int = 0

    def add(self, metrics: list[dict[str, Any]]) -> None:
        """Adds steps to the epoch's sums."""
        self.loss += sum(m["loss"] for m in metrics)
        self.accuracy += sum(m["accuracy"] for m in metrics)
        self.batches += len(metrics)


def train(
    config: Config,
    workdir: str | pathlib.Path,
    *,
    model: nn.Module | None = None,
    data: ImageSet | None = None,
    devices: Sequence[Any] | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Trains a network, or goes on with a run that was interrupted.

    The workdir then holds `config.json`, `metrics.jsonl`, `checkpoints/` (the newest states), `best/` (the variables of the epoch with
    the highest validation accuracy), and in the end `result.json`. Called again with the same configuration it resumes, and arrives
    at the same parameters, bit for bit, as if it had never stopped.

    Args:
      config: the configuration.
      workdir: a folder: new, empty, or of an earlier run of this configuration.
      model: a network of your own instead of the one that the configuration names.
      data: images of your own instead of those that the configuration names.
      devices: all there are by default.
      quiet: no progress bar.

    Returns:
      The result, as in `result.json`: test accuracy of the last epoch and of the epoch that validation chose, counts, speed.

    Raises:
      ConfigError, DataError, ModelError, PlanError: if something does not fit; nothing has been written then.
      CheckpointError: if a checkpoint cannot be read.
      NonFinite: if a loss or gradient is not finite; names the step.
      Interrupted: after SIGINT or SIGTERM, with the state saved.
    """
    return fit(prepare(config, model=model, data=data, devices=devices), workdir, quiet=quiet)


def fit(run: Run, workdir: str | pathlib.Path, *, quiet: bool = False) -> dict[str, Any]:
    """Trains what `prepare` has brought together; see `train`."""
    workdir, config = pathlib.Path(workdir), run.config
    check_batch(run)
    claim(workdir, run)
    finished = workdir / "result.json"
    if finished.is_file():
        return read_json(finished)

    with Checkpoints(workdir / "checkpoints") as newest, Checkpoints(workdir / "best", keep=1) as best, _Signals() as signals:
        # --- Resume or start
        shapes = jax.eval_shape(run.init)
        if newest.latest is None:
            check_origin(workdir)
            state, progress = jax.jit(run.init)(), Progress()
        else:
            state, notes = newest.restore(shapes)
            progress = Progress(**notes)
        step = int(state.step)
        state = run.devices.replicate(state)
        writer = jax.process_index() == 0
        metrics = MetricsFile(workdir, step, tensorboard=config.tensorboard, write=writer)
        bar = _bar(run, step, hidden=quiet or not writer)
        started = time.monotonic() - progress.seconds

        # --- Train and validate
        update = _train_function(run)
        evaluate = make_evaluate(run)
        snapshot = make_snapshot(run.model) if config.similarity_every and writer else None
        if snapshot and step == 0:
            metrics.write("similarity", 0, epoch=0, matrices=snapshot(state.variables))
        pending: list[dict[str, jax.Array]] = []  # measured, perhaps not computed yet
        window: list[dict[str, float]] = []  # fetched, not yet in a line of metrics
        fetched, compiled = time.monotonic(), False
        try:
            for inputs in _inputs(run, step):
                state, measured = update(state, inputs)
                pending.append(measured)
                step += 1
                epoch, of_epoch = divmod(step, run.steps_per_epoch)
                stop = signals.stop(step)
                line_due = step % config.log_every == 0 or of_epoch == 0
                if line_due or stop or time.monotonic() - fetched > REFRESH_SECONDS:
                    found = _fetch(pending, step)
                    now = time.monotonic()  # only now have the steps been computed
                    progress.add(found)
                    if compiled:
                        progress.training_seconds += now - fetched
                        progress.training_images += len(found) * config.batch_size
                    window, pending, fetched, compiled = window + found, [], now, True
                    bar.update(len(found) * config.batch_size)
                    bar.set_postfix(
                        epoch=f"{-(-step // run.steps_per_epoch)}/{config.epochs}",
                        loss=f"{_mean(window, 'loss'):.3f}",
                        acc=f"{_mean(window, 'accuracy'):.3f}",
                    )
                if line_due:
                    metrics.write("train", step, **_line(window), learning_rate=float(np.asarray(run.rate(step - 1))))
                    window = []
                if of_epoch == 0:
                    _finish_epoch(run, epoch, step, state, progress, evaluate, best, metrics, bar)
                    if snapshot and (epoch % config.similarity_every == 0 or epoch == config.epochs):
                        metrics.write("similarity", step, epoch=epoch, matrices=snapshot(state.variables))
                progress.seconds = time.monotonic() - started
                if stop or step == run.steps or (of_epoch == 0 and epoch % config.checkpoint_every == 0):
                    newest.save(step, state, dataclasses.asdict(progress), wait=bool(stop) or step == run.steps)
                if of_epoch == 0:
                    fetched = time.monotonic()  # validation and saving are not training
                if stop and step < run.steps:
                    raise Interrupted(
                        f"interrupted at step {step} of {run.steps}; state saved in {newest.folder}; the same command goes on from there",
                        stop,
                    )
        finally:
            bar.close()
            metrics.close()

        # --- Test, once, what was trained last and what validation chose
        result = _result(run, state, progress, evaluate, best, shapes)
        if writer:
            fresh = finished.with_suffix(".tmp")
            fresh.write_text(json.dumps(result, indent=2) + "\n")
            fresh.replace(finished)
        return result


def _train_function(run: Run):
    """`(state, inputs) -> (state, metrics)`, with the training images on the devices where they fit."""
    config, data = run.config, run.data
    step = make_train_step(
        run.model,
        run.optimizer,
        config.augment,
        data.mean,
        data.std,
        seed=config.seed,
        label_smoothing=config.label_smoothing,
        penalty=config.penalty,
        gradient_flow=config.gradient_flow,
    )
    mapped = run.devices.map(step, donate=True)
    images = run.devices.replicate({"image": data.train.image, "label": data.train.label}) if isinstance(data.train, ArraySource) else None
    return lambda state, inputs: mapped(state, images, run.devices.cut(inputs))


def _inputs(run: Run, start: int) -> Iterator[dict[str, np.ndarray]]:
    """This process's inputs of every step from `start` to the last: indices into images on the device, or the images."""
    size, seed = run.config.batch_size, run.config.seed
    process, processes = jax.process_index(), jax.process_count()
    if not isinstance(run.data.train, ArraySource):
        batches = train_batches(run.data.train, size, seed, start, process_index=process, process_count=processes)
        yield from (batch for _, batch in zip(range(start, run.steps), batches, strict=False))
        return
    mine = slice(process * size // processes, (process + 1) * size // processes)
    for step in range(start, run.steps):
        yield {"index": train_indices(len(run.data.train), size, seed, step)[mine].astype(np.int32)}


def _fetch(pending: list[dict[str, jax.Array]], step: int) -> list[dict[str, float]]:
    """The numbers of the steps up to `step`; raises `NonFinite` at the first that is not finite."""
    lines = [{name: float(value) for name, value in measured.items()} for measured in jax.device_get(pending)]
    for number, line in enumerate(lines, start=step - len(lines) + 1):
        if not line["finite"]:
            what = f"the loss is {line['loss']}" if not np.isfinite(line["loss"]) else "a gradient is not finite"
            raise NonFinite(f"step {number}: {what}; the update was not applied; lower the learning rate, or add warm-up")
    return lines


def _mean(lines: list[dict[str, float]], name: str) -> float:
    return float(np.mean([line[name] for line in lines]))


def _line(lines: list[dict[str, float]]) -> dict[str, float]:
    """The means of what was measured since the last line; of `gradient_max/BANK` the largest."""
    names = ["loss", "accuracy", *(name for name in lines[0] if name not in ("loss", "accuracy", "finite"))]
    return {name: max(line[name] for line in lines) if name.startswith("gradient_max/") else _mean(lines, name) for name in names}


def _finish_epoch(
    run: Run, epoch: int, step: int, state: State, progress: Progress, evaluate: Any, best: Checkpoints, metrics: MetricsFile, bar: tqdm
) -> None:
    """Validates, keeps the state if it is the best so far, writes the epoch's line, and clears the epoch's sums."""
    line: dict[str, Any] = {"epoch": epoch, "loss": progress.loss / progress.batches, "accuracy": progress.accuracy / progress.batches}
    if len(run.data.validation) and (epoch % run.config.validate_every == 0 or epoch == run.config.epochs):
        found = evaluate(state.variables, run.data.validation)
        line |= {"validation_loss": found["loss"], "validation_accuracy": found["accuracy"]}
        bar.set_postfix(
            epoch=f"{epoch}/{run.config.epochs}", loss=f"{line['loss']:.3f}", acc=f"{line['accuracy']:.3f}", val=f"{found['accuracy']:.3f}"
        )
        if found["accuracy"] > progress.best_accuracy:
            progress.best_accuracy, progress.best_epoch, progress.best_step = found["accuracy"], epoch, step
            # On disk before any checkpoint that says so.
            best.save(step, state.variables, {"epoch": epoch, "validation_accuracy": found["accuracy"]}, wait=True)
    metrics.write("epoch", step, **line)
    progress.loss = progress.accuracy = 0.0
    progress.batches = 0


def _result(run: Run, state: State, progress: Progress, evaluate: Any, best: Checkpoints, shapes: State) -> dict[str, Any]:
    last = evaluate(state.variables, run.data.test)
    result: dict[str, Any] = {
        "model": run.config.model.name,
        "data": run.data.name,
        "counts": count(state.variables),
        "epochs": run.config.epochs,
        "steps": run.steps,
        "last": {"epoch": run.config.epochs, "test": last},
        "selected": None,
        "seconds": round(progress.seconds, 1),
        "images_per_second": round(progress.training_images / progress.training_seconds, 1) if progress.training_images else None,
        "devices": f"{run.devices.count} x {run.devices.devices[0].device_kind}",
        "jax": jax.__version__,
    }
    if progress.best_epoch:
        variables, notes = best.restore(shapes.variables, progress.best_step)
        result["selected"] = {**notes, "test": evaluate(variables, run.data.test)}
    return result


def _bar(run: Run, step: int, *, hidden: bool) -> tqdm:
    size = run.config.batch_size
    return tqdm(
        total=run.steps * size,
        initial=step * size,
        unit="img",
        unit_scale=True,
        desc=run.config.model.name,
        disable=hidden,
        dynamic_ncols=True,
        mininterval=0.5,
    )


class _Signals:
    """SIGINT and SIGTERM set a flag that the loop reads between steps; a second SIGINT ends the process as usual.

    With several processes, SIGTERM to any of them stops all, after one same step; SIGINT is not caught.
    """

    def __enter__(self) -> "_Signals":
        self.signum, self._before = 0, {}
        # Several processes have to stop after the same step, which only JAX's own preemption service can arrange: it takes SIGTERM.
        if threading.current_thread() is threading.main_thread() and jax.process_count() == 1:
            self._before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
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
        """The signal to stop for after this step, or 0; all processes stop after the same step."""
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            return signal.SIGTERM if multihost_utils.reached_preemption_sync_point(step) else 0
        return self.signum
