"""The training loop: prepare, resume or start, train and validate, test, write the result."""

import contextlib
import dataclasses
import functools
import json
import pathlib
import signal
import statistics
import time
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from tqdm import tqdm

from paramshare.data import Dataset
from paramshare.errors import warn
from paramshare.measure.snapshots import make_snapshot
from paramshare.storage import run_path
from paramshare.training import config as configs
from paramshare.training.callbacks import Callback, Moment
from paramshare.training.checkpoint import CheckpointError
from paramshare.training.config import Config, ConfigError
from paramshare.training.evaluation import NonFinite, make_evaluate
from paramshare.training.processes import agree, check_shared, exchange, united, versions
from paramshare.training.profile import Profile
from paramshare.training.program import Together, inputs, train_function
from paramshare.training.progress import Progress
from paramshare.training.result import Result
from paramshare.training.run import Run, check_batch, check_together, prepare
from paramshare.training.signals import Interrupted, Signals
from paramshare.training.state import State
from paramshare.training.track import Track
from paramshare.training.workdir import LOCK, RESULT, claim, locked

REFRESH_SECONDS = 1.0  # between updates of the progress bar; each waits for the current step


def train(
    config: Config,
    workdir: str | pathlib.Path,
    *,
    model: nn.Module | None = None,
    data: Dataset | None = None,
    devices: Sequence[Any] | None = None,
    quiet: bool = False,
    callbacks: Sequence[Callback] = (),
) -> Result:
    """Trains a network, or resumes an interrupted run.

    During training the workdir holds `config.json`, `identity.json`, `metrics.jsonl`,
    `checkpoints/` (the newest states) and `best/` (the variables of the epoch with the best
    validation score; with a curriculum, among the epochs of the last phase). `result.json` is
    written at the end. Call `train` again with the same configuration to resume; the parameters are
    bit-identical to those of a run without interruption.

    Args:
      config: the configuration.
      workdir: a folder: new, empty, or of an earlier run of this configuration.
      model: a network to use instead of the one that the configuration names.
      data: a data set to use instead of the configured one.
      devices: all available devices by default.
      quiet: show no progress bar.
      callbacks: functions that are called after each line of metrics, after each epoch, and at the
        end, with a `paramshare.training.callbacks.Moment`.

    Returns:
      The result, as in `result.json`.

    Raises:
      ConfigError, DataError, ModelError, PlanError: if configuration, data and model are
        incompatible; nothing is written in that case.
      CheckpointError: if a checkpoint cannot be read.
      NonFinite: if a loss or gradient is not finite, and names the step; or if the loss on the
        test set is not finite at the end. Validation that is not finite is a warning, and its epoch
        is not selected.
      Interrupted: after SIGINT or SIGTERM, with the state saved.

    While it trains, the workdir is locked: another training there raises `ConfigError`.
    """
    run = prepare(config, model=model, data=data, devices=devices)
    return fit(run, workdir, quiet=quiet, callbacks=callbacks)


def fit(
    run: Run,
    workdir: str | pathlib.Path,
    *,
    quiet: bool = False,
    callbacks: Sequence[Callback] = (),
) -> Result:
    """Trains a run that `prepare` built; see `train`."""
    return fit_together([run], [workdir], quiet=quiet, callbacks=callbacks)[0]


