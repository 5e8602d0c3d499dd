"""Options of the network that a configuration gives as text, NAME=VALUE."""

import ast
from collections.abc import Container
from typing import Any

from paramshare.training.config import ConfigError, Model
from paramshare.zoo import options_of

OF_OTHER_FIELDS = {"dtype", "axis_name", "form", "stem", "length"}


def further_options(settings: Model, taken: Container[str] = ()) -> dict[str, Any]:
    """The options that `settings.options` names, with their values.

    Args:
      settings: the network's part of a configuration.
      taken: options that follow from the task.

    Raises:
      ConfigError: if an entry is not NAME=VALUE, its name occurs twice, or the network has no such
        option, or another field or the task sets it.

    Example:
      >>> further_options(Model("decoder-6-128", options=("heads=4", "scan=True")))
      {'heads': 4, 'scan': True}
    """
    allowed = set(options_of(settings.name)) - OF_OTHER_FIELDS
    options: dict[str, Any] = {}
    for entry in settings.options:
        name, equals, text = entry.partition("=")
        if name not in allowed or name in taken:
            remedy = f"its options are {', '.join(sorted(allowed))}" if allowed else "it has none"
            raise ConfigError(
                f"model.options holds {entry!r}, which is no option of {settings.name} to set "
                f"here; {remedy}"
            )
        if name in options:
            raise ConfigError(f"model.options holds {name!r} twice; leave one out")
        try:
            options[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            example = "heads=4" if equals else f"{name}=4"
            raise ConfigError(
                f"model.options holds {entry!r}; it must be NAME=VALUE, with a number, True, False "
                f"or None, such as {example}"
            ) from None
    return options
