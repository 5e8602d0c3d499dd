"""A run before its first step: configuration, data, network and devices, checked together."""

import dataclasses
import functools
import hashlib
import importlib.util
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from paramshare import ops
from paramshare.data import ArraySource, Dataset, InMemory
from paramshare.shared import Shared
from paramshare.storage import absolute, in_bucket
from paramshare.tasks import Task, TaskError
from paramshare.training.compression import compressed_network
from paramshare.training.config import Config, ConfigError, Model, differences
from paramshare.training.devices import Devices
from paramshare.training.losses import check_weights, smoothed
from paramshare.training.network_options import further_options
from paramshare.training.optimizer import learning_rate, optimizer
from paramshare.training.penalty import check_penalty
from paramshare.training.result import RunFacts
from paramshare.training.slices import cut_banks, is_sliced, join_banks, norm_over, sliced_model
from paramshare.training.state import AXIS, State, cached_for, init_state, training_trace
from paramshare.training.tied import tie
from paramshare.zoo import create_model

# Raised when the library computes the same in another way, so that programs of runs that were begun
# before are not compared. 2: soft sharing and permutations became faster (November 2026).
OPERATIONS = 2


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything that training needs.

    Attributes:
      config: the configuration; it names the network and the data set even if they were passed in.
      data: the data set.
      model: the network, plain or `Shared`.
      task: the data set's task, with the configured label smoothing if that is not 0.
      devices: where it runs.
      rate: the learning rate by step.
      optimizer: the update rule.
      program: a hash of what the network computes.
    """

    config: Config
    data: Dataset
    model: nn.Module
    task: Task
    devices: Devices
    rate: optax.Schedule
    optimizer: optax.GradientTransformation
    program: str

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in the training set, or in one phase of it."""
        return self.data.phase_examples // self.config.batch_size

    @property
    def steps(self) -> int:
        """Updates of the whole run."""
        return self.config.epochs * self.steps_per_epoch

    def phase(self, epoch: int) -> int:
        """The phase of a curriculum that an epoch trains on; both are counted from 0."""
        return epoch * self.data.phases // self.config.epochs

    @functools.cached_property
    def facts(self) -> RunFacts:
        """What identifies the run beside its configuration; the same in every process."""
        # Addresses, and what `share` measured, whose last digits depend on the machine.
        changing = r" at 0x[0-9a-f]+|, mean=[^,()]*, std=[^,()]*(?=\))"
        description = re.sub(changing, "", repr(self.model))
        score = self.task.score
        return RunFacts(
            model=hashlib.sha256(description.encode()).hexdigest()[:16],
            train=len(self.data.train),
            validation=len(self.data.validation),
            test=len(self.data.test),
            input_shape=self.data.input_shape,
            input_dtype=self.data.example.dtype.name,
            network_options=self.task.network_options(),
            task=self.task.name,
            score=score,
            data=self.data.digest,
            program=self.program,
            jax=f"{jax.__version__}, flax {flax.__version__}, operations {OPERATIONS}",
        )

    @functools.cached_property
    def init(self) -> Callable[[], State]:
        """A jitted function that returns the initial state; it is traced once."""
        example, ema = self.data.example, self.config.ema is not None
        return jax.jit(
            lambda: init_state(self.model, self.optimizer, example, self.config.seed, ema)
        )

    @functools.cached_property
    def shapes(self) -> State:
        """Shapes and dtypes of the state."""
        return jax.eval_shape(self.init)

    @functools.cached_property
    def device_model(self) -> nn.Module:
        """The network of one device: with `shard_banks`, its variables hold a part of each bank."""
        if not self.config.shard_banks:
            return self.model
        return sliced_model(self.model, self.devices.count)

    def divided(self, tree: Any) -> Any:
        """Which leaves of a state, or of variables, are divided over devices; False for none."""
        if not self.config.shard_banks:
            return False
        return jax.tree_util.tree_map_with_path(lambda path, _: is_sliced(path), tree)

    def place(self, tree: Any) -> Any:
        """Copies a state, or variables, to the devices, as the mapped steps take them."""
        divided = self.divided(tree)
        model = self.model
        if self.config.shard_banks and isinstance(model, Shared):
            tree = jax.jit(lambda tree: cut_banks(tree, model, self.devices.count))(tree)
        return self.devices.place(tree, divided)

    def stored(self, state: State) -> State:
        """A state that `place` put on the devices, in the form that checkpoints take."""
        if not self.config.shard_banks:
            return state
        if self.devices.count == 1:
            return join_banks(state, self.shapes)
        return self.devices.across(state, self.divided(state))

    def whole(self, tree: Any) -> Any:
        """Variables that `place` put on the devices, with whole banks. All processes call it."""
        if not self.config.shard_banks:
            return tree
        gathered = self.devices.gather(tree, self.divided(tree))
        return join_banks(gathered, self.shapes.variables)


