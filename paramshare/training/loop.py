"""The training loop, as one story: prepare, resume or start, train and validate, test, tell."""

import contextlib
import dataclasses
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
from paramshare.training.checkpoint import read_json
from paramshare.training.config import Config, ConfigError
from paramshare.training.data import ArraySource, ImageSet, train_batches, train_indices
from paramshare.training.evaluation import make_evaluate
from paramshare.training.run import Run, check_batch, check_together, prepare
from paramshare.training.state import State
from paramshare.training.step import make_train_step
from paramshare.training.track import RESULT, Track, mean
from paramshare.training.workdir import claim

SHORT = {"accuracy": "acc"}  # names of scores in the progress bar
REFRESH_SECONDS = 1.0  # of the progress bar; each refresh waits for the step under way


class NonFinite(RuntimeError):
    """A loss or a gradient was not finite. The update was not applied."""


class Interrupted(RuntimeError):
    """The run was told to stop, and has saved its state."""

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.signum = signum

    def __reduce__(self) -> tuple[Any, ...]:  # by default pickle would pass the message alone
        return type(self), (str(self), self.signum)


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
    the highest validation score: accuracy, or the F1 of paths; of a curriculum, among the epochs of the last phase), and in the end
    `result.json`. Called again with the same configuration it resumes, and arrives at the same parameters, bit for bit, as if it had
    never stopped.

    Args:
      config: the configuration.
      workdir: a folder: new, empty, or of an earlier run of this configuration.
      model: a network of your own instead of the one that the configuration names.
      data: images of your own instead of those that the configuration names.
      devices: all there are by default.
      quiet: no progress bar.

    Returns:
      The result, as in `result.json`: test measures of the last epoch and of the epoch that validation chose, counts, speed.

    Raises:
      ConfigError, DataError, ModelError, PlanError: if something does not fit; nothing has been written then.
      CheckpointError: if a checkpoint cannot be read.
      NonFinite: if a loss or gradient is not finite; names the step.
      Interrupted: after SIGINT or SIGTERM, with the state saved.
    """
    return fit(prepare(config, model=model, data=data, devices=devices), workdir, quiet=quiet)


def fit(run: Run, workdir: str | pathlib.Path, *, quiet: bool = False) -> dict[str, Any]:
    """Trains what `prepare` has brought together; see `train`."""
    return fit_together([run], [workdir], quiet=quiet)[0]


def fit_together(runs: Sequence[Run], workdirs: Sequence[str | pathlib.Path], *, quiet: bool = False) -> list[dict[str, Any]]:
    """Trains networks that differ in their seed alone, all in one program: the step is mapped over them by `jax.vmap`.

    Each has a workdir of its own, as if it had been trained by itself, and can be gone on with by itself; its numbers are the same but
    for rounding. Small networks leave an accelerator idle, and are trained faster together. On a CPU they are several times slower:
    XLA turns convolutions of several networks into grouped ones, for which it has no fast program there. Where a kill has left them at
    different steps, all go on from the newest step that each has kept.

    Args:
      runs: as `prepare` returns them; of equal configurations, but for `seed`, and on the same training images.
      workdirs: of each, as `train` takes it.
      quiet: no progress bar.

    Returns:
      The result of each.

    Raises:
      ConfigError: if the runs differ otherwise, or have kept no step that is common to all.
      As `train`.
    """
    workdirs = [pathlib.Path(workdir) for workdir in workdirs]
    check_together(runs, workdirs)
    for run, workdir in zip(runs, workdirs, strict=True):
        check_batch(run)
        claim(workdir, run)
    results = {workdir: read_json(workdir / RESULT) for workdir in workdirs if (workdir / RESULT).is_file()}
    waiting = [(run, workdir) for run, workdir in zip(runs, workdirs, strict=True) if workdir not in results]
    if waiting:
        with contextlib.ExitStack() as stack, _Signals() as signals:
            tracks = [Track(run, workdir, stack) for run, workdir in waiting]
            results |= dict(zip((workdir for _, workdir in waiting), _fit(tracks, signals, quiet), strict=True))
    return [results[workdir] for workdir in workdirs]


def _fit(tracks: list[Track], signals: "_Signals", quiet: bool) -> list[dict[str, Any]]:
    run, config = tracks[0].run, tracks[0].run.config

    # --- Resume or start
    step = _common_step(tracks)
    states = [track.start(step) for track in tracks]
    together = _Together(len(tracks))
    state = run.devices.replicate(together.stack(states))
    writer = jax.process_index() == 0
    bar = _bar(tracks, step, hidden=quiet or not writer)
    started = time.monotonic() - max(track.progress.seconds for track in tracks)

    # --- Train and validate
    update = _train_function([track.run for track in tracks], together)
    evaluate = make_evaluate(run)
    snapshot = make_snapshot(run.model) if config.similarity_every and writer else None

    def variables(i: int) -> dict[str, Any]:
        return together.take(state.variables, i)

    def note_similarity(epoch: int) -> None:
        for i, track in enumerate(tracks):
            if snapshot:
                track.metrics.write("similarity", step, epoch=epoch, matrices=snapshot(variables(i)))

    if step == 0:
        note_similarity(0)
    pending: list[dict[str, jax.Array]] = []  # measured, perhaps not computed yet
    fetched, compiled = time.monotonic(), False
    try:
        for inputs in _inputs([track.run for track in tracks], step):
            state, measured = update(state, inputs)
            pending.append(measured)
            step += 1
            epoch, of_epoch = divmod(step, run.steps_per_epoch)
            stop = signals.stop(step)
            line_due = step % config.log_every == 0 or of_epoch == 0
            if line_due or stop or time.monotonic() - fetched > REFRESH_SECONDS:
                found = _fetch(pending, step, tracks)
                now = time.monotonic()  # only now have the steps been computed
                for track, lines in zip(tracks, found, strict=True):
                    track.add(lines)
                    if compiled:
                        track.progress.training_seconds += now - fetched
                        track.progress.training_images += len(lines) * config.batch_size
                bar.update(len(pending) * config.batch_size * len(tracks))
                pending, fetched, compiled = [], now, True
                _show(bar, tracks, step)
            if line_due:
                for track in tracks:
                    track.write_line(step)
            if of_epoch == 0:
                _show(bar, tracks, step, [track.finish_epoch(epoch, step, variables(i), evaluate) for i, track in enumerate(tracks)])
                if epoch % max(config.similarity_every, 1) == 0 or epoch == config.epochs:
                    note_similarity(epoch)
            for i, track in enumerate(tracks):
                track.progress.seconds = time.monotonic() - started
                if stop or step == run.steps or (of_epoch == 0 and epoch % config.checkpoint_every == 0):
                    notes = dataclasses.asdict(track.progress)
                    track.newest.save(step, together.take(state, i), notes, wait=bool(stop) or step == run.steps)
            if of_epoch == 0:
                fetched = time.monotonic()  # validation and saving are not training
            if stop and step < run.steps:
                places = " and ".join(str(track.newest.folder) for track in tracks)
                raise Interrupted(
                    f"interrupted at step {step} of {run.steps}; state saved in {places}; the same command goes on from there", stop
                )
    finally:
        bar.close()

    # --- Test, once, what was trained last and what validation chose
    return [track.finish(variables(i), evaluate) for i, track in enumerate(tracks)]


def _common_step(tracks: list[Track]) -> int:
    """The newest step that all have kept: a kill may come when some have saved a step and others have not."""
    kept = [track.newest.steps or [0] for track in tracks]
    common = set.intersection(*map(set, kept))
    if not common:
        at = ", ".join(f"{track.workdir} at {' and '.join(map(str, steps))}" for track, steps in zip(tracks, kept, strict=True))
        raise ConfigError(f"the runs stand at different steps, none kept by all ({at}); go on with each by itself, or begin all anew")
    return max(common)


class _Together:
    """States of several networks as one, along a first axis; of a single network, its state as it is."""

    def __init__(self, count: int):
        self.count = count

    def stack(self, trees: list[Any]) -> Any:
        return trees[0] if self.count == 1 else jax.tree.map(lambda *leaves: np.stack(leaves), *map(jax.device_get, trees))

    def take(self, tree: Any, i: int) -> Any:
        return tree if self.count == 1 else jax.tree.map(lambda leaf: leaf[i], tree)


def _train_function(runs: list[Run], together: _Together):
    """`(state, inputs) -> (state, metrics)`, with the training images on the devices where they fit."""
    run, config, data = runs[0], runs[0].config, runs[0].data

    def step_of(seed: Any):
        return make_train_step(
            run.model,
            run.optimizer,
            config.augment,
            data.mean,
            data.std,
            task=data.task,
            seed=seed,
            label_smoothing=config.label_smoothing,
            penalty=config.penalty,
            gradient_flow=config.gradient_flow,
        )

    def steps(state: State, data: Any, batch: Any):
        seeds = np.array([run.config.seed for run in runs])
        return jax.vmap(lambda state, batch, seed: step_of(seed)(state, data, batch), in_axes=(0, 1, 0))(state, batch, seeds)

    mapped = run.devices.map(step_of(config.seed) if together.count == 1 else steps, donate=True)
    images = run.devices.replicate({"image": data.train.image, "label": data.train.label}) if isinstance(data.train, ArraySource) else None
    return lambda state, inputs: mapped(state, images, run.devices.cut(inputs))


def _inputs(runs: list[Run], start: int) -> Iterator[dict[str, np.ndarray]]:
    """This process's inputs of every step from `start` to the last: indices into images on the device, (b,), or the images.

    For several runs (b, runs): each has an order of its own.
    """
    run, size = runs[0], runs[0].config.batch_size
    process, processes = jax.process_index(), jax.process_count()
    if not isinstance(run.data.train, ArraySource):
        batches = train_batches(run.data.train, size, run.config.seed, start, process_index=process, process_count=processes)
        yield from (batch for _, batch in zip(range(start, run.steps), batches, strict=False))
        return
    mine, examples = slice(process * size // processes, (process + 1) * size // processes), run.data.phase_examples
    for step in range(start, run.steps):
        first = run.phase(step // run.steps_per_epoch) * examples
        orders = [(first + train_indices(examples, size, its.config.seed, step)[mine]).astype(np.int32) for its in runs]
        yield {"index": orders[0] if len(runs) == 1 else np.stack(orders, axis=1)}


def _fetch(pending: list[dict[str, jax.Array]], step: int, tracks: list[Track]) -> list[list[dict[str, float]]]:
    """The numbers of the steps up to `step`, for each network; raises `NonFinite` at the first that is not finite."""
    fetched = jax.device_get(pending)
    found = []
    for i, track in enumerate(tracks):
        lines = [{name: float(np.atleast_1d(value)[i]) for name, value in measured.items()} for measured in fetched]
        for number, line in enumerate(lines, start=step - len(lines) + 1):
            if not line["finite"]:
                what = f"the loss is {line['loss']}" if not np.isfinite(line["loss"]) else "a gradient is not finite"
                of = f" of seed {track.run.config.seed}" if len(tracks) > 1 else ""
                raise NonFinite(f"step {number}{of}: {what}; the update was not applied; lower the learning rate, or add warm-up")
        found.append(lines)
    return found


def _show(bar: tqdm, tracks: list[Track], step: int, validated: Sequence[float | None] = ()) -> None:
    """Puts means over all networks into the bar: of the latest steps, and of what validation has found."""
    run, score = tracks[0].run, tracks[0].run.data.task.score
    lines = [line for track in tracks for line in track.window or track.last]
    shown = {"epoch": f"{-(-step // run.steps_per_epoch)}/{run.config.epochs}", "loss": f"{mean(lines, 'loss'):.3f}"}
    shown |= {SHORT.get(score, score): f"{mean(lines, score):.3f}"}
    found = [value for value in validated if value is not None]
    bar.set_postfix(shown | ({"val": f"{sum(found) / len(found):.3f}"} if found else {}))


def _bar(tracks: list[Track], step: int, *, hidden: bool) -> tqdm:
    run, size = tracks[0].run, tracks[0].run.config.batch_size * len(tracks)
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
