"""The table of all named networks."""

from functools import partial

from paramshare.models import VGG, DenseNet, MobileNetV2, ResNeXt, WideResNet
from paramshare.zoo.basis import (
    factored_densenet,
    factored_resnet,
    shared_bottlenecks,
    shared_mobilenet,
    shared_resnext,
)
from paramshare.zoo.detection import detectors
from paramshare.zoo.family import (
    DIGITS,
    FORM_OPTIONS,
    GRID,
    LARGE,
    OPTIONS,
    STEM_OPTIONS,
    Family,
    plain,
)
from paramshare.zoo.path import looped_path_net, path_net, ring_path_net, soft_path_net
from paramshare.zoo.pose import pose_networks
from paramshare.zoo.repetition import REPEATED, repeated, repeated_vgg, resnet16
from paramshare.zoo.residual import (
    cifar_resnet,
    for_imagenet,
    for_small_images,
    has_basic_blocks,
    has_bottlenecks,
    resnet,
)
from paramshare.zoo.ring import ring_resnet
from paramshare.zoo.rotation import (
    equivariant_rot_net,
    repeated_rot_net,
    ring_rot_net,
    rot_net,
    wide_rot_net,
)
from paramshare.zoo.several import networks_for_tasks
from paramshare.zoo.transformers import transformers
from paramshare.zoo.wide import soft_wide_bottleneck, soft_wide_resnet, wide_bottleneck

imagenet = partial(Family, input_shape=LARGE, options=STEM_OPTIONS)
with_form = partial(Family, input_shape=LARGE, options=FORM_OPTIONS)
on_digits = partial(Family, input_shape=DIGITS)
on_grids = partial(Family, input_shape=GRID, num_classes=1)

BASES = "shared per stage: s shared and u unique filters in the first, doubling every stage"

