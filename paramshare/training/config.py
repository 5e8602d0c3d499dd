"""What a run is: frozen dataclasses, written in plain Python files, overridden on the command line, kept with the run as JSON."""

import dataclasses
import json
import math
import pathlib
import re
import runpy
import types
import typing
from typing import Any, Literal

from paramshare.training.data import Augment, Curriculum

UNTOLD = ("log_every", "tensorboard", "checkpoint_every", "gradient_flow", "similarity_every")  # may differ within a run
UNIONS = (typing.Union, types.UnionType)  # of `Literal[...] | None`, and of `float | None`


class ConfigError(ValueError):
    """A configuration that cannot be run."""


@dataclasses.dataclass(frozen=True)
class Model:
    """Which network."""

    name: str = "swrn-16-1-1"
    """Name in the zoo; `paramshare models` lists them."""
    tied: tuple[str, ...] = ()
    """Banks whose layers are tied in groups instead: "stage2=0,1,0,1,0,1", a group a layer; "stage2=*0,1,0,1,0,1" with signed scales."""
    num_classes: int | None = None
    """Outputs of the classifier; None takes them from the data set, a number must agree with it."""
    bfloat16: bool = False
    """Compute in bfloat16; parameters and banks stay float32."""
    sync_batch_norm: bool = False
    """Average batch statistics over all devices, instead of each device's own share of the batch."""
    stem: Literal["imagenet", "cifar"] | None = None
    """Which stem, for networks that have both; None takes "cifar" for images smaller than 64 pixels a side and "imagenet" otherwise."""


@dataclasses.dataclass(frozen=True)
class Data:
    """Which images."""

    name: str = "digits"
    """A tensorflow-datasets name (cifar10, cifar100, mnist, svhn_cropped, imagenet2012, ...), "digits", "idx", or "grids"."""
    path: str | None = None
    """For "idx": the folder with train-images-idx3-ubyte[.gz] and its three companions."""
    data_dir: str | None = None
    """Where tensorflow-datasets keeps prepared sets; None is its own default."""
    validation: float = 0.1
    """The share of the training images held out for validation (choosing an epoch); 0 for none. Of "grids", so many more are drawn."""
    train_examples: int | None = None
    """Train on this many images only; None for all."""
    image_size: int | None = None
    """Side of the crops, for sets whose images differ in size; None for 224."""
    curriculum: Curriculum = Curriculum()  # noqa: RUF009 (frozen)
    """Of "grids", shortest paths on grids: the phases of training, and what is tested."""


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """The update rule."""

    name: Literal["sgd", "adam", "adamw"] = "sgd"
    """SGD and Adam take weight decay as L2 in the gradient, before momentum; AdamW takes it decoupled."""
    learning_rate: float = 0.1
    """The schedule's highest value."""
    momentum: float = 0.9
    """Of SGD."""
    nesterov: bool = True
    """Of SGD."""
    weight_decay: float = 5e-4
    """On everything but sharing coefficients: batch norm and biases included, as in the papers."""
    decay_coefficients: bool = False
    """Whether weight decay acts on sharing coefficients too."""
    clip_norm: float | None = None
    """Scale a gradient down to this norm, over everything trained, where it is longer; before weight decay. None leaves it as it is."""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How the learning rate changes."""

    name: Literal["step", "cosine", "exponential", "constant"] = "step"
    """Drops at milestones, half a cosine down to zero, the same factor every period but smoothly, or no change."""
    milestones: tuple[int, ...] = (60, 120, 160)
    """Of "step": the epochs, counted from 0, that begin with a drop."""
    factor: float = 0.2
    """Of "step": what each drop multiplies by. Of "exponential": what a period comes to."""
    factors: tuple[float, ...] = ()
    """Of "step": a factor for each milestone, where they differ; none takes `factor` for all."""
    period: float = 45.0
    """Of "exponential": epochs; the rate is multiplied by factor^(epochs / period), a little every step."""
    warmup_epochs: float = 0.0
    """Epochs of linear growth from zero before any of them."""


@dataclasses.dataclass(frozen=True)
class Penalty:
    """What is added to the loss."""

    orthogonality: float = 0.0
    """How much the distance of the shared filters from orthonormal ones counts (Kang & Kim 2021: 10); 0 for none."""
    pools: tuple[str, ...] = ()
    """Regular expressions over whole names of banks: one mean a pool, and the sum of them; none makes one pool of all filter bases."""
    unique: bool = False
    """Whether a layer's own filters are to be orthonormal too, to each other and to the shared ones."""
    recurrence: float = 0.0
    """How much counts what is missing from the layers' similarity, over all banks of templates (Savarese & Maire 2019: .01); 0 for none."""


