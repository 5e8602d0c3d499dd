"""A run before its first step: configuration, data, network and devices brought together and checked against each other."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from paramshare.shared import Shared
from paramshare.training import config as configs
from paramshare.training.config import Config, ConfigError
from paramshare.training.data import ImageSet, load
from paramshare.training.devices import Devices
from paramshare.training.optimizer import learning_rate, optimizer
from paramshare.training.state import State, init_state
from paramshare.training.step import AXIS
from paramshare.zoo import create_model


@dataclasses.dataclass(frozen=True)
class Run:
    """What a configuration comes to.

    Attributes:
      config: the configuration; with a network or images of your own, their names stand in it.
      data: the images.
      model: the network, plain or `Shared`.
      devices: where it runs.
      rate: the learning rate by step.
      optimizer: the update rule.
    """

    config: Config
    data: ImageSet
    model: nn.Module
    devices: Devices
    rate: optax.Schedule
    optimizer: optax.GradientTransformation

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in the training images."""
        return len(self.data.train) // self.config.batch_size

    @property
    def steps(self) -> int:
        """Updates of the whole run."""
        return self.config.epochs * self.steps_per_epoch

    def init(self) -> State:
        """A fresh state; call it under `jax.jit`, or under `jax.eval_shape` for its shapes."""
        return init_state(self.model, self.optimizer, self.data.image_shape, self.config.seed)


def prepare(config: Config, *, model: nn.Module | None = None, data: ImageSet | None = None, devices: Sequence[Any] | None = None) -> Run:
    """Checks a configuration as a whole, before anything is written or trained.

    Args:
      config: the configuration.
      model: a network of your own instead of the named one; called as `model.apply(variables, images, train=...)`.
      data: images of your own (`paramshare.training.data.from_arrays`) instead of the named ones.
      devices: all there are by default.

    Raises:
      ConfigError, DataError, ModelError: naming what does not fit, and the remedy.
    """
    config.check()
    if data is not None:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, name=data.name, path=None))
    front = Devices(config.mapping, devices)
    front.check_batch(config.batch_size)
    if data is None:
        wanted = config.data
        data = load(
            wanted.name,
            data_dir=wanted.data_dir,
            path=wanted.path,
            validation=wanted.validation,
            seed=config.seed,
            train_examples=wanted.train_examples,
            image_size=wanted.image_size,
        )
    if config.batch_size > len(data.train):
        raise ConfigError(
            f"batch_size {config.batch_size} is larger than the {len(data.train)} training images of {data.name!r}; make it smaller"
        )
    config.augment.check(*data.image_shape[:2])
    classes = config.model.num_classes
    if classes is not None and classes != data.num_classes:
        raise ConfigError(
            f"model.num_classes is {classes}, but data set {data.name!r} has {data.num_classes} classes; "
            "leave it out, or change the data set"
        )
    if model is None:
        options: dict[str, Any] = {"dtype": jnp.bfloat16} if config.model.bfloat16 else {}
        options |= {"axis_name": AXIS} if config.model.sync_batch_norm else {}
        model = create_model(config.model.name, data.num_classes, data.image_shape, **options)
    elif config.model.bfloat16 or config.model.sync_batch_norm:
        raise ConfigError("model.bfloat16 and model.sync_batch_norm are for networks by name; a network of your own decides for itself")
    else:
        plain = model.model if isinstance(model, Shared) else model
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, name=type(plain).__name__))
    check_model(model, config.model.name, data)
    steps = len(data.train) // config.batch_size
    rate = learning_rate(config, steps)
    return Run(config, data, model, front, rate, optimizer(config, rate))


def check_model(model: nn.Module, name: str, data: ImageSet) -> None:
    """Raises `ConfigError` unless the model takes the set's images and gives a number for each of its classes."""
    try:
        logits, _ = jax.eval_shape(
            lambda: model.init_with_output(jax.random.key(0), jnp.zeros((1, *data.image_shape), jnp.float32), train=False)
        )
    except Exception as error:  # a model may fail on a wrong shape in any way it likes
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"model {name!r} cannot take images of shape {data.image_shape} (data set {data.name!r}): {reason}") from error
    found, wanted = getattr(logits, "shape", None), (1, data.num_classes)
    if found != wanted:
        raise ConfigError(f"model {name!r} gives {found} for one image of data set {data.name!r}; one number a class is wanted, {wanted}")


def claim(workdir: pathlib.Path, config: Config) -> None:
    """Makes the workdir and keeps the configuration in it, or sees that it is a workdir of this same configuration.

    Raises:
      ConfigError: if the folder holds a run of another configuration, or files of something else; nothing is changed.
    """
    stored = workdir / "config.json"
    if stored.is_file():
        changed = configs.differences(config, configs.from_json(stored.read_text()))
        if changed:
            raise ConfigError(
                f"workdir {workdir} holds a run of another configuration ({'; '.join(changed)}); use a new --workdir, or the same settings"
            )
        return
    if jax.process_index() != 0:
        return  # the first process is about to make it
    if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
        raise ConfigError(f"workdir {workdir} is not empty and holds no run; use a new --workdir")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        fresh = workdir / "config.json.tmp"
        fresh.write_text(configs.to_json(config))
        fresh.replace(stored)
    except OSError as error:
        raise ConfigError(f"workdir {workdir} cannot be written: {error}") from None


def stored_config(workdir: pathlib.Path) -> Config:
    """The configuration of a workdir; `ConfigError` if it holds none."""
    stored = workdir / "config.json"
    if not stored.is_file():
        raise ConfigError(f"{workdir} holds no run (no config.json); give the --workdir of a training run")
    return configs.from_json(stored.read_text())
