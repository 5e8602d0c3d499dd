"""Time and memory of programs, measured in turn: A B A B, so that drift affects all equally."""

import dataclasses
import datetime
import json
import os
import pathlib
import platform
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from paramshare import ops
from paramshare.data import Dataset, from_arrays
from paramshare.errors import ParamshareError
from paramshare.layout import table
from paramshare.measure.cost import cost
from paramshare.shared import Shared
from paramshare.tasks import Tokens
from paramshare.training.config import Config, Model
from paramshare.training.run import Run, check_batch, prepare
from paramshare.training.step import make_train_step
from paramshare.transform.conversion import bake
from paramshare.zoo import create_model, default_input_shape, input_of

What = Literal["step", "forward", "baked", "generation"]
WHATS: tuple[What, ...] = get_args(What)
COPY_BYTES = 2**28


class BenchError(ParamshareError):
    """A program cannot be measured."""


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program, ready to be timed.

    Attributes:
      name: of the network, with the form of its operations if several are compared.
      call: runs it once, to the end.
      trace_seconds: from the Python function to the input of XLA.
      compile_seconds: by XLA, without a cache.
      memory: bytes of arguments, results and temporary arrays on one device.
      moved: bytes that it must read and write at least; 0 if unknown.
      all_reduced: bytes that each device sends in a step.
      optimizer: bytes of gradients and optimizer state.
    """

    name: str
    call: Callable[[], None]
    trace_seconds: float
    compile_seconds: float
    memory: int
    moved: int = 0
    all_reduced: int = 0
    optimizer: int = 0


@dataclasses.dataclass(frozen=True)
class Timing:
    """One row of a result. Times are milliseconds; `low` and `high` are the 10% and 90% quantiles.

    `ratio` is that of the program's time to that of the last program in the same round, with its
    median and quantiles over the rounds. The other attributes are those of `Program`;
    `bytes_per_second` is `moved` over the median.
    """

    name: str
    median: float
    low: float
    high: float
    ratio: float
    ratio_low: float
    ratio_high: float
    trace_seconds: float
    compile_seconds: float
    memory: int
    all_reduced: int
    optimizer: int
    bytes_per_second: float


@dataclasses.dataclass(frozen=True)
class Bench:
    """What was measured.

    Attributes:
      what: "step", "forward", "baked" or "generation".
      about: batch size, shape of inputs, number of rounds, and the machine.
      timings: one for each program; ratios are to the last.
    """

    what: str
    about: dict[str, Any]
    timings: tuple[Timing, ...]

    def as_json(self) -> str:
        """All fields as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    def __str__(self) -> str:
        last = self.timings[-1].name
        head = ("program", "ms", "10%-90%", f"time / {last}", "10%-90%", "trace s", "compile s")
        columns = {
            "GB/s": lambda x: f"{x.bytes_per_second / 1e9:.1f}" if x.bytes_per_second else "",
            "all-reduced MB": lambda x: f"{x.all_reduced / 1e6:.2f}" if x.all_reduced else "",
            "gradient and optimizer MB": lambda x: (
                f"{x.optimizer / 1e6:.2f}" if x.optimizer else ""
            ),
        }
        shown = {name: f for name, f in columns.items() if any(map(f, self.timings))}
        rows: list[tuple[str, ...]] = [(*head, "memory MB", *shown)]
        for x in self.timings:
            times = f"{x.median:.2f}", f"{x.low:.2f}-{x.high:.2f}"
            ratios = f"{x.ratio:.3f}", f"{x.ratio_low:.3f}-{x.ratio_high:.3f}"
            compiled = f"{x.trace_seconds:.2f}", f"{x.compile_seconds:.2f}", f"{x.memory / 1e6:.1f}"
            rows.append((x.name, *times, *ratios, *compiled, *(f(x) for f in shown.values())))
        about = ", ".join(f"{name} {value}" for name, value in self.about.items())
        return "\n".join([f"{self.what}: {about}", *table(rows, right=set(range(1, len(rows[0]))))])


