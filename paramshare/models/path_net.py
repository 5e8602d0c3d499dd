"""The network of the algorithmic task: fully convolutional, of equal residual layers."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from paramshare.models.layers import ModelError, check_images, layers


class ResidualLayer(nn.Module):
    """x + ReLU(BN(3x3(x))): a convolution, with a skip over it."""

    conv: Any
    norm: Any
    features: int

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
        return x_BxHxWxC + nn.relu(self.norm(name="bn")(self.conv(self.features, 3, name="conv")(x_BxHxWxC)))


class PathNet(nn.Module):
    r"""1x1 into `width` channels, `depth` residual 3x3 layers, 1x1 into one number a cell. Takes grids of any size.

    Parameters lie at `first`, `layer1/conv`, `layer1/bn`, ..., `last`. All layers are alike, so that one bank can serve them all:
    `Rule(r"layer\d+/conv/kernel", Soft(templates=k), bank="layers")`.

    Attributes:
      depth: residual layers, 1 or more.
      width: channels, 1 or more.
      dtype: compute dtype; parameters stay float32, and so do the numbers that come out.
      axis_name: the mapped axis (of `pmap` or `shard_map`) over which batch statistics are averaged; None keeps each device's own.

    Raises:
      ModelError: when called, if depth or width is not 1 or more, or the input is not (B, H, W, C).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from paramshare.models import PathNet
      >>> grids = jax.ShapeDtypeStruct((1, 32, 32, 2), jnp.float32)
      >>> logits, shapes = jax.eval_shape(lambda x: PathNet().init_with_output(jax.random.key(0), x), grids)
      >>> logits.shape, sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
      ((1, 32, 32), 185697)

    References:
      Savarese & Maire, ICLR 2019, arXiv:1902.09701, section 4.3.
    """

    depth: int = 20
    width: int = 32
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array, train: bool = False) -> jax.Array:
        if self.depth < 1 or self.width < 1:
            raise ModelError(f"depth={self.depth}, width={self.width}; a path net has a layer and a channel or more")
        check_images(x_BxHxWxC)
        conv, norm = layers(self, train)
        x = conv(self.width, 1, name="first")(x_BxHxWxC)
        for number in range(1, self.depth + 1):
            x = ResidualLayer(conv, norm, self.width, name=f"layer{number}")(x)
        return conv(1, 1, bias=True, name="last")(x)[..., 0].astype(jnp.float32)
