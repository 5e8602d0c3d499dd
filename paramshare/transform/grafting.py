"""One network's variables put into another that holds it, as a detector holds its backbone."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.core import unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict

from paramshare.errors import ParamshareError
from paramshare.shared import Shared
from paramshare.transform.conversion import ConvertedBank, bake, convert, sharing_variables

INEXACT = 1e-3  # a kernel error above it is more than rounding


class GraftError(ParamshareError):
    """The variables of one network do not fit into another."""


@dataclasses.dataclass(frozen=True)
class Grafted:
    """What `graft` returns.

    Attributes:
      variables: of the larger network.
      taken: paths of the weights and statistics that were replaced, such as
        "params/backbone/stem/kernel"; of shared weights too.
      left_out: paths of those that the submodule does not have, such as "params/classifier/bias".
      banks: how closely the banks that were replaced make the given kernels.
    """

    variables: dict[str, Any]
    taken: tuple[str, ...]
    left_out: tuple[str, ...]
    banks: tuple[ConvertedBank, ...]


def graft(
    model: nn.Module,
    variables: Mapping[str, Any],
    name: str,
    given: Mapping[str, Any],
) -> Grafted:
    """Replaces the variables of a submodule by those of a network of its own.

    Banks with a layer in the submodule are fitted to the given kernels (`paramshare.convert`):
    exactly, if these come from equal banks of any scheme but `Ring`, whose maps depend on the paths
    of the layers. A ring is exact only if it has a slot for every weight. All other variables stay
    as they are.

    Args:
      model: the network, plain or shared.
      variables: its variables.
      name: the submodule, such as "backbone"; a path for one further inside.
      given: variables of a plain network with the parameters that the submodule has, or more; of a
        shared one, `bake` them.

    Raises:
      GraftError: if there is no such submodule, or one of its variables is missing in `given`, or
        has another shape there; or if `given` holds banks.

    Example:
      >>> import jax, paramshare
      >>> from paramshare.transform.grafting import graft
      >>> x = jax.numpy.ones((1, 32, 32, 3))
      >>> classifier = paramshare.create_model("resnet14-s8u1", input_shape=(32, 32, 3))
      >>> detector = paramshare.create_model("retinanet-resnet14-s8u1-head8x1", 2, (32, 32, 3))
      >>> trained, variables = (
      ...     jax.jit(model.init)(jax.random.key(0), x) for model in (classifier, detector)
      ... )
      >>> baked = paramshare.bake(classifier, trained)
      >>> grafted = graft(detector, variables, "backbone", baked)
      >>> grafted.left_out
      ('params/classifier/bias', 'params/classifier/kernel')
      >>> max(bank.kernel_error for bank in grafted.banks) < 1e-5
      True
    """
    if "banks" in given:
        raise GraftError(
            f"the variables to start from are those of a shared network, with banks "
            f"{sorted(given['banks'])}; pass the plain model's, as `bake` makes them"
        )
    dense = bake(model, variables) if isinstance(model, Shared) else unfreeze(dict(variables))
    leaves: dict[str, Any] = flatten_dict(dense, sep="/")
    found: dict[str, Any] = flatten_dict(unfreeze(dict(given)), sep="/")
    taken = {}  # path in the network: path in the source
    for path in leaves:
        collection, inside = path.split("/", 1)
        if inside.startswith(f"{name}/"):
            taken[path] = f"{collection}/{inside.removeprefix(f'{name}/')}"
    if not taken:
        modules = sorted({path.split("/")[1] for path in leaves if path.startswith("params/")})
        raise GraftError(f"there is no submodule {name!r}; the modules are {', '.join(modules)}")
    for path, origin in taken.items():
        shape = found[origin].shape if origin in found else "missing"
        if shape != leaves[path].shape:
            raise GraftError(
                f"{path} has shape {leaves[path].shape}, but {origin} is {shape} in the variables "
                f"to start from; take those of the network that {name!r} is"
            )
        leaves[path] = jnp.asarray(found[origin], leaves[path].dtype)
    grafted, banks = unflatten_dict(leaves, sep="/"), ()
    if isinstance(model, Shared):
        converted = convert(model, grafted)
        grafted, banks = converted.variables, converted.banks
        touched = {
            bank.name
            for bank in model.layout.banks
            if any(site.path.startswith(f"{name}/") for site in bank.sites)
        }
        weights = model.layout.weights(variables) | {
            bank: arrays
            for bank, arrays in model.layout.weights(grafted).items()
            if bank in touched
        }
        grafted |= sharing_variables(weights, grafted["params"].get("model", {}))
        banks = tuple(bank for bank in banks if bank.name in touched)
    left_out = tuple(sorted(set(found) - set(taken.values())))
    return Grafted(grafted, tuple(taken), left_out, banks)