def prepare(
    config: Config,
    *,
    model: nn.Module | None = None,
    data: Dataset | None = None,
    devices: Sequence[Any] | None = None,
) -> Run:
    """Builds a run and checks it, before anything is written or trained.

    Args:
      config: the configuration.
      model: a network to use instead of the one that the configuration names; called as
        `model.apply(variables, inputs, train=...)`.
      data: a data set (`paramshare.data.from_arrays`) to use instead of the configured one.
      devices: all available devices by default.

    Raises:
      ConfigError, DataError, TaskError, AugmentError, ModelError: naming what does not fit, and
        the remedy.
    """
    config.check()
    if config.tensorboard and importlib.util.find_spec("tensorboardX") is None:
        raise ConfigError(
            "tensorboard is True, but tensorboardX is not installed; "
            'pip install "paramshare[tensorboard]"'
        )
    mapped = Devices(config.mapping, devices)
    if data is None:
        data = config.data.load(config.seed)
    else:
        config = dataclasses.replace(config, data=InMemory(name=data.name))
    if config.epochs % data.phases:
        raise ConfigError(
            f"epochs is {config.epochs}; it must be a multiple of the {data.phases} phases of data "
            f"set {data.name!r}"
        )
    steps = config.epochs * (data.phase_examples // config.batch_size)
    if steps >= 2**31:
        raise ConfigError(
            f"epochs is {config.epochs}, which makes {steps:,} steps; at most 2^31 - 1 are possible"
        )
    task = smoothed(data.task, config.label_smoothing)
    task.check_augment(config.augment, data.input_shape)
    if model is None:
        model = named_network(config, task.network_options(), data.input_shape)
    else:
        if isinstance(model, Shared):
            model = model.clone(collection="banks")  # where optimizers look for them
        config = _with_model(config, model)
        model = compressed_network(model, config)
    outputs, variables, program = check_model(model, config.model.name, data)
    check_weights(config, task, outputs, data.input_shape)
    check_penalty(config, model, variables)
    if config.shard_banks:
        sliced_model(model, mapped.count)
    rate = learning_rate(config, max(1, data.phase_examples // config.batch_size))
    rule = optimizer(config, rate, norm_over(config.shard_banks), steps)
    return Run(config, data, model, task, mapped, rate, rule, program)


def _with_model(config: Config, model: nn.Module) -> Config:
    """The configuration with the name of a network that was passed in."""
    fields = ("tied", "num_classes", "bfloat16", "sync_batch_norm", "form", "stem", "options")
    changed = [name for name in fields if getattr(config.model, name) != getattr(Model(), name)]
    if changed:
        raise ConfigError(
            f"model.{changed[0]} is {getattr(config.model, changed[0])!r}, but applies only to a "
            "network that the configuration names; set it in the network that you pass"
        )
    plain = model.model if isinstance(model, Shared) else model
    named = dataclasses.replace(config.model, name=type(plain).__name__)
    return dataclasses.replace(config, model=named)


def named_network(
    config: Config, network_options: Mapping[str, Any], input_shape: tuple[int, ...]
) -> nn.Module:
    """The network that a configuration names, with layers tied and banks compressed as configured.

    Args:
      config: the configuration.
      network_options: the network options of `paramshare.create_model`, as the task gives them.
      input_shape: (H, W, C), or (length,) of tokens.

    Raises:
      ConfigError, ModelError: if there is no such network, or it does not fit the task.
    """
    settings, options = config.model, dict(network_options)
    classes = options.get("num_classes")
    if settings.num_classes not in (None, classes):
        allowed = "None, for this task has no classes" if classes is None else f"{classes} or None"
        raise ConfigError(
            f"model.num_classes is {settings.num_classes}; for data set {config.data.name!r} it "
            f"must be {allowed}"
        )
    options |= {"dtype": jnp.bfloat16} if settings.bfloat16 else {}
    options |= {"axis_name": AXIS} if settings.sync_batch_norm else {}
    options |= {"form": settings.form} if settings.form else {}
    options |= {"stem": settings.stem} if settings.stem else {}
    options |= further_options(settings, options)
    model = create_model(settings.name, input_shape=input_shape, **options)
    model = tie(model, settings) if settings.tied else model
    return compressed_network(model, config)


def check_batch(run: Run) -> None:
    """Raises `ConfigError` unless a batch can be filled and divided evenly over the devices."""
    size, examples = run.config.batch_size, run.data.phase_examples
    run.devices.check_batch(size)
    share = size // run.devices.count
    if share % run.config.accumulate:
        raise ConfigError(
            f"accumulate is {run.config.accumulate}; it must divide the {share} examples of a "
            "batch on each device"
        )
    if size > examples:
        phase = " in each phase" if run.data.phases > 1 else ""
        raise ConfigError(
            f"batch_size is {size}; it must be at most the {examples} training examples of "
            f"{run.data.name!r}{phase}"
        )


def check_together(runs: Sequence[Run], workdirs: Sequence[pathlib.Path]) -> None:
    """Checks that runs can be trained as one program.

    Raises:
      ConfigError: unless the runs differ in their seed alone, have the same training set, and each
        has a workdir.
    """
    if (
        not runs
        or len(runs) != len(workdirs)
        or len({absolute(path) for path in workdirs}) < len(workdirs)
    ):
        raise ConfigError(
            f"{len(runs)} runs need {len(runs)} different workdirs, got "
            f"{', '.join(map(str, workdirs)) or 'none'}; give each run a workdir"
        )
    first = runs[0]
    if first.config.tensorboard and any(map(in_bucket, workdirs)):
        raise ConfigError(
            f"tensorboard is True, but its event files cannot be written to {workdirs[0]}; leave "
            "it out, or use a workdir on this machine"
        )
    if len(runs) > 1 and first.config.shard_banks:
        raise ConfigError(
            "shard_banks is True, but banks of runs that are trained together cannot be divided; "
            "train one after the other, or leave shard_banks out"
        )
    for run in runs[1:]:
        changed = differences(dataclasses.replace(run.config, seed=first.config.seed), first.config)
        if changed or run.model != first.model:
            raise ConfigError(
                "runs that are trained together may differ in their seed only; these differ in "
                f"{'; '.join(changed) or 'the model'}"
            )
        if not _same_examples(first.data.train, run.data.train):
            raise ConfigError(
                f"the training set of {first.data.name!r} depends on the seed or is on disk; to "
                "train runs together, set data.validation to 0; or train them one by one"
            )


def _same_examples(first: Any, second: Any) -> bool:
    if not isinstance(first, ArraySource) or not isinstance(second, ArraySource):
        return False
    a, b = ((source.input, source.label) for source in (first, second))
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b))
    )


