"""The detection task: losses, measures and augmentation with known answers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paramshare.tasks import Augment, Detection, TaskError

CATEGORIES = ("cat", "dog", "owl")
SHAPE = (64, 64, 3)


def labels_of(*images, rows=4, scale=1.0):
    """Labels of images, each a list of (category, box in input pixels)."""
    label = {
        "area": np.zeros((len(images), rows), np.float32),
        "box": np.zeros((len(images), rows, 4), np.float32),
        "category": np.zeros((len(images), rows), np.int32),
        "crowd": np.zeros((len(images), rows), bool),
        "present": np.zeros((len(images), rows), bool),
        "scale": np.full((len(images), 2), scale, np.float32),
    }
    for i, image in enumerate(images):
        for row, (category, box) in enumerate(image):
            sides = np.subtract(box[2:], box[:2]) / scale
            label["area"][i, row], label["present"][i, row] = sides[0] * sides[1], True
            label["box"][i, row], label["category"][i, row] = box, category
    return label


def detected(labels, shift=0.0, score=0.9):
    """Boxes like those of the labels, moved to the right by a fraction of their width."""
    box = labels["box"].copy()
    box[..., [0, 2]] += shift * (box[..., 2:3] - box[..., :1])
    return {"box": box, "score": score * labels["present"], "category": labels["category"]}


IMAGES = (
    [(0, (2, 2, 30, 22)), (1, (32, 30, 60, 60))],
    [(0, (10, 12, 40, 50))],
    [],
    [(1, (5, 5, 25, 45)), (1, (30, 4, 62, 40)), (0, (3, 50, 40, 63))],
)


def measures(**given):
    task = Detection(CATEGORIES, max_boxes=4)
    labels = given.pop("labels", labels_of(*IMAGES))
    return task.reduce({"detected": detected(labels, **given), "labels": labels})


def test_perfect_boxes_have_average_precision_one():
    result = measures()
    assert {result[name] for name in ("ap", "ap50", "ap75", "ar", "ap/cat", "ap/dog")} == {1.0}
    assert np.isnan(result["ap/owl"])  # there is no owl
    assert list(result) == [measure.name for measure in Detection(CATEGORIES).measures]


def test_boxes_moved_by_a_fifth_count_at_the_thresholds_below_two_thirds():
    """IoU 0.8 / 1.2: thresholds 0.5, 0.55, 0.6 and 0.65 of ten."""
    result = measures(shift=0.2)
    assert result["ap50"] == 1 and result["ap75"] == 0
    assert result["ap"] == pytest.approx(0.4)


def test_boxes_moved_by_half_never_count():
    assert measures(shift=0.5)["ap50"] == 0  # IoU 1/3


def test_nothing_found_and_nothing_to_find():
    assert measures(score=0.0)["ap"] == 0
    result = measures(labels=labels_of([], []))
    assert all(np.isnan(value) for value in result.values())


def test_a_false_box_ahead_of_a_true_one_halves_the_precision():
    labels = labels_of([(0, (2, 2, 30, 30))])
    found = {
        "box": np.array([[[40, 40, 60, 60], [2, 2, 30, 30]]], np.float32),
        "score": np.array([[0.9, 0.8]], np.float32),
        "category": np.zeros((1, 2), np.int32),
    }
    result = Detection(CATEGORIES, 4).reduce({"detected": found, "labels": labels})
    assert result["ap"] == pytest.approx(0.5) and result["ar"] == 1


def test_precision_falls_where_recall_needs_the_box_behind_a_false_one():
    """Three cats: the first box is right, the second wrong, the third right; one cat is missed."""
    labels = labels_of([(0, (0, 0, 20, 20)), (0, (22, 0, 42, 20)), (0, (44, 0, 64, 20))])
    found = {
        "box": np.array([[[0, 0, 20, 20], [0, 44, 20, 64], [22, 0, 42, 20]]], np.float32),
        "score": np.array([[0.9, 0.8, 0.7]], np.float32),
        "category": np.zeros((1, 3), np.int32),
    }
    (chart,) = Detection(CATEGORIES, 4).curves({"detected": found, "labels": labels})
    assert chart.x_label == "recall" and list(chart.lines) == [
        "all, IoU 0.5",
        "all, IoU 0.75",
        "cat, IoU 0.5",
    ]
    for line in chart.lines.values():
        points = dict(line)
        assert len(points) == 101
        assert points[0.33] == 1 and points[0.34] == pytest.approx(2 / 3, abs=1e-4)
        assert points[0.66] == pytest.approx(2 / 3, abs=1e-4) and points[0.67] == 0
    nothing = labels_of([], [])
    crowd = labels_of([(0, (0, 0, 20, 20))])
    crowd["crowd"][:] = crowd["present"]
    for labels in (nothing, crowd):
        assert not Detection(CATEGORIES, 4).curves({"detected": detected(labels), "labels": labels})


@pytest.mark.parametrize("returned", [120, 300])
def test_all_boxes_that_are_returned_count(returned):
    """COCO's measures take 100 of an image; with more than that, all of 120 objects are found."""
    rows, objects = 300, 120
    box = np.zeros((1, rows, 4), np.float32)
    left = 10.0 * np.arange(objects)
    box[0, :objects] = np.stack([left, 0 * left, left + 8, 0 * left + 8], axis=1)
    real = (np.arange(rows) < objects)[None]
    labels = {
        "box": box,
        "category": np.zeros((1, rows), np.int32),
        "present": real,
        "crowd": np.zeros((1, rows), bool),
        "area": 64.0 * real,
        "scale": np.ones((1, 2)),
    }
    found = {"box": box, "score": 0.9 * real, "category": labels["category"]}
    found = {name: value[:, :returned] for name, value in found.items()}
    task = Detection(("cat",), rows, detections=returned)
    result = task.reduce({"detected": found, "labels": labels})
    assert result["ap"] == result["ar"] == result["ap_small"] == 1
    few = {name: value[:, :60] for name, value in found.items()}
    assert task.reduce({"detected": few, "labels": labels})["ar"] == pytest.approx(0.5)


