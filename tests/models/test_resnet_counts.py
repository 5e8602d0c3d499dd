"""Residual networks against the papers' counts of parameters and multiply-adds, to the last number."""

import jax
import jax.numpy as jnp
import pytest

from paramshare.analysis.cost import multiply_adds
from paramshare.models import ResNet
from paramshare.models.resnet import BASIC_BLOCKS, BOTTLENECK_BLOCKS


def shapes(model, side=32):
    x = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    return jax.eval_shape(lambda x: model.init(jax.random.key(0), x), x), x


def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def cifar(blocks, widths, stem_width, classes=10, **options):
    return ResNet(blocks, widths, classes, stem="cifar", stem_width=stem_width, **options)


def narrow(n):
    """ResNet20 and its like."""
    return cifar((n, n, n), (16, 32, 64), 16, shortcut="pad")


def wide16(k, **options):
    """WRN-16-k of learned repetition."""
    return cifar((2, 2, 2), (16 * k, 32 * k, 64 * k), 16, **options)


COUNTS = {  # Exact trainable counts of the papers' reference codes.
    "CIFAR-10 ResNet20": (narrow(3), 269_722),
    "CIFAR-10 ResNet32": (narrow(5), 464_154),
    "CIFAR-10 ResNet56": (narrow(9), 853_018),
    "CIFAR-10 ResNet18": (ResNet(BASIC_BLOCKS[18], num_classes=10, stem="cifar"), 11_173_962),
    "CIFAR-10 ResNet34": (ResNet(BASIC_BLOCKS[34], num_classes=10, stem="cifar"), 21_282_122),
    "CIFAR-100 ResNet18": (ResNet(BASIC_BLOCKS[18], num_classes=100, stem="cifar"), 11_220_132),
    "CIFAR-100 ResNet34": (ResNet(BASIC_BLOCKS[34], num_classes=100, stem="cifar"), 21_328_292),
    "ImageNet ResNet18": (ResNet(), 11_689_512),
    "ImageNet ResNet34": (ResNet(BASIC_BLOCKS[34]), 21_797_672),
    "ImageNet ResNet50": (ResNet(BOTTLENECK_BLOCKS[50], bottleneck=True), 25_557_032),
    "ImageNet ResNet101": (ResNet(BOTTLENECK_BLOCKS[101], bottleneck=True), 44_549_160),
    "ImageNet Wide-ResNet-50-2": (ResNet(BOTTLENECK_BLOCKS[50], bottleneck=True, inner=2), 68_883_240),
    "WRN-16-1": (wide16(1), 175_258),
    "WRN-16-2": (wide16(2), 692_122),
    "WRN-16-4": (wide16(4), 2_749_786),
    "WRN-16-8": (wide16(8), 10_963_162),
    "WRN-16-1, repeated": (wide16(1, bias=True), 175_802),
    "ImageNet ResNet18 x1, repeated": (ResNet(bias=True), 11_694_248),
}


@pytest.mark.parametrize("name", COUNTS)
def test_published_counts(name):
    model, wanted = COUNTS[name]
    assert size(shapes(model)[0]["params"]) == wanted


@pytest.mark.parametrize(
    ("model", "generated", "private"),
    [
        (ResNet(), 11_157_504, 532_008),
        (ResNet(BASIC_BLOCKS[34]), 21_258_240, 539_432),
        (ResNet(num_classes=10, stem="cifar"), 11_157_504, 16_458),
        (ResNet(BASIC_BLOCKS[34], num_classes=100, stem="cifar"), 21_258_240, 70_052),
    ],
)
def test_kernels_of_the_stages_are_what_a_ring_generates(model, generated, private):
    params = shapes(model)[0]["params"]
    kernels = [x for path, x in jax.tree_util.tree_leaves_with_path(params) if path[0].key.startswith("stage") and path[-1].key == "kernel"]
    assert (size(kernels), size(params) - size(kernels)) == (generated, private)


@pytest.mark.parametrize(
    ("model", "shared", "double", "wanted"),
    [
        (ResNet(BASIC_BLOCKS[34], rank=33), 32, False, 8_196_056),
        (ResNet(BASIC_BLOCKS[34], rank=33), 32, True, 9_762_776),
        (ResNet(BASIC_BLOCKS[34], rank=49), 48, True, 11_786_968),
        (ResNet(BASIC_BLOCKS[34], num_classes=100, stem="cifar", rank=16), 0, False, 9_510_052),
        (cifar((5, 5, 5), (16, 32, 64), 16, shortcut="pad", rank=9), 8, False, 150_666),
    ],
)
def test_factored_counts_once_bases_count_once(model, shared, double, wanted):
    saved = 0
    for g, (blocks, p) in enumerate(zip(model.blocks, model.widths, strict=True)):
        saved += (2 * (blocks - 1) - (2 if double else 1)) * 9 * p * shared * 2**g
    assert size(shapes(model)[0]["params"]) - saved == wanted


@pytest.mark.parametrize(
    ("model", "side", "wanted"),
    [
        (ResNet(BASIC_BLOCKS[34], num_classes=100, stem="cifar"), 32, 1_159_397_376),
        (ResNet(BASIC_BLOCKS[34], num_classes=100, stem="cifar", rank=33), 32, 772_472_832),
        (ResNet(BASIC_BLOCKS[34], rank=49), 224, 3_248_996_352),
        (ResNet(BOTTLENECK_BLOCKS[50], bottleneck=True), 224, 4_087_136_256),
    ],
)
def test_multiply_adds_of_the_convolutions(model, side, wanted):
    work = multiply_adds(model.apply, *shapes(model, side))
    assert sum(work.values()) - work["classifier"] == wanted
