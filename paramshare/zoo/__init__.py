"""Named networks: plain ones, and ones whose weights are shared as in the papers."""

import difflib
import fnmatch
import re
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax

from paramshare.models import ModelError
from paramshare.parameters import example_input
from paramshare.parameters.linen import trace
from paramshare.shared import share
from paramshare.zoo.families import FAMILIES
from paramshare.zoo.family import LARGE, SMALL, Family

LARGEST = 10**9  # size of an image, or number of classes
AXES = {"images": ("height", "width", "channels"), "tokens": ("length",)}
DTYPES = {"images": "float32", "tokens": "int32"}
BYTES = 256
DEEPEST = 1000


def create_model(
    name: str,
    num_classes: int | Mapping[str, int] | None = None,
    input_shape: tuple[int, ...] | None = None,
    **options: Any,
) -> nn.Module:
    """Builds a network by name. Allocates no arrays, at any size.

    Args:
      name: such as "wrn-28-10" (depth, width), "swrn-28-10-2" (depth, width, templates) or
        "resnet34-s32u1"; see `list_models`.
      num_classes: outputs of the classifier. Default 1000 for networks for ImageNet, else 10; path
        nets always have 1 (per cell). Networks for several tasks take the outputs of each task,
        such as {"digit": 10, "place": 2}. For decoders, the number of different tokens; default
        256, for bytes.
      input_shape: (height, width, channels) of the images. Default (224, 224, 3) for networks for
        ImageNet, (32, 32, 2) for path nets, else (32, 32, 3). For decoders, (length,) of the
        sequences, the length of their cache too; default (256,).
      **options: options of the network; `options_of` lists them. `dtype` is the compute dtype,
        `axis_name` the mapped axis over which batch statistics are averaged. Most networks for
        ImageNet have `stem`, "imagenet" or "cifar" (for small images); the default is "imagenet"
        for images of at least 64 pixels, else "cifar". MobileNetV2 and DenseNet have `form`:
        "paper", the default, or "torchvision". Some have `ring_size`, or `inner_norm=False`
        (factored blocks without inner batch norms). Transformers have `heads`, `dropout` and
        `scan`, among others; see `paramshare.models.ViT` and `Decoder`.

    Returns:
      A plain Flax module or a `Shared` one. Call `model.apply(variables, x_BxHxWxC, train=False)`.

    Raises:
      ModelError: if there is no network of that name (the message lists the nearest names), or the
        arguments in the name, the shape or the options are not legal.

    Example:
      >>> import paramshare
      >>> paramshare.create_model("swrn-28-10-2").layout.trainable
      17125630
      >>> paramshare.create_model("resnet34-s32u1", num_classes=100, stem="cifar").layout.trainable
      7726676
    """
    family, arguments = _find(name)
    unknown = sorted(set(options) - set(family.options))
    if unknown:
        raise ModelError(
            f"{name} has no option {unknown[0]!r}; its options are {', '.join(family.options)}"
        )
    stem = options.get("stem")
    shape = default_input_shape(name, stem) if input_shape is None else input_shape
    axes = AXES[family.inputs]
    if (
        not isinstance(shape, Sequence)
        or len(shape) != len(axes)
        or not all(isinstance(size, int) and 0 < size <= LARGEST for size in shape)
    ):
        text = ", ".join(axes) if len(axes) > 1 else f"{axes[0]},"
        raise ModelError(
            f"{name}: input_shape={shape!r}; it must be ({text}) of {family.inputs}, each at least "
            f"1 and at most {LARGEST:,}"
        )
    if "stem" in family.options and stem is None:
        stem = options["stem"] = "cifar" if min(shape[:2]) < 64 else "imagenet"
    if family.inputs == "tokens":
        options.setdefault("length", shape[0])
        num_classes = BYTES if num_classes is None else num_classes
    if num_classes is None:
        num_classes = family.num_classes or (
            1000 if family.input_shape == LARGE and stem != "cifar" else 10
        )
    _check_outputs(name, num_classes, by_task=isinstance(family.num_classes, Mapping))
    try:
        model, plan = family.build(**arguments, num_classes=num_classes, **options)
        inputs = example_input(shape, DTYPES[family.inputs])
        if plan is not None:
            return share(model, plan, inputs)
        # Illegal attributes raise here, not when the model is first called.
        trace(model, inputs)
        return model
    except (ValueError, TypeError) as error:
        raise ModelError(f"{name}: {error}") from None