def test_sizes_are_those_of_the_original_image():
    small = measures(labels=labels_of([(0, (0, 0, 16, 16))]))
    assert small["ap_small"] == 1 and np.isnan(small["ap_large"])
    large = measures(labels=labels_of([(0, (0, 0, 16, 16))], scale=0.125))
    assert large["ap_large"] == 1 and np.isnan(large["ap_small"])


def test_boxes_of_crowds_are_neither_found_nor_missed():
    labels = labels_of([(0, (2, 2, 30, 30)), (0, (32, 32, 62, 62))])
    labels["crowd"][0, 1] = True
    result = measures(labels=labels)
    assert result["ap"] == 1 and result["ar"] == 1
    one = {**detected(labels), "score": np.array([[0.9, 0.0, 0.0, 0.0]], np.float32)}
    assert Detection(CATEGORIES, 4).reduce({"detected": one, "labels": labels})["ap"] == 1


# --- Losses


def outputs_of(rng, batch, anchors, classes=3):
    corner = rng.uniform(0, 40, (batch, anchors, 2))
    anchor = np.concatenate([corner, corner + rng.uniform(8, 24, (batch, anchors, 2))], -1)
    return {
        "logits": rng.normal(size=(batch, anchors, classes)).astype(np.float32),
        "offsets": rng.normal(size=(batch, anchors, 4)).astype(np.float32) * 0.2,
        "anchors": anchor.astype(np.float32),
    }


