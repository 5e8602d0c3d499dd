"""VGG networks for small images, and the shorter ones that learned repetition starts from."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from paramshare.models.layers import ModelError, check_images, layers

# Channels of both convolutions of each stage.
WIDTHS = (64, 128, 256, 512, 512)
DEPTHS = range(4, 2 * len(WIDTHS) + 2)


class VGG(nn.Module):
    """The first `depth` - 1 of ten 3x3 convolutions with BN and ReLU; global mean, classifier.

    A stage has two convolutions, then a 2x2 max-pool; a last stage that is cut to one convolution
    keeps its max-pool, as in the paper's public code. Parameters are at `conv{stage}_{index}`,
    `bn{stage}_{index}` (both from 1) and `classifier`. The convolutions' kernels start
    Xavier-uniform, the biases at 0.

    Attributes:
      depth: number of convolutions plus one (the classifier), 4 to 11.
      num_classes: outputs of the classifier.
      dtype: compute dtype; the parameters and the classifier stay float32.
      axis_name: mapped axis (of `pmap` or `shard_map`) over which batch statistics are averaged;
        None for no averaging.

    Raises:
      ModelError: when called, if depth is not 4 to 11, or the images are not (B, H, W, C) or too
        small for the max-pools.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from paramshare.models import VGG
      >>> x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
      >>> shapes = jax.eval_shape(lambda x: VGG(depth=4).init(jax.random.key(0), x), x)
      >>> sorted(name for name in shapes["params"] if name.startswith("conv"))
      ['conv1_1', 'conv1_2', 'conv2_1']
      >>> sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
      114378

    References:
      Simonyan & Zisserman, Very Deep Convolutional Networks for Large-Scale Image Recognition,
      ICLR 2015, arXiv:1409.1556.
      Chavan et al., Rescaling CNN through Learnable Repetition of Network Parameters, ICIP 2021,
      arXiv:2101.05650: the widths, the shorter networks and the single dense layer.
    """

    depth: int = 11
    num_classes: int = 10
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array, train: bool = False) -> jax.Array:
        if self.depth not in DEPTHS:
            raise ModelError(
                f"the depth of a VGG must be {DEPTHS[0]} to {DEPTHS[-1]}; got {self.depth}"
            )
        check_images(x_BxHxWxC)
        check_size(x_BxHxWxC, pools=self.depth // 2)
        conv, norm = layers(self, train, kernel_init=nn.initializers.xavier_uniform())
        x = x_BxHxWxC
        for number in range(self.depth - 1):
            stage, index = number // 2 + 1, number % 2 + 1
            x = conv(WIDTHS[stage - 1], 3, bias=True, name=f"conv{stage}_{index}")(x)
            x = nn.relu(norm(name=f"bn{stage}_{index}")(x))
            if index == 2 or number == self.depth - 2:
                x = nn.max_pool(x, (2, 2), (2, 2))
        x_BxC = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
        return nn.Dense(self.num_classes, name="classifier")(x_BxC)


def check_size(x_BxHxWxC: jax.Array, pools: int) -> None:
    """`ModelError` if the images are too small to be halved `pools` times, rounding down."""
    height, width = x_BxHxWxC.shape[1:3]
    if min(height, width) < 2**pools:
        raise ModelError(
            f"images of {height}x{width} are too small for {pools} max-pools; each side must have "
            f"at least {2**pools} pixels"
        )
