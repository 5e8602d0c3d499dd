"""Object detection: boxes with categories and scores."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from paramshare.tasks import boxes
from paramshare.tasks.augment import Augment, Draws, move
from paramshare.tasks.average_precision import average_precision, precision_recall
from paramshare.tasks.task import Curves, Measure, Task, TaskError

ALPHA, GAMMA, BETA = 0.25, 2.0, 1 / 9
CANDIDATES = 1000
SHOWN = 0.3  # least score of a box that is drawn
LEAST = 0.25  # of a box that must remain in the image when it is cropped


@dataclasses.dataclass(frozen=True)
class Detection(Task):
    """Finds objects: outputs are class logits and boxes for a dense set of anchors.

    Outputs, for any number A of anchors, as `paramshare.models.RetinaNet` gives them: `logits`
    (B, A, K), `offsets` (B, A, 4) and `anchors` (B, A, 4). Boxes are (x0, y0, x1, y1) in pixels of
    the network's input.

    Labels, with M = `max_boxes` rows an image: `box` (B, M, 4), `category` (B, M), `present` (B, M)
    bool, `crowd` (B, M) bool, for boxes around many objects, which are not trained on; `area`
    (B, M), in pixels of the original image; and `scale` (B, 2), input pixels per original pixel
    along x and y.

    Losses: `focal`, the focal loss of all classes and anchors, and `box`, smooth L1 of the offsets
    or generalised IoU of the boxes of positive anchors; each divided by the number of positive
    anchors of its image. An anchor is positive if it overlaps an object by 0.5 or more, or as much
    as any anchor overlaps that object; negative below 0.4; otherwise it does not count.

    Measures, all of COCO's: `ap`, the score, average precision averaged over the IoU thresholds
    0.5, 0.55, ..., 0.95 and over categories; `ap50` and `ap75`; `ap_small`, `ap_medium` and
    `ap_large`, objects of less than 32^2, of less than 96^2, and of more pixels of the original
    image; `ar`, average recall with 100 boxes an image; and the `ap` of each category,
    `ap/CATEGORY`. A measure without objects is NaN.

    Attributes:
      categories: their names, K of them.
      max_boxes: rows of the labels, M.
      box_loss: "smooth_l1" or "giou".
      detections: boxes per image that are returned, D.
      score_threshold: boxes below it are dropped.
      iou_threshold: of two boxes of one category that overlap more, the one with the lower score is
        dropped.

    Raises:
      TaskError: if there are no categories, a name occurs twice, or a value is out of range.

    Example:
      >>> task = Detection(("cat", "dog"), max_boxes=3)
      >>> {name: leaf.shape for name, leaf in task.label_spec((64, 64, 3)).items()}["box"]
      (3, 4)

    References:
      Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, arXiv:1708.02002.
    """

    categories: tuple[str, ...]
    max_boxes: int = 100
    box_loss: Literal["smooth_l1", "giou"] = "smooth_l1"
    detections: int = 100
    score_threshold: float = 0.05
    iou_threshold: float = 0.5

    name: ClassVar[str] = "detection"
    outputs_per_input: ClassVar[str] = "logits, offsets and anchors of equally many anchors"

    def __post_init__(self) -> None:
        if not self.categories or len(set(self.categories)) < len(self.categories):
            raise TaskError(
                f"categories are {self.categories}; there must be at least one, and no name twice"
            )
        if min(self.max_boxes, self.detections) < 1:
            raise TaskError(
                f"max_boxes is {self.max_boxes} and detections is {self.detections}; both must be "
                "at least 1"
            )
        if self.box_loss not in ("smooth_l1", "giou"):
            raise TaskError(f"box_loss is {self.box_loss!r}; it must be 'smooth_l1' or 'giou'")
        if not (0 <= self.score_threshold < 1 and 0 <= self.iou_threshold <= 1):
            raise TaskError(
                f"score_threshold is {self.score_threshold} and iou_threshold "
                f"{self.iou_threshold}; they must be in [0, 1) and [0, 1]"
            )

    @property
    def measures(  # pyright: ignore[reportIncompatibleVariableOverride]
        self,
    ) -> tuple[Measure, ...]:
        """COCO's measures, then the average precision of each category."""
        return (
            Measure("ap", "AP", "AP"),
            Measure("ap50", "AP50", "AP50"),
            Measure("ap75", "AP75", "AP75"),
            Measure("ap_small", "AP small", "APs"),
            Measure("ap_medium", "AP medium", "APm"),
            Measure("ap_large", "AP large", "APl"),
            Measure("ar", "average recall", "AR"),
            *(Measure(f"ap/{name}", f"AP of {name}", name) for name in self.categories),
        )

    def label_spec(self, input_shape: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
        """Boxes of one image, padded to `max_boxes` rows, and its scale."""
        rows = self.max_boxes
        return {
            "area": jax.ShapeDtypeStruct((rows,), jnp.float32),
            "box": jax.ShapeDtypeStruct((rows, 4), jnp.float32),
            "category": jax.ShapeDtypeStruct((rows,), jnp.int32),
            "crowd": jax.ShapeDtypeStruct((rows,), jnp.bool_),
            "present": jax.ShapeDtypeStruct((rows,), jnp.bool_),
            "scale": jax.ShapeDtypeStruct((2,), jnp.float32),
        }

    def network_options(self) -> dict[str, Any]:
        """The number of classes."""
        return {"num_classes": len(self.categories)}

    def check_outputs(self, outputs: Any, input_shape: tuple[int, ...]) -> None:
        """Checks that the outputs are those of a detector with K classes."""
        expected = {"anchors": 4, "logits": len(self.categories), "offsets": 4}
        if isinstance(outputs, dict) and sorted(outputs) == sorted(expected):
            shapes = {name: tuple(value.shape) for name, value in outputs.items()}
            if {(*shape[:-1], expected[name]) for name, shape in shapes.items()} == {
                *shapes.values()
            } and all(len(shape) == 3 for shape in shapes.values()):
                return
        found = jax.tree.map(lambda leaf: tuple(leaf.shape), outputs)
        raise TaskError(
            f"the outputs of the network have the shapes {found}; the task 'detection' needs "
            f"{{'logits': (B, A, {len(self.categories)}), 'offsets': (B, A, 4), 'anchors': "
            "(B, A, 4)}: choose a detector, such as retinanet-resnet18"
        )

    def check_labels(self, labels: Any, input_shape: tuple[int, ...]) -> None:
        """Checks shapes and kinds and, of concrete arrays, categories and boxes too."""
        super().check_labels(labels, input_shape)
        if not all(isinstance(leaf, np.ndarray) for leaf in labels.values()):
            return
        box, category = labels["box"][labels["present"]], labels["category"][labels["present"]]
        if category.size and not 0 <= category.min() <= category.max() < len(self.categories):
            raise TaskError(
                f"categories run from {category.min()} to {category.max()}; they must be from 0 to "
                f"{len(self.categories) - 1}"
            )
        wrong = ~np.all(np.isfinite(box), axis=-1) | np.any(box[:, 2:] <= box[:, :2], axis=-1)
        if wrong.any():
            raise TaskError(
                f"a box is {box[wrong][0].tolist()}; it must be (x0, y0, x1, y1) with x0 < x1 and "
                "y0 < y1"
            )

    def move_labels(
        self, draws: Draws, labels: Any, config: Augment, shape: tuple[int, ...]
    ) -> Any:
        """Moves boxes with their images; those that leave the image are dropped."""
        corners = move(draws, labels["box"].reshape(shape[0], -1, 2), config, shape[1:3])
        points = corners.reshape(*labels["box"].shape[:-1], 2, 2)
        moved = jnp.concatenate([points.min(axis=-2), points.max(axis=-2)], axis=-1)
        visible = boxes.clip(moved, *shape[1:3])
        remains = boxes.area(visible) > LEAST * boxes.area(moved)
        return {**labels, "box": visible, "present": labels["present"] & remains}

    def losses(self, outputs: Any, labels: Any, *, train: bool) -> dict[str, jax.Array]:
        """Focal loss and box loss of each image, in float32."""
        return jax.vmap(self._losses)(outputs, labels)

    def _losses(self, outputs: Any, labels: Any) -> dict[str, jax.Array]:
        box_Mx4, real_M = labels["box"], labels["present"] & ~labels["crowd"]
        logits_AxK, anchor_Ax4 = outputs["logits"], outputs["anchors"]
        match = boxes.assign(anchor_Ax4, box_Mx4, real_M)
        count = jnp.maximum(jnp.sum(match.positive_A, dtype=jnp.float32), 1)
        category_A = jnp.where(match.positive_A, labels["category"][match.index_A], -1)
        target_AxK = jax.nn.one_hot(category_A, logits_AxK.shape[-1])
        focal_AxK = optax.sigmoid_focal_loss(logits_AxK, target_AxK, alpha=ALPHA, gamma=GAMMA)
        counted_A = match.positive_A | match.negative_A
        # Of anchors without an object, the box is any: keep its logarithms finite.
        matched_Ax4 = jnp.where(match.positive_A[:, None], box_Mx4[match.index_A], anchor_Ax4)
        if self.box_loss == "giou":
            decoded_Ax4 = boxes.decode(outputs["offsets"], anchor_Ax4)
            box_A = 1 - boxes.giou(decoded_Ax4, matched_Ax4)
        else:
            error_Ax4 = jnp.abs(outputs["offsets"] - boxes.encode(matched_Ax4, anchor_Ax4))
            box_A = jnp.sum(
                jnp.where(error_Ax4 < BETA, 0.5 * error_Ax4**2 / BETA, error_Ax4 - 0.5 * BETA),
                axis=-1,
            )
        return {
            "focal": jnp.sum(focal_AxK, where=counted_A[:, None]) / count,
            "box": jnp.sum(box_A, where=match.positive_A) / count,
        }

    def detect(self, outputs: Any, input_shape: tuple[int, ...]) -> dict[str, jax.Array]:
        """The boxes that the outputs stand for, highest score first.

        The 1,000 best scores of all anchors and classes (Lin et al.: of each level of the pyramid)
        are decoded, clipped to the image and thinned out by non-maximum suppression.

        Args:
          outputs: the network's outputs.
          input_shape: (H, W, C).

        Returns:
          `box` (B, D, 4), `score` (B, D), `category` (B, D); score 0 where there are fewer.
        """

        def one(outputs: Any) -> dict[str, jax.Array]:
            score_AxK = jax.nn.sigmoid(outputs["logits"])
            classes = score_AxK.shape[-1]
            score_N, place_N = jax.lax.top_k(score_AxK.ravel(), min(CANDIDATES, score_AxK.size))
            anchor_N, category_N = place_N // classes, place_N % classes
            box_Nx4 = boxes.clip(
                boxes.decode(outputs["offsets"][anchor_N], outputs["anchors"][anchor_N]),
                *input_shape[:2],
            )
            rank_N = jnp.where(score_N > self.score_threshold, score_N, -jnp.inf)
            index_D, valid_D = boxes.suppress(
                box_Nx4, rank_N, category_N, self.iou_threshold, self.detections
            )
            return {
                "box": jnp.where(valid_D[:, None], box_Nx4[index_D], 0),
                "score": jnp.where(valid_D, score_N[index_D], 0),
                "category": jnp.where(valid_D, category_N[index_D], 0),
            }

        return jax.vmap(one)(outputs)

    def statistics(self, outputs: Any, inputs: jax.Array, labels: Any) -> dict[str, Any]:
        """Detections and labels."""
        return {"detected": self.detect(outputs, inputs.shape[1:]), "labels": labels}

    def reduce(self, statistics: Any) -> dict[str, float]:
        """COCO's measures, by faster-coco-eval."""
        return average_precision(statistics["detected"], statistics["labels"], self.categories)

    def curves(self, statistics: Any) -> tuple[Curves, ...]:
        """Precision against recall."""
        detected, labels = statistics["detected"], statistics["labels"]
        lines = precision_recall(detected, labels, self.categories)
        return (Curves("Precision", "recall", lines),) if lines else ()

    def predict(self, outputs: Any, input_shape: tuple[int, ...]) -> dict[str, jax.Array]:
        """The boxes, as `detect` gives them."""
        return self.detect(outputs, input_shape)

    def describe(self, prediction: Any, original: Callable[[Any], Any]) -> dict[str, Any]:
        """`objects`, highest score first: category, score, and box in pixels of the picture."""
        corners_Dx2x2 = original(prediction["box"].reshape(-1, 2, 2))
        return {
            "objects": [
                {
                    "category": self.categories[int(category)],
                    "score": float(score),
                    "box": [round(float(x), 2) for x in corners.ravel()],
                }
                for category, score, corners in zip(
                    prediction["category"], prediction["score"], corners_Dx2x2, strict=True
                )
                if score > 0
            ]
        }

    def draw(self, axes: Any, description: Mapping[str, Any]) -> None:
        """Draws the boxes with a score of at least 0.3, coloured by category."""
        for item in reversed(description["objects"]):  # the likeliest on top
            if item["score"] < SHOWN:
                continue
            colour = f"C{self.categories.index(item['category']) % 10}"
            x0, y0, x1, y1 = item["box"]
            axes.plot([x0, x1, x1, x0, x0], [y0, y0, y1, y1, y0], color=colour, linewidth=1.5)
            axes.text(
                x0,
                y0,
                f"{item['category']} {item['score']:.0%}",
                color="white",
                fontsize=7,
                verticalalignment="bottom",
                bbox={"facecolor": colour, "edgecolor": "none", "pad": 1},
            )
