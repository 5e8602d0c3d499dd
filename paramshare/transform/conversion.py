"""Conversion: a shared network's variables to those of its plain model, and back."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import unfreeze

from paramshare.errors import ParamshareError
from paramshare.layout import (
    HasLayout,
    Layout,
    PlanError,
    SharedBank,
    count_leaves,
    separated,
    strip,
    table,
    variables_of,
)
from paramshare.measure.change import output_change, relative_change
from paramshare.models.resnet import is_factored
from paramshare.schemes import SchemeError, Weights
from paramshare.shared import Shared, check_shared

Model = TypeVar("Model", bound=HasLayout)


class ConversionError(ParamshareError):
    """Variables do not match the model, or a scheme cannot be fitted to kernels."""


@dataclasses.dataclass(frozen=True)
class ConvertedBank:
    """Report on the layers of one bank.

    Attributes:
      name: the name of the bank.
      scheme: its scheme, as text.
      layers: how many layers use the bank.
      before: number of parameters of the layers' dense kernels.
      after: number of trainable parameters that replace them.
      kernel_error: |W' - W| / |W| over all kernels of the bank, W before and W' after.
      worst: the largest such error of a single layer.
      worst_layer: the path of that layer.
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
class Converted(Generic[Model]):
    """A converted dense network.

    Attributes:
      shared: the shared model.
      variables: the variables of `shared`.
      banks: a report on each bank.
      output_change: |y' - y| / |y| over the example inputs, y and y' being the outputs before and
        after conversion; None without inputs.
    """

    shared: Model
    variables: dict[str, Any]
    banks: tuple[ConvertedBank, ...]
    output_change: float | None = None

    @property
    def saved(self) -> int:
        """Number of trainable parameters that the conversion removed."""
        return sum(bank.before - bank.after for bank in self.banks)

    def __str__(self) -> str:
        head = ("bank", "scheme", "layers", "parameters", "after", "kernel error", "worst layer")
        rows: list[tuple[str, ...]] = [(*head, "")]
        for bank in self.banks:
            rows.append(
                (
                    bank.name,
                    bank.scheme,
                    str(bank.layers),
                    f"{bank.before:,}",
                    f"{bank.after:,}",
                    f"{bank.kernel_error:.2e}",
                    f"{bank.worst:.2e}",
                    bank.worst_layer,
                )
            )
        difference = f"{abs(self.saved):,} {'more' if self.saved < 0 else 'fewer'} than before"
        lines = table(rows, right={2, 3, 4, 5, 6})
        lines += ["", f"trainable      {self.shared.layout.trainable:,}, {difference}"]
        if self.output_change is not None:
            lines.append(f"output change  {self.output_change:.2e} of the outputs' norm")
        return "\n".join(lines)


def bake(shared: Shared, variables: Mapping[str, Any]) -> dict[str, Any]:
    """Computes every shared weight once and returns variables of the plain model.

    Use it for inference, or to pass the network to code without sharing:
    `shared.model.apply(bake(shared, variables), x)` equals `shared.apply(variables, x)`. This is
    `shared.expand` in one compiled program.

    Args:
      shared: the shared model.
      variables: its variables.

    Returns:
      Variables of `shared.model`, concrete arrays.

    Raises:
      ConversionError: if `shared` is not a `Shared`.
      PlanError: if the variables do not match the layout.

    Example:
      >>> import jax, paramshare
      >>> x = jax.numpy.ones((1, 8, 8, 3))
      >>> shared = paramshare.create_model("swrn-16-1-1", input_shape=(8, 8, 3))
      >>> dense = paramshare.bake(shared, jax.jit(shared.init)(jax.random.key(0), x))
      >>> dense["params"]["stage1"]["block2"]["conv1"]["kernel"].shape
      (3, 3, 16, 16)
    """
    check_shared("bake", shared, ConversionError)
    return jax.jit(shared.expand)(unfreeze(dict(variables)))


