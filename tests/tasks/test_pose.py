"""The pose task: heatmaps, losses, measures, mirror images and augmentation with known answers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paramshare.tasks import Augment, AugmentError, Pose, TaskError
from paramshare.tasks.heatmaps import gaussians, mirror, peaks
from paramshare.tasks.keypoints import SIGMAS

SIZE = 64
BODY = (
    "neck",
    "head_top",
    *(f"{side}_{part}" for part in ("shoulder", "hip", "knee") for side in ("left", "right")),
)
# A person of 40 pixels: torso of length 20 (12, 16), head of length 8.
PLACES = dict(
    zip(
        BODY,
        [(32, 20), (32, 12), (38, 22), (26, 22), (38, 38), (26, 38), (39, 52), (25, 52)],
        strict=True,
    )
)


def task_of(joints=BODY, **options):
    return Pose(joints, image_size=(SIZE, SIZE), **options)


def labels_of(joint_NxJx2, scale=1.0, offset=0.0, **given):
    joint = np.array(joint_NxJx2, np.float32)
    count, joints = joint.shape[:2]
    low, high = joint.min(axis=1), joint.max(axis=1)
    box = np.concatenate([low, high], axis=1) / scale + offset
    label = {
        "joint": joint,
        "visible": np.ones((count, joints), bool),
        "area": np.prod(box[:, 2:] - box[:, :2], axis=1).astype(np.float32),
        "box": box.astype(np.float32),
        "scale": np.full((count, 2), scale, np.float32),
        "offset": np.full((count, 2), offset, np.float32),
        "image": np.arange(count, dtype=np.int32),
    }
    return {**label, **given}


def people(count=3, joints=BODY):
    """People side by side, each shifted by some pixels."""
    place = np.array([PLACES[name] for name in joints], np.float32)
    shift = np.array([3.0, 1.0], np.float32)
    return np.stack([place - 2 + shift * i for i in range(count)])


def painted(task, joint, size=16, stages=2):
    """Heatmaps as good as can be: Gaussians at these places in every stage."""
    maps = jax.vmap(lambda x: gaussians(x, (size, size), (SIZE, SIZE), task.sigma))(
        jnp.asarray(joint, jnp.float32)
    )
    return jnp.stack([maps] * stages, axis=1)


def measures(task, detected, labels, score: Any = 0.9):
    """The measures of poses in pixels of the input."""

    def original(joint):
        return joint / labels["scale"][:, None] + labels["offset"][:, None]

    detected = np.asarray(detected, np.float32)
    return task.reduce(
        {
            "detected": {
                "joint": original(detected),
                "score": np.broadcast_to(np.float32(score), detected.shape[:2]),
            },
            "labels": {**labels, "joint": original(labels["joint"])},
        }
    )


# --- Heatmaps


@pytest.mark.parametrize("shape", [(16, 16), (32, 8)])
def test_a_painted_joint_is_found_within_a_quarter_of_a_pixel(shape):
    """For joints up to the centres of the outermost pixels, at any stride along x and y."""
    rng = np.random.default_rng(0)
    stride = np.array([SIZE / shape[1], SIZE / shape[0]])
    joint = rng.uniform(stride / 2, SIZE - stride / 2, (200, 2)).astype(np.float32)
    inner = np.all((joint > stride) & (joint < SIZE - stride), axis=1)
    heatmap = gaussians(jnp.asarray(joint), shape, (SIZE, SIZE), 1.0)
    found = peaks(heatmap, (SIZE, SIZE)).joint_Jx2
    error = np.abs(np.asarray(found) - joint) / stride
    assert error[inner].max() <= 0.25 + 1e-4
    assert error.max() <= 0.5 + 1e-4 and error[inner].mean() < 0.15


def test_the_centre_of_a_pixel_is_where_images_have_it():
    """A stride of 4: the first heatmap pixel covers the image's from 0 to 4."""
    heatmap = gaussians(jnp.array([[2.0, 6.0], [62.0, 30.0]]), (16, 16), (SIZE, SIZE), 1.0)
    assert float(heatmap[1, 0, 0]) == float(heatmap[7, 15, 1]) == 1
    assert peaks(heatmap, (SIZE, SIZE)).joint_Jx2.tolist() == [[2.0, 6.0], [62.0, 30.0]]


def test_a_mirrored_image_has_mirrored_heatmaps():
    task = task_of()
    joint = people()
    flipped = np.stack([SIZE - joint[..., 0], joint[..., 1]], axis=-1)[:, list(task.mirrored)]
    np.testing.assert_allclose(
        mirror(painted(task, joint), task.mirrored), painted(task, flipped), atol=1e-6
    )


