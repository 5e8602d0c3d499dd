"""Networks compressed by configuration: `config.compression` quantises banks."""

import dataclasses
import pathlib
from typing import Any

import flax.linen as nn

from paramshare.shared import Shared
from paramshare.storage import write_bytes
from paramshare.training.config import Compression, Config, ConfigError
from paramshare.transform.compress import (
    CompressError,
    finalise,
    matching_banks,
    quantised_layout,
)
from paramshare.transform.packing import PACKED, Packed, pack


def compressed_network(model: nn.Module, config: Config) -> nn.Module:
    """The network with the banks that `config.compression` names under `Compressed`.

    Raises:
      ConfigError: if the network shares no weights, or has no such bank.
    """
    settings = config.compression
    if not settings.active:
        return model
    if not isinstance(model, Shared):
        raise ConfigError(
            f"compression prunes or quantises banks, but {config.model.name} shares no weights; "
            "leave it out, or use a shared network"
        )
    try:
        matching_banks(model.layout, settings.banks)
        if settings.bits is None:
            return model
        layout = quantised_layout(model.layout, settings.bits, settings.method, settings.banks)
    except CompressError as error:
        raise ConfigError(f"compression of {config.model.name!r}: {error}") from None
    return model.clone(layout=layout)


def pack_run(
    model: Shared, variables: dict[str, Any], workdir: pathlib.Path | None
) -> tuple[dict[str, Any], Packed]:
    """The final variables of a compressed network, and their packed form.

    Args:
      model: the network, with its banks under `Compressed`.
      variables: as trained.
      workdir: where `variables.pack` is written; None for nowhere.
    """
    final = finalise(model, variables)[1]
    packed = pack(final)
    if workdir is not None:
        write_bytes(workdir / PACKED, packed.content)
    return final, packed


def further(before: Compression, asked: Compression) -> Compression:
    """What a run is compressed by that starts from one compressed by `before`.

    Numbers that are pruned stay so.

    Raises:
      ConfigError: if the run before is quantised, or other banks of it are pruned.

    Example:
      >>> further(Compression(prune=0.5), Compression(bits=4))
      Compression(bits=4, method='kmeans', prune=0.5, gradual=False, banks=())
    """
    if before.bits is not None:
        raise ConfigError(
            f"the run is quantised to {before.bits} bits already; compress the run that it was "
            "made from, with other --bits or --prune"
        )
    if before.prune and before.banks != asked.banks:
        raise ConfigError(
            f"the run has pruned the banks {list(before.banks) or 'all'}, not those of --banks; "
            "name the same banks"
        )
    if asked.prune >= before.prune:
        return asked
    return dataclasses.replace(asked, prune=before.prune)