def bench(
    what: What,
    names: Sequence[str],
    *,
    batch_size: int = 64,
    input_shape: tuple[int, ...] | None = None,
    num_classes: int | None = None,
    bfloat16: bool = False,
    devices: int | None = None,
    mapping: Literal["pmap", "shard_map"] = "pmap",
    forms: Sequence[ops.Form] = ("auto",),
    rounds: int = 10,
) -> Bench:
    """Measures networks on random images or tokens; each round runs every program once.

    Args:
      what: "step": a step of the trainer, with augmentation, update and metrics. "forward": the
        network's outputs for a batch on one device. "baked": the same, of kernels that are stored
        (`bake`). "generation": all kernels from the banks, and the gradient of the banks from
        those of the kernels; beside it a copy of a large array.
      names: networks; ratios are to the last. A single network that shares parameters is compared
        with the plain one that it is made of.
      batch_size: images or sequences, over all devices.
      input_shape: (height, width, channels) or (length,); by default the shape that the first
        network is made for.
      num_classes: outputs of the classifier; by default the network's own number.
      bfloat16: compute in bfloat16.
      devices: how many devices the step runs on; None for all.
      mapping: how the step is mapped over devices.
      forms: forms of operations, see `ops.form`; every network is measured with each.
      rounds: how many times each program is timed.

    Raises:
      BenchError: if there is nothing to measure.
      ConfigError, ModelError: if a network does not take these inputs, or the batch does not fit.
    """
    if rounds < 1 or batch_size < 1 or not names or not forms:
        raise BenchError(
            f"nothing to measure: {len(names)} networks, batch size {batch_size}, {rounds} rounds, "
            f"{len(forms)} forms; each must be at least 1"
        )
    available = len(jax.devices())
    if devices is not None and not 1 <= devices <= available:
        raise BenchError(f"devices is {devices}; there are {available}")
    shape = tuple(input_shape or default_input_shape(names[0]))
    networks = [_network(name, shape, num_classes, bfloat16) for name in names]
    example = input_of(names[0], shape)
    images = jnp.issubdtype(example.dtype, jnp.floating)
    if len(networks) == 1 and isinstance(networks[0][1], Shared) and what != "generation":
        networks.append((f"{names[0]} (plain)", networks[0][1].model))
    count = (devices or available) if what == "step" else 1
    programs = []
    cached = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_enable_compilation_cache", False)
    reset_cache()  # JAX decides once whether there is one
    try:
        for name, model in networks:
            for form in forms:
                label = f"{name} ({form})" if len(forms) > 1 else name
                with ops.form(form):
                    if what == "generation":
                        programs += _generation(label, model)
                    elif what != "step":
                        baked = what == "baked"
                        programs.append(_forward(label, model, example, batch_size, baked=baked))
                if what == "step":
                    run = _run(name, model, example, batch_size, count, mapping, form)
                    programs.append(_step(label, run))
        if what == "generation":
            programs.append(_copy())
    finally:
        jax.config.update("jax_enable_compilation_cache", cached)
        reset_cache()
    about = {
        "batch": batch_size,
        "images" if images else "tokens": "x".join(map(str, shape)),
        "compute": "bfloat16" if bfloat16 else "float32",
        "rounds": rounds,
        **_machine(count),
    }
    if what == "generation":
        about = _machine(count) | {"rounds": rounds}
    return Bench(what, about, _timed(programs, rounds))


def _network(
    name: str, shape: tuple[int, ...], num_classes: int | None, bfloat16: bool
) -> tuple[str, Any]:
    options = {"dtype": jnp.bfloat16} if bfloat16 else {}
    return name, create_model(name, num_classes, shape, **options)


def _run(
    name: str,
    model: Any,
    example: jax.ShapeDtypeStruct,
    batch_size: int,
    devices: int,
    mapping: Any,
    form: ops.Form,
) -> Run:
    """The trainer's run on a data set of one random batch."""
    outputs = jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x)[0], example)
    images = jnp.issubdtype(example.dtype, jnp.floating)
    ndim = 2 if images else 3
    if not isinstance(outputs, jax.ShapeDtypeStruct) or outputs.ndim != ndim:
        shapes = jax.tree.map(lambda leaf: leaf.shape[1:], outputs)
        raise BenchError(
            f"{name} has outputs of shape {shapes}, not one for each class; its step cannot be "
            "measured on random labels; measure forward"
        )
    data = (_random_images if images else _random_tokens)(
        (batch_size, *example.shape[1:]), outputs.shape[-1]
    )
    config = Config(
        model=Model(name=name), batch_size=batch_size, epochs=1, mapping=mapping, ops=form
    )
    run = prepare(config, model=model, data=data, devices=jax.devices()[:devices])
    check_batch(run)
    return run


def _random_images(shape: tuple[int, ...], classes: int) -> Dataset:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, shape, np.uint8)
    part = images, generator.integers(0, classes, len(images))
    return from_arrays(part, part, name="random", validation=0.0, num_classes=classes)


def _random_tokens(shape: tuple[int, ...], vocabulary: int) -> Dataset:
    tokens = np.random.default_rng(0).integers(0, vocabulary, shape, np.int32)
    part = tokens, np.roll(tokens, -1, axis=1)
    return from_arrays(part, part, name="random", validation=0.0, task=Tokens(vocabulary))


