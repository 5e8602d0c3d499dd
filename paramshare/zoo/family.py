"""What a family of named networks is."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn

from paramshare.plan import Plan

SMALL, LARGE = (32, 32, 3), (224, 224, 3)


@dataclasses.dataclass(frozen=True)
class Family:
    """Networks whose names have one form.

    Attributes:
      form: the name with its numbers in braces, as it is shown: "wrn-{depth}-{width}".
      about: one line.
      examples: names that `list_models` shows.
      build: from the numbers, `num_classes` and the options to (model, plan or None).
      accepts: whether the numbers are of this family rather than of another of the same form.
      input_shape: of the images that the networks were designed for.
      options: what `build` takes besides.
      num_classes: outputs unless told; None for 10, or 1000 of networks for ImageNet.
    """

    form: str
    about: str
    examples: tuple[str, ...]
    build: Callable[..., tuple[nn.Module, Plan | None]]
    accepts: Callable[[dict[str, Any]], bool] = lambda numbers: True
    input_shape: tuple[int, int, int] = SMALL
    options: tuple[str, ...] = ("dtype", "axis_name")
    num_classes: int | None = None

    def parse(self, name: str) -> dict[str, Any] | None:
        """The numbers in a name of this form, or None."""
        pattern = re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>[0-9]+)", re.escape(self.form))
        found = re.fullmatch(pattern.replace("(?P<width>[0-9]+)", r"(?P<width>[0-9]+(\.[0-9]+)?)"), name)
        return {key: float(value) if "." in value else int(value) for key, value in found.groupdict().items()} if found else None
