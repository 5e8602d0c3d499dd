"""Conversion: a shared network's kernels made once and for all, and a dense network's weights turned into banks."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from paramshare.analysis.folding import relative_change
from paramshare.layout import PlanError, SharedBank, count_leaves, table
from paramshare.schemes import SchemeError
from paramshare.shared import Shared


class ConversionError(ValueError):
    """Variables cannot be converted: they are of another model, or the scheme has no way from kernels to banks."""


@dataclasses.dataclass(frozen=True)
class ConvertedBank:
    """What became of the layers of one bank.

    Attributes:
      name: of the bank.
      scheme: that makes its kernels, as it prints.
      layers: how many.
      before: numbers of the layers' dense kernels.
      after: numbers that are trained in their place.
      kernel_error: |W' - W| / |W|, over all kernels of the bank, W as they were and W' as they are made.
      worst: the same of the layer where it is largest.
      worst_layer: its path.
    """

    name: str
    scheme: str
    layers: int
    before: int
    after: int
    kernel_error: float
    worst: float
    worst_layer: str


@dataclasses.dataclass(frozen=True)
class Converted:
    """A dense network, converted.

    Attributes:
      shared: what it was converted to.
      variables: of `shared`.
      banks: what became of each bank.
      output_change: |y' - y| / |y| over the inputs given, y and y' the outputs before and after; None without inputs.
    """

    shared: Shared
    variables: dict[str, Any]
    banks: tuple[ConvertedBank, ...]
    output_change: float | None = None

    @property
    def saved(self) -> int:
        """Trainable numbers that the conversion did away with."""
        return sum(bank.before - bank.after for bank in self.banks)

    def __str__(self) -> str:
        rows = [("bank", "scheme", "layers", "numbers before", "after", "kernel error", "worst layer", "")]
        for bank in self.banks:
            numbers = (str(bank.layers), f"{bank.before:,}", f"{bank.after:,}", f"{bank.kernel_error:.2e}")
            rows.append((bank.name, bank.scheme, *numbers, f"{bank.worst:.2e}", bank.worst_layer))
        lines = table(rows, right={2, 3, 4, 5, 6})
        lines += [
            "",
            f"trainable      {self.shared.layout.trainable:,}, {abs(self.saved):,} {'more' if self.saved < 0 else 'less'} than before",
        ]
        if self.output_change is not None:
            lines.append(f"output change  {self.output_change:.2e} of the outputs' norm")
        return "\n".join(lines)


def bake(shared: Shared, variables: Mapping[str, Any]) -> dict[str, Any]:
    """The plain model's variables, every kernel made once: for inference, and for whatever knows nothing of sharing.

    `shared.model.apply(bake(shared, variables), x)` equals `shared.apply(variables, x)`. This is `shared.expand`, in one compiled program.

    Args:
      shared: the shared model.
      variables: its variables.

    Returns:
      Variables of `shared.model`, concrete arrays.

    Raises:
      ConversionError: if `shared` is no `Shared`.
      PlanError: if a bank is missing: the variables are of another model.

    Example:
      >>> import jax, paramshare
      >>> x = jax.numpy.ones((1, 8, 8, 3))
      >>> shared = paramshare.create_model("swrn-16-1-1", input_shape=(8, 8, 3))
      >>> dense = paramshare.bake(shared, shared.init(jax.random.key(0), x))
      >>> dense["params"]["stage1"]["block2"]["conv1"]["kernel"].shape
      (3, 3, 16, 16)
    """
    _check_shared("bake", shared)
    return jax.jit(shared.expand)(plain(variables))


def convert(shared: Shared, variables: Mapping[str, Any], *example_inputs: Any, **options: Any) -> Converted:
    """Variables of a shared model whose kernels are as near as can be to those of a dense network.

    Each bank is what its scheme's `from_dense` makes of the kernels at its sites: for soft sharing the truncated singular value
    decomposition, for tied kernels means, for rings means over slots. Private parameters are taken over, and so are all other collections,
    batch statistics among them. A network that trains well may be a poor one after conversion to few numbers: train it
    on, and let `reestimate` fit its batch statistics.

    Args:
      shared: what to convert to.
      variables: of the plain model, `shared.model`, dense.
      *example_inputs: of the model; where given, all parameters are checked by name, and the change of the outputs is measured.
      **options: further arguments of the model, such as `train=False`.

    Returns:
      The variables and a report; nothing of the input is changed.

    Raises:
      ConversionError: if a parameter is missing or has another shape than the plain model's, the variables are shared already, or a
        bank's scheme cannot be fitted to kernels.

    Example:
      >>> import jax, paramshare
      >>> x = jax.numpy.ones((1, 8, 8, 3))
      >>> dense = paramshare.create_model("wrn-16-1", input_shape=(8, 8, 3))
      >>> variables = dense.init(jax.random.key(0), x)
      >>> shared = paramshare.create_model("swrn-16-1-2", input_shape=(8, 8, 3))  # as many templates as layers: exact
      >>> converted = paramshare.convert(shared, variables, x)
      >>> converted.output_change < 1e-5
      True
      >>> [(bank.name, bank.layers, bank.after) for bank in converted.banks]
      [('stage1', 2, 4612), ('stage2', 2, 18436), ('stage3', 2, 73732)]
    """
    _check_shared("convert", shared)
    variables = plain(variables)
    layout, params = shared.layout, variables.get("params", {})
    try:
        dense = layout.read(params)
    except PlanError as error:
        if "banks" in variables:
            raise ConversionError(
                f"the variables are a shared model's already, with banks {sorted(variables['banks'])}; pass the plain model's, as `bake` "
                "makes them"
            ) from None
        hint = "; a dense ResNet becomes a factored one by paramshare.factorise" if getattr(shared.model, "rank", 0) else ""
        raise ConversionError(f"{error}{hint}") from None
    if example_inputs:
        check_variables(shared.model, variables, *example_inputs, **options)
    elif count_leaves(params) != layout.plain:
        raise ConversionError(
            f"the variables hold {count_leaves(params):,} parameters, the plain {type(shared.model).__name__} has {layout.plain:,}; pass "
            "variables of that model (and example inputs, to be told which differ)"
        )

    banks, coefficients = {}, {}
    for bank in layout.banks:
        banks[bank.name], own = _from_dense(bank, dense[bank.name])
        if jax.tree.leaves(own):
            coefficients[bank.name] = own
    own = {"coefficients": coefficients} if coefficients else {}
    private = layout.strip(params)
    own |= {"model": private} if private else {}
    rest = {name: {"model": value} for name, value in variables.items() if name != "params"}
    fresh = {"banks": banks, **({"params": own} if own else {}), **rest}

    made = jax.jit(layout.expand)(banks, coefficients)
    kernels = layout.read(layout.fill({}, made))
    reports = tuple(report(bank, kernels[bank.name], dense[bank.name], sum(bank.trainable)) for bank in layout.banks)
    if not example_inputs:
        return Converted(shared, fresh, reports)
    return Converted(shared, fresh, reports, change(shared.model, variables, shared, fresh, example_inputs, **options))


def report(bank: SharedBank, made: Sequence[Any], dense: Sequence[Any], after: int) -> ConvertedBank:
    """The report on a bank whose layers' kernels were `dense` and are now `made`; `ConversionError` if these are not finite numbers."""
    errors = [relative_change(a, b) for a, b in zip(dense, made, strict=True)]
    whole = relative_change(tuple(dense), tuple(made))
    if not np.isfinite(whole):
        raise ConversionError(f"bank {bank.name!r}: its layers hold numbers that are not finite; take an earlier checkpoint")
    worst = int(np.argmax(errors))
    before = sum(int(np.size(kernel)) for kernel in dense)
    return ConvertedBank(
        bank.name, str(bank.scheme), len(bank.sites), before, after, whole, errors[worst], str(bank.sites[worst]).removesuffix("/kernel")
    )


