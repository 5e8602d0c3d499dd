"""Layers tied by configuration: `model.tied` puts banks of a shared network under `Tied`."""

import flax.linen as nn

from paramshare.layout import PlanError, SharedBank
from paramshare.schemes import SchemeError, Tied
from paramshare.shared import Shared
from paramshare.training.config import ConfigError, Model


def tie(model: nn.Module, config: Model) -> Shared:
    """The network with the banks that `config.tied` names under `Tied`.

    Raises:
      ConfigError: if the network has no such bank, or a bank cannot be tied in these groups.
    """
    if not isinstance(model, Shared):
        raise ConfigError(
            f"model.tied is {config.tied}, but {config.name} shares no weights; leave it empty, or "
            "use a shared network"
        )
    try:
        schemes = dict(map(tied_scheme, config.tied))
        return Shared(model.model, model.layout.with_schemes(schemes))
    except (PlanError, SchemeError) as error:
        raise ConfigError(f"model.tied with model {config.name!r}: {error}") from error


def tied_scheme(text: str) -> tuple[str, Tied]:
    """The bank and the scheme of an entry of `model.tied`.

    Example:
      >>> bank, scheme = tied_scheme("stage2=*0,1,0,1")
      >>> bank, scheme.groups, scheme.scaled
      ('stage2', (0, 1, 0, 1), True)
    """
    bank, equals, groups = text.rpartition("=")
    try:
        if not equals:
            raise ValueError("no '='")
        numbers = tuple(int(group) for group in groups.removeprefix("*").split(","))
        return bank, Tied(groups=numbers, scaled=groups.startswith("*"), initial="paper")
    except ValueError as error:
        raise ConfigError(
            f"model.tied holds {text!r} ({error}); it must be BANK=GROUPS, one group for each "
            "layer, such as 'stage2=0,1,0,1', or 'stage2=*0,1,0,1' for signed scales"
        ) from error


def tied_text(bank: SharedBank) -> str:
    """The inverse of `tied_scheme`, for a bank under `Tied`."""
    assert isinstance(bank.scheme, Tied)
    groups = bank.scheme.groups or (0,) * len(bank.sites)
    return f"{bank.name}={'*' if bank.scheme.scaled else ''}{','.join(map(str, groups))}"
