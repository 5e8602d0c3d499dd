"""A family of named networks: all names of one form."""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

import flax.linen as nn

from paramshare.plan import Plan

Network = tuple[nn.Module, Plan | None]

SMALL, LARGE, GRID, DIGITS = (32, 32, 3), (224, 224, 3), (32, 32, 2), (29, 29, 1)
OPTIONS = ("dtype", "axis_name")
STEM_OPTIONS = (*OPTIONS, "stem")
DETECTOR_OPTIONS = (*STEM_OPTIONS, "coarsest")
FORM_OPTIONS = (*STEM_OPTIONS, "form")


@dataclasses.dataclass(frozen=True)
class Family:
    """Networks whose names have one form.

    Attributes:
      form: the names, with their arguments in braces: "wrn-{depth}-{width}".
      about: description in one line.
      examples: the names that `list_models` lists; at least one, unless other families of
        classifiers have the same form behind another prefix.
      build: takes the arguments in the name, `num_classes` and the options as keyword arguments;
        returns the model and the plan that shares its weights, or None for the plan.
      exists: whether there is a network with these arguments in its name, passed as keyword
        arguments; None for all that `build` takes.
      input_shape: shape of the inputs that the networks were designed for: (height, width,
        channels) of images, (length,) of tokens.
      options: names of the options of `build`.
      num_classes: default number of outputs, by task for networks for several tasks; None for 1000
        with images of ImageNet's size, 256 with tokens, else 10.
      inputs: the kind of input.
    """

    form: str
    about: str
    examples: tuple[str, ...]
    build: Callable[..., Network]
    exists: Callable[..., bool] | None = None
    input_shape: tuple[int, ...] = SMALL
    options: tuple[str, ...] = OPTIONS
    num_classes: int | Mapping[str, int] | None = None
    inputs: Literal["images", "tokens"] = "images"

    def parse(self, name: str) -> dict[str, Any] | None:
        """The arguments of `build` in a name of this form; None if the name has another form."""
        pattern = re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>[0-9]+)", re.escape(self.form))
        pattern = pattern.replace("(?P<width>[0-9]+)", r"(?P<width>[0-9]+(\.[0-9]+)?)")
        pattern = pattern.replace("(?P<backbone>[0-9]+)", r"(?P<backbone>resnet[a-z0-9.-]+)")
        match = re.fullmatch(pattern, name)
        if match is None:
            return None
        return {argument: _value(text) for argument, text in match.groupdict().items()}

    def accepts(self, arguments: dict[str, Any]) -> bool:
        """Whether the family has a network with these arguments."""
        return self.exists is None or self.exists(**arguments)


def _value(text: str) -> Any:
    """The number that a text is, or the text."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def plain(model: Callable[..., nn.Module]) -> Callable[..., Network]:
    """A family's `build` for networks without weight sharing."""
    return lambda **arguments: (model(**arguments), None)
