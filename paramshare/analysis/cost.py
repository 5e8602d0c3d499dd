"""What a network costs: trainable numbers, multiply-adds and bytes, layer by layer. Computed from shapes; no device is touched."""

import collections
import dataclasses
import json
import math
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from paramshare.layout import table
from paramshare.plan import trace_parameters
from paramshare.shared import Shared, count


@dataclasses.dataclass(frozen=True)
class Layer:
    """One module that owns parameters.

    Attributes:
      path: of the module.
      weights: numbers in its parameters as it uses them.
      private: those of them that are its own.
      bank: what its other weights are made from, or "".
      multiply_adds: of one image.
    """

    path: str
    weights: int
    private: int
    bank: str
    multiply_adds: int


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a network costs, for one image of one shape.

    Attributes:
      layers: every module that owns parameters, in the order of their first call.
      counts: as `paramshare.count`.
      generated: numbers of all the weights that are made from banks (T).
      plain: trainable numbers of the same network without sharing.
      use: multiply-adds of convolutions and dense layers.
      convolutions: those of convolutions alone.
      generation: multiply-adds of the matrix products that make the shared kernels, once a step whatever the batch; gathers and
        elementwise work, as rings, repetition and the scales of tied kernels have, are not counted.
      bytes: of the trainable numbers, as stored.
      optimizer: bytes of the optimizer's state.
      all_reduce: bytes that every device hands in for averaging, once a step of data-parallel training: gradients of the trainable
        numbers, batch statistics, loss and accuracy.
      unshared: `{"bytes", "optimizer", "all_reduce"}` of the network without sharing.
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

    def as_json(self) -> str:
        """Everything, as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    def __str__(self) -> str:
        rows = [("layer", "bank", "weights", "private", "multiply-adds")]
        rows += [
            (x.path, x.bank, f"{x.weights:,}", f"{x.private:,}", f"{x.multiply_adds:,}" if x.multiply_adds else "") for x in self.layers
        ]
        lines = table(rows, right={2, 3, 4})
        lines += [
            "",
            *self._counts_table(),
            "",
            *self._bytes_table(),
            "",
            f"multiply-adds  {self.use:,} an image, {self.convolutions:,} of them in convolutions",
        ]
        if self.generation:
            lines.append(f"  and          {self.generation:,} a step, to make the shared kernels")
        return "\n".join(lines)

    def _counts_table(self) -> list[str]:
        """Degrees of freedom, private numbers and their sum, against the generated weights and against the plain network."""
        if not self.generated:
            return [f"trainable      {self.counts['trainable']:,}"]
        rows = [("", "numbers", f"of {self.generated:,} generated", f"of {self.plain:,} unshared")]
        for name in ("banks", "coefficients", "private", "trainable"):
            number = self.counts[name]
            rows.append((name, f"{number:,}", f"{number / self.generated:.2%}", f"{number / self.plain:.2%}"))
        return table(rows, right={1, 2, 3})

    def _bytes_table(self) -> list[str]:
        """What is stored, remembered and sent in training; beside it the same of the plain network."""
        about = {"bytes": "storage", "optimizer": "optimizer state", "all_reduce": "all-reduce a step"}
        rows = [("", "bytes", "of the unshared network's")]
        for name, label in about.items():
            rows.append((label, f"{getattr(self, name):,}", f"{getattr(self, name) / max(1, self.unshared[name]):.2%}"))
        return table([row if self.generated else row[:2] for row in rows], right={1, 2})


def cost(model: nn.Module, input_shape: tuple[int, ...], optimizer: optax.GradientTransformation | None = None) -> Cost:
    """The cost of a network on one image.

    Args:
      model: plain or `Shared`.
      input_shape: of one image, (H, W, C).
      optimizer: whose state is counted; None for SGD with momentum.

    Example:
      >>> import paramshare
      >>> from paramshare.analysis.cost import cost
      >>> c = cost(paramshare.create_model("swrn-16-1-1"), (32, 32, 3))
      >>> c.counts["trainable"], c.plain
      (126688, 175066)
    """
    image = jax.ShapeDtypeStruct((1, *input_shape), jnp.float32)
    plain = model.model if isinstance(model, Shared) else model
    banks = model.layout.banks if isinstance(model, Shared) else ()
    bank_of = {site.path: bank.name for bank in banks for site in bank.sites}
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), image)
    plain_variables = jax.eval_shape(lambda x: plain.init(jax.random.key(0), x), image)

    apply = lambda v, x: plain.apply(v, x)  # noqa: E731
    work = multiply_adds(apply, plain_variables, image)
    convolutions = sum(multiply_adds(apply, plain_variables, image, dense=False).values())
    layers: dict[str, dict[str, Any]] = collections.defaultdict(lambda: {"weights": 0, "private": 0, "banks": []})
    for path, shape in trace_parameters(plain, image).items():
        owner, size = path.rpartition("/")[0], math.prod(shape.shape)
        layers[owner]["weights"] += size
        if path in bank_of:
            layers[owner]["banks"].append(bank_of[path])
        else:
            layers[owner]["private"] += size
    rows = tuple(
        Layer(path, x["weights"], x["private"], ", ".join(dict.fromkeys(x["banks"])), work.get(path, 0)) for path, x in layers.items()
    )

    generation = 0
    if isinstance(model, Shared):
        generation = sum(multiply_adds(model.layout.expand, variables["banks"], variables["params"].get("coefficients", {})).values())
    optimizer = optax.sgd(0.1, momentum=0.9) if optimizer is None else optimizer
    memory, unshared = _memory(variables, optimizer), _memory(plain_variables, optimizer)
    plain_count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(plain_variables["params"]))
    generated = sum(bank.dense for bank in banks)
    return Cost(rows, count(variables), generated, plain_count, sum(work.values()), convolutions, generation, **memory, unshared=unshared)


def _memory(variables: Any, optimizer: optax.GradientTransformation) -> dict[str, int]:
    """Bytes of the trainable numbers, of the optimizer's state, and of what is averaged over devices in a step."""
    trainable = {name: variables[name] for name in ("banks", "params") if name in variables}
    averaged = [leaf for name, tree in variables.items() if name not in trainable for leaf in jax.tree.leaves(tree)]
    averaged = [leaf for leaf in averaged if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    stored, loss_and_accuracy = _bytes(trainable), 2 * 4
    state = jax.eval_shape(optimizer.init, trainable)
    return {"bytes": stored, "optimizer": _bytes(state), "all_reduce": stored + _bytes(averaged) + loss_and_accuracy}


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def multiply_adds(function: Any, *args: Any, dense: bool = True) -> dict[str, int]:
    """Multiply-adds of the convolutions and (with `dense`) matrix products that a function runs, by Flax module path ("" outside of any).

    Read off the function's jaxpr; loops count as often as they run. Arguments may be shapes.
    """
    found: dict[str, int] = collections.defaultdict(int)

    def walk(jaxpr: Any, times: int, outer: tuple[str, ...]) -> None:
        for equation in jaxpr.eqns:
            scopes = outer + _scopes(equation)
            name, parameters = equation.primitive.name, equation.params
            if name == "conv_general_dilated":
                kernel = equation.invars[1].aval.shape
                features = kernel[parameters["dimension_numbers"].rhs_spec[0]]
                found[_module(scopes)] += times * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // features
            elif name == "dot_general" and dense:
                (contract, _), _ = parameters["dimension_numbers"]
                left = equation.invars[0].aval.shape
                found[_module(scopes)] += times * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contract)
            again = times * parameters["length"] if name == "scan" else times
            for inner in jax.tree.leaves(list(parameters.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    walk(inner, again, scopes)

    walk(jax.make_jaxpr(function)(*args).jaxpr, 1, ())
    return dict(found)


def _scopes(equation: Any) -> tuple[str, ...]:
    """The name scopes of an equation inside its own jaxpr; in a loop's, or a rematerialised one, those outside come from the caller."""
    scopes = re.sub(r"\w+\(([^()]*)\)", r"\1", str(equation.source_info.name_stack))
    return tuple(part for part in scopes.split("/") if part)


def _module(scopes: tuple[str, ...]) -> str:
    """The Flax module of an equation: Flax opens a name scope a module, the outermost being the class."""
    return "/".join(part for part in scopes[1:] if not re.fullmatch(r"\w+\.\w+|__call__", part))
