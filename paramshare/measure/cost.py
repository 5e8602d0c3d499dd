"""Cost of a network: parameters, multiply-adds and bytes. Computed from shapes, on no device."""

import collections
import dataclasses
import json
import math
import operator
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.core import DenyList

from paramshare.layout import Layout, separated, strip, table
from paramshare.measure.multiply_adds import CONVOLUTION, by_primitive, multiply_adds
from paramshare.parameters import example_input
from paramshare.parameters.linen import trace
from paramshare.shared import Shared, count


@dataclasses.dataclass(frozen=True)
class Layer:
    """A module that owns parameters.

    Attributes:
      path: path of the module.
      weights: size of its parameters, shared or not.
      private: size of those that are not shared.
      bank: the banks of the others, or "".
      multiply_adds: in one forward pass.
    """

    path: str
    weights: int
    private: int
    bank: str
    multiply_adds: int


LABELS = {
    "bytes": "storage",
    "optimizer": "optimizer state",
    "all_reduce": "all-reduce per step",
    "all_gather": "all-gather per step",
    "reduce_scatter": "reduce-scatter per step",
}


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of a network on given inputs.

    Attributes:
      layers: all modules that own parameters, in the order of their first call.
      counts: parameter counts, as `paramshare.count` returns them.
      generated: total size of the weights that are made from banks (T).
      plain: trainable parameters of the same network without sharing.
      use: multiply-adds of convolutions and matrix products in one forward pass.
      convolutions: the convolutions' part of `use`.
      generation: multiply-adds of the matrix products that make the shared weights, once per step
        whatever the batch size. Gathers and elementwise operations (rings, repetition, scales of
        tied kernels) are not counted.
      bytes: size of the trainable parameters.
      optimizer: bytes of the optimizer's state.
      all_reduce: bytes that each device sends in one step of data-parallel training: gradients,
        batch statistics, and two float32 metrics (loss and score).
      unshared: `{"bytes", "optimizer", "all_reduce"}` of the network without sharing.
      devices: the number of devices that `divided` is for; None if it was not asked for.
      divided: `{"bytes", "optimizer", "all_reduce", "all_gather", "reduce_scatter"}` of each device
        if banks are divided over them (`shard_banks`), with padding.
    """

    layers: tuple[Layer, ...]
    counts: dict[str, int]
    generated: int
    plain: int
    use: int
    convolutions: int
    generation: int
    bytes: int
    optimizer: int
    all_reduce: int
    unshared: dict[str, int]
    devices: int | None = None
    divided: dict[str, int] = dataclasses.field(default_factory=dict)

    def as_json(self) -> str:
        """All fields as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    def __str__(self) -> str:
        rows = [("layer", "bank", "weights", "private", "multiply-adds")]
        for x in self.layers:
            work = f"{x.multiply_adds:,}" if x.multiply_adds else ""
            rows.append((x.path, x.bank, f"{x.weights:,}", f"{x.private:,}", work))
        lines = table(rows, right={2, 3, 4})
        lines += [
            "",
            *self._parts_table(),
            "",
            *self._counts_table(),
            "",
            *self._bytes_table(),
            "",
            f"multiply-adds  {self.use:,} per forward pass, {self.convolutions:,} in convolutions",
        ]
        if self.generation:
            lines.append(f"               {self.generation:,} per step to make the shared weights")
        if self.divided:
            lines += ["", *self._devices_table()]
        return "\n".join(lines)

    def _parts_table(self) -> list[str]:
        """Sums over the layers of each part of the network, such as a stage or the backbone."""
        sums: dict[str, list[int]] = {}
        for x in self.layers:
            total = sums.setdefault(x.path.split("/")[0], [0, 0, 0])
            total[:] = map(operator.add, total, (x.weights, x.private, x.multiply_adds))
        rows = [("part", "weights", "private", "multiply-adds")]
        rows += [(part, *(f"{number:,}" for number in total)) for part, total in sums.items()]
        return table(rows, right={1, 2, 3})

    def _counts_table(self) -> list[str]:
        """Parameters by kind, relative to the generated weights and to the unshared network."""
        if not self.generated:
            return [f"trainable      {self.counts['trainable']:,}"]
        rows: list[tuple[str, ...]] = [
            ("", "parameters", f"of {self.generated:,} generated", f"of {self.plain:,} unshared")
        ]
        for name in ("banks", "coefficients", "private", "trainable"):
            size = self.counts[name]
            shares = f"{size / self.generated:.2%}", f"{size / self.plain:.2%}"
            rows.append((name, f"{size:,}", *shares))
        return table(rows, right={1, 2, 3})

    def _bytes_table(self) -> list[str]:
        """Bytes of training, and relative to the unshared network."""
        rows = [("", "bytes", "of the unshared network's")]
        for name in ("bytes", "optimizer", "all_reduce"):
            label, size = LABELS[name], getattr(self, name)
            rows.append((label, f"{size:,}", f"{size / max(1, self.unshared[name]):.2%}"))
        return table([row if self.generated else row[:2] for row in rows], right={1, 2})

    def _devices_table(self) -> list[str]:
        """Bytes of each device, with banks copied to all of them or divided over them."""
        rows = [(f"on each of {self.devices} devices", "banks copied", "banks divided")]
        for name, label in LABELS.items():
            rows.append((label, f"{getattr(self, name, 0):,}", f"{self.divided[name]:,}"))
        return table(rows, right={1, 2})


