"""Runs a trained network of equal layers with more layers than it was trained with."""

from collections.abc import Mapping
from typing import Any, Literal, get_args

from paramshare.errors import ParamshareError
from paramshare.models import PathNet
from paramshare.shared import Shared
from paramshare.transform.conversion import bake

How = Literal["middle", "stretch", "last"]
HOW: tuple[How, ...] = get_args(How)


class DepthError(ParamshareError):
    """A network cannot run with this many layers."""


def deepen(
    model: PathNet | Shared,
    variables: Mapping[str, Any],
    depth: int,
    *,
    period: int = 1,
    how: How = "middle",
) -> tuple[PathNet, dict[str, Any]]:
    """A deeper `PathNet` that repeats the layers of a trained one: a loop with more iterations.

    One iteration is `period` layers. A repeated iteration keeps its kernels and its batch norms. A
    hard loop has one kernel, but separate batch norms for each iteration of training. `how` selects
    the iterations that are repeated:

      "middle"    the middle one: 1 2 2 2 2 3. Computation begins and ends as before.
      "stretch"   every iteration in turn, equally often: 1 1 2 2 3 3.
      "last"      the last one: 1 2 3 3 3 3.

    Layers form a loop only if their kernels are equal (`Tied`) or repeat with this period, which
    `paramshare.fold` reports. Other layers can be repeated for comparison, but then the longer
    network is no longer the same computation with more iterations. Batch statistics are those of
    the shorter network; `paramshare.reestimate` computes them for the longer one.

    Args:
      model: a `PathNet`, plain, shared or folded.
      variables: its variables.
      depth: number of layers: the present number plus any number of whole periods.
      period: layers per iteration, at least 1. Layers after the last whole iteration stay last.
      how: "middle", "stretch" or "last". `experiments/results/shortest_paths.md` compares them.

    Returns:
      The model and its variables. Repeated layers refer to the same arrays, without copies.

    Raises:
      DepthError: if the model is not a `PathNet`, or if depth, period or how is invalid.
      PlanError: if the variables belong to another model.

    Example:
      >>> import jax, paramshare
      >>> from paramshare.transform.deepening import deepen
      >>> shared = paramshare.create_model("pathnet-4-8-loop-1", input_shape=(8, 8, 2))
      >>> variables = jax.jit(shared.init)(jax.random.key(0), jax.numpy.zeros((1, 8, 8, 2)))
      >>> deeper, deeper_variables = deepen(shared, variables, depth=10)
      >>> deeper.apply(deeper_variables, jax.numpy.ones((1, 24, 24, 2))).shape
      (1, 24, 24)
    """
    plain = model.model if isinstance(model, Shared) else model
    if not isinstance(plain, PathNet):
        raise DepthError(f"only a PathNet can run with more layers; got {type(plain).__name__}")
    layers = repeated(plain.depth, depth, period, how)
    dense = bake(model, variables) if isinstance(model, Shared) else variables
    sources = {f"layer{number + 1}": f"layer{layer + 1}" for number, layer in enumerate(layers)}

    def deeper(tree: Mapping[str, Any]) -> dict[str, Any]:
        others = {name: value for name, value in tree.items() if not name.startswith("layer")}
        return others | {name: tree[s] for name, s in sources.items() if s in tree}

    plain = plain.clone(depth=depth, parent=None, name=None)
    return plain, {name: deeper(tree) for name, tree in dense.items()}


def repeated(layers: int, depth: int, period: int = 1, how: How = "middle") -> tuple[int, ...]:
    """For each of `depth` layers, the index of the one of `layers` layers that it repeats.

    See `deepen`.

    Raises:
      DepthError: if depth, period or how is invalid.

    Example:
      >>> from paramshare.transform.deepening import repeated
      >>> repeated(3, 6), repeated(3, 6, how="stretch")
      ((0, 1, 1, 1, 1, 2), (0, 0, 1, 1, 2, 2))
      >>> repeated(5, 9, period=2, how="last")
      (0, 1, 2, 3, 2, 3, 2, 3, 4)
    """
    if how not in HOW:
        raise DepthError(f"how={how!r}; how must be one of {', '.join(HOW)}")
    if not _is_integer(period) or not 1 <= period <= layers:
        raise DepthError(
            f"period={period!r}; period must be an integer from 1 to {layers}, the network's layers"
        )
    if not _is_integer(depth) or depth < layers or (depth - layers) % period:
        raise DepthError(
            f"depth={depth!r}; the network has {layers} layers, in iterations of {period}: depth "
            f"must be {layers}, {layers + period}, or any number of iterations more"
        )
    before, after = layers // period, (depth - layers % period) // period
    half = before // 2
    iterations = {
        "stretch": [i * before // after for i in range(after)],
        "middle": [*range(half), *[half] * (after - before), *range(half, before)],
        "last": [*range(before), *[before - 1] * (after - before)],
    }[how]
    remaining = range(before * period, layers)
    return (*(i * period + j for i in iterations for j in range(period)), *remaining)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
