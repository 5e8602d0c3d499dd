"""Convolution, batch norm, stages and checks that the networks in this folder have in common."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from paramshare import ops
from paramshare.errors import ParamshareError

HE_NORMAL = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
HE_NORMAL_FAN_OUT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class ModelError(ParamshareError):
    """An attribute of a model, or its input, is not legal."""


FORMS = ("paper", "torchvision")


def check_form(form: str) -> None:
    """`ModelError` unless a network's form is one of `FORMS`."""
    if form not in FORMS:
        raise ModelError(f"form={form!r}; the form must be 'paper' or 'torchvision'")


def convolution(
    features: int,
    size: int,
    stride: int = 1,
    bias: bool = False,
    padding: int | None = None,
    **options: Any,
) -> nn.Conv:
    """A square convolution with symmetric padding, computed by `ops.convolution`.

    The padding is size // 2 by default. `SAME` would pad even sizes by (0, 1) for stride 2, the
    papers' code pads by (1, 1).
    """
    pad = size // 2 if padding is None else padding
    return nn.Conv(
        features,
        (size, size),
        (stride, stride),
        [(pad, pad)] * 2,
        use_bias=bias,
        conv_general_dilated_cls=_convolution,
        **options,
    )


def _convolution() -> Callable:
    return ops.convolution


def layers(
    module: nn.Module, train: bool, kernel_init: Callable = HE_NORMAL
) -> tuple[Callable[..., nn.Module], Callable[..., nn.Module]]:
    """Builders of a network's convolutions and batch norms.

    Args:
      module: the network. Reads `dtype`, the compute dtype, and `axis_name`, the mapped axis over
        which batch statistics are averaged (or None).
      train: whether to use and update batch statistics.
      kernel_init: initialiser of the convolutions' kernels.

    Returns:
      (convolution, norm).
    """
    norm = functools.partial(
        nn.BatchNorm,
        use_running_average=not train,
        momentum=0.9,
        epsilon=1e-5,
        dtype=module.dtype,
        axis_name=None if module.is_initializing() else module.axis_name,
    )
    return functools.partial(convolution, kernel_init=kernel_init, dtype=module.dtype), norm


def stem_pool(x_BxHxWxC: jax.Array) -> jax.Array:
    """The 3x3 max-pool of stride 2 of the ImageNet stems."""
    padding: Any = [(1, 1), (1, 1)]  # Flax annotates it as str alone
    return nn.max_pool(x_BxHxWxC, (3, 3), (2, 2), padding)


def nearest(x_BxHxWxC: jax.Array, size: tuple[int, ...]) -> jax.Array:
    """Enlarges feature maps to (height, width) by repeating their entries.

    Example:
      >>> nearest(jnp.arange(2.0).reshape(1, 1, 2, 1), (2, 3))[0, :, :, 0].tolist()
      [[0.0, 0.0, 1.0], [0.0, 0.0, 1.0]]
    """
    height, width = x_BxHxWxC.shape[1:3]
    if size == (2 * height, 2 * width):  # much faster than a gather
        return jnp.repeat(jnp.repeat(x_BxHxWxC, 2, axis=1), 2, axis=2)
    rows = jnp.arange(size[0]) * height // size[0]
    columns = jnp.arange(size[1]) * width // size[1]
    return x_BxHxWxC[:, rows][:, :, columns]


class Stage(nn.Module):
    """Residual blocks of one width, named `block1`, `block2`, ...

    Attributes:
      block: builds a block, given its stride and name.
      blocks: number of blocks.
      stride: stride of the first block.
      later: builds blocks 2.., given their name; None for `block` with stride 1.
    """

    block: Callable[..., nn.Module]
    blocks: int
    stride: int
    later: Callable[..., nn.Module] | None = None

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
        x_BxHxWxC = self.block(stride=self.stride, name="block1")(x_BxHxWxC)
        later = self.later or functools.partial(self.block, stride=1)
        for number in range(2, self.blocks + 1):
            x_BxHxWxC = later(name=f"block{number}")(x_BxHxWxC)
        return x_BxHxWxC


def check_width(width: float, base: int = 16) -> int:
    """`base` times `width` channels; `ModelError` unless that is an integer of at least 1."""
    channels = base * width
    if channels < 1 or channels != int(channels):
        raise ModelError(
            f"a widening factor must be positive and a multiple of 1/{base}; got {width}"
        )
    return int(channels)


def check_images(x_BxHxWxC: jax.Array) -> None:
    """`ModelError` unless the input is a batch of images with channels last."""
    if x_BxHxWxC.ndim != 4 or 0 in x_BxHxWxC.shape[1:]:
        raise ModelError(
            f"images must be of shape (batch, height, width, channels); got {x_BxHxWxC.shape}"
        )


def check_stem(stem: str) -> None:
    """`ModelError` unless the stem is "imagenet" or "cifar"."""
    if stem not in ("imagenet", "cifar"):
        raise ModelError(f"stem={stem!r}; the stem must be 'imagenet' or 'cifar'")
