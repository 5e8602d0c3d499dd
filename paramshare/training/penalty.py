"""The penalties that a configuration adds to the loss."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax

from paramshare.penalties import PenaltyError, orthogonality, recurrence
from paramshare.shared import Shared
from paramshare.training.config import Config, ConfigError, Penalty

# By the field that holds the weight: the penalty of (model, variables), with its other fields.
PENALTIES: dict[str, Callable[[Penalty, Shared, Mapping[str, Any]], jax.Array]] = {
    "orthogonality": lambda config, model, variables: orthogonality(
        model, variables, *config.pools, unique=config.unique
    ),
    "recurrence": lambda config, model, variables: recurrence(model, variables),
}


def penalties(
    config: Penalty, model: nn.Module, variables: Mapping[str, Any]
) -> dict[str, jax.Array]:
    """The values of the configured penalties by name, without their weights.

    Raises:
      PenaltyError: if the model does not have the banks of a penalty.
    """
    values = {}
    for name, penalty in PENALTIES.items():
        if getattr(config, name):
            if not isinstance(model, Shared):
                raise PenaltyError(f"{name} needs a shared network, got {type(model).__name__}")
            values[name] = penalty(config, model, variables)
    return values


def without(config: Penalty, *names: str) -> Penalty:
    """The configuration with the weights of some penalties set to 0."""
    return dataclasses.replace(config, **dict.fromkeys(names, 0.0))


def misfits(config: Penalty, model: nn.Module, variables: Any) -> dict[str, PenaltyError]:
    """The configured penalties that the model has no banks for, with the reasons.

    Args:
      config: the penalties.
      model: a network.
      variables: the variables of the network; shapes suffice.
    """
    reasons = {}
    for name in PENALTIES:
        alone = without(config, *(other for other in PENALTIES if other != name))
        try:
            jax.eval_shape(
                lambda variables, alone=alone: penalties(alone, model, variables), variables
            )
        except PenaltyError as error:
            reasons[name] = error
    return reasons


def check_penalty(config: Config, model: nn.Module, variables: Any) -> None:
    """Raises `ConfigError`, naming the penalty, if the model lacks the banks of a penalty."""
    for name, error in misfits(config.penalty, model, variables).items():
        raise ConfigError(
            f"penalty.{name} is {getattr(config.penalty, name)} with model "
            f"{config.model.name!r}: {error}; or set it to 0"
        ) from error
