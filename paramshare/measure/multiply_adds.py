"""Multiply-adds of convolutions and matrix products, counted in a function's jaxpr."""

import collections
import math
import re
from typing import Any

import jax

CONVOLUTION, PRODUCT = "conv_general_dilated", "dot_general"


def multiply_adds(function: Any, *args: Any) -> dict[str, int]:
    """Multiply-adds of a function, by the path of the Flax module that runs them.

    Counts convolutions and matrix products; the body of a `scan` counts once per iteration. What
    runs outside of any module is under "". Arguments are arrays or `jax.ShapeDtypeStruct`s; nothing
    is computed.

    Example:
      >>> import jax.numpy as jnp
      >>> from paramshare.measure.multiply_adds import multiply_adds
      >>> multiply_adds(jnp.dot, jnp.ones((2, 3)), jnp.ones((3, 5)))
      {'': 30}
    """
    totals: dict[str, int] = collections.defaultdict(int)
    for (_, module), number in by_primitive(function, *args).items():
        totals[module] += number
    return dict(totals)


def by_primitive(function: Any, *args: Any) -> dict[tuple[str, str], int]:
    """The same by primitive and module, {(CONVOLUTION or PRODUCT, module path): multiply-adds}."""
    totals: dict[tuple[str, str], int] = collections.defaultdict(int)

    def walk(jaxpr: Any, times: int, outer: tuple[str, ...]) -> None:
        for equation in jaxpr.eqns:
            scopes = outer + _scopes(equation)
            name, params = equation.primitive.name, equation.params
            if name in (CONVOLUTION, PRODUCT):
                terms = _convolution_terms if name == CONVOLUTION else _product_terms
                outputs = math.prod(equation.outvars[0].aval.shape)
                totals[name, _module(scopes)] += times * outputs * terms(equation)
            inner_times = times * params["length"] if name == "scan" else times
            for inner in jax.tree.leaves(
                list(params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
            ):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    walk(inner, inner_times, scopes)

    walk(jax.make_jaxpr(function)(*args).jaxpr, 1, ())
    return dict(totals)


def _convolution_terms(equation: Any) -> int:
    """Multiply-adds per output element: the kernel's size without its output axis."""
    kernel = equation.invars[1].aval.shape
    output_axis = equation.params["dimension_numbers"].rhs_spec[0]
    return math.prod(kernel) // kernel[output_axis]


def _product_terms(equation: Any) -> int:
    """Multiply-adds per output element: the sizes of the contracted axes."""
    (contracted, _), _ = equation.params["dimension_numbers"]
    return math.prod(equation.invars[0].aval.shape[i] for i in contracted)


def _scopes(equation: Any) -> tuple[str, ...]:
    """Name scopes of an equation inside its own jaxpr.

    The scopes outside of a scanned or rematerialised jaxpr come from the caller.
    """
    scopes = re.sub(r"\w+\(([^()]*)\)", r"\1", str(equation.source_info.name_stack))
    return tuple(part for part in scopes.split("/") if part)


def _module(scopes: tuple[str, ...]) -> str:
    """Path of the Flax module: Flax opens one name scope per module, the first is the class."""
    return "/".join(part for part in scopes[1:] if not re.fullmatch(r"\w+\.\w+|__call__", part))