@ops.form("xla")  # whose program is the same on all machines
def check_model(model: nn.Module, name: str, data: Dataset) -> tuple[Any, Any, str]:
    """Shapes of the outputs and variables of a model, and a hash of what it computes.

    Raises:
      ConfigError: unless the model takes the data set's inputs and gives the task's outputs.
    """
    inputs = data.example
    try:
        evaluation, (outputs, variables) = jax.make_jaxpr(
            lambda inputs: model.init_with_output(jax.random.key(0), inputs, train=False),
            return_shape=True,
        )(inputs)
        digest = cached_for(_training_digest, model, inputs)
    except Exception as error:  # a model may fail on a wrong shape with any exception
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"model {name!r} cannot take inputs of shape {data.input_shape} "
            f"(data set {data.name!r}): {reason}"
        ) from error
    try:
        data.task.check_outputs(outputs, data.input_shape)
    except TaskError as error:
        raise ConfigError(f"model {name!r} with data set {data.name!r}: {error}") from error
    about = f"{data.task!r} {digest}"
    return outputs, variables, program_digest(about, evaluation, measured=isinstance(model, Shared))


@functools.lru_cache(maxsize=16)
def _training_digest(model: nn.Module, example: jax.ShapeDtypeStruct) -> str:
    """A hash of the model in training."""
    traced, _ = cached_for(training_trace, model, example)
    return program_digest("", traced, measured=isinstance(model, Shared))


def program_digest(about: str, *programs: Any, measured: bool) -> str:
    """A hash of traced programs and their constants, equal in every process and on every machine.

    Addresses and unrolling, which depend on the process and the backend, are left out.

    Args:
      about: further text to hash.
      *programs: as `jax.make_jaxpr` returns them.
      measured: whether real constants may be what `share` has measured. Machines differ in their
        last digits, so that two digits of each count.

    Example:
      >>> program = jax.make_jaxpr(lambda x: 0.301 * x)(1.0)
      >>> other = jax.make_jaxpr(lambda x: 0.302 * x)(1.0)
      >>> program_digest("", program, measured=False) == program_digest("", other, measured=False)
      False
      >>> program_digest("", program, measured=True) == program_digest("", other, measured=True)
      True
    """
    result = hashlib.sha256(re.sub("0x[0-9a-f]+", "", about).encode())
    for program in programs:
        text = re.sub(r"0x[0-9a-f]+|unroll=\w+", "", str(program))
        if measured:
            number = r"\d+\.\d+(e[+-]?\d+)?"
            text = re.sub(number, lambda found: f"{float(found[0]):.2g}", text)
        result.update(text.encode())
        for constant in program.consts:
            if isinstance(constant, jax.Array) and jnp.issubdtype(
                constant.dtype, jax.dtypes.prng_key
            ):
                continue
            array = np.asarray(constant)
            if measured and np.issubdtype(array.dtype, np.floating):
                array = _two_digits(array)
            result.update(f"{array.shape} {array.dtype}".encode() + array.tobytes())
    return result.hexdigest()[:16]


def _two_digits(array: np.ndarray) -> np.ndarray:
    array = np.asarray(array, np.float64)
    unit = 10.0 ** (np.floor(np.log10(np.where(array == 0, 1, np.abs(array)))) - 1)
    return np.round(array / unit).astype(np.int64)
