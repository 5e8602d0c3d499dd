"""Boxes against independent NumPy code."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paramshare.models.anchors import anchors, base_anchors
from paramshare.tasks import boxes


def random_boxes(rng, *shape) -> Any:
    corner = rng.uniform(0, 60, (*shape, 2))
    return np.concatenate([corner, corner + rng.uniform(1, 40, (*shape, 2))], -1).astype(np.float32)


def overlap(a, b):
    """Common area, union and enclosing area of two boxes, each number by itself."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    common = width * height
    return common, sum(areas) - common, hull


def test_iou_and_giou_of_random_boxes():
    rng = np.random.default_rng(0)
    a, b = random_boxes(rng, 50), random_boxes(rng, 50)
    expected = []
    for one, other in zip(a.astype(float), b.astype(float), strict=True):
        common, union, hull = overlap(one, other)
        expected.append((common / union, common / union - (hull - union) / hull))
    np.testing.assert_allclose(boxes.iou(a, b), [iou for iou, _ in expected], atol=1e-6)
    np.testing.assert_allclose(boxes.giou(a, b), [giou for _, giou in expected], atol=1e-6)


def test_giou_attracts_boxes_that_are_apart():
    a, b = jnp.array([0.0, 0.0, 1.0, 1.0]), jnp.array([5.0, 0.0, 6.0, 1.0])
    assert jax.grad(lambda x: boxes.iou(x, b))(a)[2] == 0
    assert jax.grad(lambda x: boxes.giou(x, b))(a)[2] > 0


def test_boxes_without_area_do_not_give_nan():
    empty = jnp.zeros(4)
    for function in (boxes.iou, boxes.giou):
        value, gradient = jax.value_and_grad(function)(empty, empty)
        assert jnp.isfinite(value) and jnp.all(jnp.isfinite(gradient))
    assert jnp.all(jnp.isfinite(boxes.encode(empty, jnp.array([0.0, 0.0, 4.0, 4.0]))))


def test_decoding_undoes_coding():
    rng = np.random.default_rng(1)
    box, anchor = random_boxes(rng, 40), random_boxes(rng, 40)
    offset = boxes.encode(box, anchor)
    np.testing.assert_allclose(boxes.decode(offset, anchor), box, atol=1e-4)
    sides, anchor_sides = box[:, 2:] - box[:, :2], anchor[:, 2:] - anchor[:, :2]
    moved = (box[:, :2] + sides / 2 - anchor[:, :2] - anchor_sides / 2) / anchor_sides
    np.testing.assert_allclose(offset[:, :2], moved, atol=1e-5)
    np.testing.assert_allclose(offset[:, 2:], np.log(sides / anchor_sides), atol=1e-5)


def test_large_offsets_stay_finite():
    anchor = jnp.array([0.0, 0.0, 16.0, 16.0])
    side = boxes.decode(jnp.full(4, 1e4), anchor)
    assert float(side[2] - side[0]) == pytest.approx(1000, rel=1e-3)


def greedy(box, score, category, threshold):
    """The usual algorithm, with a stable sort."""
    left, kept = list(np.argsort(-score, kind="stable")), []
    while left:
        best = left.pop(0)
        kept.append(int(best))
        left = [
            i
            for i in left
            if category[i] != category[best]
            or overlap(box[i], box[best])[0] / overlap(box[i], box[best])[1] <= threshold
        ]
    return kept


@pytest.mark.parametrize("ties", [False, True])
def test_suppression_is_the_greedy_algorithm(ties):
    rng = np.random.default_rng(2)
    select = jax.jit(jax.vmap(lambda b, s, c: boxes.suppress(b, s, c, 0.4, 60)))
    box, category = random_boxes(rng, 20, 60), rng.integers(0, 3, (20, 60))
    score = rng.uniform(size=(20, 60)).astype(np.float32)
    if ties:
        score = np.round(score * 4) / 4
        box[:, 30:] = box[:, :30]  # equal boxes with equal or other scores
    selected = select(box, score, category)
    for i in range(20):
        kept = selected.index_D[i][selected.valid_D[i]].tolist()
        assert kept == greedy(box[i].astype(float), score[i], category[i], 0.4)
    assert 5 < int(selected.valid_D.sum()) / 20 < 55


