"""The network for shortest paths on grids: fully convolutional, with identical residual layers."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from paramshare.models.layers import ModelError, check_images, layers


class ResidualLayer(nn.Module):
    """x + ReLU(BN(3x3(x)))."""

    conv: Any
    norm: Any
    features: int

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
        return x_BxHxWxC + nn.relu(
            self.norm(name="bn")(self.conv(self.features, 3, name="conv")(x_BxHxWxC))
        )


class PathNet(nn.Module):
    r"""1x1 to `width` channels, `depth` residual 3x3 layers, 1x1 to one logit per cell.

    Grids can have any size. Parameters are at `first`, `layer1/conv`, `layer1/bn`, ..., `last`.
    All layers have the same shapes, so that one bank can serve them all:
    `Rule(r"layer\d+/conv/kernel", Soft(templates=k), bank="layers")`.

    Attributes:
      depth: residual layers, 1 or more.
      width: channels, 1 or more.
      dtype: compute dtype; the parameters and the logits stay float32.
      axis_name: mapped axis (of `pmap` or `shard_map`) over which batch statistics are averaged;
        None for no averaging.

    Raises:
      ModelError: when called, if depth or width is below 1, or the input is not (B, H, W, C).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from paramshare.models import PathNet
      >>> grids = jax.ShapeDtypeStruct((1, 32, 32, 2), jnp.float32)
      >>> init = lambda x: PathNet().init_with_output(jax.random.key(0), x)
      >>> logits, shapes = jax.eval_shape(init, grids)
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
            raise ModelError(
                "depth and width of a path net must be at least 1; "
                f"got depth={self.depth}, width={self.width}"
            )
        check_images(x_BxHxWxC)
        conv, norm = layers(self, train)
        x = conv(self.width, 1, name="first")(x_BxHxWxC)
        for number in range(1, self.depth + 1):
            x = ResidualLayer(conv, norm, self.width, name=f"layer{number}")(x)
        return conv(1, 1, bias=True, name="last")(x)[..., 0].astype(jnp.float32)
