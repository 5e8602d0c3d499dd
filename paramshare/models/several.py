"""Networks for several tasks on the same images."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from paramshare.models.layers import ModelError


class Heads(nn.Module):
    """One network for several tasks: each has its own outputs of the network's last layer.

    A linear layer with the outputs of all tasks is the same as one linear layer per task on the
    same features. Parameters are under `network`.

    Attributes:
      network: a classifier with as many classes as `heads` have outputs together.
      heads: (name, number of outputs) of each task.

    Raises:
      ModelError: when called, if the network has another number of outputs.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from paramshare.models import Heads, ResNet
      >>> model = Heads(ResNet(num_classes=12), (("digit", 10), ("place", 2)))
      >>> images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
      >>> init = lambda x: model.init_with_output(jax.random.key(0), x)
      >>> outputs, _ = jax.eval_shape(init, images)
      >>> {name: leaf.shape for name, leaf in outputs.items()}
      {'digit': (1, 10), 'place': (1, 2)}
    """

    network: Any
    heads: tuple[tuple[str, int], ...]

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array, train: bool = False) -> dict[str, jax.Array]:
        """The outputs of each task, (B, K) each."""
        outputs = self.network(x_BxHxWxC, train=train)
        sizes = [size for _, size in self.heads]
        if outputs.shape[-1] != sum(sizes):
            raise ModelError(
                f"the network has {outputs.shape[-1]} outputs; the heads {dict(self.heads)} need "
                f"{sum(sizes)}"
            )
        ends = [sum(sizes[:number]) for number in range(1, len(sizes))]
        parts = jnp.split(outputs, ends, axis=-1)
        return {name: part for (name, _), part in zip(self.heads, parts, strict=True)}


class Networks(nn.Module):
    """One network for each task. The parameters of a network are under the name of its task.

    Attributes:
      networks: (name, network) of each task.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from paramshare.models import Networks, ResNet
      >>> model = Networks((("digit", ResNet(num_classes=10)), ("place", ResNet(num_classes=2))))
      >>> images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
      >>> shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), images)
      >>> sorted(shapes["params"])
      ['digit', 'place']
    """

    networks: tuple[tuple[str, nn.Module], ...]

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array, train: bool = False) -> dict[str, Any]:
        """The outputs of each task's network."""
        outputs = {}
        for name, network in self.networks:
            called: Any = network.clone(parent=self, name=name)
            outputs[name] = called(x_BxHxWxC, train=train)
        return outputs
