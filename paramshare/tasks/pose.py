"""Pose: where the joints of a person are."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from paramshare.tasks import heatmaps
from paramshare.tasks.augment import Augment, AugmentError, Draws, move
from paramshare.tasks.keypoints import (
    FRACTIONS,
    HEAD,
    SIGMAS,
    TORSO,
    correct,
    keypoint_precision,
    lengths,
    partners,
    ratio,
)
from paramshare.tasks.task import Measure, Task, TaskError


@dataclasses.dataclass(frozen=True)
class Pose(Task):
    """Finds the joints of one person: outputs are heatmaps of a cascade of stages.

    Outputs, as `paramshare.models.Hourglass` gives them: (B, S, h, w, J), the heatmaps of S stages,
    of any size up to that of the image, which they cover. The joints are read off the last stage's.

    Labels, in pixels of the network's input: `joint` (B, J, 2), x and y, and `visible` (B, J) bool,
    whether the joint is labelled; in pixels of the original image: `box` (B, 4) and `area` (B,) of
    the person; `scale` (B, 2) and `offset` (B, 2), so that x_original = x_input / scale + offset;
    and `image` (B,), the number of the image.

    Losses: `stage1`, `stage2`, ..., intermediate supervision: the squared error of a stage's
    heatmaps against Gaussians of height 1 at the joints, summed over pixels, averaged over the
    visible joints in the image, and divided by pi sigma^2, the sum of such a Gaussian's squares. So
    heatmaps of zeros have a loss of about 1 in every stage, at any resolution.

    Measures, over all labelled joints of the set, with distances in pixels of the original image:

    * `pck`, the fraction of joints within 0.2 of the length of the torso, from the left shoulder to
      the right hip, or else from the right shoulder to the left hip (Sapp & Taskar 2013), and for
      each kind of joint, left and right together, `pck/KIND`. People with neither do not count.
    * `pckh`, the fraction within 0.5 of the length of the head, from `neck` to `head_top`. For
      their images with head boxes, Andriluka et al. 2014 take 0.6 of the box's diagonal instead.
    * For COCO's 17 joints, COCO's average precision and recall by object keypoint similarity:
      `ap`, `ap50`, `ap75`, `ap_medium`, `ap_large` and `ar`. People are not detected but taken from
      the labels' boxes, so that these figures are higher than a detector's. A pose's score is the
      mean of its heatmaps' highest values.
    * For joints without a torso, `pck_box` instead of `pck`: the fraction within 0.1 of the longer
      side of the person's box (Yang & Ramanan 2013), and `pck_box/KIND`.

    The score is the first of `ap`, `pck` and `pck_box` that exists. A measure without joints is
    NaN.

    Left and right joints are identified by their names, such as "left_knee" and "right_knee".
    Mirrored training images swap them. Evaluation averages the heatmaps of an image and of its
    mirror image, if every left joint has a right one.

    Attributes:
      joints: names of the J joints.
      limbs: pairs of joints, counted from 0, that are drawn as lines.
      image_size: (H, W) of the network's input.
      sigma: standard deviation of the Gaussians, in pixels of the heatmap.
      flip_test: whether evaluation averages over the mirror image too.

    Raises:
      TaskError: if there are no joints, a name occurs twice, a limb has joints that do not exist,
        or sigma is not positive.

    Example:
      >>> task = Pose(("nose", "left_hip", "right_hip"), image_size=(32, 32))
      >>> heatmap = jnp.zeros((1, 2, 8, 8, 3)).at[:, :, 5, 3].set(0.5)
      >>> task.decode(heatmap)["joint"][0, 0].tolist()
      [14.0, 22.0]

    References:
      Newell, Yang & Deng, "Stacked Hourglass Networks for Human Pose Estimation", ECCV 2016,
      arXiv:1603.06937. Measures: Yang & Ramanan, PAMI 2013; Sapp & Taskar, "MODEC", CVPR 2013;
      Andriluka et al., "2D Human Pose Estimation", CVPR 2014; https://cocodataset.org.
    """

    joints: tuple[str, ...]
    limbs: tuple[tuple[int, int], ...] = ()
    image_size: tuple[int, int] = (256, 256)
    sigma: float = 1.0
    flip_test: bool = True

    name: ClassVar[str] = "pose"
    outputs_per_input: ClassVar[str] = "one heatmap per joint and stage"

    def __post_init__(self) -> None:
        if not self.joints or len(set(self.joints)) < len(self.joints):
            raise TaskError(
                f"joints are {self.joints}; there must be at least one, and no name twice"
            )
        for limb in self.limbs:
            if not all(0 <= joint < len(self.joints) for joint in limb):
                raise TaskError(
                    f"a limb is {limb}; its joints must be from 0 to {len(self.joints) - 1}"
                )
        if not 0 < self.sigma < math.inf:
            raise TaskError(f"sigma is {self.sigma}; it must be positive, such as 1.0")

    @functools.cached_property
    def _segments(self) -> dict[str, list[tuple[int, int]]]:
        """The segments whose lengths the measures of correct joints refer to."""
        number = {name: i for i, name in enumerate(self.joints)}

        def existing(pairs: Sequence[tuple[str, str]]) -> list[tuple[int, int]]:
            return [(number[a], number[b]) for a, b in pairs if a in number and b in number]

        found = {"pck": existing(TORSO), "pckh": existing(HEAD)}
        return {name: segments for name, segments in found.items() if segments}

    @property
    def _main(self) -> str:
        """The measure of correct joints that is reported for each kind of joint."""
        return "pck" if "pck" in self._segments else "pck_box"

    @functools.cached_property
    def _kinds(self) -> dict[str, list[int]]:
        """Kinds of joints, such as "knee", and the numbers of the joints."""
        kinds: dict[str, list[int]] = {}
        for number, name in enumerate(self.joints):
            kinds.setdefault(re.sub(r"^(left|right)_", "", name), []).append(number)
        return kinds

    @functools.cached_property
    def mirrored(self) -> tuple[int, ...]:
        """For each joint the number of the one on the other side, or its own in the middle.

        Raises:
          TaskError: if a left joint has no right one, or a right one no left one.

        Example:
          >>> Pose(("nose", "left_hip", "right_hip")).mirrored
          (0, 2, 1)
        """
        return partners(self.joints)

    @property
    def measures(  # pyright: ignore[reportIncompatibleVariableOverride]
        self,
    ) -> tuple[Measure, ...]:
        """Average precision of COCO's joints, correct joints, and correct joints of each kind."""
        precision = (
            Measure("ap", "OKS AP", "AP"),
            Measure("ap50", "OKS AP50", "AP50"),
            Measure("ap75", "OKS AP75", "AP75"),
            Measure("ap_medium", "OKS AP medium", "APm"),
            Measure("ap_large", "OKS AP large", "APl"),
            Measure("ar", "OKS average recall", "AR"),
        )
        title = FRACTIONS[self._main][0]
        return (
            *(precision if set(self.joints) == set(SIGMAS) else ()),
            Measure(self._main, title, "PCK"),
            *([Measure("pckh", FRACTIONS["pckh"][0], "PCKh")] if "pckh" in self._segments else []),
            *(Measure(f"{self._main}/{kind}", f"{title} of {kind}", kind) for kind in self._kinds),
        )

    def label_spec(self, input_shape: tuple[int, ...]) -> dict[str, Any]:
        """Joints, and where the input was cropped from."""
        joints = len(self.joints)
        return {
            "joint": jax.ShapeDtypeStruct((joints, 2), jnp.float32),
            "visible": jax.ShapeDtypeStruct((joints,), jnp.bool_),
            "area": jax.ShapeDtypeStruct((), jnp.float32),
            "box": jax.ShapeDtypeStruct((4,), jnp.float32),
            "scale": jax.ShapeDtypeStruct((2,), jnp.float32),
            "offset": jax.ShapeDtypeStruct((2,), jnp.float32),
            "image": jax.ShapeDtypeStruct((), jnp.int32),
        }

    def network_options(self) -> dict[str, Any]:
        """The number of heatmaps."""
        return {"num_classes": len(self.joints)}

    def check_outputs(self, outputs: Any, input_shape: tuple[int, ...]) -> None:
        """Checks that the outputs are heatmaps of J joints, no larger than the image."""
        if tuple(input_shape[:2]) != self.image_size:
            raise TaskError(
                f"inputs have shape {tuple(input_shape)}, but the task 'pose' has image_size "
                f"{self.image_size}; make it {tuple(input_shape[:2])}"
            )
        joints = len(self.joints)
        if getattr(outputs, "ndim", 0) == 5:
            _, _, height, width, maps = outputs.shape
            if maps == joints and height <= input_shape[0] and width <= input_shape[1]:
                return
        found = jax.tree.map(lambda leaf: tuple(leaf.shape), outputs)
        raise TaskError(
            f"the outputs of the network have the shape {found}; the task 'pose' needs heatmaps of "
            f"stages, (B, S, h, w, {joints}), no larger than the images: choose a network for "
            "poses, such as hourglass2-64"
        )

    def check_labels(self, labels: Any, input_shape: tuple[int, ...]) -> None:
        """Checks shapes and kinds and, of concrete arrays, that values are finite."""
        super().check_labels(labels, input_shape)
        if not all(isinstance(leaf, np.ndarray) for leaf in labels.values()):
            return
        wrong = labels["visible"] & ~np.isfinite(labels["joint"]).all(axis=-1)
        if wrong.any():
            raise TaskError(
                f"a visible joint is at {labels['joint'][wrong][0].tolist()}; x and y must be "
                "finite, in pixels of the input"
            )
        if not (labels["scale"] > 0).all():
            raise TaskError(
                f"scale goes down to {labels['scale'].min()}; it must be positive, the pixels of "
                "the input per pixel of the original image"
            )

    def check_augment(self, config: Augment, input_shape: tuple[int, ...]) -> None:
        """Checks the configuration; to mirror images, every left joint must have a right one."""
        super().check_augment(config, input_shape)
        if config.flip:
            try:
                self.mirrored  # noqa: B018
            except TaskError as error:
                raise AugmentError(f"augment.flip is True, but {error}; leave flip out") from None

    def move_labels(
        self, draws: Draws, labels: Any, config: Augment, shape: tuple[int, ...]
    ) -> Any:
        """Moves joints with their images; those that leave the image are not visible.

        Labels in pixels of the original image stay as they are.
        """
        joint, visible = move(draws, labels["joint"], config, shape[1:3]), labels["visible"]
        if draws.mirrored_B is not None:
            other = jnp.array(self.mirrored)
            swapped = draws.mirrored_B[:, None]
            joint = jnp.where(swapped[..., None], joint[:, other], joint)
            visible = jnp.where(swapped, visible[:, other], visible)
        return {**labels, "joint": joint, "visible": visible & self._inside(joint)}

    def _inside(self, joint_BxJx2: jax.Array) -> jax.Array:
        """Which joints are in the image, (B, J) bool."""
        x, y = joint_BxJx2[..., 0], joint_BxJx2[..., 1]
        height, width = self.image_size
        return (x >= 0) & (x < width) & (y >= 0) & (y < height)

    def losses(self, outputs: Any, labels: Any, *, train: bool) -> dict[str, jax.Array]:
        """The loss of each stage's heatmaps, `stage1` and so on, in float32."""
        shape = outputs.shape[2:4]
        target_BxHxWxJ = jax.vmap(
            lambda joint: heatmaps.gaussians(joint, shape, self.image_size, self.sigma)
        )(labels["joint"])
        counted_BxJ = labels["visible"] & self._inside(labels["joint"])
        counted_BxJ = counted_BxJ.astype(jnp.float32)
        count_B = jnp.maximum(jnp.sum(counted_BxJ, axis=1), 1)
        squares_BxSxJ = jnp.sum((outputs - target_BxHxWxJ[:, None]) ** 2, axis=(2, 3))
        sums_BxS = jnp.sum(squares_BxSxJ * counted_BxJ[:, None], axis=-1)
        loss_BxS = sums_BxS / (count_B[:, None] * (math.pi * self.sigma**2))
        return {f"stage{i + 1}": loss_BxS[:, i] for i in range(loss_BxS.shape[1])}

    def decode(self, outputs: Any) -> dict[str, jax.Array]:
        """The poses that the outputs stand for.

        Args:
          outputs: the network's outputs.

        Returns:
          `joint` (B, J, 2) in pixels of the network's input, and `score` (B, J), the highest value
          of each heatmap.
        """
        found = jax.vmap(lambda heatmap: heatmaps.peaks(heatmap, self.image_size))(outputs[:, -1])
        return {"joint": found.joint_Jx2, "score": found.height_J}

    def views(self, inputs: jax.Array) -> jax.Array:
        """The inputs and, for the flip test, their mirror images."""
        return jnp.stack([inputs, inputs[:, :, ::-1]]) if self._flips else inputs[None]

    def merge(self, outputs: Any) -> Any:
        """The mean of the heatmaps of the inputs and of their mirror images, mirrored back."""
        if not self._flips:
            return outputs[0]
        return (outputs[0] + heatmaps.mirror(outputs[1], self.mirrored)) / 2

    @functools.cached_property
    def _flips(self) -> bool:
        """Whether evaluation averages over mirror images."""
        try:
            return self.flip_test and bool(self.mirrored)
        except TaskError:  # a left joint has no right one
            return False

    def batch_measures(self, outputs: Any, labels: Any) -> dict[str, tuple[jax.Array, jax.Array]]:
        """Correct joints of the torso or, for joints without a torso, none."""
        if "pck" not in self._segments:  # a box in pixels of the original image would not do
            return {}
        joint_BxJx2, visible_BxJ = labels["joint"], labels["visible"]
        length_B = lengths(joint_BxJx2, visible_BxJ, self._segments["pck"])
        found_BxJx2, fraction = self.decode(outputs)["joint"], FRACTIONS["pck"][1]
        pair = correct(found_BxJx2, joint_BxJx2, visible_BxJ, length_B, fraction)
        hit_B, counted_B = (jnp.sum(x, axis=1, dtype=jnp.float32) for x in pair)
        return {"pck": (hit_B, counted_B)}

    def statistics(self, outputs: Any, inputs: jax.Array, labels: Any) -> dict[str, Any]:
        """Poses and labels, joints in pixels of the original image."""

        def original(joint_BxJx2: jax.Array) -> jax.Array:
            return joint_BxJx2 / labels["scale"][:, None] + labels["offset"][:, None]

        found = self.decode(outputs)
        return {
            "detected": {**found, "joint": original(found["joint"])},
            "labels": {**labels, "joint": original(labels["joint"])},
        }

    def reduce(self, statistics: Any) -> dict[str, float]:
        """Correct joints, of COCO's joints also average precision by faster-coco-eval."""
        found, labels = statistics["detected"], statistics["labels"]
        joint_NxJx2, visible_NxJ = labels["joint"], labels["visible"]
        box_Nx4 = labels["box"]
        size_N = {
            name: lengths(joint_NxJx2, visible_NxJ, segments)
            for name, segments in self._segments.items()
        }
        if self._main == "pck_box":
            size_N["pck_box"] = np.max(box_Nx4[:, 2:] - box_Nx4[:, :2], axis=1)
        values: dict[str, float] = {}
        for name, length_N in size_N.items():
            fraction = FRACTIONS[name][1]
            pair = correct(found["joint"], joint_NxJx2, visible_NxJ, length_N, fraction)
            hit_NxJ, counted_NxJ = map(np.asarray, pair)
            values[name] = ratio(hit_NxJ, counted_NxJ)
            if name == self._main:
                for kind, numbers in self._kinds.items():
                    values[f"{name}/{kind}"] = ratio(hit_NxJ[:, numbers], counted_NxJ[:, numbers])
        if set(self.joints) == set(SIGMAS):
            score_N = found["score"].mean(axis=1)
            values |= keypoint_precision(found["joint"], score_N, labels, self.joints)
        return {measure.name: values[measure.name] for measure in self.measures}

    def predict(self, outputs: Any, input_shape: tuple[int, ...]) -> dict[str, jax.Array]:
        """The joints, as `decode` gives them."""
        del input_shape
        return self.decode(outputs)

    def heatmap(self, outputs: Any) -> jax.Array:
        """The highest of the joints' heatmaps of the last stage at each place."""
        return jnp.max(outputs[:, -1], axis=-1)

    def describe(self, prediction: Any, original: Callable[[Any], Any]) -> dict[str, Any]:
        """`joints`: the name of each, its place in pixels of the picture, and its score."""
        places_Jx2 = original(prediction["joint"])
        return {
            "joints": [
                {"name": name, "x": round(x, 2), "y": round(y, 2), "score": score}
                for name, (x, y), score in zip(
                    self.joints, places_Jx2.tolist(), prediction["score"].tolist(), strict=True
                )
            ]
        }

    def draw(self, axes: Any, description: Mapping[str, Any]) -> None:
        """Draws limbs as lines and joints as dots: left ones blue, right ones red, others green."""
        joints = description["joints"]
        for a, b in self.limbs:
            ends = joints[a], joints[b]
            colour = _colour(joints[b]["name"])
            axes.plot([p["x"] for p in ends], [p["y"] for p in ends], color=colour, linewidth=2)
        for joint in joints:
            axes.plot(joint["x"], joint["y"], "o", color=_colour(joint["name"]), markersize=5)


def _colour(joint: str) -> str:
    return {"left": "#2155a3", "right": "#d1495b"}.get(joint.partition("_")[0], "#4aa564")