def fit_together(
    runs: Sequence[Run],
    workdirs: Sequence[str | pathlib.Path],
    *,
    quiet: bool = False,
    callbacks: Sequence[Callback] = (),
    profile: bool = False,
) -> list[Result]:
    """Trains several networks in one program, with `jax.vmap`. They differ only in their seed.

    Each run has a workdir, as if it were trained alone, and can later be resumed alone. Its
    parameters and metrics equal those of a run trained alone, up to rounding. Small networks
    underuse an accelerator and train faster together. On a CPU they train several times slower: XLA
    turns the convolutions of several networks into grouped ones, which it runs slowly there. If the
    program was killed and the runs are at different steps, all resume from the newest step that
    every run has saved.

    Args:
      runs: as `prepare` returns them; equal except for `seed`, with the same training set.
      workdirs: one per run, as in `train`.
      quiet: show no progress bar.
      callbacks: as for `train`; called for each run in turn.
      profile: trace a few steps into the folder `profile` of the first workdir.

    Returns:
      The result of each run.

    Raises:
      ConfigError: if the runs differ in anything else, or have stored no common step. Also the
        errors of `train`.
    """
    workdirs = [run_path(workdir) for workdir in workdirs]
    with united():
        check_together(runs, workdirs)
        for run in runs:
            check_batch(run)
    for run in runs:
        agree(configs.flat(run.config) | run.facts.as_json() | versions())
    with contextlib.ExitStack() as stack, Signals() as signals:
        with united():
            for run, workdir in zip(runs, workdirs, strict=True):
                if workdir.exists():
                    claim(workdir, run)  # before a lock is put into the folder of others
                if not (workdir / RESULT).is_file():  # else nothing is written
                    stack.enter_context(locked(workdir))
                    claim(workdir, run)
        for workdir in workdirs:
            check_shared(workdir / LOCK)
        with united():
            results = {
                workdir: Result.read(workdir / RESULT)
                for workdir in workdirs
                if (workdir / RESULT).is_file()
            }
        agree({"finished workdirs": [workdir in results for workdir in workdirs]})
        waiting = [
            (run, workdir)
            for run, workdir in zip(runs, workdirs, strict=True)
            if workdir not in results
        ]
        if profile and workdirs[0] in results and jax.process_index() == 0:
            warn(f"nothing is traced: the run in {workdirs[0]} is finished")
        if waiting:
            tracks = [Track(run, workdir, stack) for run, workdir in waiting]
            folder = waiting[0][1] / "profile" if profile else None
            fitted = _fit(tracks, signals, stack, quiet, callbacks, folder)
            results |= dict(zip((workdir for _, workdir in waiting), fitted, strict=True))
    return [results[workdir] for workdir in workdirs]


