"""Measures of poses: the fraction of correct keypoints, and COCO's average precision."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paramshare.tasks.average_precision import evaluated, named
from paramshare.tasks.task import TaskError

TORSO = (("left_shoulder", "right_hip"), ("right_shoulder", "left_hip"))
HEAD = (("neck", "head_top"),)
# Name of a measure: its title, and the fraction of a length within which a joint is correct.
FRACTIONS = {"pck": ("PCK@0.2", 0.2), "pckh": ("PCKh@0.5", 0.5), "pck_box": ("box PCK@0.1", 0.1)}
PRECISION = ("ap", "ap50", "ap75", "ap_medium", "ap_large", "ar")
# https://cocodataset.org/#keypoints-eval; the evaluator's sigmas, by the names of the joints.
SIGMAS = {
    "nose": 0.026,
    **{f"{side}_eye": 0.025 for side in ("left", "right")},
    **{f"{side}_ear": 0.035 for side in ("left", "right")},
    **{f"{side}_shoulder": 0.079 for side in ("left", "right")},
    **{f"{side}_elbow": 0.072 for side in ("left", "right")},
    **{f"{side}_wrist": 0.062 for side in ("left", "right")},
    **{f"{side}_hip": 0.107 for side in ("left", "right")},
    **{f"{side}_knee": 0.087 for side in ("left", "right")},
    **{f"{side}_ankle": 0.089 for side in ("left", "right")},
}
"""Of COCO's 17 joints: how exactly people agree on them."""


def partners(joints: Sequence[str]) -> tuple[int, ...]:
    """For each joint the number of the one on the other side, or its own in the middle.

    Args:
      joints: names, such as "left_knee", "right_knee" and "nose".

    Raises:
      TaskError: if a left joint has no right one, or a right one no left one.

    Example:
      >>> partners(["nose", "left_hip", "right_hip"])
      (0, 2, 1)
    """
    numbers, other = [], {"left": "right", "right": "left"}
    for name in joints:
        partner = re.sub(r"^(left|right)_", lambda side: f"{other[side[1]]}_", name)
        if partner not in joints:
            raise TaskError(
                f"there is a joint {name!r} but no {partner!r}, so that poses cannot be mirrored; "
                f"the joints are {', '.join(joints)}"
            )
        numbers.append(list(joints).index(partner))
    return tuple(numbers)


def lengths(
    joint_BxJx2: jax.Array, visible_BxJ: jax.Array, segments: Sequence[tuple[int, int]]
) -> jax.Array:
    """Lengths (B,) of the first segment whose two joints are labelled; 0 where there is none.

    Args:
      joint_BxJx2: places of the joints.
      visible_BxJ: which joints are labelled.
      segments: pairs of joints, in order of preference.

    Example:
      >>> joint = jnp.array([[[0.0, 0.0], [3.0, 4.0], [1.0, 0.0]]])
      >>> lengths(joint, jnp.array([[True, False, True]]), [(0, 1), (0, 2)]).tolist()
      [1.0]
    """
    length_B = jnp.zeros(len(joint_BxJx2), jnp.float32)
    for a, b in segments:
        distance_B = jnp.linalg.norm(joint_BxJx2[:, a] - joint_BxJx2[:, b], axis=-1)
        both_B = visible_BxJ[:, a] & visible_BxJ[:, b]
        length_B = jnp.where((length_B == 0) & both_B, distance_B, length_B)
    return length_B


def correct(
    detected_BxJx2: jax.Array,
    joint_BxJx2: jax.Array,
    visible_BxJ: jax.Array,
    length_B: jax.Array,
    fraction: float,
) -> tuple[jax.Array, jax.Array]:
    """Which joints are found within a fraction of a length, and which count, (B, J) bool each.

    Joints that are not labelled, and all joints of people without a length, do not count.
    """
    distance_BxJ = jnp.linalg.norm(detected_BxJx2 - joint_BxJx2, axis=-1)
    counted_BxJ = visible_BxJ & (length_B > 0)[:, None]
    return counted_BxJ & (distance_BxJ <= fraction * length_B[:, None]), counted_BxJ


def ratio(hit: Any, counted: Any) -> float:
    """The fraction of what counts that is hit; NaN where nothing counts."""
    count = int(np.sum(counted))
    return int(np.sum(hit)) / count if count else float("nan")


def keypoint_precision(
    joint_NxJx2: np.ndarray,
    score_N: np.ndarray,
    labels: Mapping[str, np.ndarray],
    joints: Sequence[str],
) -> dict[str, float]:
    """Average precision and recall of poses as COCO defines them, by object keypoint similarity.

    There is one pose for each labelled person, detected in that person's own box, so that nothing
    is said about finding people.

    Args:
      joint_NxJx2: the poses, in pixels of the original images.
      score_N: their scores.
      labels: as `paramshare.tasks.Pose` has them, (N, ...), with `joint` in pixels of the original
        images.
      joints: names of the joints, those of `SIGMAS`.

    Returns:
      `ap`, `ap50`, `ap75`, `ap_medium`, `ap_large` and `ar`. NaN where there is no person.

    Raises:
      TaskError: if faster-coco-eval is not installed.

    Example:
      >>> joint = np.arange(34.0).reshape(1, 17, 2)
      >>> labels = {
      ...     "joint": joint, "visible": np.ones((1, 17), bool), "image": np.array([0]),
      ...     "box": np.array([[0.0, 0.0, 40.0, 40.0]]), "area": np.array([1600.0]),
      ... }
      >>> keypoint_precision(joint, np.array([0.5]), labels, list(SIGMAS))["ap"]
      1.0
    """
    visible_NxJ = np.asarray(labels["visible"], bool)
    if not visible_NxJ.any():
        return dict.fromkeys(PRECISION, float("nan"))
    truth = [
        {
            "id": n + 1,
            "image_id": int(labels["image"][n]) + 1,
            "category_id": 1,
            "keypoints": _flat(labels["joint"][n], 2 * visible_NxJ[n]),
            "num_keypoints": int(visible_NxJ[n].sum()),
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "area": float(labels["area"][n]),
            "iscrowd": 0,
        }
        for n, (x0, y0, x1, y1) in enumerate(np.asarray(labels["box"], np.float64).tolist())
    ]
    found = [
        {
            "image_id": person["image_id"],
            "category_id": 1,
            "keypoints": _flat(joint_NxJx2[n], np.ones(len(joints))),
            "score": float(score_N[n]),
        }
        for n, person in enumerate(truth)
    ]
    images = [{"id": id} for id in sorted({person["image_id"] for person in truth})]
    kinds = [{"id": 1, "name": "person", "keypoints": list(joints), "skeleton": []}]
    sigmas = [SIGMAS[name] for name in joints]
    whole = {"images": images, "categories": kinds, "annotations": truth}
    scored = evaluated(whole, found, "keypoints", kpt_oks_sigmas=sigmas)
    return named(PRECISION, scored.stats[: len(PRECISION)])


def _flat(joint_Jx2: np.ndarray, visibility_J: np.ndarray) -> list[float]:
    """x, y, visibility of each joint, one after the other."""
    point_Jx3 = np.concatenate([joint_Jx2, visibility_J[:, None]], axis=1, dtype=np.float64)
    return point_Jx3.ravel().tolist()
