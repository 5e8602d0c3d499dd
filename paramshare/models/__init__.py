"""Plain Flax networks, written without any weight sharing."""

from paramshare.models.decoder import Decoder
from paramshare.models.densenet import DenseNet
from paramshare.models.hourglass import Hourglass
from paramshare.models.layers import ModelError
from paramshare.models.mobilenet import MobileNetV2
from paramshare.models.path_net import PathNet
from paramshare.models.resnet import ResNet
from paramshare.models.resnext import ResNeXt
from paramshare.models.retinanet import RetinaNet
from paramshare.models.rot_net import RotNet
from paramshare.models.sampling import sample
from paramshare.models.several import Heads, Networks
from paramshare.models.vgg import VGG
from paramshare.models.vit import ViT
from paramshare.models.wide_resnet import WideResNet

__all__ = [
    "VGG",
    "Decoder",
    "DenseNet",
    "Heads",
    "Hourglass",
    "MobileNetV2",
    "ModelError",
    "Networks",
    "PathNet",
    "ResNeXt",
    "ResNet",
    "RetinaNet",
    "RotNet",
    "ViT",
    "WideResNet",
    "sample",
]