def _fit(
    tracks: list[Track],
    signals: Signals,
    stack: contextlib.ExitStack,
    quiet: bool,
    callbacks: Sequence[Callback],
    profile: pathlib.Path | None,
) -> list[Result]:
    run, config = tracks[0].run, tracks[0].run.config

    # --- Resume or start
    with united():
        step, stored = _resume(tracks)
    agree({"newest step": step})
    for track, (state, progress) in zip(tracks, stored, strict=True):
        track.start(state, progress)
    states = [state for state, _ in stored]
    together = Together(len(tracks))
    state = run.place(together.stack(states))
    writer = jax.process_index() == 0
    idle = config.without_effect()
    if idle and writer and not quiet:
        warn(f"these settings have no effect: {'; '.join(idle)}")
    bar = _bar(tracks, step, hidden=quiet or not writer)
    bar.set_postfix_str("compiling ...")
    started = time.monotonic() - max(track.progress.seconds for track in tracks)

    # --- Train and validate
    update = train_function([track.run for track in tracks], together)
    evaluate = make_evaluate(run)
    snapshot = make_snapshot(run.model) if config.similarity_every and writer else None

    def whole(variables: dict[str, Any] | None) -> list[Any]:
        """Those of each run. All processes call it: banks may be divided over them."""
        if variables is None:
            return [None] * len(tracks)
        stacked = run.whole(variables)
        return [together.take(stacked, i) for i in range(len(tracks))]

    def write_similarity(epoch: int, now: list[dict[str, Any]]) -> None:
        for track, each in zip(tracks, now, strict=True):
            if snapshot:
                track.metrics.write("similarity", step, epoch=epoch, matrices=snapshot(each))

    if step == 0:
        write_similarity(0, whole(state.variables))

    def told(kind: Any, metrics: list[dict[str, Any]]) -> int:
        """Calls the callbacks; the signal to stop with, or 0."""
        stopped, now = False, state.variables
        for i, (track, values) in enumerate(zip(tracks, metrics, strict=True)):
            # Copies: the next step reuses the memory.
            take = functools.partial(lambda i: jax.device_get(whole(now)[i]), i)
            moment = Moment(kind, track.run, step, values, take)
            for callback in callbacks:
                callback(moment)
            stopped = stopped or moment.stopped
        return signal.SIGINT if stopped else 0

    pending: list[dict[str, jax.Array]] = []  # metrics of steps, perhaps not computed yet
    saved = fetched = time.monotonic()
    compiled = False
    profiler = stack.enter_context(Profile(profile)) if profile else None
    try:
        for batch in inputs([track.run for track in tracks], step):
            state, metrics = update(state, batch)
            pending.append(metrics)
            step += 1
            if profiler:
                fetched += profiler.step(state)  # not training
            epoch, of_epoch = divmod(step, run.steps_per_epoch)
            stop = signals.stop(step)
            line_due = step % config.log_every == 0 or of_epoch == 0
            save_due = any(
                steps and step % steps == 0
                for steps in (config.checkpoint_steps, config.keep_every)
            )
            validation_due = config.validate_steps and step % config.validate_steps == 0
            due = line_due or stop or save_due or validation_due
            if due or time.monotonic() - fetched > REFRESH_SECONDS:
                lines_of_runs = _fetch(pending, step, tracks)
                now = time.monotonic()  # only now have the steps been computed
                for track, lines in zip(tracks, lines_of_runs, strict=True):
                    track.add(lines)
                    if compiled:
                        track.progress.training_seconds += now - fetched
                        track.progress.training_examples += len(lines) * config.batch_size
                bar.update(len(pending) * config.batch_size * len(tracks))
                pending, fetched, compiled = [], now, True
                _show(bar, tracks, step)
            if line_due:
                written = [track.write_line(step) for track in tracks]
                stop = told("line", written) or stop
                if config.checkpoint_minutes:  # by the clock of the first process
                    minutes = json.loads(exchange(json.dumps(time.monotonic() - saved))[0]) / 60
                    save_due = save_due or minutes >= config.checkpoint_minutes
            if of_epoch == 0 or validation_due:
                variables, averages = whole(state.variables), whole(state.ema)
                validated = [
                    track.validate_between(epoch + 1, step, each, average, evaluate)
                    if of_epoch
                    else track.finish_epoch(
                        epoch, step, each, average, evaluate, bool(validation_due)
                    )
                    for track, each, average in zip(tracks, variables, averages, strict=True)
                ]
                _show(bar, tracks, step, validated)
                fetched = time.monotonic()  # validation and saving are not training
                kind = "validation" if of_epoch else "epoch"
                stop = told(kind, validated) or stop
            every = max(config.similarity_every, 1)
            if of_epoch == 0 and (epoch % every == 0 or epoch == config.epochs):
                write_similarity(epoch, variables)
            last = step == run.steps
            epoch_due = of_epoch == 0 and epoch % config.checkpoint_every == 0
            save = stop or last or save_due or epoch_due
            stored = run.stored(state) if save else None
            for i, track in enumerate(tracks):
                track.progress.seconds = time.monotonic() - started
                if save:
                    notes = dataclasses.asdict(track.progress)
                    wait = bool(stop) or last
                    track.metrics.sync()  # lines up to a state are on disk before it
                    track.newest.save(step, together.take(stored, i), notes, wait=wait)
            if save:
                saved = time.monotonic()
            if of_epoch == 0:
                fetched = time.monotonic()
            if stop and not last:
                folders = " and ".join(str(track.newest.folder) for track in tracks)
                raise Interrupted(
                    f"interrupted at step {step} of {run.steps}; state saved in {folders}; rerun "
                    "the same command to resume",
                    stop,
                )
    finally:
        bar.close()

    # --- Test the last epoch, and the one with the best validation score
    results, errors = [], []
    of_runs = zip(tracks, whole(state.variables), whole(state.ema), strict=True)
    for track, variables, average in of_runs:
        try:
            results.append(track.finish(variables, average, evaluate))
        except NonFinite as error:  # the other runs are finished first
            errors.append(error)
    if errors:
        raise errors[0]
    if callbacks:
        told("end", [result.as_json() for result in results])
    return results


