"""Axis-aligned boxes (x0, y0, x1, y1): overlaps, coding against anchors, non-maximum suppression.

All functions are jitted, mapped and differentiated like any other; shapes are static.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

LARGEST = 4.135166556742356  # log(1000 / 16): decoded sides are at most 62.5 times the anchor's


def area(box: jax.Array) -> jax.Array:
    """Areas (...) of boxes (..., 4); 0 where a box is turned inside out."""
    sides = jnp.maximum(box[..., 2:] - box[..., :2], 0)
    return sides[..., 0] * sides[..., 1]


def intersection(a: jax.Array, b: jax.Array) -> jax.Array:
    """Areas (...) that boxes (..., 4) have in common; the shapes broadcast."""
    return area(
        jnp.concatenate(
            [jnp.maximum(a[..., :2], b[..., :2]), jnp.minimum(a[..., 2:], b[..., 2:])], axis=-1
        )
    )


def iou(a: jax.Array, b: jax.Array) -> jax.Array:
    """Intersection over union (...) of boxes (..., 4), whose shapes broadcast.

    0 where both boxes have no area.

    Example:
      >>> a = jnp.array([0.0, 0.0, 2.0, 2.0])
      >>> iou(a[None], jnp.array([[0.0, 0.0, 2.0, 2.0], [1.0, 0.0, 3.0, 2.0]])).tolist()
      [1.0, 0.3333333432674408]
    """
    common = intersection(a, b)
    union = area(a) + area(b) - common
    return common / jnp.where(union > 0, union, 1)


def giou(a: jax.Array, b: jax.Array) -> jax.Array:
    """Generalised IoU (...) of boxes (..., 4), in (-1, 1]; the shapes broadcast.

    IoU less the fraction of the smallest enclosing box that the union does not fill. Its gradient
    does not vanish where boxes are disjoint.

    Example:
      >>> float(giou(jnp.array([0.0, 0.0, 1.0, 1.0]), jnp.array([2.0, 0.0, 3.0, 1.0])))
      -0.3333333432674408

    References:
      Rezatofighi et al., "Generalized Intersection over Union", CVPR 2019, arXiv:1902.09630.
    """
    common = intersection(a, b)
    union = area(a) + area(b) - common
    hull = area(
        jnp.concatenate(
            [jnp.minimum(a[..., :2], b[..., :2]), jnp.maximum(a[..., 2:], b[..., 2:])], axis=-1
        )
    )
    unfilled = (hull - union) / jnp.where(hull > 0, hull, 1)
    return common / jnp.where(union > 0, union, 1) - unfilled


def encode(box: jax.Array, anchor: jax.Array) -> jax.Array:
    """Offsets (..., 4) that turn anchors into boxes: `decode` undoes it.

    (dx, dy, dw, dh): the shift of the centre in sides of the anchor, and the logarithm of the ratio
    of the sides. Sides of 0 count as 1e-6.

    References:
      Girshick et al., R-CNN, 2014, arXiv:1311.2524, appendix C.
    """
    centre, sides = _centre_and_sides(box)
    anchor_centre, anchor_sides = _centre_and_sides(anchor)
    return jnp.concatenate(
        [
            (centre - anchor_centre) / anchor_sides,
            jnp.log(jnp.maximum(sides, 1e-6) / anchor_sides),
        ],
        axis=-1,
    )


def decode(offset: jax.Array, anchor: jax.Array) -> jax.Array:
    """Boxes (..., 4) from offsets (..., 4) to anchors (..., 4).

    Example:
      >>> anchor, box = jnp.array([0.0, 0.0, 4.0, 4.0]), jnp.array([1.0, 1.0, 3.0, 5.0])
      >>> decode(encode(box, anchor), anchor).tolist()
      [1.0, 1.0, 3.0, 5.0]
    """
    anchor_centre, anchor_sides = _centre_and_sides(anchor)
    centre = offset[..., :2] * anchor_sides + anchor_centre
    half = jnp.exp(jnp.minimum(offset[..., 2:], LARGEST)) * anchor_sides / 2
    return jnp.concatenate([centre - half, centre + half], axis=-1)


def clip(box: jax.Array, height: float, width: float) -> jax.Array:
    """The parts of boxes (..., 4) inside an image."""
    limits = jnp.broadcast_to(jnp.array([width, height, width, height], box.dtype), box.shape)
    return jnp.clip(box, jnp.zeros((), box.dtype), limits)


class Match(NamedTuple):
    """Which box each anchor is to predict, if any; see `assign`."""

    index_A: jax.Array
    """The box that overlaps the anchor most; 0 where there is none."""
    positive_A: jax.Array
    """Whether the anchor is to predict that box."""
    negative_A: jax.Array
    """Whether the anchor is to predict that there is nothing."""


def assign(
    anchor_Ax4: jax.Array,
    box_Mx4: jax.Array,
    present_M: jax.Array,
    positive: float = 0.5,
    negative: float = 0.4,
) -> Match:
    """Assigns anchors to boxes by their overlap.

    An anchor predicts the box that it overlaps most. It is positive if it overlaps a box by
    `positive` or more, or as much as any anchor overlaps that box; negative if it overlaps all
    boxes by less than `negative`; otherwise neither. So a box is without an anchor only if those
    nearest to it overlap another one more, as in torchvision.

    Args:
      anchor_Ax4: anchors (x0, y0, x1, y1).
      box_Mx4: boxes.
      present_M: whether a row of `box_Mx4` is a box.
      positive: intersection over union from which an anchor is positive.
      negative: intersection over union below which an anchor is negative.

    Example:
      >>> anchor = jnp.array([[0.0, 0.0, 4.0, 4.0], [8.0, 8.0, 12.0, 12.0]])
      >>> match = assign(anchor, jnp.array([[0.0, 0.0, 4.0, 3.0]]), jnp.array([True]))
      >>> match.positive_A.tolist(), match.negative_A.tolist()
      ([True, False], [False, True])
    """
    overlap_MxA = jnp.where(present_M[:, None], iou(box_Mx4[:, None], anchor_Ax4[None]), -1)
    best_A, index_A = jnp.max(overlap_MxA, axis=0), jnp.argmax(overlap_MxA, axis=0)
    highest_Mx1 = jnp.max(overlap_MxA, axis=1, keepdims=True)
    nearest_A = jnp.any((overlap_MxA == highest_Mx1) & (highest_Mx1 > 0), axis=0)
    positive_A = (best_A >= positive) | nearest_A
    return Match(index_A, positive_A, ~positive_A & (best_A < negative))


class Selection(NamedTuple):
    """What `suppress` selects."""

    index_D: jax.Array
    """Places in the input, highest score first; 0 where nothing was left."""
    valid_D: jax.Array
    """Whether there was anything left."""


def suppress(
    box_Nx4: jax.Array,
    score_N: jax.Array,
    category_N: jax.Array,
    threshold: float = 0.5,
    limit: int = 100,
) -> Selection:
    """Greedy non-maximum suppression within each category.

    The box with the highest score is selected, and those of its category that overlap it by more
    than the threshold are dropped, again and again. The result is exact: the first `limit` boxes of
    the usual algorithm. Ties go to the lower index.

    Args:
      box_Nx4: boxes (x0, y0, x1, y1).
      score_N: their scores; -inf for boxes that do not take part.
      category_N: their categories, integers.
      threshold: intersection over union above which a box is dropped.
      limit: number of boxes to select, D.

    Example:
      >>> box = jnp.array([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 1.9], [5.0, 5.0, 6.0, 6.0]])
      >>> selected = suppress(box, jnp.array([0.5, 0.9, 0.1]), jnp.array([0, 0, 0]), limit=3)
      >>> selected.index_D.tolist(), selected.valid_D.tolist()
      ([1, 2, 0], [True, True, False])
    """

    def select(score_N: jax.Array, _: None) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        best = jnp.argmax(score_N)
        valid = score_N[best] > -jnp.inf
        near_N = (iou(box_Nx4, box_Nx4[best][None]) > threshold) & (category_N == category_N[best])
        taken_N = near_N.at[best].set(True)  # a box without area does not overlap itself
        return jnp.where(taken_N, -jnp.inf, score_N), (jnp.where(valid, best, 0), valid)

    _, (index_D, valid_D) = jax.lax.scan(select, score_N, None, length=limit)
    return Selection(index_D, valid_D)


def _centre_and_sides(box: jax.Array) -> tuple[jax.Array, jax.Array]:
    return (box[..., :2] + box[..., 2:]) / 2, box[..., 2:] - box[..., :2]