CLASSIFIERS = (
    # Soft sharing.
    Family(
        "wrn-{depth}-{width}",
        "Wide ResNet with bottlenecks for ImageNet, depth 50, 101 or 152",
        ("wrn-50-2", "wrn-101-2"),
        plain(wide_bottleneck),
        has_bottlenecks,
        LARGE,
    ),
    Family(
        "swrn-{depth}-{width}-{templates}",
        "Wide ResNet with bottlenecks for ImageNet, soft sharing with three banks per stage",
        ("swrn-50-2-1", "swrn-50-2-2", "swrn-50-2-3"),
        soft_wide_bottleneck,
        has_bottlenecks,
        LARGE,
    ),
    Family(
        "wrn-{depth}-{width}",
        "Wide ResNet for 32x32 images, depth 6 n + 4",
        ("wrn-16-1", "wrn-16-2", "wrn-16-4", "wrn-28-10", "wrn-40-4", "wrn-40-8"),
        plain(WideResNet),
    ),
    Family(
        "swrn-{depth}-{width}-{templates}",
        "Wide ResNet for 32x32 images, soft sharing with one bank per stage",
        (
            "swrn-16-1-1",
            "swrn-16-2-1",
            "swrn-28-10-1",
            "swrn-28-10-2",
            "swrn-28-10-4",
            "swrn-28-14-2",
            "swrn-28-18-2",
            "swrn-40-8-8",
        ),
        soft_wide_resnet,
    ),
    # Plain residual networks.
    imagenet(
        "resnet{depth}",
        "ResNet for ImageNet, depth 18, 34, 50, 101 or 152; stem=cifar for small images",
        ("resnet18", "resnet34", "resnet50", "resnet101"),
        plain(resnet),
        for_imagenet,
    ),
    imagenet(
        "resnet{depth}-x{width}",
        "ResNet for ImageNet, widened; the stem keeps its width",
        ("resnet18-x2", "resnet18-x4"),
        plain(resnet),
        for_imagenet,
    ),
    Family(
        "resnet{depth}",
        "ResNet for 32x32 images, depth 6 n + 2",
        ("resnet20", "resnet32", "resnet44", "resnet56", "resnet110"),
        plain(cifar_resnet),
    ),
    Family(
        "resnet{depth}-x{width}",
        "ResNet for 32x32 images, widened, stem included",
        ("resnet20-x0.75",),
        plain(cifar_resnet),
    ),
    # Deeply shared filter bases.
    imagenet(
        "resnet{depth}-s{shared}u{unique}",
        f"ResNet with basic blocks for ImageNet, one filter basis {BASES}",
        ("resnet34-s8u1", "resnet34-s16u1", "resnet34-s32u1", "resnet34-s16u0", "resnet34-s0u16"),
        factored_resnet,
        has_basic_blocks,
        options=(*STEM_OPTIONS, "inner_norm"),
    ),
    imagenet(
        "resnet{depth}-s{shared}u{unique}-double",
        f"ResNet with basic blocks for ImageNet, two filter bases {BASES}",
        ("resnet34-s32u1-double", "resnet34-s48u1-double"),
        partial(factored_resnet, bases=2),
        has_basic_blocks,
        options=(*STEM_OPTIONS, "inner_norm"),
    ),
    Family(
        "resnet{depth}-s{shared}u{unique}",
        f"ResNet for 32x32 images, one filter basis {BASES}",
        ("resnet20-s16u1", "resnet32-s8u1", "resnet32-s16u1", "resnet56-s8u1", "resnet56-s16u1"),
        factored_resnet,
        for_small_images,
        options=(*OPTIONS, "inner_norm"),
    ),
    Family(
        "resnet{depth}-s{shared}u{unique}-double",
        f"ResNet for 32x32 images, two filter bases {BASES}",
        ("resnet32-s16u1-double", "resnet56-s16u1-double"),
        partial(factored_resnet, bases=2),
        for_small_images,
        options=(*OPTIONS, "inner_norm"),
    ),
    imagenet(
        "resnet{depth}-shared",
        "ResNet with bottlenecks; one 3x3 kernel shared per stage",
        ("resnet50-shared", "resnet101-shared"),
        partial(shared_bottlenecks, convolutions="conv2"),
        has_bottlenecks,
    ),
    imagenet(
        "resnet{depth}-sharedpp",
        "ResNet with bottlenecks; one 3x3 kernel and one 1x1 expansion shared per stage",
        ("resnet50-sharedpp", "resnet101-sharedpp"),
        partial(shared_bottlenecks, convolutions="conv[23]"),
        has_bottlenecks,
    ),
    with_form("mobilenetv2", "MobileNetV2", ("mobilenetv2",), plain(MobileNetV2)),
    with_form(
        "mobilenetv2-shared",
        "MobileNetV2; one 1x1 expansion shared in each of the stages 3 to 6",
        ("mobilenetv2-shared",),
        partial(shared_mobilenet, convolutions="expand"),
    ),
    with_form(
        "mobilenetv2-sharedpp",
        "MobileNetV2; one 1x1 expansion and one 1x1 projection shared in each of the stages 3 to 6",
        ("mobilenetv2-sharedpp",),
        partial(shared_mobilenet, convolutions="expand|project"),
    ),
    with_form("densenet121", "DenseNet121", ("densenet121",), plain(DenseNet)),
    with_form(
        "densenet121-s{shared}u{unique}",
        "DenseNet121, one filter basis shared per stage: s shared and u unique filters in each",
        ("densenet121-s16u1",),
        factored_densenet,
    ),
    imagenet("resnext50", "ResNeXt50_32x4d", ("resnext50",), plain(ResNeXt)),
    imagenet(
        "resnext50-s{shared}u{unique}",
        f"ResNeXt50_32x4d, one grouped 3x3 {BASES}",
        ("resnext50-s64u4",),
        shared_resnext,
    ),
    # Recurrent parameter generators.
    imagenet(
        "resnet{depth}-rpg",
        "ResNet for ImageNet; all kernels of the stages come from one ring of 2,359,296 parameters",
        ("resnet18-rpg", "resnet34-rpg"),
        ring_resnet,
        for_imagenet,
        options=(*STEM_OPTIONS, "ring_size"),
    ),
    imagenet(
        "resnet{depth}-rpg-{ring_size}",
        "ResNet for ImageNet; all kernels of the stages come from one ring of this size",
        ("resnet34-rpg-50000",),
        ring_resnet,
        for_imagenet,
    ),
    Family(
        "resnet{depth}-rpg-{ring_size}",
        "ResNet for 32x32 images; all kernels of the stages come from one ring of this size",
        ("resnet20-rpg-10000",),
        ring_resnet,
    ),
    # Learnable repetition.
    Family(
        "vgg{depth}",
        "VGG for 32x32 images: the first depth - 1 of VGG11's ten 3x3 convolutions, depth 4 to 11",
        tuple(f"vgg{depth}" for depth in range(4, 12)),
        plain(VGG),
    ),
    Family(
        "rep-vgg-{convolutions}",
        "VGG11 that keeps this many convolutions, 4 to 10; the others repeat kept ones",
        tuple(f"rep-vgg-{n}" for n in REPEATED),
        repeated_vgg,
    ),
    Family(
        "resnet16-{width}",
        "ResNet of depth 16 for 32x32 images, widened",
        ("resnet16-1", "resnet16-2", "resnet16-4", "resnet16-8"),
        plain(resnet16),
    ),
    Family(
        "resnet16-{width}-repeat",
        "ResNet of depth 16 for 32x32 images, widened; every kernel repeats one of resnet16-1",
        ("resnet16-1-repeat", "resnet16-4-repeat", "resnet16-8-repeat", "resnet16-10-repeat"),
        partial(repeated, resnet16),
    ),
    imagenet(
        "resnet18-x{width}-repeat",
        "ResNet18 for ImageNet, widened; every kernel repeats one of resnet18",
        ("resnet18-x1-repeat", "resnet18-x2-repeat", "resnet18-x4-repeat"),
        partial(repeated, partial(resnet, 18)),
    ),
)