def _resume(tracks: list[Track]) -> tuple[int, list[tuple[State, Progress]]]:
    """The newest step that all runs have saved and that can be read, and what they saved there."""
    steps, errors = _common_steps(tracks), []
    for step in steps:
        try:
            stored = [track.restore(step) for track in tracks]
        except CheckpointError as error:
            errors.append(error)
            continue
        for error in errors:
            warn(f"{error}; resuming from step {step} instead")
        return step, stored
    raise errors[0]


def _common_steps(tracks: list[Track]) -> list[int]:
    """The steps that all runs have saved, newest first. A killed program may have saved only some.

    Raises:
      ConfigError: if there is none.
    """
    stored = [track.newest.steps or [0] for track in tracks]
    common = set.intersection(*map(set, stored))
    if not common:
        at = ", ".join(
            f"{track.workdir} at {' and '.join(map(str, steps))}"
            for track, steps in zip(tracks, stored, strict=True)
        )
        raise ConfigError(
            f"no step is saved in every workdir ({at}); resume each run alone, or start over in "
            "new workdirs"
        )
    return sorted(common, reverse=True)


def _fetch(
    pending: list[dict[str, jax.Array]], step: int, tracks: list[Track]
) -> list[list[dict[str, float]]]:
    """The metrics of the steps up to `step`, for each run; raises `NonFinite`."""
    fetched = jax.device_get(pending)
    lines_of_runs = []
    for i, track in enumerate(tracks):
        lines = [
            {name: float(np.atleast_1d(value)[i]) for name, value in metrics.items()}
            for metrics in fetched
        ]
        for number, line in enumerate(lines, start=step - len(lines) + 1):
            if not line["finite"] and track.run.config.non_finite == "stop":
                what = (
                    "a gradient is not finite"
                    if np.isfinite(line["loss"])
                    else f"the loss is {line['loss']}"
                )
                seed = f" of seed {track.run.config.seed}" if len(tracks) > 1 else ""
                raise NonFinite(
                    f"step {number}{seed}: {what}; the update was not applied; lower the learning "
                    "rate, or add warm-up"
                )
        lines_of_runs.append(lines)
    return lines_of_runs


def _show(
    bar: tqdm, tracks: list[Track], step: int, validated: Sequence[dict[str, Any]] = ()
) -> None:
    """Shows metrics of the newest steps and the validation score, averaged over all runs."""
    run, score = tracks[0].run, tracks[0].run.task.score
    lines = [track.recent for track in tracks if track.recent]
    if not lines:  # all updates were skipped
        return
    shown = {
        "epoch": f"{-(-step // run.steps_per_epoch)}/{run.config.epochs}",
        "loss": f"{statistics.fmean(line['loss'] for line in lines):.3f}",
    }
    if score.name in lines[0]:  # some scores are defined for whole data sets only
        shown[score.short] = f"{statistics.fmean(line[score.name] for line in lines):.3f}"
    name = f"validation_{score.name}"
    scores = [line[name] for line in validated if name in line]
    if scores:
        shown["val"] = f"{statistics.fmean(scores):.3f}"
    bar.set_postfix(shown)


def _bar(tracks: list[Track], step: int, *, hidden: bool) -> tqdm:
    run, size = tracks[0].run, tracks[0].run.config.batch_size * len(tracks)
    return tqdm(
        total=run.steps * size,
        initial=step * size,
        unit="img" if len(run.data.input_shape) == 3 else "seq",
        unit_scale=True,
        desc=run.config.model.name,
        disable=hidden,
        dynamic_ncols=True,
        mininterval=0.5,
    )
