"""Runs made from a trained run, folded or converted: workdirs like any other, but their training starts from its variables."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from paramshare.analysis.folders import written_whole
from paramshare.penalties import PenaltyError
from paramshare.training.checkpoint import Checkpoints
from paramshare.training.config import Config, ConfigError, Penalty, Schedule
from paramshare.training.data import eval_batches, normalise
from paramshare.training.run import Run, prepare
from paramshare.training.state import TRAINABLE, State
from paramshare.training.step import PENALTIES, alone, penalties
from paramshare.training.workdir import ORIGIN, claim, stored_config, stored_variables


def trained(workdir: str | pathlib.Path, checkpoint: str = "last") -> tuple[Run, dict[str, Any], int]:
    """The run of a workdir, its variables (of the "last" state, or of the "best"), and their step.

    Raises:
      ConfigError: if the folder holds no run, or the run no such checkpoint.
      CheckpointError: if it cannot be read.
    """
    workdir = pathlib.Path(workdir)
    run = prepare(stored_config(workdir))
    return run, *stored_variables(workdir, jax.eval_shape(run.init), checkpoint)


def begin(run: Run, variables: Mapping[str, Any], workdir: str | pathlib.Path, origin: Mapping[str, Any]) -> None:
    """Makes a workdir whose first state, at step 0, has these variables: `train` goes on from them. Written whole, or not at all.

    Args:
      run: what is to be trained there.
      variables: of `run.model`.
      workdir: a folder that does not exist yet.
      origin: what the variables come from; kept as `origin.json`.

    Raises:
      ConfigError: if the folder exists, or cannot be written, or the variables are not those of `run.model`.
    """
    workdir = pathlib.Path(workdir)
    if workdir.exists():
        raise ConfigError(f"{workdir} exists; give a folder that does not")
    variables = check_variables(run, variables)
    trainable = {name: variables[name] for name in TRAINABLE if name in variables}
    collections = {name: value for name, value in variables.items() if name not in TRAINABLE}
    state = State(jnp.zeros((), jnp.int32), trainable, collections, run.optimizer.init(trainable), jnp.zeros((), jnp.bool_))
    with written_whole(workdir, ConfigError) as place:
        claim(place, run)
        (place / ORIGIN).write_text(json.dumps(origin, indent=2) + "\n")
        with Checkpoints(place / "checkpoints") as checkpoints:
            checkpoints.save(0, state, {}, wait=True)


def check_variables(run: Run, variables: Mapping[str, Any]) -> dict[str, Any]:
    """The variables, less collections that training does not keep; `ConfigError`, naming the first odd one, unless they are the model's."""
    shapes = jax.eval_shape(run.init).variables
    kept = {name: value for name, value in variables.items() if name in shapes}

    def forms(tree: Any) -> dict[str, Any]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.shape} {jnp.dtype(leaf.dtype)}" for path, leaf in leaves}

    wanted, found = forms(shapes), forms(kept)
    for path in sorted({*wanted, *found}, reverse=True):  # params first
        if wanted.get(path) != found.get(path):
            raise ConfigError(
                f"the variables are not those of {run.config.model.name}: {path} is {found.get(path, 'missing')}, where that network has "
                f"{wanted.get(path, 'nothing')}; take a network of the same layers"
            )
    return kept


def training_images(run: Run, batches: int) -> Iterator[jax.Array]:
    """The first images of the training set, normalised and not augmented: so many batches (fewer in a smaller set).

    Of a curriculum, the first of its last phase.
    """
    size, source = run.config.batch_size, run.data.of_phase("train", run.data.phases - 1)
    for _, batch in zip(range(min(batches, len(source) // size)), eval_batches(source, size), strict=False):
        yield normalise(jnp.asarray(batch["image"]), run.data.mean, run.data.std)


def with_model(config: Config, **fields: Any) -> Config:
    """A configuration with another network. Penalties that find no banks there are dropped.

    Args:
      config: of a run.
      **fields: of its `model`, to be changed.

    Raises:
      ConfigError, ModelError, PlanError: if there is no such network.
    """
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **fields))
    variables = jax.eval_shape(prepare(dataclasses.replace(config, penalty=Penalty())).init).variables
    for name in PENALTIES:
        try:
            jax.eval_shape(functools.partial(penalties, alone(config.penalty, name)), variables)
        except PenaltyError:
            config = dataclasses.replace(config, penalty=dataclasses.replace(config.penalty, **{name: 0.0}))
    return config


def fine_tuning(config: Config, epochs: int = 1) -> Config:
    """A configuration that trains on for a few epochs: half a cosine from a tenth of the learning rate down to zero.

    Of a curriculum, on the last phase.
    """
    curriculum = dataclasses.replace(config.data.curriculum, windows=config.data.curriculum.windows[-1:])
    return dataclasses.replace(
        config,
        epochs=epochs,
        data=dataclasses.replace(config.data, curriculum=curriculum) if config.data.name == "grids" else config.data,
        optimizer=dataclasses.replace(config.optimizer, learning_rate=config.optimizer.learning_rate / 10),
        schedule=Schedule("cosine"),
    )
