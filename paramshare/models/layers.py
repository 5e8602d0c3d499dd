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


def convolution(features: int, size: int, stride: int = 1, **options: Any) -> nn.Conv:
    """A square convolution without bias. Padding is symmetric: `SAME` would pad (0, 1) for stride 2 on even sizes."""
    return nn.Conv(features, (size, size), (stride, stride), [(size // 2, size // 2)] * 2, use_bias=False, **options)


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
    """Residual blocks of one width, named `block1`, `block2`, ...; the first one strides."""

    block: Callable[..., nn.Module]
    blocks: int
    stride: int

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
        for number in range(1, self.blocks + 1):
            x_BxHxWxC = self.block(stride=self.stride if number == 1 else 1, name=f"block{number}")(x_BxHxWxC)
        return x_BxHxWxC
