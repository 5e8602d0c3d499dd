"""A run before its first step: configuration, data, network and devices brought together and checked against each other."""

import dataclasses
import functools
import hashlib
import importlib.util
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from paramshare.layout import PlanError, SharedBank
from paramshare.penalties import PenaltyError
from paramshare.schemes import Tied
from paramshare.shared import Shared
from paramshare.training.config import Config, ConfigError, Model, differences
from paramshare.training.data import CLASSES, ArraySource, Augment, ImageSet, load
from paramshare.training.devices import Devices
from paramshare.training.optimizer import learning_rate, optimizer
from paramshare.training.state import AXIS, State, init_state
from paramshare.training.step import PENALTIES, alone, penalties
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
        """Full batches in the training images, of a phase where there are several."""
        return self.data.phase_examples // self.config.batch_size

    def phase(self, epoch: int) -> int:
        """Which part of a curriculum an epoch, counted from 0, trains on; phases are counted from 0 too."""
        return epoch * self.data.phases // self.config.epochs

    @property
    def identity(self) -> dict[str, str]:
        """What the configuration does not say of a network and images of one's own; equal for equal runs, in any process."""
        model = re.sub(r" at 0x[0-9a-f]+", "", repr(self.model))
        parts = "/".join(str(len(part)) for part in (self.data.train, self.data.validation, self.data.test))
        return {
            "model": hashlib.sha256(model.encode()).hexdigest()[:16],
            "data": f"{parts} images of {self.data.image_shape}, {self.data.num_classes} classes",
        }

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
    if config.tensorboard and importlib.util.find_spec("tensorboardX") is None:
        raise ConfigError('tensorboard is on, but tensorboardX is not installed; pip install "paramshare[tensorboard]"')
    if data is not None:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, name=data.name, path=None))
    elif config.data.path is not None:  # the same folder, wherever the run is resumed from
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=str(pathlib.Path(config.data.path).absolute())))
    front = Devices(config.mapping, devices)
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
            curriculum=wanted.curriculum,
        )
    if config.epochs % data.phases:
        raise ConfigError(f"epochs is {config.epochs}, which {data.phases} phases of data set {data.name!r} cannot share evenly")
    if data.task != CLASSES and config.augment != Augment():
        raise ConfigError(f"augment is {config.augment}, but data set {data.name!r} has a label for each place; leave augment out")
    config.augment.check(*data.image_shape[:2])
    classes = config.model.num_classes
    if classes is not None and classes != data.num_classes:
        raise ConfigError(
            f"model.num_classes is {classes}, but data set {data.name!r} has {data.num_classes} classes; "
            "leave it out, or change the data set"
        )
    if model is None:
        model = named_network(config, data.num_classes, data.image_shape)
    elif config.model.bfloat16 or config.model.sync_batch_norm or config.model.stem or config.model.tied:
        raise ConfigError(
            "model.bfloat16, model.sync_batch_norm, model.stem and model.tied are for networks by name; a network of your own decides "
            "for itself"
        )
    else:
        plain = model.model if isinstance(model, Shared) else model
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, name=type(plain).__name__))
    check_penalty(config, check_model(model, config.model.name, data))
    rate = learning_rate(config, max(1, data.phase_examples // config.batch_size))
    return Run(config, data, model, front, rate, optimizer(config, rate))


def named_network(config: Config, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """The network that a configuration names, tied as it says; `ModelError` if there is none of its name."""
    options: dict[str, Any] = {"dtype": jnp.bfloat16} if config.model.bfloat16 else {}
    options |= {"axis_name": AXIS} if config.model.sync_batch_norm else {}
    options |= {"stem": config.model.stem} if config.model.stem else {}
    model = create_model(config.model.name, num_classes, image_shape, **options)
    return tie(model, config.model) if config.model.tied else model


def check_batch(run: Run) -> None:
    """Raises `ConfigError` unless the batch can be filled, and cut evenly over the devices."""
    size, images = run.config.batch_size, run.data.phase_examples
    run.devices.check_batch(size)
    if size > images:
        raise ConfigError(f"batch_size {size} is larger than the {images} training images of {run.data.name!r}; make it smaller")


def check_together(runs: Sequence[Run], workdirs: Sequence[pathlib.Path]) -> None:
    """Raises `ConfigError` unless runs can be trained as one program: equal but for their seeds, on the same images, each in its folder."""
    if not runs or len(runs) != len(workdirs) or len({path.absolute() for path in workdirs}) < len(workdirs):
        raise ConfigError(f"{len(runs)} runs and {len(workdirs)} workdirs ({', '.join(map(str, workdirs))}); give each run one of its own")
    first = runs[0]
    for run in runs[1:]:
        changed = differences(dataclasses.replace(run.config, seed=first.config.seed), first.config)
        if changed or run.model != first.model:
            raise ConfigError(
                f"runs that are trained together differ in their seed alone; these differ in {'; '.join(changed) or 'the model'}"
            )
        sources = (first.data.train, run.data.train)
        same = all(isinstance(source, ArraySource) for source in sources) and all(
            np.array_equal(getattr(sources[0], part), getattr(sources[1], part)) for part in ("image", "label")
        )
        if not same:
            raise ConfigError(
                f"data set {first.data.name!r} gives each seed training images of its own, or is read from disk, so that the runs cannot "
                "be trained together; set data.validation to 0, which holds none out, or train each by itself"
            )


def check_model(model: nn.Module, name: str, data: ImageSet) -> Any:
    """The shapes of the model's variables; `ConfigError` unless it takes the set's images and gives a number for each of its classes."""
    try:
        logits, variables = jax.eval_shape(
            lambda: model.init_with_output(jax.random.key(0), jnp.zeros((1, *data.image_shape), jnp.float32), train=False)
        )
    except Exception as error:  # a model may fail on a wrong shape in any way it likes
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"model {name!r} cannot take images of shape {data.image_shape} (data set {data.name!r}): {reason}") from error
    found, wanted = getattr(logits, "shape", None), (1, *data.task.outputs(data.num_classes, data.image_shape))
    if found != wanted:
        per = "class" if data.task == CLASSES else "cell"
        raise ConfigError(f"model {name!r} gives {found} for one image of data set {data.name!r}; one number a {per} is wanted, {wanted}")
    return variables


def tie(model: nn.Module, wanted: Model) -> Shared:
    """A shared network with the banks of `model.tied` under `Tied`; `ConfigError` if there is no such bank, or not with these groups."""
    if not isinstance(model, Shared):
        raise ConfigError(f"model.tied is {wanted.tied}, but {wanted.name} has no banks to tie; leave it empty, or take a shared network")
    try:
        return Shared(model.model, model.layout.with_schemes(dict(map(tied_scheme, wanted.tied))))
    except PlanError as error:
        raise ConfigError(f"model.tied, of {wanted.name}: {error}") from error


def tied_scheme(text: str) -> tuple[str, Tied]:
    """The bank and the scheme that an entry of `model.tied` says: "stage2=*0,1,0,1" is `Tied(groups=(0, 1, 0, 1), scaled=True)`.

    Example:
      >>> tied_scheme("stage2=*0,1,0,1")[1].groups
      (0, 1, 0, 1)
    """
    bank, equals, groups = text.rpartition("=")
    try:
        if not equals:
            raise ValueError("no '='")
        return bank, Tied(groups=tuple(int(group) for group in groups.removeprefix("*").split(",")), scaled=groups.startswith("*"))
    except ValueError as error:
        raise ConfigError(
            f"model.tied holds {text!r} ({error}); write BANK=GROUPS, a number for each layer, as in 'stage2=0,1,0,1', or with signed "
            "scales 'stage2=*0,1,0,1'"
        ) from error


def tied_text(bank: SharedBank) -> str:
    """The inverse of `tied_scheme`, for a bank under `Tied`."""
    assert isinstance(bank.scheme, Tied)
    return f"{bank.name}={'*' if bank.scheme.scaled else ''}{','.join(map(str, bank.scheme.groups_of(bank.sites)))}"


def check_penalty(config: Config, variables: Any) -> None:
    """Raises `ConfigError` if there is a penalty on the loss, but not the banks that it is for; `variables` may be shapes."""
    for name in PENALTIES:
        try:
            jax.eval_shape(functools.partial(penalties, alone(config.penalty, name)), variables)
        except PenaltyError as error:
            weight = getattr(config.penalty, name)
            raise ConfigError(f"penalty.{name} is {weight} with model {config.model.name!r}: {error}; or set it to 0") from error
