"""Named networks: a name gives a plain model and, where the name says so, the plan that shares its weights."""

import difflib
import fnmatch
import re
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from paramshare.models import ModelError
from paramshare.shared import share
from paramshare.zoo import basis, path, repetition, residual, ring, wide
from paramshare.zoo.family import LARGE, SMALL, Family

FAMILIES = (*wide.FAMILIES, *residual.FAMILIES, *basis.FAMILIES, *ring.FAMILIES, *repetition.FAMILIES, *path.FAMILIES)


def create_model(name: str, num_classes: int | None = None, input_shape: tuple[int, int, int] | None = None, **options: Any) -> nn.Module:
    """Builds a network by name. Touches no device and allocates nothing, at any size.

    Args:
      name: such as "wrn-28-10" (depth, width), "swrn-28-10-2" (depth, width, templates), "resnet34-s32u1"; see `list_models`.
      num_classes: outputs of the classifier; 10 unless given, 1000 for networks built for ImageNet, 1 (a cell) for path nets.
      input_shape: (height, width, channels) of the images; (32, 32, 3) unless given, (224, 224, 3) for networks built for ImageNet.
      **options: of the network, as `options_of` lists them: `dtype` (compute), `axis_name` (synchronised batch statistics); of many
        networks built for ImageNet `stem`, "imagenet" or "cifar" (for small images; unless given, what the images' size suggests, from
        64 pixels on "imagenet"); of some `ring_size`, or `inner_norm=False` (no batch norms inside of factored blocks).

    Returns:
      A plain Flax module or a `Shared` one; called as `model.apply(variables, x_BxHxWxC, train=False)`.

    Raises:
      ModelError: if there is no network of that name (it offers the nearest), or not with these numbers, shape or options.

    Example:
      >>> import paramshare
      >>> paramshare.create_model("swrn-28-10-2").layout.trainable
      17125630
      >>> paramshare.create_model("resnet34-s32u1", num_classes=100, stem="cifar").layout.trainable
      7726676
    """
    family, numbers = _find(name)
    unknown = sorted(set(options) - set(family.options))
    if unknown:
        raise ModelError(f"{name} has no option {unknown[0]!r}; its options are {', '.join(family.options)}")
    stem = options.get("stem")
    if not isinstance(input_shape, Sequence | None):
        raise ModelError(f"{name}: input_shape={input_shape!r}; give (height, width, channels), each 1 or more")
    shape = tuple(input_shape) if input_shape is not None else default_input_shape(name, stem)
    if len(shape) != 3 or not all(isinstance(size, int) and size > 0 for size in shape):
        raise ModelError(f"{name}: input_shape={shape}; give (height, width, channels), each 1 or more")
    if "stem" in family.options and stem is None:
        stem = options["stem"] = "cifar" if min(shape[:2]) < 64 else "imagenet"
    if num_classes is None:
        num_classes = family.num_classes or (1000 if family.input_shape == LARGE and stem != "cifar" else 10)
    if type(num_classes) is not int or num_classes < 1:
        raise ModelError(f"{name}: num_classes={num_classes}; a classifier has at least one output")
    try:
        model, plan = family.build(numbers, num_classes=num_classes, **options)
        image = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
        if plan is not None:
            return share(model, plan, image)
        jax.eval_shape(lambda x: model.init(jax.random.key(0), x), image)  # or what cannot be would only show in use
        return model
    except (ValueError, TypeError) as error:
        raise ModelError(f"{name}: {error}") from None


def list_models(pattern: str = "*") -> list[str]:
    """Names of networks that match a shell pattern, in sorted order. Any legal number may stand in the place of those shown.

    Example:
      >>> import paramshare
      >>> paramshare.list_models("swrn-50-*")
      ['swrn-50-2-1', 'swrn-50-2-2', 'swrn-50-2-3']
    """
    return sorted(fnmatch.filter({name for family in FAMILIES for name in family.examples}, pattern))


def default_input_shape(name: str, stem: str | None = None) -> tuple[int, int, int]:
    """Shape of the images that a named network, with that stem, was designed for."""
    return SMALL if stem == "cifar" else _find(name)[0].input_shape


def options_of(name: str) -> tuple[str, ...]:
    """The options of `create_model` that a named network takes.

    Example:
      >>> from paramshare.zoo import options_of
      >>> options_of("resnet18-rpg")
      ('dtype', 'axis_name', 'stem', 'ring_size')
    """
    return _find(name)[0].options


def _find(name: str) -> tuple[Family, dict[str, Any]]:
    for family in FAMILIES:
        numbers = family.parse(name)
        if numbers is not None and family.accepts(numbers):
            return family, numbers
    head = re.split(r"\d", name)[0].rstrip("-")
    near = difflib.get_close_matches(name, list_models(), n=3, cutoff=0.3)
    fits = [family for family in FAMILIES if family.parse(name) is not None]
    if fits:
        about = " or ".join(f"{family.about}, such as {family.examples[0]}" for family in fits)
        raise ModelError(f"there is no network {name!r}; names of the form {fits[0].form} are: {about}; nearest: {', '.join(near)}")
    same = [family for family in FAMILIES if "{" in family.form and re.split(r"\d|-?\{", family.form)[0] == head]
    if same:
        forms = difflib.get_close_matches(name, sorted({family.form for family in same}), n=2, cutoff=0)
        example = next(family.examples[0] for family in reversed(same) if family.form == forms[0])
        raise ModelError(f"malformed model name {name!r}; names are of the form {' or '.join(forms)}, such as {example}")
    raise ModelError(
        f"unknown model {name!r}; nearest: {', '.join(near)}" if near else f"unknown model {name!r}; `list_models()` lists them"
    )
