"""Named networks: a name gives a plain model and, where the name says so, the plan that shares its weights."""

import dataclasses
import difflib
import fnmatch
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from paramshare.models import ModelError, WideBottleneckResNet, WideResNet
from paramshare.models.wide_resnet import BOTTLENECK_BLOCKS, blocks_per_stage, check_width
from paramshare.plan import Plan, Rule
from paramshare.schemes import Soft
from paramshare.shared import share


@dataclasses.dataclass(frozen=True)
class Family:
    """Networks whose names have one form.

    Attributes:
      form: the name with its numbers in braces, as it is shown: "wrn-{depth}-{width}".
      about: one line.
      examples: names that `list_models` shows.
      build: from the numbers, `num_classes` and the model's options to (model, plan or None).
      accepts: whether the numbers are of this family rather than of another of the same form.
      input_shape: of the images that the networks were designed for.
    """

    form: str
    about: str
    examples: tuple[str, ...]
    build: Callable[..., tuple[nn.Module, Plan | None]]
    accepts: Callable[[dict[str, Any]], bool] = lambda numbers: True
    input_shape: tuple[int, int, int] = (32, 32, 3)

    def parse(self, name: str) -> dict[str, Any] | None:
        """The numbers in a name of this form, or None."""
        pattern = re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>[0-9]+)", re.escape(self.form))
        found = re.fullmatch(pattern.replace("(?P<width>[0-9]+)", r"(?P<width>[0-9]+(\.[0-9]+)?)"), name)
        return {key: float(value) if "." in value else int(value) for key, value in found.groupdict().items()} if found else None


def _wide(numbers: dict[str, Any], **options: Any) -> tuple[nn.Module, None]:
    blocks_per_stage(numbers["depth"])
    check_width(numbers["width"])
    return WideResNet(numbers["depth"], numbers["width"], **options), None


def _soft_wide(numbers: dict[str, Any], **options: Any) -> tuple[nn.Module, Plan]:
    model, _ = _wide(numbers, **options)
    if blocks_per_stage(model.depth) < 2:
        raise ModelError("a network of depth 10 has one block a stage, and the first blocks are never shared; the least depth is 16")
    later = r"(?P<stage>stage\d)/block(?!1/)\d+/conv\d/kernel"
    return model, Plan(Rule(later, Soft(numbers["templates"]), bank="{stage}"))


def _bottleneck(numbers: dict[str, Any], **options: Any) -> tuple[nn.Module, None]:
    check_width(numbers["width"], base=64)
    return WideBottleneckResNet(numbers["depth"], numbers["width"], **options), None


def _soft_bottleneck(numbers: dict[str, Any], **options: Any) -> tuple[nn.Module, Plan]:
    model, _ = _bottleneck(numbers, **options)
    # Three banks a stage, one for each kernel of the bottleneck; more templates than layers would be wasted.
    rules = [
        Rule(
            rf"stage{stage}/block(?!1/)\d+/(?P<conv>conv\d)/kernel",
            Soft(min(numbers["templates"], blocks - 1)),
            bank=f"stage{stage}-{{conv}}",
        )
        for stage, blocks in enumerate(BOTTLENECK_BLOCKS[model.depth], start=1)
    ]
    return model, Plan(*rules)


def _is_bottleneck(numbers: dict[str, Any]) -> bool:
    return numbers["depth"] in BOTTLENECK_BLOCKS


