"""What the networks of this folder are built of: the papers' convolution and batch norm, with their settings in one place."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

HE_NORMAL = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
HE_NORMAL_FAN_OUT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class ModelError(ValueError):
    """A model was asked for in a size that it does not have."""


def convolution(features: int, size: int, stride: int = 1, bias: bool = False, **options: Any) -> nn.Conv:
    """A square convolution, without bias unless asked. Padding is symmetric: `SAME` would pad (0, 1) for stride 2 on even sizes."""
    return nn.Conv(features, (size, size), (stride, stride), [(size // 2, size // 2)] * 2, use_bias=bias, **options)


def layers(module: nn.Module, train: bool, kernel_init: Callable = HE_NORMAL) -> tuple[Callable[..., nn.Module], Callable[..., nn.Module]]:
    """The convolution and the batch norm of a network, at its compute dtype.

    Args:
      module: the network; its `dtype` is the compute dtype, its `axis_name` the mapped axis that statistics are averaged over (or None).
      train: whether batch statistics are used and updated.
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


class Stage(nn.Module):
    """Residual blocks of one width, named `block1`, `block2`, ...; the first one strides, and `later` builds the others if they differ."""

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
    """`base` channels, widened; `ModelError` unless that is a whole number, 1 or more."""
    channels = base * width
    if channels < 1 or channels != int(channels):
        raise ModelError(f"a widening factor is positive and a multiple of 1/{base}; got {width}")
    return int(channels)


def check_images(x_BxHxWxC: jax.Array) -> None:
    """`ModelError` unless the input is a batch of images with channels last."""
    if x_BxHxWxC.ndim != 4 or 0 in x_BxHxWxC.shape[1:]:
        raise ModelError(f"images must be of shape (batch, height, width, channels); got {x_BxHxWxC.shape}")


def check_stem(stem: str) -> None:
    """`ModelError` unless it is one of the two stems: for images of ImageNet's size, or of CIFAR's."""
    if stem not in ("imagenet", "cifar"):
        raise ModelError(f"stem={stem!r}; the stem is 'imagenet' or 'cifar'")