def test_the_flip_test_averages_an_image_and_its_mirror_image():
    task = task_of()
    image = jax.random.normal(jax.random.key(0), (2, SIZE, SIZE, 3))
    views = task.views(image)
    np.testing.assert_array_equal(views[1], image[:, :, ::-1])
    heatmap, other = painted(task, people(2)), painted(task, people(2) + 2)
    merged = task.merge(jnp.stack([heatmap, mirror(other, task.mirrored)]))
    np.testing.assert_allclose(merged, (heatmap + other) / 2, atol=1e-6)
    for single in (task_of(flip_test=False), task_of(("left_hip", "nose"))):
        assert len(single.views(image)) == 1
        np.testing.assert_array_equal(single.merge(heatmap[None]), heatmap)


# --- Losses


def test_perfect_heatmaps_have_no_loss_and_empty_ones_a_loss_of_one():
    task, labels = task_of(sigma=1.2), labels_of(people())
    perfect = task.losses(painted(task, people()), labels, train=True)
    assert list(perfect) == ["stage1", "stage2"]
    for loss in perfect.values():
        np.testing.assert_allclose(loss, 0, atol=1e-6)
    for size in (16, 32):  # the resolution does not matter
        empty = task.losses(jnp.zeros((3, 1, size, size, len(BODY))), labels, train=True)
        np.testing.assert_allclose(empty["stage1"], 1, atol=0.03)  # Gaussians end at the border


def test_every_stage_has_its_own_loss():
    task, labels = task_of(), labels_of(people())
    outputs = painted(task, people()).at[:, 1].set(0)
    losses = task.losses(outputs, labels, train=False)
    assert float(losses["stage1"].max()) < 1e-6 < 0.9 < float(losses["stage2"].min())
    assert float(task.decode(outputs)["score"].max()) == 0  # joints are read off the last stage


def test_joints_that_are_not_visible_or_not_in_the_image_have_no_loss():
    task, labels = task_of(), labels_of(people())
    labels["visible"][0, 2] = False
    labels["joint"][1, 3] = (-3, 10)
    outputs = jax.random.normal(jax.random.key(0), (3, 2, 16, 16, len(BODY)))
    base = task.losses(outputs, labels, train=True)["stage1"]
    changed = outputs.at[0, :, :, :, 2].set(7.0).at[1, :, :, :, 3].set(7.0)
    np.testing.assert_array_equal(task.losses(changed, labels, train=True)["stage1"], base)
    changed = outputs.at[0, :, :, :, 3].set(7.0)
    assert float(task.losses(changed, labels, train=True)["stage1"][0]) > float(base[0])


def test_an_image_without_visible_joints_has_no_loss():
    task, labels = task_of(), labels_of(people())
    labels["visible"][:] = False
    gradient = jax.grad(lambda x: task.losses(x, labels, train=True)["stage1"].sum())(
        jnp.ones((3, 1, 16, 16, len(BODY)))
    )
    assert not gradient.any()


# --- Measures


def test_perfect_poses_are_correct():
    result = measures(task_of(), people(), labels_of(people()))
    assert list(result) == ["pck", "pckh", "pck/neck", "pck/head_top"] + [
        f"pck/{kind}" for kind in ("shoulder", "hip", "knee")
    ]
    assert set(result.values()) == {1.0}
    assert [m.name for m in task_of().measures] == list(result) and task_of().score.name == "pck"


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_joints_are_correct_within_a_fifth_of_the_torso_and_half_of_the_head(scale):
    """Both lengths are of the person, whatever the scale of the crop: 20 and 8 pixels of it."""
    task, joint = task_of(), people()
    labels = labels_of(joint, scale=scale, offset=100.0)
    for distance, pck, pckh in ((3.95, 1, 1), (4.05, 0, 0)):
        moved = joint + np.array([0.6, -0.8], np.float32) * distance
        result = measures(task, moved, labels)
        assert (result["pck"], result["pckh"]) == (pck, pckh)
    one = joint.copy()
    one[:, BODY.index("left_knee"), 0] += 6
    result = measures(task, one, labels)
    assert result["pck/knee"] == 0.5 and result["pck/hip"] == 1
    assert result["pck"] == pytest.approx(1 - 1 / len(BODY))


def test_the_other_diagonal_of_the_torso_stands_in_and_without_it_nobody_counts():
    task, joint = task_of(), people(2)
    labels = labels_of(joint)
    wrong = joint + 30
    labels["visible"][0, BODY.index("left_shoulder")] = False
    joint[1] = wrong[1]
    result = measures(task, joint, labels)
    count = len(BODY)
    assert result["pck"] == pytest.approx((count - 1) / (2 * count - 1))
    labels["visible"][0, BODY.index("left_hip")] = False
    assert measures(task, joint, labels)["pck"] == 0  # the second person's alone
    labels["visible"][:] = False
    assert all(np.isnan(value) for value in measures(task, joint, labels).values())


