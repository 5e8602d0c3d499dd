"""The folder of a run: whose it is, and what it holds."""

import json
import pathlib
from typing import Any

import jax

from paramshare.training import config as configs
from paramshare.training.checkpoint import CheckpointError, Checkpoints, read_json
from paramshare.training.config import Config, ConfigError
from paramshare.training.run import Run
from paramshare.training.state import State

ORIGIN = "origin.json"  # of a workdir made from another run: what it was made from


def claim(workdir: pathlib.Path, run: Run) -> None:
    """Makes the workdir and keeps the configuration in it, or sees that it is a workdir of this same run.

    Raises:
      ConfigError: if the folder holds another run, or files of something else; nothing is changed.
      CheckpointError: if what it holds cannot be read.
    """
    stored = workdir / "config.json"
    if stored.is_file():
        changed = configs.differences(run.config, stored_config(workdir))
        theirs = read_json(workdir / "identity.json")
        changed += [f"{name}: {theirs.get(name)} -> {ours}" for name, ours in run.identity.items() if theirs.get(name) != ours]
        if changed:
            raise ConfigError(
                f"workdir {workdir} holds a run of another configuration ({'; '.join(changed)}); use a new --workdir, or the same settings"
            )
        return
    if jax.process_index() != 0:
        return  # the first process is about to make it
    # A claim that was killed may have left its own files behind.
    if workdir.exists() and (not workdir.is_dir() or any(p.name not in ("identity.json", "config.json.tmp") for p in workdir.iterdir())):
        raise ConfigError(f"workdir {workdir} is not empty and holds no run; use a new --workdir")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "identity.json").write_text(json.dumps(run.identity, indent=2) + "\n")
        fresh = workdir / "config.json.tmp"
        fresh.write_text(configs.to_json(run.config))
        fresh.replace(stored)
    except OSError as error:
        raise ConfigError(f"workdir {workdir} cannot be written: {error}") from None


def check_origin(workdir: pathlib.Path) -> None:
    """Raises `CheckpointError` if the workdir was made from another run: its first checkpoint, which it should begin with, is gone."""
    if (workdir / ORIGIN).is_file():
        origin = read_json(workdir / ORIGIN)
        raise CheckpointError(
            f"{workdir} was made from {origin.get('workdir')} by `paramshare {origin.get('command')}`, but its first checkpoint is gone; "
            "remove the folder and make it again"
        )


def stored_config(workdir: pathlib.Path) -> Config:
    """The configuration of a workdir; `ConfigError` if it holds none."""
    stored = workdir / "config.json"
    if not stored.is_file():
        raise ConfigError(f"{workdir} holds no run (no config.json); give the --workdir of a training run")
    try:
        return configs.from_json(stored.read_text())
    except (OSError, ConfigError) as error:
        raise ConfigError(f"{stored}: {error}") from None


def stored_variables(workdir: pathlib.Path, shapes: State, checkpoint: str = "last") -> tuple[dict[str, Any], int]:
    """The trained variables of a workdir, of its "last" state or of the "best", and their step.

    Args:
      workdir: of a training run.
      shapes: of the run's state.
      checkpoint: which state.

    Raises:
      ConfigError: if no epoch was chosen as the best.
      CheckpointError: if there is no state, or it cannot be read.
    """
    best = checkpoint == "best"
    with Checkpoints(workdir / ("best" if best else "checkpoints")) as checkpoints:
        step = checkpoints.latest
        if best and step is None:
            raise ConfigError(f"run {workdir} has chosen no epoch by validation; take --checkpoint last")
        found, _ = checkpoints.restore(shapes.variables if best else shapes, step)
    return found if best else found.variables, int(step or 0)