def check_variables(model: nn.Module, variables: Mapping[str, Any], *example_inputs: Any, **options: Any) -> None:
    """Raises `ConversionError`, naming the first that differs, unless the variables are in names and shapes those of a model."""
    wanted = jax.eval_shape(lambda *inputs: model.init(jax.random.key(0), *inputs, **options), *example_inputs)
    shapes, found = _shapes(wanted), _shapes(variables)
    name = type(model).__name__
    for path, shape in shapes.items():
        if path not in found:
            raise ConversionError(
                f"no {path!r} among the variables; the plain {name} has it, of shape {shape}: pass variables of that model"
            )
        if found[path] != shape:
            raise ConversionError(f"{path!r} is of shape {found[path]}, the plain {name} wants {shape}; pass variables of that model")
    for path, shape in found.items():
        if path not in shapes:
            raise ConversionError(f"the variables hold {path!r}, of shape {shape}, which the plain {name} does not have")


def change(model: nn.Module, variables: Any, other: nn.Module, other_variables: Any, inputs: tuple[Any, ...], **options: Any) -> float:
    """|y' - y| / |y|, y the outputs of a model and y' those of another one."""
    pairs = ((model, variables), (other, other_variables))
    outputs = [jax.jit(lambda its, inputs, m=m: m.apply(its, *inputs, **options))(its, inputs) for m, its in pairs]
    return relative_change(*outputs)


def plain(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The same in dicts: of frozen ones `Shared.expand` would leave some as they are."""
    return {name: plain(value) if isinstance(value, Mapping) else value for name, value in tree.items()}


def _check_shared(what: str, shared: Any) -> None:
    if not isinstance(shared, Shared):
        raise ConversionError(
            f"{what} takes a Shared, as `share` and `create_model` make it, got {type(shared).__name__}; it shares nothing"
        )


def _from_dense(bank: SharedBank, kernels: tuple[Any, ...]) -> tuple[Any, Any]:
    scheme: Any = bank.scheme
    if not hasattr(scheme, "from_dense"):
        raise ConversionError(
            f"bank {bank.name!r}: {scheme} has no from_dense, a way from kernels back to a bank; train it from its own start, or give the "
            "bank another scheme"
        )
    try:
        return jax.jit(lambda kernels: scheme.from_dense(kernels, bank.sites))(tuple(jnp.asarray(kernel) for kernel in kernels))
    except SchemeError as error:
        raise ConversionError(f"bank {bank.name!r}: {error}") from error


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(plain(tree))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): jnp.shape(leaf) for path, leaf in leaves}
