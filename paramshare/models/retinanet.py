"""RetinaNet: a feature pyramid on a residual network, and two heads that all its levels share."""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from paramshare.models.anchors import PER_PLACE, anchors
from paramshare.models.layers import ModelError, check_images, convolution, nearest
from paramshare.models.resnet import ResNet

PRIOR = 0.01  # probability of every class at initialisation, at every anchor


class Pyramid(nn.Module):
    """A feature pyramid: each level sees what the coarser ones found, at its own resolution.

    Attributes:
      width: channels of every level.
      coarsest: what the first level beyond the inputs is computed from: "output", the pyramid's
        coarsest level, or "input", the coarsest of the inputs.
      dtype: compute dtype.

    References:
      Lin et al., "Feature Pyramid Networks for Object Detection", CVPR 2017, arXiv:1612.03144.
    """

    width: int
    coarsest: str = "output"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: Sequence[jax.Array]) -> list[jax.Array]:
        """Levels of all inputs, and two more at half and a quarter of the coarsest resolution."""

        def conv(size: int, stride: int, name: str) -> nn.Module:
            init = nn.initializers.variance_scaling(1.0, "fan_in", "uniform")  # as torchvision
            return convolution(
                self.width, size, stride, bias=True, kernel_init=init, dtype=self.dtype, name=name
            )

        levels: list[jax.Array] = []
        above = None
        for number in range(len(features), 0, -1):
            x = conv(1, 1, f"lateral{number}")(features[number - 1])
            if above is not None:
                x = x + nearest(above, x.shape[1:3])
            above = x
            levels.insert(0, conv(3, 1, f"output{number}")(x))
        coarse = conv(3, 2, "extra1")(levels[-1] if self.coarsest == "output" else features[-1])
        return [*levels, coarse, conv(3, 2, "extra2")(nn.relu(coarse))]


class Head(nn.Module):
    """`depth` 3x3 convolutions with ReLU, then one to `outputs` numbers for every anchor.

    Attributes:
      width: channels of the convolutions `conv1`, `conv2`, ...
      depth: their number.
      outputs: numbers for each anchor.
      bias: initial value of these numbers.
      dtype: compute dtype.
    """

    width: int
    depth: int
    outputs: int
    bias: float = 0.0
    dtype: Any = jnp.float32

    def setup(self) -> None:
        init = nn.initializers.normal(0.01)
        options: dict[str, Any] = {"bias": True, "kernel_init": init, "dtype": self.dtype}
        self.convs = [
            convolution(self.width, 3, name=f"conv{number + 1}", **options)
            for number in range(self.depth)
        ]
        options["bias_init"] = nn.initializers.constant(self.bias)
        self.predict = convolution(PER_PLACE * self.outputs, 3, **options)

    def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
        """(B, H * W * 9, outputs) float32, by row, column, anchor."""
        for conv in self.convs:
            x_BxHxWxC = nn.relu(conv(x_BxHxWxC))
        y = self.predict(x_BxHxWxC).astype(jnp.float32)
        return y.reshape(y.shape[0], -1, self.outputs)


class RetinaNet(nn.Module):
    """A one-stage detector: classes and boxes for nine anchors at every place of five feature maps.

    Parameters are under `backbone` (see `ResNet`), `pyramid` (`lateral1`, `output1`, ... from the
    finest level, `extra1`, `extra2`), `classes` and `boxes` (`conv1`, ..., `predict`).

    Attributes:
      backbone: a residual network of three or more stages that returns their outputs
        (`num_classes=None`). The last three stages are used.
      num_classes: classes, without a class for the background.
      width: channels of pyramid and heads.
      depth: convolutions of each head, before the last one.
      coarsest: what the fourth level is computed from: "output", the third level, as in
        torchvision's `retinanet_resnet50_fpn`, or "input", the last stage, as in the paper.
      dtype: compute dtype of pyramid and heads; their parameters stay float32.

    Raises:
      ModelError: when called, if an attribute is not legal or the images are not (B, H, W, C).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from paramshare.models import ResNet, RetinaNet
      >>> model = RetinaNet(ResNet(num_classes=None), num_classes=80)
      >>> x = jax.ShapeDtypeStruct((1, 256, 256, 3), jnp.float32)
      >>> outputs, variables = jax.eval_shape(
      ...     lambda x: model.init_with_output(jax.random.key(0), x), x
      ... )
      >>> outputs["logits"].shape, outputs["offsets"].shape
      ((1, 12276, 80), (1, 12276, 4))

    References:
      Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, arXiv:1708.02002.
    """

    backbone: ResNet
    num_classes: int
    width: int = 256
    depth: int = 4
    coarsest: str = "output"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array, train: bool = False) -> dict[str, jax.Array]:
        """`logits` (B, A, K), `offsets` (B, A, 4) and `anchors` (B, A, 4), all float32.

        Offsets lead from an anchor, (x0, y0, x1, y1) in pixels, to a box. Anchors are ordered by
        level, from the finest, then by row, column and shape.
        """
        check_attributes(self)
        check_images(x_BxHxWxC)
        stages = self.backbone(x_BxHxWxC, train=train)
        levels = Pyramid(self.width, self.coarsest, self.dtype, name="pyramid")(stages[-3:])
        bias = -math.log((1 - PRIOR) / PRIOR)
        classes = Head(self.width, self.depth, self.num_classes, bias, self.dtype, name="classes")
        boxes = Head(self.width, self.depth, 4, dtype=self.dtype, name="boxes")
        logits = jnp.concatenate([classes(level) for level in levels], axis=1)
        offsets = jnp.concatenate([boxes(level) for level in levels], axis=1)
        finest = self.backbone.strides[-3]
        anchors_Ax4 = jnp.concatenate(
            [
                anchors(*level.shape[1:3], stride=finest * 2**number)
                for number, level in enumerate(levels)
            ]
        )
        return {
            "logits": logits,
            "offsets": offsets,
            "anchors": jnp.broadcast_to(anchors_Ax4, offsets.shape),
        }


def check_attributes(model: RetinaNet) -> None:
    """`ModelError` if an attribute is not legal."""
    if model.backbone.num_classes is not None or len(model.backbone.blocks) < 3:
        raise ModelError(
            f"the backbone has num_classes={model.backbone.num_classes} and "
            f"{len(model.backbone.blocks)} stages; it must have num_classes=None, so that it "
            "returns its stages, and at least three of them"
        )
    if min(model.num_classes, model.width, model.depth) < 1:
        raise ModelError(
            f"num_classes={model.num_classes}, width={model.width}, depth={model.depth}; each must "
            "be at least 1"
        )
    if model.coarsest not in ("output", "input"):
        raise ModelError(f"coarsest={model.coarsest!r}; it must be 'output' or 'input'")