def test_boxes_that_do_not_take_part_are_never_selected():
    box, score = jnp.zeros((3, 4)), jnp.array([-jnp.inf, 0.5, -jnp.inf])  # without area
    selected = boxes.suppress(box, score, jnp.zeros(3, jnp.int32), limit=3)
    assert selected.index_D.tolist() == [1, 0, 0]
    assert selected.valid_D.tolist() == [True, False, False]


def test_anchors_have_their_areas_ratios_and_places():
    sides = base_anchors(32)[:, 2:] - base_anchors(32)[:, :2]
    size = np.tile(128 * 2 ** (np.arange(3) / 3), 3)
    ratio = np.repeat([0.5, 1, 2], 3)
    # Corners are rounded to whole pixels.
    np.testing.assert_allclose(sides[:, 0], size / np.sqrt(ratio), atol=2)
    np.testing.assert_allclose(sides[:, 1], size * np.sqrt(ratio), atol=2)
    grid = np.asarray(anchors(3, 4, 32)).reshape(3, 4, 9, 4)
    for row in range(3):
        for column in range(4):
            centre = (grid[row, column, :, :2] + grid[row, column, :, 2:]) / 2
            np.testing.assert_array_equal(centre, np.tile([column * 32, row * 32], (9, 1)))


@pytest.mark.parametrize("stride", [1, 2, 4, 8])
def test_the_nine_anchors_differ(stride):
    sides = base_anchors(stride)[:, 2:] - base_anchors(stride)[:, :2]
    assert len(np.unique(sides, axis=0)) == 9
    np.testing.assert_allclose(
        sides[:, 1] / sides[:, 0], np.repeat([0.5, 1, 2], 3), rtol=0.2 if stride >= 4 else 1e-6
    )


def test_nearest_anchors_are_positive_and_thresholds_hold():
    rng = np.random.default_rng(3)
    anchor, box = random_boxes(rng, 200), random_boxes(rng, 6)
    box[0] = [0, 0, 1, 1]  # which no anchor overlaps much
    anchor[0] = [0, 0, 9, 9]
    present = np.array([True, True, True, True, True, False])
    match = boxes.assign(jnp.asarray(anchor), jnp.asarray(box), jnp.asarray(present))
    table = np.array(
        [[overlap(b, a)[0] / overlap(b, a)[1] for a in anchor.astype(float)] for b in box]
    )[:5]
    best = table.max(axis=0)
    positive = (best >= 0.5) | np.any(table == table.max(axis=1, keepdims=True), axis=0)
    np.testing.assert_array_equal(match.positive_A, positive)
    np.testing.assert_array_equal(match.negative_A, ~positive & (best < 0.4))
    np.testing.assert_array_equal(match.index_A[positive], table.argmax(axis=0)[positive])
    assert positive[0] and best[0] < 0.1


def test_an_anchor_predicts_the_box_that_it_overlaps_most():
    """So a box may be without one, as in torchvision."""
    anchor = jnp.array([[0.0, 0, 10, 10], [100, 100, 110, 110]])
    box = jnp.array([[0.0, 0, 10, 10], [0, 0, 4, 4]])
    match = boxes.assign(anchor, box, jnp.array([True, True]))
    assert (match.index_A[0], match.positive_A.tolist()) == (0, [True, False])


def test_an_image_without_boxes_has_negative_anchors_only():
    anchor = jnp.asarray(random_boxes(np.random.default_rng(4), 10))
    match = boxes.assign(anchor, jnp.zeros((2, 4)), jnp.zeros(2, bool))
    assert not match.positive_A.any() and match.negative_A.all()
