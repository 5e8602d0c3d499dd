"""The configuration of a training run: frozen dataclasses, checked when built, stored as JSON."""

import dataclasses
import json
import operator
import pathlib
import re
import runpy
from typing import Annotated, Any, Literal

import pydantic

from paramshare.data import AnyData, Digits
from paramshare.errors import ParamshareError, one_line
from paramshare.ops import Form
from paramshare.storage import local_path
from paramshare.tasks import Augment
from paramshare.tasks.config import Count, Fraction, Natural, checked_dataclass, describe

# Fields that may differ when a run is resumed: training computes the same, up to rounding.
FREE_FIELDS = (
    "shard_banks",
    "ops",
    "log_every",
    "tensorboard",
    "non_finite_limit",
    "checkpoint_every",
    "checkpoint_steps",
    "checkpoint_minutes",
    "keep_last",
    "keep_every",
    "gradient_flow",
    "similarity_every",
)

Positive = Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)]


class ConfigError(ParamshareError):
    """A configuration that cannot be run."""


@checked_dataclass(ConfigError)
class Model:
    """The network."""

    name: str = "swrn-16-1-1"
    """Name in the zoo; `paramshare models` lists all names."""
    tied: tuple[str, ...] = ()
    """Banks whose layers are tied in groups: "stage2=0,1,0,1" gives each layer its group, in the
    order of the layers' paths; "stage2=*0,1,0,1" adds a signed scale to each layer."""
    num_classes: int | None = None
    """Outputs of the classifier; None uses the number of classes of the data set."""
    bfloat16: bool = False
    """Compute in bfloat16; parameters and banks stay float32."""
    sync_batch_norm: bool = False
    """Average batch statistics over all devices, instead of over each device's part of the
    batch."""
    form: Literal["paper", "torchvision"] | None = None
    """Form, for MobileNetV2 and DenseNet, whose papers' code differs from torchvision's; None uses
    "paper"."""
    stem: Literal["imagenet", "cifar"] | None = None
    """Stem, for networks with two variants; None uses "cifar" for images below 64 x 64 pixels and
    "imagenet" otherwise."""
    options: tuple[str, ...] = ()
    """Further options of the network, NAME=VALUE each, such as heads=4 and dropout=0.1 for a
    transformer; values as Python writes them."""


@checked_dataclass(ConfigError)
class Optimizer:
    """The update rule."""

    name: Literal["sgd", "adam", "adamw"] = "sgd"
    """SGD and Adam add weight decay to the gradient (L2), before momentum; AdamW decouples it."""
    learning_rate: Positive = 0.1
    """Highest learning rate of the schedule."""
    momentum: Fraction = 0.9
    """Momentum of SGD."""
    nesterov: bool = True
    """Use Nesterov momentum, in SGD."""
    weight_decay: NotNegative = 5e-4
    """Weight decay of all parameters except sharing coefficients."""
    decay_coefficients: bool = False
    """Apply weight decay to sharing coefficients too."""
    decay_vectors: bool = True
    """Apply weight decay to biases and to the scales of norms too, as in the papers."""
    clip_norm: Positive | None = None
    """Largest norm of the gradient over all parameters; a longer gradient is scaled down, before
    weight decay. None does not clip."""


@checked_dataclass(ConfigError)
class Schedule:
    """The learning rate over time."""

    name: Literal["step", "cosine", "exponential", "constant"] = "step"
    """Drops at milestones, half a cosine down to zero, smooth exponential decay, or constant."""
    milestones: tuple[Annotated[int, pydantic.Field(lt=2**31)], ...] = (60, 120, 160)
    """Epochs, counted from 0, at the start of which the "step" schedule drops."""
    factor: Positive = 0.2
    """Factor of each drop ("step"), or of each period ("exponential")."""
    factors: tuple[Positive, ...] = ()
    """One factor for each milestone ("step"); empty uses `factor` for all."""
    period: Positive = 45.0
    """Period of "exponential" in epochs: the rate is multiplied by factor^(epochs / period)."""
    warmup_epochs: NotNegative = 0.0
    """Epochs of linear warm-up from zero. They are part of `epochs`, and milestones count them."""


@checked_dataclass(ConfigError)
class Penalty:
    """Terms added to the loss."""

    orthogonality: NotNegative = 0.0
    """Weight of the orthogonality penalty on shared filters (Kang & Kim 2021: 10); 0 for none."""
    pools: tuple[str, ...] = ()
    """Regular expressions of bank names for the orthogonality penalty: it is averaged over the
    banks of each, and the averages are added. Empty makes one pool of all filter bases."""
    unique: bool = False
    """Orthogonality: also make each layer's own filters orthonormal, to each other and to the
    shared ones."""
    recurrence: NotNegative = 0.0
    """Weight of the recurrence penalty on soft sharing (Savarese & Maire 2019: .01); 0 for
    none."""


