"""Plain Flax networks. They know nothing of sharing, and import nothing of ours."""

from paramshare.models.layers import ModelError
from paramshare.models.wide_resnet import WideBottleneckResNet, WideResNet

__all__ = ["ModelError", "WideBottleneckResNet", "WideResNet"]