def _step(name: str, run: Run) -> Program:
    mapped: Any = run.devices.map(make_train_step(run, run.config.seed), donate=True)
    state = run.place(run.init())
    source: Any = run.data.train
    data = run.devices.place(source.arrays)
    order = np.arange(run.config.batch_size, dtype=np.int32)
    batch = run.devices.cut({"index": order})
    compiled, seconds, memory = _compiled(mapped, state, data, batch)
    whole = cost(run.model, run.data.example, optimizer=run.optimizer)
    kept = [state]

    def call() -> None:
        kept[0], metrics = compiled(kept[0], data, batch)
        jax.block_until_ready((kept[0], metrics))

    optimizer = whole.bytes + whole.optimizer
    all_reduced = whole.all_reduce if run.devices.count > 1 else 0
    return Program(name, call, *seconds, memory, 0, all_reduced, optimizer)


def _forward(
    name: str, model: Any, example: jax.ShapeDtypeStruct, batch_size: int, *, baked: bool
) -> Program:
    shape = (batch_size, *example.shape[1:])
    images = jnp.issubdtype(example.dtype, jnp.floating)
    # Token 0 is in every vocabulary.
    inputs = jax.random.normal(jax.random.key(0), shape) if images else jnp.zeros(shape, jnp.int32)
    variables = jax.jit(lambda: model.init(jax.random.key(0), inputs[:1]))()
    if baked and isinstance(model, Shared):
        model, variables = model.model, bake(model, variables)
    apply = jax.jit(lambda variables, inputs: model.apply(variables, inputs, train=False))
    return _program(name, apply, variables, inputs)


def _generation(name: str, model: Any) -> list[Program]:
    """Makes the kernels, and takes the gradient of the banks."""
    if not isinstance(model, Shared):
        raise BenchError(f"{name} shares no parameters; there is nothing to generate")
    banks, params = jax.jit(lambda: model.layout.init(jax.random.key(0)))()
    variables = {"banks": banks, "params": params}
    kernels = jax.jit(model.layout.expand)(variables)

    def gradient(variables: Any, kernels: Any) -> Any:
        return jax.vjp(model.layout.expand, variables)[1](kernels)[0]

    moved = _bytes(variables) + _bytes(kernels)
    return [
        _program(f"{name}: kernels", jax.jit(model.layout.expand), variables, moved=moved),
        _program(f"{name}: gradient", jax.jit(gradient), variables, kernels, moved=moved),
    ]


def _copy() -> Program:
    source = jnp.ones((COPY_BYTES // 4,), jnp.float32)
    # An operation, since XLA would return an unchanged argument without a copy.
    negate = jax.jit(lambda x: -x)
    return _program(f"copy of {COPY_BYTES // 2**20} MiB", negate, source, moved=2 * COPY_BYTES)


def _program(name: str, function: Any, *args: Any, moved: int = 0) -> Program:
    compiled, seconds, memory = _compiled(function, *args)

    def call() -> None:
        jax.block_until_ready(compiled(*args))

    return Program(name, call, *seconds, memory, moved)


def _compiled(function: Any, *args: Any) -> tuple[Any, tuple[float, float], int]:
    begin = time.perf_counter()
    lowered = function.lower(*args)
    between = time.perf_counter()
    compiled = lowered.compile()
    end = time.perf_counter()
    sizes = compiled.memory_analysis()
    memory = sizes.argument_size_in_bytes + sizes.output_size_in_bytes + sizes.temp_size_in_bytes
    return compiled, (between - begin, end - between), memory - sizes.alias_size_in_bytes


def _timed(programs: Sequence[Program], rounds: int) -> tuple[Timing, ...]:
    for program in programs:  # the first call may allocate
        program.call()
    seconds = np.empty((rounds, len(programs)))
    for i in range(rounds):
        for j, program in enumerate(programs):
            begin = time.perf_counter()
            program.call()
            seconds[i, j] = time.perf_counter() - begin
    ratios = seconds / seconds[:, -1:]
    timings = []
    for program, times, against in zip(programs, seconds.T, ratios.T, strict=True):
        median, low, high = map(float, 1000 * np.quantile(times, (0.5, 0.1, 0.9)))
        ratio, ratio_low, ratio_high = map(float, np.quantile(against, (0.5, 0.1, 0.9)))
        timings.append(
            Timing(
                program.name,
                median,
                low,
                high,
                ratio,
                ratio_low,
                ratio_high,
                program.trace_seconds,
                program.compile_seconds,
                program.memory,
                program.all_reduced,
                program.optimizer,
                1000 * program.moved / median,
            )
        )
    return tuple(timings)


def _machine(devices: int) -> dict[str, str]:
    device = jax.devices()[0]
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(x.partition(": ")[2] for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):  # not Linux, or not a PC
        processor = platform.processor() or platform.machine()
    return {
        "devices": f"{devices} x {device.device_kind}",
        "processor": f"{processor}, {os.cpu_count()} cores",
        "jax": jax.__version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