def _check_outputs(name: str, num_classes: Any, *, by_task: bool) -> None:
    """`ModelError` unless it is a number of outputs, or one for each of several tasks."""
    numbers = [num_classes]
    if by_task and isinstance(num_classes, Mapping):
        numbers = list(num_classes.values())
    if by_task and not (isinstance(num_classes, Mapping) and numbers):
        raise ModelError(
            f"{name}: num_classes={num_classes!r}; it must be the number of outputs of each task, "
            'such as {"digit": 10, "place": 2}'
        )
    for number in numbers:
        if type(number) is not int or not 1 <= number <= LARGEST:
            raise ModelError(
                f"{name}: num_classes={num_classes!r}; it must be an integer of at least 1 and at "
                f"most {LARGEST:,}{' for each task' * by_task}"
            )


def list_models(pattern: str = "*") -> list[str]:
    """Names of networks that match a shell pattern, sorted. Other numbers in the names work too.

    Example:
      >>> import paramshare
      >>> paramshare.list_models("swrn-50-*")
      ['swrn-50-2-1', 'swrn-50-2-2', 'swrn-50-2-3']
    """
    return sorted(
        fnmatch.filter({name for family in FAMILIES for name in family.examples}, pattern)
    )


def default_input_shape(name: str, stem: str | None = None) -> tuple[int, ...]:
    """Shape of the images or tokens that a network with that stem was designed for."""
    return SMALL if stem == "cifar" else _find(name)[0].input_shape


def input_of(name: str, shape: tuple[int, ...] | None = None) -> jax.ShapeDtypeStruct:
    """One input of a network, in a batch of one, to trace it with.

    Args:
      name: of the network.
      shape: of an input; None for that of `default_input_shape`.

    Example:
      >>> from paramshare.zoo import input_of
      >>> input_of("decoder-6-128", (64,))
      ShapeDtypeStruct(shape=(1, 64), dtype=int32)
    """
    family, _ = _find(name)
    return example_input(shape or family.input_shape, DTYPES[family.inputs])


def options_of(name: str) -> tuple[str, ...]:
    """Names of the options that `create_model` takes for a network.

    Example:
      >>> from paramshare.zoo import options_of
      >>> options_of("resnet18-rpg")
      ('dtype', 'axis_name', 'stem', 'ring_size')
    """
    return _find(name)[0].options


def _find(name: str) -> tuple[Family, dict[str, Any]]:
    """The family of a name and the arguments in the name; `ModelError` if there is none."""
    if re.search(r"\d{10}", name):
        raise ModelError(f"unknown model {name[:40]!r}; numbers in names have at most 9 digits")
    same_form = []
    for family in FAMILIES:
        arguments = family.parse(name)
        if arguments is not None:
            if arguments.get("depth", 0) > DEEPEST:
                raise ModelError(f"{name}: depth must be at most {DEEPEST:,}")
            if family.accepts(arguments):
                return family, arguments
            same_form.append(family)
    near = difflib.get_close_matches(name, list_models(), n=3, cutoff=0.3)
    nearest = f"nearest: {', '.join(near)}" if near else "`list_models()` lists all"
    if same_form:
        about = " or ".join(
            f"{family.about}, such as {family.examples[0]}" if family.examples else family.about
            for family in same_form
        )
        raise ModelError(
            f"there is no network {name!r}; names of the form {same_form[0].form} are: {about}; "
            f"{nearest}"
        )
    head = re.split(r"\d", name)[0].rstrip("-")
    same_head = {
        family.form: family.examples[0]
        for family in FAMILIES
        if family.examples and "{" in family.form and re.split(r"\d|-?\{", family.form)[0] == head
    }
    if same_head:
        forms = difflib.get_close_matches(name, sorted(same_head), n=2, cutoff=0)
        raise ModelError(
            f"malformed model name {name!r}; the form must be {' or '.join(forms)}, "
            f"such as {same_head[forms[0]]}"
        )
    raise ModelError(f"unknown model {name!r}; {nearest}")