def test_joints_without_a_torso_are_measured_by_the_box():
    joints = ("neck", "left_knee", "right_knee")
    task, joint = task_of(joints), people(2, joints)
    labels = labels_of(joint)  # boxes of 32 pixels
    for distance, value in ((3.1, 1), (3.3, 0)):
        result = measures(task, joint + np.array([0, distance]), labels)
        assert result["pck_box"] == result["pck_box/knee"] == value
    assert task.score.name == "pck_box" and list(task.batch_measures(None, labels)) == []


def test_statistics_are_in_pixels_of_the_original_image():
    task, joint = task_of(), people()
    labels = labels_of(joint, scale=0.5, offset=7.0)
    outputs = painted(task, joint)
    statistics = jax.device_get(task.statistics(outputs, jnp.zeros((3, SIZE, SIZE, 3)), labels))
    np.testing.assert_allclose(statistics["labels"]["joint"], joint / 0.5 + 7)
    np.testing.assert_allclose(statistics["detected"]["joint"], joint / 0.5 + 7, atol=2.01)
    assert task.reduce(statistics)["pck"] == 1
    hit, counted = task.batch_measures(outputs, labels)["pck"]
    assert hit.tolist() == counted.tolist() == [len(BODY)] * 3


COCO = tuple(SIGMAS)


def standing(count):
    """People with COCO's joints in random places of a square of 200 pixels."""
    joint = np.random.default_rng(0).uniform(0, 200, (count, 17, 2)).astype(np.float32)
    return labels_of(joint, area=np.full(count, 40_000, np.float32))


def test_perfect_poses_have_average_precision_one():
    labels = standing(4)
    result = measures(Pose(COCO), labels["joint"], labels)
    assert {result[name] for name in ("ap", "ap50", "ap75", "ap_large", "ar", "pck")} == {1.0}
    assert np.isnan(result["ap_medium"]) and Pose(COCO).score.name == "ap"
    assert list(result) == [measure.name for measure in Pose(COCO).measures]


@pytest.mark.parametrize(("similarity", "ap"), [(0.72, 0.5), (0.52, 0.1), (0.97, 1.0), (0.4, 0.0)])
def test_average_precision_follows_object_keypoint_similarity(similarity, ap):
    """Every joint is moved to the distance d at which exp(-d^2 / (2 area (2 sigma)^2)) is given."""
    labels = standing(3)
    sigma = 2 * np.array(list(SIGMAS.values()), np.float32)
    distance = sigma * np.sqrt(-2 * 40_000 * np.log(similarity))
    labels["visible"][:, 5] = False  # joints that are not labelled may be anywhere
    moved = labels["joint"] + np.stack([distance, np.zeros(17)], axis=-1)
    moved[:, 5] += 1000
    assert measures(Pose(COCO), moved, labels)["ap"] == pytest.approx(ap)


def test_poses_are_matched_to_the_people_of_an_image():
    """Each pose is that of the other person: right in one image, wrong in two."""
    labels = standing(2)
    other = labels["joint"][[1, 0]]
    assert measures(Pose(COCO), other, labels)["ap"] == 0
    labels["image"][:] = 5
    assert measures(Pose(COCO), other, labels)["ap"] == 1


def test_average_precision_ranks_poses_by_their_scores():
    """A wrong pose ahead of a right one of another image: precision 1/2 up to recall 1/2."""
    labels = standing(2)
    joint = labels["joint"].copy()
    joint[0] += 1000
    for scores, ap in (((0.9, 0.8), 51 / 101 / 2), ((0.8, 0.9), 51 / 101)):
        score = np.array(scores, np.float32)[:, None]
        assert measures(Pose(COCO), joint, labels, score)["ap"] == pytest.approx(ap)


# --- Augmentation