def intersection_over_union(a, b):
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    both = width * height
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def expected_losses(outputs, labels, i):
    """Focal and smooth L1 loss of image i, anchor by anchor."""
    anchors = outputs["anchors"][i].astype(float)
    real = [m for m in range(4) if labels["present"][i, m] and not labels["crowd"][i, m]]
    table = np.array(
        [[intersection_over_union(labels["box"][i, m], a) for a in anchors] for m in real]
    ).reshape(len(real), len(anchors))
    focal, box, positives = 0.0, 0.0, 0
    for a, anchor in enumerate(anchors):
        overlaps = table[:, a]
        best = overlaps.max(initial=0)
        nearest = any(overlaps[m] > 0 and overlaps[m] == table[m].max() for m in range(len(real)))
        positive = bool(real) and (best >= 0.5 or nearest)
        if not positive and best >= 0.4:
            continue
        m = real[int(overlaps.argmax())] if positive else None
        for k, logit in enumerate(outputs["logits"][i, a].astype(float)):
            p = 1 / (1 + np.exp(-logit))
            target = m is not None and labels["category"][i, m] == k
            pt, alpha = (p, 0.25) if target else (1 - p, 0.75)
            focal -= alpha * (1 - pt) ** 2 * np.log(pt)
        if m is not None:
            positives += 1
            x0, y0, x1, y1 = labels["box"][i, m].astype(float)
            w, h = anchor[2] - anchor[0], anchor[3] - anchor[1]
            true = [
                ((x0 + x1) / 2 - (anchor[0] + anchor[2]) / 2) / w,
                ((y0 + y1) / 2 - (anchor[1] + anchor[3]) / 2) / h,
                np.log((x1 - x0) / w),
                np.log((y1 - y0) / h),
            ]
            error = np.abs(np.array(true) - outputs["offsets"][i, a])
            box += np.where(error < 1 / 9, 4.5 * error**2, error - 1 / 18).sum()
    return focal / max(positives, 1), box / max(positives, 1)


def test_losses_against_code_for_single_anchors():
    rng, task = np.random.default_rng(0), Detection(CATEGORIES, max_boxes=4)
    labels, outputs = labels_of(*IMAGES), outputs_of(rng, len(IMAGES), 80)
    labels["crowd"][3, 1] = True
    losses = jax.jit(lambda o, y: task.losses(o, y, train=True))(outputs, labels)
    for i in range(len(IMAGES)):
        focal, box = expected_losses(outputs, labels, i)
        assert float(losses["focal"][i]) == pytest.approx(focal, rel=1e-4)
        assert float(losses["box"][i]) == pytest.approx(box, rel=1e-4)
    assert float(losses["box"][2]) == 0  # no object


@pytest.mark.parametrize("box_loss", ["smooth_l1", "giou"])
def test_descending_the_losses_finds_the_boxes(box_loss):
    rng, task = np.random.default_rng(1), Detection(CATEGORIES, 4, box_loss=box_loss)
    labels, outputs = labels_of(*IMAGES), outputs_of(rng, len(IMAGES), 60)
    anchors = outputs.pop("anchors")

    @jax.jit
    def descend(free):
        def total(free):
            losses = task.losses({**free, "anchors": anchors}, labels, train=True)
            return sum(jnp.sum(loss) for loss in losses.values())

        def step(free, _):
            gradient = jax.grad(total)(free)
            return jax.tree.map(lambda x, g: x - 0.3 * jnp.sign(g) * 0.1, free, gradient), None

        return jax.lax.scan(step, free, None, length=400)[0]

    final = {**descend(outputs), "anchors": anchors}
    statistics = jax.device_get(task.statistics(final, jnp.zeros((4, *SHAPE)), labels))
    assert task.reduce(statistics)["ap50"] == pytest.approx(1)


def test_extreme_outputs_have_finite_losses_and_gradients():
    task, labels = Detection(CATEGORIES, 4), labels_of(*IMAGES)
    outputs = outputs_of(np.random.default_rng(2), len(IMAGES), 20)
    outputs = {**outputs, "logits": 1e4 * outputs["logits"], "offsets": 1e4 * outputs["offsets"]}

    def total(logits, offsets):
        given = {**outputs, "logits": logits, "offsets": offsets}
        return sum(map(jnp.sum, task.losses(given, labels, train=True).values()))

    gradients = jax.jit(jax.grad(total, argnums=(0, 1)))(outputs["logits"], outputs["offsets"])
    assert all(bool(jnp.isfinite(g).all()) for g in gradients)


