"""More iterations at test time: a trained network of equal layers, run for more of them than it was trained with."""

from collections.abc import Mapping
from typing import Any, Literal

from paramshare.analysis.conversion import bake
from paramshare.models import PathNet
from paramshare.shared import Shared

How = Literal["middle", "stretch", "last"]
HOW = ("middle", "stretch", "last")


class DepthError(ValueError):
    """A network cannot be run for so many layers."""


def deepen(
    model: PathNet | Shared, variables: Mapping[str, Any], depth: int, *, period: int = 1, how: How = "middle"
) -> tuple[PathNet, dict[str, Any]]:
    """A `PathNet` of more layers, which repeats those that a trained one has: a loop, run for more iterations.

    An iteration is `period` layers. A repeated one brings along all that it has, its kernels and the batch norms that are its own, for
    a hard loop has one kernel, but batch statistics for each of the iterations that it was trained with. Which of them the new iterations
    take is the choice of `how`:

      "middle"    the middle one only: 1 2 2 2 2 3. Computation begins and ends as it did.
      "stretch"   every iteration in turn, as often as comes out even: 1 1 2 2 3 3.
      "last"      the last one only: 1 2 3 3 3 3.

    Layers are a loop only where their kernels are equal (`Tied`), or repeat with this period (`paramshare.fold` tells it). Others can be
    repeated too, to compare with: that is no longer the same computation run for longer. Statistics were gathered of other activations,
    and perhaps of other grids; `paramshare.analysis.batch_statistics.reestimate` gathers them anew.

    Args:
      model: a `PathNet`, plain, shared or folded.
      variables: its variables.
      depth: layers wanted: as many as there are, and so many whole periods besides.
      period: layers of one iteration, 1 or more. Layers behind the last whole iteration stay the last.
      how: "middle", "stretch" or "last". `experiments/results/shortest_paths.md` compares them.

    Returns:
      The model and its variables. Arrays are those of the layers that are repeated, not copies.

    Raises:
      DepthError: if the model is no `PathNet`, or depth, period or how are not legal.
      PlanError: if the variables are of another model.

    Example:
      >>> import jax, paramshare
      >>> from paramshare.analysis.deepening import deepen
      >>> shared = paramshare.create_model("pathnet-4-8-loop-1", input_shape=(8, 8, 2))
      >>> variables = shared.init(jax.random.key(0), jax.numpy.zeros((1, 8, 8, 2)))
      >>> longer, its = deepen(shared, variables, depth=10)
      >>> longer.apply(its, jax.numpy.ones((1, 24, 24, 2))).shape
      (1, 24, 24)
    """
    plain = model.model if isinstance(model, Shared) else model
    if not isinstance(plain, PathNet):
        raise DepthError(f"only a PathNet can be run for more layers; got {type(plain).__name__}")
    layers = repeated(plain.depth, depth, period, how)
    dense = bake(model, variables) if isinstance(model, Shared) else variables
    names = {f"layer{number + 1}": f"layer{layer + 1}" for number, layer in enumerate(layers)}

    def longer(tree: Mapping[str, Any]) -> dict[str, Any]:
        own = {name: value for name, value in tree.items() if not name.startswith("layer")}
        return own | {name: tree[source] for name, source in names.items() if source in tree}

    found = {name: longer(tree) for name, tree in dense.items()}
    return plain.clone(depth=depth, parent=None, name=None), found


def repeated(layers: int, depth: int, period: int = 1, how: How = "middle") -> tuple[int, ...]:
    """Which of `layers` layers, counted from 0, each of `depth` layers repeats; see `deepen`.

    Example:
      >>> from paramshare.analysis.deepening import repeated
      >>> repeated(3, 6), repeated(3, 6, how="stretch"), repeated(5, 9, period=2, how="last")
      ((0, 1, 1, 1, 1, 2), (0, 0, 1, 1, 2, 2), (0, 1, 2, 3, 2, 3, 2, 3, 4))
    """
    if how not in HOW:
        raise DepthError(f"how={how!r}; it is one of {', '.join(HOW)}")
    if isinstance(period, bool) or not isinstance(period, int) or not 1 <= period <= layers:
        raise DepthError(f"period={period!r}; an iteration has from 1 to {layers} layers, as many as the network")
    if isinstance(depth, bool) or not isinstance(depth, int) or depth < layers or (depth - layers) % period:
        raise DepthError(
            f"depth={depth!r}; the network has {layers} layers, and iterations of {period}: give {layers + period}, or any whole number of "
            "iterations more"
        )
    have, want = layers // period, (depth - layers % period) // period
    iterations = {
        "stretch": [i * have // want for i in range(want)],
        "middle": [*range(have // 2), *[have // 2] * (want - have), *range(have // 2, have)],
        "last": [*range(have), *[have - 1] * (want - have)],
    }[how]
    rest = range(have * period, layers)
    return (*(iteration * period + i for iteration in iterations for i in range(period)), *rest)