@pytest.mark.parametrize(
    "config",
    [
        Augment(flip=True),
        Augment(pad_crop=10),
        Augment(zoom=(0.6, 1.6)),
        Augment(turn=60),
        Augment(flip=True, pad_crop=4, zoom=(0.8, 1.25), turn=20),
    ],
    ids=["flip", "shift", "zoom", "turn", "all"],
)
def test_joints_stay_on_what_they_mark(config):
    """Each joint is a painted square in its own channel; mirrored, left is on the other side."""
    task, count = task_of(BODY[2:4]), 24
    joint = np.tile(np.array([[[42, 20], [18, 40]]], np.float32), (count, 1, 1))
    image = np.zeros((count, SIZE, SIZE, 2), np.float32)
    image[:, 16:24, 38:46, 0] = 100  # the left shoulder
    image[:, 36:44, 14:22, 1] = 100
    after, moved = jax.jit(
        lambda key, x, y: task.augment(key, x, y, config, (0.0,) * 2, (1.0,) * 2)
    )(jax.random.key(1), image, labels_of(joint))
    after, moved = np.asarray(after), jax.device_get(moved)
    swaps = 0
    for i in range(count):
        # The left shoulder's paint is right of the other one's, unless the image is mirrored.
        columns = [np.flatnonzero(after[i, ..., c].max(axis=0) > 50) for c in (0, 1)]
        if not all(map(len, columns)):
            continue
        swapped = bool(config.flip) and columns[0].mean() < columns[1].mean()
        swaps += swapped
        for channel in (0, 1):
            j = 1 - channel if swapped else channel
            if not moved["visible"][i, j]:
                continue
            rows, xs = np.nonzero(after[i, ..., channel] > 50)
            if min(rows.min(), xs.min()) > 0 and max(rows.max(), xs.max()) < SIZE - 1:
                centre = [xs.mean() + 0.5, rows.mean() + 0.5]
                np.testing.assert_allclose(moved["joint"][i, j], centre, atol=0.8)
    assert (0 < swaps < count) if config.flip else swaps == 0
    assert moved["visible"].sum() > count


def test_joints_that_leave_the_image_are_not_visible_any_more():
    task = task_of()
    labels = labels_of(np.repeat(people(1), 8, axis=0))
    labels["visible"][:, 4] = False
    _, moved = task.augment(
        jax.random.key(0),
        jnp.zeros((8, SIZE, SIZE, 3)),
        labels,
        Augment(pad_crop=32),
        None,
        None,
    )
    inside = np.all((moved["joint"] >= 0) & (moved["joint"] < SIZE), axis=-1)
    np.testing.assert_array_equal(moved["visible"], inside & labels["visible"])
    assert 0 < inside.sum() < inside.size


def test_what_is_not_labelled_is_mirrored_too():
    task = task_of()
    labels = labels_of(np.repeat(people(1), 16, axis=0))
    labels["visible"][:, BODY.index("left_knee")] = False
    _, moved = task.augment(
        jax.random.key(0), jnp.zeros((16, SIZE, SIZE, 3)), labels, Augment(flip=True), None, None
    )
    hidden = [BODY[j] for j in np.nonzero(~np.asarray(moved["visible"]))[1]]
    assert len(hidden) == 16 and set(hidden) == {"left_knee", "right_knee"}


# --- Errors


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"joints": ()}, "at least one"),
        ({"joints": ("a", "a")}, "no name twice"),
        ({"limbs": ((0, 8),)}, r"a limb is \(0, 8\); its joints must be from 0 to 7"),
        ({"sigma": 0.0}, "sigma is 0"),
    ],
)
def test_bad_options(given, message):
    with pytest.raises(TaskError, match=message):
        Pose(**{"joints": BODY, **given})


def test_mirroring_needs_both_sides():
    task = task_of(("nose", "left_eye"))
    task.check_augment(Augment(pad_crop=2), (SIZE, SIZE, 3))
    with pytest.raises(AugmentError, match=r"flip is True.*'left_eye' but no 'right_eye'"):
        task.check_augment(Augment(flip=True), (SIZE, SIZE, 3))


def test_outputs_of_a_classifier_are_refused():
    task, shape = task_of(), (SIZE, SIZE, 3)
    task.check_outputs(jnp.zeros((2, 1, 16, 16, len(BODY))), shape)
    for wrong in ((2, 8), (2, 1, 16, 16, 3), (2, 1, 128, 16, len(BODY))):
        with pytest.raises(TaskError, match=r"\(B, S, h, w, 8\).*such as hourglass2-64"):
            task.check_outputs(jnp.zeros(wrong), shape)
    with pytest.raises(TaskError, match=r"image_size \(64, 64\); make it \(32, 64\)"):
        task.check_outputs(jnp.zeros((2, 1, 16, 16, len(BODY))), (32, 64, 3))


def test_labels_are_checked():
    task, shape = task_of(), (SIZE, SIZE, 3)
    task.check_labels(labels_of(people()), shape)
    wrong = people()
    wrong[1, 2, 0] = np.nan
    with pytest.raises(TaskError, match=r"a visible joint is at \[nan"):
        task.check_labels(labels_of(wrong), shape)
    with pytest.raises(TaskError, match=r"scale goes down to 0\.0"):
        none = np.zeros((3, 2), np.float32)
        task.check_labels({**labels_of(people()), "scale": none}, shape)
    with pytest.raises(TaskError, match="the label of one input"):
        task.check_labels(labels_of(people(joints=BODY[:4])), shape)