@checked_dataclass(ConfigError)
class Compression:
    """Pruning and quantisation of banks, as `paramshare compress` sets them up."""

    bits: Annotated[int, pydantic.Field(ge=2, le=8)] | None = None
    """Bits per parameter of a bank, 2 to 8; the bank itself is trained in floating point. None does
    not quantise."""
    method: Literal["kmeans", "uniform"] = "kmeans"
    """Levels that parameters are rounded to: a codebook, or a uniform grid."""
    prune: Fraction = 0.0
    """Fraction of each bank's parameters, the smallest in magnitude, that are set to 0 and kept
    there; 0 prunes nothing."""
    gradual: bool = False
    """Prune more and more over the first half of the run, instead of at its start."""
    banks: tuple[str, ...] = ()
    """Regular expressions of the names of the banks; empty takes all."""

    @property
    def active(self) -> bool:
        """Whether anything is pruned or quantised."""
        return self.bits is not None or self.prune > 0


@checked_dataclass(ConfigError)
class Config:
    """One training run."""

    model: Model = Model()
    data: AnyData = Digits()
    augment: Augment = Augment()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    penalty: Penalty = Penalty()
    compression: Compression = Compression()
    epochs: Count = 200
    """Passes over the training set; the last, incomplete batch of each pass is dropped. The phases
    of a curriculum take equal parts of the epochs."""
    batch_size: Count = 128
    """Examples in each step, over all devices of all processes."""
    accumulate: Count = 1
    """Parts that each device's share of a batch is divided into. Gradients are averaged over them,
    one after the other, in less memory. Batch statistics are those of each part."""
    non_finite: Literal["stop", "skip"] = "stop"
    """What to do if a loss or gradient is not finite: stop, or skip the update and go on."""
    non_finite_limit: Count = 10
    """Skipped updates after which training stops."""
    ema: Annotated[float, pydantic.Field(gt=0, lt=1)] | None = None
    """Decay per step of an exponential moving average of the variables, which is validated, stored
    and tested beside them, such as 0.999; None keeps none."""
    label_smoothing: Fraction = 0.0
    """Fraction of the target that is spread evenly over all classes; 0 keeps that of the task."""
    loss_weights: tuple[str, ...] = ()
    """Weights of the task's losses, NAME=WEIGHT each; the others have weight 1. Of several tasks,
    the name of a task weights all its losses."""
    seed: Natural = 0
    """Seed of initial values, order of examples, augmentation, validation split and dropout."""
    mapping: Literal["pmap", "shard_map"] = "pmap"
    """How the step is mapped over devices; both compute the same."""
    shard_banks: bool = False
    """Divide banks and their optimizer state over the devices, instead of copying them to each.
    Computes the same, up to rounding."""
    ops: Form = "auto"
    """Form of convolutions and gathers: "auto" uses forms that are faster on CPUs where they pay,
    "fast" everywhere, "xla" nowhere. All compute the same, up to rounding."""
    log_every: Count = 50
    """Steps between lines of metrics.jsonl."""
    validate_every: Count = 1
    """Epochs between validations."""
    validate_steps: Natural = 0
    """Steps between further validations, for long epochs; 0 for none."""
    checkpoint_every: Count = 1
    """Epochs between checkpoints."""
    checkpoint_steps: Natural = 0
    """Steps between further checkpoints, for long epochs; 0 for none."""
    checkpoint_minutes: NotNegative = 0.0
    """Minutes between further checkpoints, each saved with a line of metrics; 0 for none."""
    keep_last: Annotated[int, pydantic.Field(ge=1, lt=2**31)] = 2
    """How many of the newest checkpoints to keep."""
    keep_every: Natural = 0
    """Checkpoints to keep for good: those whose step is a multiple of this; 0 for none."""
    tensorboard: bool = False
    """Write TensorBoard event files too."""
    gradient_flow: bool = False
    """Log the mean and the largest |gradient| of every bank."""
    similarity_every: Natural = 1
    """Epochs between records of the similarity of the layers in each bank; 0 for none."""

    def check(self) -> None:
        """Checks what concerns several fields.

        Raises:
          ConfigError: naming the field, its value and what is allowed.
        """
        schedule = self.schedule
        milestones, factors = schedule.milestones, schedule.factors
        if list(milestones) != sorted(set(milestones)) or any(m < 1 for m in milestones):
            raise ConfigError(
                f"schedule.milestones is {milestones}; it must be rising epochs of 1 or more"
            )
        if len(factors) not in (0, len(milestones)):
            raise ConfigError(
                f"schedule.factors is {factors}; it must be empty, or hold one factor for each of "
                f"the {len(milestones)} milestones"
            )
        if schedule.warmup_epochs > self.epochs:
            raise ConfigError(
                f"schedule.warmup_epochs is {schedule.warmup_epochs}; it must be at most epochs, "
                f"{self.epochs}"
            )
        patterns = {"penalty.pools": self.penalty.pools}
        patterns["compression.banks"] = self.compression.banks
        for field, expressions in patterns.items():
            for expression in expressions:
                try:
                    re.compile(expression)
                except re.error as error:
                    raise ConfigError(
                        f"{field} holds {expression!r}; it must be a regular expression ({error})"
                    ) from None
        compression = self.compression
        if compression.gradual and not compression.prune:
            raise ConfigError(
                "compression.gradual is True, but compression.prune is 0; set the fraction to prune"
            )
        if compression.gradual and compression.bits is not None:
            raise ConfigError(
                "compression.gradual is True, but levels are fitted to the parameters left "
                f"after pruning; prune first, without compression.bits ({compression.bits}), and "
                "quantise the pruned run"
            )
        if compression.prune and self.shard_banks:
            raise ConfigError(
                f"compression.prune is {compression.prune}, which compares all parameters of a "
                "bank; leave shard_banks out"
            )

    def without_effect(self) -> list[str]:
        """Settings that are not the defaults, or are never reached, and change nothing.

        Example:
          >>> Config(epochs=10).without_effect()
          ['schedule.milestones (60, 120, 160): the run ends after 10 epochs']
        """
        schedule, defaults = self.schedule, Config()
        idle = {
            "schedule.milestones": schedule.name != "step",
            "schedule.factors": schedule.name != "step",
            "schedule.factor": schedule.name not in ("step", "exponential")
            or bool(schedule.factors and schedule.name == "step"),
            "schedule.period": schedule.name != "exponential",
            "optimizer.momentum": self.optimizer.name != "sgd",
            "optimizer.nesterov": self.optimizer.name != "sgd",
            "penalty.pools": not self.penalty.orthogonality,
            "penalty.unique": not self.penalty.orthogonality,
            "compression.method": self.compression.bits is None,
            "compression.banks": not self.compression.active,
            "non_finite_limit": self.non_finite == "stop",
            "optimizer.decay_vectors": not self.optimizer.weight_decay,
            "optimizer.decay_coefficients": not self.optimizer.weight_decay,
        }
        values = {name: operator.attrgetter(name)(self) for name in idle}
        notes = [
            f"{name} {values[name]}"
            for name, is_idle in idle.items()
            if is_idle and values[name] != operator.attrgetter(name)(defaults)
        ]
        late = tuple(m for m in schedule.milestones if m >= self.epochs)
        if schedule.name == "step" and late:
            notes.append(f"schedule.milestones {late}: the run ends after {self.epochs} epochs")
        return notes


