"""Anchors: the boxes that a detector refines, a fixed number at each place of a feature map."""

import jax.numpy as jnp
import numpy as np

ASPECTS = (0.5, 1.0, 2.0)  # height / width
OCTAVES = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))
PER_PLACE = len(ASPECTS) * len(OCTAVES)


def base_anchors(stride: int) -> np.ndarray:
    """The nine anchors of a feature map with this stride, around the origin, (9, 4) float32.

    Three sizes, 4 times the stride and two steps of a third of an octave above it, each in three
    aspect ratios of one area. From stride 4 on they are rounded to whole pixels as in torchvision,
    so that its weights mean the same boxes here; smaller ones would become equal.

    Args:
      stride: pixels from one place of the feature map to the next.

    Returns:
      (x0, y0, x1, y1), by aspect and then by size.

    Example:
      >>> base_anchors(8)[3].tolist()
      [-16.0, -16.0, 16.0, 16.0]

    References:
      Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, arXiv:1708.02002, section 4.
    """
    rounded = stride >= 4
    size_3 = 4 * stride * np.array(OCTAVES)
    if rounded:
        size_3 = np.trunc(size_3)
    height_ratio_3 = np.sqrt(np.array(ASPECTS, np.float64))
    width_9 = np.outer(1 / height_ratio_3, size_3).ravel()
    height_9 = np.outer(height_ratio_3, size_3).ravel()
    anchors_9x4 = np.stack([-width_9, -height_9, width_9, height_9], axis=-1) / 2
    return (np.round(anchors_9x4) if rounded else anchors_9x4).astype(np.float32)


def anchors(height: int, width: int, stride: int) -> jnp.ndarray:
    """The anchors of a feature map, (height * width * 9, 4) float32: by row, column, anchor.

    Place (i, j) has its anchors around the pixel (i * stride, j * stride).

    Example:
      >>> anchors(2, 3, 8).shape
      (54, 4)
    """
    y_HxW, x_HxW = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    centre_Nx1x4 = np.stack([x_HxW, y_HxW, x_HxW, y_HxW], axis=-1).reshape(-1, 1, 4) * stride
    return jnp.asarray((centre_Nx1x4 + base_anchors(stride)).reshape(-1, 4), jnp.float32)
