"""Plain Flax networks. They know nothing of sharing, and import nothing of ours."""

from paramshare.models.densenet import DenseNet
from paramshare.models.layers import ModelError
from paramshare.models.looped import Loop
from paramshare.models.mobilenet import MobileNetV2
from paramshare.models.path_net import PathNet
from paramshare.models.resnet import ResNet
from paramshare.models.resnext import ResNeXt
from paramshare.models.vgg import VGG
from paramshare.models.wide_resnet import WideResNet

__all__ = ["VGG", "DenseNet", "Loop", "MobileNetV2", "ModelError", "PathNet", "ResNeXt", "ResNet", "WideResNet"]
