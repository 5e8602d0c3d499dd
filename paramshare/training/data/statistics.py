"""Means and standard deviations of pixels, by channel."""

from typing import Any

import numpy as np

from paramshare.training.data import order

Channels = tuple[float, ...]

# Zagoruyko and Komodakis, "Wide residual networks" (2016), the reference implementation's constants.
_CIFAR10 = ((125.3, 123.0, 113.9), (63.0, 62.1, 66.7))
_CIFAR100 = ((129.3, 124.1, 112.4), (68.2, 65.4, 70.4))
# The constants of torchvision's ImageNet references, times 255.
_IMAGENET = ((0.485 * 255, 0.456 * 255, 0.406 * 255), (0.229 * 255, 0.224 * 255, 0.225 * 255))


def known(name: str) -> tuple[Channels, Channels] | None:
    """The published (mean, std) of a set of tensorflow-datasets, on the 0..255 scale; None where there is none.

    Example:
        >>> known("cifar10")[0]
        (125.3, 123.0, 113.9)
        >>> known("mnist") is None
        True
    """
    if name.startswith("imagenet"):  # imagenet2012, imagenet_v2, imagenet_a, ...: the same pictures' statistics
        return _IMAGENET
    return {"cifar10": _CIFAR10, "cifar100": _CIFAR100}.get(name)


def mean_and_std(image_NxHxWxC: np.ndarray) -> tuple[Channels, Channels]:
    """(mean, std) of each channel, on the scale of the images, computed in integers: exact but for the last division and root.

    A constant channel has std 1, so that normalising it gives zeros and not NaN.

    Example:
        >>> mean_and_std(np.array([0, 0, 2, 2], np.uint8).reshape(1, 2, 2, 1))
        ((1.0,), (1.0,))
    """
    channels = image_NxHxWxC.shape[-1]
    means, stds = [], []
    for c in range(channels):
        # 256 counts say everything about 8-bit pixels, and are gathered without a float copy of the images.
        counts = np.bincount(image_NxHxWxC[..., c].ravel(), minlength=256)
        values = np.arange(256)
        total = max(int(counts.sum()), 1)
        first, second = int(counts @ values), int(counts @ values**2)
        means.append(first / total)
        stds.append((total * second - first**2) ** 0.5 / total or 1.0)
    return tuple(means), tuple(stds)


def sampled(source: Any, seed: int = 0, limit: int = 1000) -> tuple[Channels, Channels]:
    """`mean_and_std` over a fixed sample of at most `limit` examples of a source whose images may differ in size."""
    chosen = np.sort(order.permutation(len(source), seed, order.SAMPLE)[:limit])
    pixels = [np.asarray(source[int(i)]["image"]) for i in chosen]
    return mean_and_std(np.concatenate([p.reshape(-1, 1, 1, p.shape[-1]) for p in pixels]))