def convert(
    shared: Shared, variables: Mapping[str, Any], *example_inputs: Any, **options: Any
) -> Converted[Shared]:
    """Fits the banks of a shared model to the kernels of a trained dense network.

    Each scheme's `from_dense` fits its bank: soft sharing by a truncated singular value
    decomposition, tied kernels by means, rings by means over slots. Private parameters and all
    other collections, such as batch statistics, are copied. After conversion to few parameters the
    network may perform poorly: fine-tune it, and re-estimate its batch statistics with
    `reestimate`.

    Args:
      shared: the shared model to convert to.
      variables: the variables of the plain model `shared.model`.
      *example_inputs: of the model; if given, all parameters are checked by name, and the change of
        the outputs is measured.
      **options: further arguments of the model, such as `train=False`.

    Returns:
      The variables and a report. The input is not changed.

    Raises:
      ConversionError: if a parameter is missing or has another shape than in the plain model, if
        the variables are those of a shared model, or if a scheme cannot be fitted to kernels.

    Example:
      >>> import jax, paramshare
      >>> x = jax.numpy.ones((1, 8, 8, 3))
      >>> dense = paramshare.create_model("wrn-16-1", input_shape=(8, 8, 3))
      >>> variables = jax.jit(dense.init)(jax.random.key(0), x)
      >>> # As many templates as layers: exact.
      >>> shared = paramshare.create_model("swrn-16-1-2", input_shape=(8, 8, 3))
      >>> converted = paramshare.convert(shared, variables, x)
      >>> converted.output_change < 1e-5
      True
      >>> [(bank.name, bank.layers, bank.after) for bank in converted.banks]
      [('stage1', 2, 4612), ('stage2', 2, 18436), ('stage3', 2, 73732)]
    """
    check_shared("convert", shared, ConversionError)
    variables = unfreeze(dict(variables))
    layout, params = shared.layout, variables.get("params", {})
    try:
        dense = layout.read(params)
    except PlanError as error:
        if banks := separated(variables).get("banks"):
            raise ConversionError(
                f"the variables are those of a shared model, with banks {sorted(banks)}; pass the "
                "plain model's, as `bake` makes them"
            ) from None
        hint = "; use paramshare.factorise for it" if is_factored(shared.model) else ""
        raise ConversionError(f"{error}{hint}") from None
    if example_inputs:
        check_variables(shared.model, variables, *example_inputs, **options)
    elif count_leaves(params) != layout.plain:
        raise ConversionError(
            f"the variables have {count_leaves(params):,} parameters, the plain "
            f"{type(shared.model).__name__} has {layout.plain:,}; pass variables of that model "
            "(and example inputs, to see which parameter differs)"
        )

    weights, reports = fit(layout, dense)
    others = {name: {"model": value} for name, value in variables.items() if name != "params"}
    private = strip(params, layout.paths)
    converted = shared.stored(sharing_variables(weights, private) | others, like=variables)
    change = None
    if example_inputs:
        pairs = (shared.model, variables), (shared, converted)
        change = output_change(*pairs, *example_inputs, **options)
    return Converted(shared, converted, reports, change)


def fit(
    layout: Layout, dense: Mapping[str, Sequence[Any]]
) -> tuple[dict[str, Weights], tuple[ConvertedBank, ...]]:
    """The weights of every bank whose kernels are nearest to dense ones, and a report on each.

    Args:
      layout: the banks.
      dense: the kernels of each bank's sites, as `layout.read` returns them.

    Raises:
      ConversionError: if a scheme cannot be fitted to kernels, or they are not finite.
    """
    weights = {bank.name: _from_dense(bank, dense[bank.name]) for bank in layout.banks}
    kernels = jax.jit(
        lambda weights: {b.name: b.scheme.expand(weights[b.name], b.sites) for b in layout.banks}
    )(weights)
    reports = tuple(
        bank_report(bank, kernels[bank.name], dense[bank.name], sum(bank.trainable))
        for bank in layout.banks
    )
    return weights, reports


def sharing_variables(weights: Mapping[str, Weights], private: Mapping[str, Any]) -> dict[str, Any]:
    """The collections `banks` and `params` of a shared model; empty parts are left out."""
    banks, params = variables_of(weights)
    if private:
        params["model"] = private
    return {"banks": banks} | ({"params": params} if params else {})


def bank_report(
    bank: SharedBank, kernels: Sequence[Any], dense: Sequence[Any], after: int
) -> ConvertedBank:
    """Compares the kernels of a bank's layers with the dense ones that they replace.

    Raises:
      ConversionError: if a kernel is not finite.
    """
    errors = [relative_change(a, b) for a, b in zip(dense, kernels, strict=True)]
    kernel_error = relative_change(tuple(dense), tuple(kernels))
    if not np.isfinite(kernel_error):
        raise ConversionError(
            f"bank {bank.name!r}: kernels are not finite; use an earlier checkpoint"
        )
    worst = int(np.argmax(errors))
    return ConvertedBank(
        bank.name,
        str(bank.scheme),
        len(bank.sites),
        sum(int(np.size(kernel)) for kernel in dense),
        after,
        kernel_error,
        errors[worst],
        str(bank.sites[worst]).removesuffix("/kernel"),
    )


def check_variables(
    model: nn.Module, variables: Mapping[str, Any], *example_inputs: Any, **options: Any
) -> None:
    """Checks the names and shapes of a model's variables.

    Raises:
      ConversionError: naming the first variable that is missing, unknown or of another shape.
    """
    expected = jax.eval_shape(
        lambda *inputs: model.init(jax.random.key(0), *inputs, **options), *example_inputs
    )
    # Boxes, of `nn.with_partitioning`, may have been taken off.
    expected, shapes = (_shapes(nn.meta.unbox(tree)) for tree in (expected, variables))
    name = type(model).__name__
    for path, shape in expected.items():
        if path not in shapes:
            raise ConversionError(
                f"no variable {path!r}; the plain {name} has it, of shape {shape}: "
                "pass variables of that model"
            )
        if shapes[path] != shape:
            raise ConversionError(
                f"{path!r} must have shape {shape}, as in the plain {name}, got {shapes[path]}; "
                "pass variables of that model"
            )
    for path, shape in shapes.items():
        if path not in expected:
            raise ConversionError(
                f"unknown variable {path!r} of shape {shape}: the plain {name} does not have it; "
                "pass variables of that model"
            )


def _from_dense(bank: SharedBank, kernels: Sequence[Any]) -> Weights:
    try:
        return jax.jit(lambda kernels: bank.scheme.from_dense(kernels, bank.sites))(
            tuple(jnp.asarray(kernel) for kernel in kernels)
        )
    except SchemeError as error:
        raise ConversionError(f"bank {bank.name!r}: {error}") from error


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): jnp.shape(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(unfreeze(tree))
    }
