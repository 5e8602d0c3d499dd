"""Means and standard deviations of pixels, by channel."""

import numpy as np

from paramshare.data import order
from paramshare.data.sources import Source

Channels = tuple[float, ...]

# torchvision's references, times 255.
IMAGENET: tuple[Channels, Channels] = (
    (0.485 * 255, 0.456 * 255, 0.406 * 255),
    (0.229 * 255, 0.224 * 255, 0.225 * 255),
)
"""Mean and std of ImageNet's pixels, on the scale 0 to 255."""


def mean_and_std(image_NxHxWxC: np.ndarray) -> tuple[Channels, Channels]:
    """(mean, std) of each channel of uint8 images, computed in integers up to the last division.

    The std of a constant channel is 1, so that normalising it gives zeros and not NaN.

    Example:
      >>> mean_and_std(np.array([0, 0, 2, 2], np.uint8).reshape(1, 2, 2, 1))
      ((1.0,), (1.0,))
    """
    channels = image_NxHxWxC.shape[-1]
    means, stds = [], []
    for c in range(channels):
        # 256 counts suffice for 8-bit pixels, and need no float copy of the images.
        counts = np.bincount(image_NxHxWxC[..., c].ravel(), minlength=256)
        values = np.arange(256)
        total = max(int(counts.sum()), 1)
        first, second = int(counts @ values), int(counts @ values**2)
        means.append(first / total)
        stds.append((total * second - first**2) ** 0.5 / total or 1.0)
    return tuple(means), tuple(stds)


def sampled(source: Source, seed: int = 0, limit: int = 1000) -> tuple[Channels, Channels]:
    """`mean_and_std` of a fixed sample of at most `limit` images, which may differ in size."""
    chosen = np.sort(order.permutation(len(source), seed, order.SAMPLE)[:limit])
    pixels = [np.asarray(source[int(i)]["input"]) for i in chosen]
    return mean_and_std(np.concatenate([p.reshape(-1, 1, 1, p.shape[-1]) for p in pixels]))