FAMILIES = (
    Family(
        "wrn-{depth}-{width}",
        "Wide-ResNet bottleneck for ImageNet, depth 50, 101 or 152",
        ("wrn-50-2", "wrn-101-2"),
        _bottleneck,
        _is_bottleneck,
        (224, 224, 3),
    ),
    Family(
        "swrn-{depth}-{width}-{templates}",
        "the same with soft sharing, three banks a stage",
        ("swrn-50-2-1", "swrn-50-2-2", "swrn-50-2-3"),
        _soft_bottleneck,
        _is_bottleneck,
        (224, 224, 3),
    ),
    Family(
        "wrn-{depth}-{width}",
        "wide residual network for 32x32 images, depth 6 n + 4",
        ("wrn-16-1", "wrn-16-2", "wrn-16-4", "wrn-28-10", "wrn-40-4", "wrn-40-8"),
        _wide,
    ),
    Family(
        "swrn-{depth}-{width}-{templates}",
        "the same with soft sharing, one bank a stage",
        ("swrn-16-1-1", "swrn-16-2-1", "swrn-28-10-1", "swrn-28-10-2", "swrn-28-10-4", "swrn-28-14-2", "swrn-28-18-2", "swrn-40-8-8"),
        _soft_wide,
    ),
)


def create_model(name: str, num_classes: int | None = None, input_shape: tuple[int, int, int] | None = None, **options: Any) -> nn.Module:
    """Builds a network by name. Touches no device and allocates nothing, at any size.

    Args:
      name: such as "wrn-28-10" (depth, width), "swrn-28-10-2" (depth, width, templates), "swrn-50-2-2"; see `list_models`.
      num_classes: outputs of the classifier; 10 unless given, 1000 for networks built for ImageNet.
      input_shape: (height, width, channels) of the images; (32, 32, 3) unless given, (224, 224, 3) for networks built for ImageNet.
      **options: of the plain model: `dtype` (compute), `axis_name` (synchronised batch statistics).

    Returns:
      A plain Flax module or a `Shared` one; called as `model.apply(variables, x_BxHxWxC, train=False)`.

    Raises:
      ModelError: if there is no network of that name (it offers the nearest), or not with these numbers, shape or options.

    Example:
      >>> import paramshare
      >>> paramshare.create_model("swrn-28-10-2").layout.trainable
      17125630
    """
    family, numbers = _find(name)
    if family.input_shape[0] >= 224:
        num_classes = 1000 if num_classes is None else num_classes
    num_classes = 10 if num_classes is None else num_classes
    shape = family.input_shape if input_shape is None else tuple(input_shape)
    if num_classes < 1:
        raise ModelError(f"{name}: num_classes={num_classes}; a classifier has at least one output")
    if len(shape) != 3 or min(shape) < 1:
        raise ModelError(f"{name}: input_shape={shape}; give (height, width, channels), each 1 or more")
    try:
        model, plan = family.build(numbers, num_classes=num_classes, **options)
    except TypeError as error:
        raise ModelError(f"{name}: {error}; options are dtype and axis_name") from None
    except ValueError as error:
        raise ModelError(f"{name}: {error}") from None
    return model if plan is None else share(model, plan, jax.ShapeDtypeStruct((1, *shape), jnp.float32))


def list_models(pattern: str = "*") -> list[str]:
    """Names of networks that match a shell pattern, in sorted order. Any legal number may stand in the place of those shown.

    Example:
      >>> import paramshare
      >>> paramshare.list_models("swrn-50-*")
      ['swrn-50-2-1', 'swrn-50-2-2', 'swrn-50-2-3']
    """
    return sorted(fnmatch.filter({name for family in FAMILIES for name in family.examples}, pattern))


def default_input_shape(name: str) -> tuple[int, int, int]:
    """Shape of the images that a named network was designed for."""
    return _find(name)[0].input_shape


def _find(name: str) -> tuple[Family, dict[str, Any]]:
    for family in FAMILIES:
        numbers = family.parse(name)
        if numbers is not None and family.accepts(numbers):
            return family, numbers
    head = re.split(r"\d", name)[0].rstrip("-")
    same = [family for family in FAMILIES if family.form.split("-{")[0] == head]
    if same:
        forms = sorted({family.form for family in same})
        raise ModelError(f"malformed model name {name!r}; names are of the form {' or '.join(forms)}, such as {same[-1].examples[0]}")
    near = difflib.get_close_matches(name, list_models(), n=3, cutoff=0.3)
    raise ModelError(
        f"unknown model {name!r}; nearest: {', '.join(near)}" if near else f"unknown model {name!r}; `list_models()` lists them"
    )
