"""Where an NNX module keeps its shared weights, and how they are taken out and put back."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, MutableMapping, MutableSequence
from typing import Any, NoReturn

import jax
from flax import nnx
from flax.typing import PathParts

from paramshare.layout import Layout, PlanError
from paramshare.parameters.nnx import child, params_of


@dataclasses.dataclass(frozen=True)
class Place:
    """A weight of a module: where it is, and as which kind of variable.

    Attributes:
      path: the weight's path.
      keys: the path as NNX has it; several if the module refers to one weight from several places.
      kind: the type of the variable, `nnx.Param` or derived from it.
      metadata: the variable's metadata, such as its sharding.
    """

    path: str
    keys: tuple[PathParts, ...]
    kind: type[nnx.Param]
    metadata: tuple[tuple[str, Any], ...]


class MissingWeightError(PlanError, AttributeError):
    """A generated weight was read outside of a call; `hasattr` takes it for a missing attribute."""


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Hole:
    """What stands in the module for a weight that is generated from a bank."""

    path: str

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        self._refuse()

    def __getitem__(self, index: Any) -> NoReturn:
        self._refuse()

    def __jax_array__(self) -> NoReturn:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise MissingWeightError(
            f"the weight {self.path!r} is generated from a bank, and only there while the shared "
            "module is called; call the module's parts in `with shared.filled() as module:`"
        )


def places_of(module: nnx.Module, layout: Layout) -> tuple[Place, ...]:
    """The places of a layout's weights in a module.

    Raises:
      PlanError: if a weight is missing or has another shape, or is in a container that cannot be
        changed.
    """
    params = params_of(module)
    shapes = {
        path: jax.ShapeDtypeStruct(variable.shape, variable.dtype)
        for path, (_, variable) in params.items()
    }
    jax.eval_shape(layout.read, shapes)
    copies = {keys: tuple(group) for group in nnx.find_duplicates(module) for keys in group}
    places = []
    for path in sorted(layout.paths):
        keys, variable = params[path]
        place = Place(
            path,
            tuple(map(tuple, copies.get(keys, (keys,)))),
            variable.var_type,
            tuple((variable.get_metadata() | {"hijax": False, "ref": False}).items()),
        )
        for at in place.keys:
            holder = _holder(module, at)
            if not isinstance(holder, nnx.Pytree | MutableMapping | MutableSequence):
                raise PlanError(
                    f"the weight {path!r} is in a {type(holder).__name__}, which cannot be "
                    "changed; use nnx.List or nnx.Dict, or exclude it from the rule"
                )
        places.append(place)
    return tuple(places)


def fill(module: nnx.Module, places: tuple[Place, ...], weights: Mapping[str, jax.Array]) -> None:
    """Puts weights into a module, by path, for good."""
    for place in places:
        variable = place.kind.from_metadata(weights[place.path], dict(place.metadata))
        for keys in place.keys:
            _put(module, keys, variable)


def empty(module: nnx.Module, places: tuple[Place, ...]) -> None:
    """Takes the weights out of a module."""
    for place in places:
        for keys in place.keys:
            _put(module, keys, Hole(place.path))


@contextlib.contextmanager
def filled(
    module: nnx.Module, places: tuple[Place, ...], weights: Mapping[str, jax.Array]
) -> Iterator[None]:
    """Puts weights into a module, and at the end what was there before."""
    every = [keys for place in places for keys in place.keys]
    before = [child(_holder(module, keys), keys[-1]) for keys in every]
    try:
        fill(module, places, weights)
        yield
    finally:
        # By path again: a container may have been replaced by a copy.
        for keys, value in zip(every, before, strict=True):
            _put(module, keys, value)


def _put(module: nnx.Module, keys: PathParts, value: Any) -> None:
    holder: Any = _holder(module, keys)
    if isinstance(holder, nnx.Pytree):
        # Not by `setattr`, which refuses a module from outside of a traced function: the value is
        # taken out again before the trace ends.
        vars(holder)[str(keys[-1])] = value
    else:
        holder[keys[-1]] = value


def _holder(module: nnx.Module, keys: PathParts) -> Any:
    node = module
    for key in keys[:-1]:
        node = child(node, key)
    return node