@dataclasses.dataclass(frozen=True)
class Config:
    """One training run."""

    model: Model = Model()
    data: Data = Data()
    augment: Augment = Augment()  # noqa: RUF009 (frozen)
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    penalty: Penalty = Penalty()
    epochs: int = 200
    """Passes over the training images; each drops the last, incomplete batch of its own random order. Of a curriculum, over those of a
    phase, each phase taking the same number of epochs."""
    batch_size: int = 128
    """Images a step, over all devices of all processes."""
    label_smoothing: float = 0.0
    """Share of the target spread evenly over all classes."""
    seed: int = 0
    """Of everything random: initial values, order of images, augmentation, validation split, dropout."""
    mapping: Literal["pmap", "shard_map"] = "pmap"
    """How the step is spread over devices; the same numbers either way."""
    log_every: int = 50
    """Steps between lines of metrics.jsonl."""
    validate_every: int = 1
    """Epochs between validations."""
    checkpoint_every: int = 1
    """Epochs between checkpoints."""
    tensorboard: bool = False
    """Write TensorBoard event files as well."""
    gradient_flow: bool = False
    """Log the mean and the largest |gradient| of every bank."""
    similarity_every: int = 1
    """Epochs between lines that tell how similar the layers of every bank are; 0 for none."""

    def check(self) -> None:
        """Raises `ConfigError`, naming the field, its value and what it may be, if a value makes no sense."""
        check_types(self, Config)

        def require(holds: bool, field: str, value: Any, wanted: str) -> None:
            if not holds:
                raise ConfigError(f"{field} is {value!r}; it must be {wanted}")

        for name in ("epochs", "batch_size", "log_every", "validate_every", "checkpoint_every"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        require(self.similarity_every >= 0, "similarity_every", self.similarity_every, "1 or more, or 0 for none")
        require(0 <= self.label_smoothing < 1, "label_smoothing", self.label_smoothing, "in [0, 1)")
        require(0 <= self.seed < 2**31, "seed", self.seed, "in [0, 2^31)")
        rate = self.optimizer.learning_rate
        require(math.isfinite(rate) and rate > 0, "optimizer.learning_rate", rate, "positive and finite")
        require(0 <= self.optimizer.momentum < 1, "optimizer.momentum", self.optimizer.momentum, "in [0, 1)")
        decay = self.optimizer.weight_decay
        require(math.isfinite(decay) and decay >= 0, "optimizer.weight_decay", decay, "0 or more, and finite")
        clip = self.optimizer.clip_norm
        require(clip is None or (math.isfinite(clip) and clip > 0), "optimizer.clip_norm", clip, "positive and finite, or None")
        for name in ("factor", "period"):
            value = getattr(self.schedule, name)
            require(math.isfinite(value) and value > 0, f"schedule.{name}", value, "positive and finite")
        milestones = self.schedule.milestones
        require(
            list(milestones) == sorted(set(milestones)) and all(m > 0 for m in milestones),
            "schedule.milestones",
            milestones,
            "rising, from 1 on",
        )
        factors = self.schedule.factors
        require(
            len(factors) in (0, len(milestones)) and all(math.isfinite(f) and f > 0 for f in factors),
            "schedule.factors",
            factors,
            f"empty, or a positive number for each of the {len(milestones)} milestones",
        )
        require(
            0 <= self.schedule.warmup_epochs <= self.epochs,
            "schedule.warmup_epochs",
            self.schedule.warmup_epochs,
            "0 or more, and at most epochs",
        )
        require(0 <= self.data.validation < 1, "data.validation", self.data.validation, "in [0, 1)")
        for name in ("orthogonality", "recurrence"):
            weight = getattr(self.penalty, name)
            require(math.isfinite(weight) and weight >= 0, f"penalty.{name}", weight, "0 or more, and finite")
        for pool in self.penalty.pools:
            try:
                re.compile(pool)
            except re.error as error:
                raise ConfigError(
                    f"penalty.pools holds {pool!r}, which is no regular expression ({error}); it must match names of banks"
                ) from None


def check_types(value: Any, hint: Any, field: str = "") -> None:
    """Raises `ConfigError` at the first field whose value is not of its declared type; an int will do for a float."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint) and isinstance(value, hint):
        for name, part in typing.get_type_hints(hint).items():
            check_types(getattr(value, name), part, f"{field}.{name}" if field else name)
    elif not _fits(value, hint):
        raise ConfigError(f"{field or 'config'} is {value!r}; it must be {_wanted(hint)}")


def _fits(value: Any, hint: Any) -> bool:
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return value in options
    if origin in UNIONS:
        return any(_fits(value, option) for option in options)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(item, options[0]) for item in value)
    return type(value) is hint or (hint is float and type(value) is int)


def _wanted(hint: Any) -> str:
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(options)}"
    if origin in UNIONS:
        names = [option.__name__ if isinstance(option, type) else _wanted(option) for option in options]
        return " or ".join(names).replace("NoneType", "None")
    if origin is tuple:
        return f"a tuple of {options[0].__name__}s"
    return f"of type {hint.__name__}"


def load_file(path: str | pathlib.Path) -> Config:
    """The `config` of a Python file.

    Raises:
      ConfigError: if there is no such file, it does not run, or leaves no `config` of type `Config`.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise ConfigError(
            f"no configuration file {str(path)!r}; CONFIG comes first: a Python file that sets `config`, such as experiments/quickstart.py"
        )
    try:
        config = runpy.run_path(str(path)).get("config")
    except Exception as error:
        raise ConfigError(f"{path} does not run: {type(error).__name__}: {error}") from error
    if not isinstance(config, Config):
        raise ConfigError(f"{path} must set `config` to a paramshare.training.config.Config; found {type(config).__name__}")
    check_types(config, Config)  # the command line would trip over wrong ones before `check` could name them
    return config


def to_json(config: Config) -> str:
    """The configuration as indented JSON."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str) -> Config:
    """The inverse of `to_json`.

    Raises:
      ConfigError: if the text is not a configuration of this version.
    """
    try:
        return _build(Config, json.loads(text))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"not a stored configuration of this version of paramshare: {error}") from None


def differences(ours: Config, theirs: Config) -> list[str]:
    """Fields in which two configurations differ, as "field: theirs -> ours". What is logged, and where, does not make another run."""

    def flat(value: Any, prefix: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            return {prefix: value}
        return {key: leaf for name, part in value.items() for key, leaf in flat(part, f"{prefix}.{name}" if prefix else name).items()}

    a, b = flat(dataclasses.asdict(ours), ""), flat(dataclasses.asdict(theirs), "")
    return [f"{key}: {b[key]!r} -> {a[key]!r}" for key in a if a[key] != b[key] and key not in UNTOLD]


def _build(kind: Any, value: Any) -> Any:
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ValueError(f"{value!r} where {kind.__name__} should be")
        hints = typing.get_type_hints(kind)
        unknown = sorted(set(value) - set(hints))
        if unknown:
            raise ValueError(f"unknown field {unknown[0]!r}")
        return kind(**{name: _build(hints[name], part) for name, part in value.items()})
    if typing.get_origin(kind) in UNIONS:
        return value
    return tuple(value) if typing.get_origin(kind) is tuple else value