def cost(
    model: nn.Module,
    *inputs: Any,
    optimizer: optax.GradientTransformation | None = None,
    devices: int | None = None,
    **options: Any,
) -> Cost:
    """Cost of a network on the given inputs.

    Args:
      model: plain or `Shared`.
      *inputs: example inputs, pytrees of arrays or `jax.ShapeDtypeStruct`s. A single tuple of
        integers is the shape of one float32 example, without the batch axis.
      optimizer: counts this optimizer's state; None for SGD with momentum.
      devices: also give bytes of each device if the banks of a `Shared` are divided over so many.
      **options: further arguments of the model, such as `train=False`.

    Example:
      >>> import jax, paramshare
      >>> from paramshare.measure.cost import cost
      >>> c = cost(paramshare.create_model("swrn-16-1-1"), (32, 32, 3))
      >>> c.counts["trainable"], c.plain
      (126688, 175066)
      >>> batch = jax.ShapeDtypeStruct((8, 32, 32, 3), jax.numpy.float32)
      >>> cost(paramshare.create_model("swrn-16-1-1"), batch, train=False).use == 8 * c.use
      True
    """
    if len(inputs) == 1 and _is_shape(inputs[0]):
        inputs = (example_input(inputs[0]),)
    plain = model.model if isinstance(model, Shared) else model
    key = jax.random.key(0)
    options.pop("mutable", None)  # everything is, but the parameters
    traced = trace(plain, *inputs, **options)
    plain_variables = traced.variables

    def apply(variables: Any, *xs: Any) -> Any:
        mutable = DenyList("params")  # with train=True the model updates its statistics
        return plain.apply(variables, *xs, rngs={"params": key}, mutable=mutable, **options)

    work, convolutions = collections.Counter(), 0
    for (primitive, path), number in by_primitive(apply, plain_variables, *inputs).items():
        work[path] += number
        convolutions += number if primitive == CONVOLUTION else 0

    variables, banks, generation, divided = plain_variables, (), 0, {}
    if isinstance(model, Shared):
        banks = model.layout.banks
        variables = _shared_variables(model, plain_variables)
        generation = sum(multiply_adds(model.layout.expand, variables).values())
    sizes = {path: math.prod(x.shape) for path, x in traced.parameters.items()}
    optimizer = optax.sgd(0.1, momentum=0.9) if optimizer is None else optimizer
    if devices is not None and isinstance(model, Shared):
        divided = _divided(model.layout, variables, optimizer, devices)
    return Cost(
        _layers(sizes, {site.path: b.name for b in banks for site in b.sites}, work),
        count(variables),
        sum(bank.dense for bank in banks),
        sum(sizes.values()),
        work.total(),
        convolutions,
        generation,
        **_memory(variables, optimizer),
        unshared=_memory(plain_variables, optimizer),
        devices=devices,
        divided=divided,
    )


def _is_shape(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(size, int) for size in value)


def _shared_variables(shared: Shared, plain_variables: Mapping[str, Any]) -> dict[str, Any]:
    """Shapes of the shared model's variables, without a second trace of the model."""
    banks, params = jax.eval_shape(lambda: shared.layout.init(jax.random.key(0)))
    private = strip(plain_variables["params"], shared.layout.paths)
    others = {name: {"model": x} for name, x in plain_variables.items() if name != "params"}
    params |= {"model": private} if private else {}
    return shared.stored({"banks": banks, "params": params, **others})


def _layers(
    sizes: Mapping[str, int], bank_of: Mapping[str, str], work: Mapping[str, int]
) -> tuple[Layer, ...]:
    paths: dict[str, list[str]] = {}
    for path in sizes:
        paths.setdefault(path.rpartition("/")[0], []).append(path)
    return tuple(
        Layer(
            owner,
            sum(sizes[path] for path in members),
            sum(sizes[path] for path in members if path not in bank_of),
            ", ".join(dict.fromkeys(bank_of[path] for path in members if path in bank_of)),
            work.get(owner, 0),
        )
        for owner, members in paths.items()
    )


def _memory(
    variables: Mapping[str, Any], optimizer: optax.GradientTransformation
) -> dict[str, int]:
    trainable = {name: variables[name] for name in ("banks", "params") if name in variables}
    others = {name: tree for name, tree in variables.items() if name not in trainable}
    statistics = [x for x in jax.tree.leaves(others) if jnp.issubdtype(x.dtype, jnp.inexact)]
    metrics = 2 * jnp.dtype(jnp.float32).itemsize
    return {
        "bytes": _bytes(trainable),
        "optimizer": _bytes(jax.eval_shape(optimizer.init, trainable)),
        "all_reduce": _bytes(trainable) + _bytes(statistics) + metrics,
    }


def _divided(
    layout: Layout,
    variables: Mapping[str, Any],
    optimizer: optax.GradientTransformation,
    devices: int,
) -> dict[str, int]:
    """As `_memory`, of one device, and what it gathers and scatters: kernels, or whole banks."""
    banks, communicated = {}, 0
    for bank in layout.sliced("devices", devices).banks:
        banks[bank.name] = slices = bank.scheme.shapes(bank.sites).bank
        kernels = bank.dense * max(leaf.dtype.itemsize for leaf in jax.tree.leaves(slices))
        entrywise = layout[bank.name].scheme.entrywise
        communicated += kernels if entrywise else devices * _bytes(slices)
    memory = _memory({**separated(variables), "banks": banks}, optimizer)
    memory["all_reduce"] -= _bytes(banks)
    return memory | {"all_gather": communicated, "reduce_scatter": communicated}


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