# --- Augmentation


@pytest.mark.parametrize(
    "config",
    [
        Augment(flip=True),
        Augment(pad_crop=12),
        Augment(zoom=(0.5, 2.0)),
        Augment(True, 6, 0, 0.0, (0.7, 1.4)),
    ],
    ids=["flip", "shift", "zoom", "all"],
)
def test_boxes_stay_on_what_they_surround(config):
    """Bright rectangles are found where the boxes say, and nowhere else."""
    task, count = Detection(("cat",), max_boxes=1), 16
    labels = labels_of(*[[(0, (18, 24, 42, 36))]] * count, rows=1)
    image = np.zeros((count, *SHAPE), np.float32)
    image[:, 24:36, 18:42] = 100
    after, moved = jax.jit(
        lambda key, x, y: task.augment(key, x, y, config, (0.0,) * 3, (1.0,) * 3)
    )(jax.random.key(3), image, labels)
    after, moved = np.asarray(after), jax.device_get(moved)
    assert moved["present"].sum() > count / 2
    places = []
    for x, box, present in zip(after, moved["box"][:, 0], moved["present"][:, 0], strict=True):
        if not present:
            continue
        rows, columns = np.nonzero(x[..., 0] > 50)
        found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        np.testing.assert_allclose(box, found, atol=1.01)
        places.append(tuple(found))
    assert len(set(places)) > 1


def test_boxes_that_leave_the_image_are_dropped():
    task = Detection(("cat",), max_boxes=2)
    labels = labels_of(*[[(0, (0, 0, 4, 4)), (0, (30, 30, 34, 34))]] * 8, rows=2)
    _, moved = task.augment(
        jax.random.key(0), jnp.zeros((8, *SHAPE)), labels, Augment(zoom=(4.0, 4.0)), None, None
    )
    inside = (moved["box"] >= 0) & (moved["box"] <= 64)
    assert bool(inside.all()) and 0 < int(moved["present"].sum()) < 16


# --- Errors


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"categories": ()}, "at least one"),
        ({"categories": ("a", "a")}, "no name twice"),
        ({"max_boxes": 0}, "max_boxes is 0"),
        ({"box_loss": "l7"}, "'smooth_l1' or 'giou'"),
        ({"iou_threshold": 2.0}, "iou_threshold"),
    ],
)
def test_bad_options(given, message):
    with pytest.raises(TaskError, match=message):
        Detection(**{"categories": CATEGORIES, **given})


def test_outputs_of_a_classifier_are_refused():
    task = Detection(CATEGORIES)
    with pytest.raises(TaskError, match=r"choose a detector, such as retinanet-resnet18"):
        task.check_outputs(jnp.zeros((2, 3)), SHAPE)
    outputs = outputs_of(np.random.default_rng(0), 2, 10, classes=4)
    with pytest.raises(TaskError, match=r"needs \{'logits': \(B, A, 3\)"):
        task.check_outputs(outputs, SHAPE)
    task.check_outputs({**outputs, "logits": outputs["logits"][..., :3]}, SHAPE)


def test_labels_are_checked():
    task, labels = Detection(CATEGORIES, max_boxes=4), labels_of(*IMAGES)
    task.check_labels(labels, SHAPE)
    wrong = labels_of([(3, (0, 0, 5, 5))])
    with pytest.raises(TaskError, match="categories run from 3 to 3"):
        task.check_labels(wrong, SHAPE)
    with pytest.raises(TaskError, match="x0 < x1"):
        task.check_labels(labels_of([(0, (5, 0, 5, 5))]), SHAPE)
    with pytest.raises(TaskError, match="the label of one input"):
        task.check_labels(labels["box"], SHAPE)
