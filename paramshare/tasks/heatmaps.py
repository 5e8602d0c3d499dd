"""Heatmaps of joints: the Gaussians that they are trained to, their peaks, their mirror image.

Places are (x, y) in pixels of the network's input: the left edge of the image is at 0, the right
one at its width. Column i of a heatmap with a stride of s pixels has its centre at (i + 0.5) s.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp


def gaussians(
    joint_Jx2: jax.Array, shape: tuple[int, int], image_shape: tuple[int, ...], sigma: float
) -> jax.Array:
    """Heatmaps with a Gaussian of height 1 at each joint.

    Args:
      joint_Jx2: places of the joints in the image.
      shape: (h, w) of the heatmaps.
      image_shape: (H, W, ...) of the image.
      sigma: standard deviation in pixels of the heatmap.

    Returns:
      (h, w, J) float32.

    Example:
      >>> heatmap = gaussians(jnp.array([[6.0, 2.0]]), (2, 2), (8, 8), sigma=1.0)
      >>> heatmap[..., 0].round(2).tolist()
      [[0.6100000143051147, 1.0], [0.3700000047683716, 0.6100000143051147]]
    """
    cell_Jx2 = joint_Jx2 / _strides(shape, image_shape)[None] - 0.5

    def along(size: int, centre_J: jax.Array) -> jax.Array:
        distance = jnp.arange(size, dtype=jnp.float32)[:, None] - centre_J[None]
        return jnp.exp(-(distance**2) / (2 * sigma**2))

    rows_HxJ, columns_WxJ = along(shape[0], cell_Jx2[:, 1]), along(shape[1], cell_Jx2[:, 0])
    return rows_HxJ[:, None] * columns_WxJ[None]


class Peaks(NamedTuple):
    """Where heatmaps are highest; see `peaks`."""

    joint_Jx2: jax.Array
    """Places in the image."""
    height_J: jax.Array
    """The highest value of each heatmap."""


def peaks(heatmap_HxWxJ: jax.Array, image_shape: tuple[int, ...]) -> Peaks:
    """The joints that heatmaps stand for.

    A joint is at the highest pixel, moved along x and y by a quarter of a pixel towards the higher
    one of its two neighbours; not at the border, where there is one neighbour only.

    Args:
      heatmap_HxWxJ: one heatmap per joint.
      image_shape: (H, W, ...) of the image.

    Example:
      >>> heatmap = gaussians(jnp.array([[13.0, 11.0]]), (4, 8), (16, 32), sigma=1.0)
      >>> peaks(heatmap, (16, 32)).joint_Jx2.tolist()
      [[13.0, 11.0]]

    References:
      Newell, Yang & Deng, ECCV 2016, arXiv:1603.06937, section 4.
    """
    height, width, joints = heatmap_HxWxJ.shape
    flat_PxJ, joint_J = heatmap_HxWxJ.reshape(-1, joints), jnp.arange(joints)
    place_J = jnp.argmax(flat_PxJ, axis=0)
    row_J, column_J = place_J // width, place_J % width

    def at(row_J: jax.Array, column_J: jax.Array) -> jax.Array:
        inside = (jnp.clip(row_J, 0, height - 1), jnp.clip(column_J, 0, width - 1))
        return heatmap_HxWxJ[(*inside, joint_J)]

    def centre(cell_J: jax.Array, size: int, difference_J: jax.Array) -> jax.Array:
        border = (cell_J == 0) | (cell_J == size - 1)
        quarter = jnp.where(border, 0, 0.25 * jnp.sign(difference_J))
        return cell_J.astype(jnp.float32) + 0.5 + quarter

    x_J = centre(column_J, width, at(row_J, column_J + 1) - at(row_J, column_J - 1))
    y_J = centre(row_J, height, at(row_J + 1, column_J) - at(row_J - 1, column_J))
    stride = _strides((height, width), image_shape)
    return Peaks(jnp.stack([x_J, y_J], axis=-1) * stride[None], at(row_J, column_J))


def mirror(heatmap_xWxJ: jax.Array, mirrored: Sequence[int]) -> jax.Array:
    """The heatmaps (..., w, J) of the mirrored image, in which left joints are right joints.

    Args:
      heatmap_xWxJ: heatmaps.
      mirrored: for each joint the number of the one on the other side.

    Example:
      >>> mirror(jnp.array([[[1.0, 2.0], [3.0, 4.0]]]), (1, 0)).tolist()
      [[[4.0, 3.0], [2.0, 1.0]]]
    """
    return heatmap_xWxJ[..., ::-1, :][..., jnp.array(mirrored)]


def _strides(shape: tuple[int, int], image_shape: tuple[int, ...]) -> jax.Array:
    """Pixels of the image per pixel of the heatmap, along x and y."""
    return jnp.array([image_shape[1] / shape[1], image_shape[0] / shape[0]], jnp.float32)