ROTATION_NETWORKS = (
    on_digits(
        "rotnet", "six convolutions for rotated digits of 29x29", ("rotnet",), plain(rot_net)
    ),
    on_digits(
        "rotnet-c{order}",
        "rotnet with steerable kernels: equivariant to the rotations of C4, C8 or C16",
        ("rotnet-c4", "rotnet-c8", "rotnet-c16"),
        equivariant_rot_net,
    ),
    on_digits(
        "rotnet-c{order}-repeat",
        "rotnet as wide as the equivariant one; kernels repeat the baseline's by learned scalars",
        ("rotnet-c4-repeat", "rotnet-c8-repeat", "rotnet-c16-repeat"),
        repeated_rot_net,
    ),
    on_digits(
        "rotnet-c{order}-scaled",
        "rotnet as wide as the equivariant one; kernels are scaled copies of the baseline's",
        ("rotnet-c4-scaled",),
        partial(repeated_rot_net, transform="scale"),
    ),
    on_digits(
        "rotnet-c{order}-tiled",
        "rotnet as wide as the equivariant one; kernels are plain copies of the baseline's",
        ("rotnet-c4-tiled",),
        partial(repeated_rot_net, transform="linear"),
    ),
    on_digits(
        "rotnet-c{order}-rpg",
        "rotnet as wide as the equivariant one; one ring of the baseline's size makes all kernels",
        ("rotnet-c4-rpg",),
        ring_rot_net,
    ),
    on_digits(
        "rotnet-c{order}-wide",
        "plain rotnet as wide as the equivariant one",
        ("rotnet-c4-wide",),
        plain(wide_rot_net),
    ),
)

GRID_NETWORKS = (
    on_grids(
        "pathnet-{depth}-{width}",
        "fully convolutional network for shortest paths on grids, with identical layers",
        ("pathnet-20-32", "pathnet-10-16"),
        plain(path_net),
    ),
    on_grids(
        "spathnet-{depth}-{width}-{templates}",
        "network for shortest paths on grids, soft sharing with one bank for all layers",
        ("spathnet-20-32-20", "spathnet-10-16-10"),
        soft_path_net,
    ),
    on_grids(
        "pathnet-{depth}-{width}-loop-{period}",
        "network for shortest paths on grids; the layers use this many kernels in turn",
        ("pathnet-20-32-loop-1", "pathnet-10-16-loop-1"),
        looped_path_net,
    ),
    on_grids(
        "pathnet-{depth}-{width}-rpg-{ring_size}",
        "network for shortest paths on grids; all layers' kernels come from one ring of this size",
        ("pathnet-20-32-rpg-18432", "pathnet-10-16-rpg-2304"),
        ring_path_net,
    ),
)

# A name belongs to the first family that has its form and accepts its arguments.
FAMILIES = (
    *CLASSIFIERS,
    *detectors(CLASSIFIERS),
    *pose_networks(),
    *networks_for_tasks(CLASSIFIERS),
    *ROTATION_NETWORKS,
    *GRID_NETWORKS,
    *transformers(),
)