def load_file(path: str | pathlib.Path) -> Config:
    """The `config` that a Python file sets.

    Raises:
      ConfigError: if there is no such file, it fails, or sets no `config` of type `Config`.
    """
    path = local_path(path)
    if not path.is_file():
        raise ConfigError(
            f"no configuration file {str(path)!r}; give a Python file that sets `config` first, "
            "such as experiments/recipes/quickstart.py"
        )
    try:
        config = runpy.run_path(str(path)).get("config")
    except ParamshareError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{path} fails with {one_line(error)}") from error
    if not isinstance(config, Config):
        raise ConfigError(
            f"{path} must set `config` to a paramshare.training.config.Config, got "
            f"{type(config).__name__}"
        )
    return config


def to_json(config: Config) -> str:
    """The configuration as indented JSON."""
    return pydantic.TypeAdapter(Config).dump_json(config, indent=2).decode() + "\n"


def from_json(text: str) -> Config:
    """The inverse of `to_json`; fields that the text lacks take their defaults.

    Raises:
      ConfigError: if the text is not a configuration of this version.
    """
    try:
        return pydantic.TypeAdapter(Config).validate_json(text)
    except pydantic.ValidationError as error:
        reason = describe(error)
    except ParamshareError as error:
        reason = str(error)
    raise ConfigError(f"not a configuration of this version of paramshare: {reason}")


def differences(config: Config, stored: Config) -> list[str]:
    """Fields that differ, as "field: stored value -> value"; those of `FREE_FIELDS` may."""
    after, before = (_flat(dataclasses.asdict(each)) for each in (config, stored))
    missing = object()
    return [
        f"{field}: {before.get(field)!r} -> {after.get(field)!r}"
        for field in dict.fromkeys((*after, *before))
        if after.get(field, missing) != before.get(field, missing) and field not in FREE_FIELDS
    ]


def flat(config: Config) -> dict[str, Any]:
    """The fields as JSON values by dotted path.

    Example:
      >>> flat(Config())["optimizer.learning_rate"]
      0.1
    """
    return _flat(json.loads(to_json(config)))


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of nested dictionaries by dotted path."""
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        path: leaf
        for name, part in value.items()
        for path, leaf in _flat(part, f"{prefix}.{name}" if prefix else name).items()
    }
