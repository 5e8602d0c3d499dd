"""The options of a detector that a data set's configuration holds."""

from collections.abc import Sequence
from typing import Literal

from paramshare.data.error import DataError
from paramshare.tasks import Detection
from paramshare.tasks.config import Count, Fraction, checked_dataclass


@checked_dataclass(DataError)
class DetectorOptions:
    """What is trained on boxes, and which boxes are returned; see `paramshare.tasks.Detection`.

    Example:
      >>> DetectorOptions(box_loss="giou").task(["cat", "dog"], max_boxes=5).box_loss
      'giou'
    """

    box_loss: Literal["smooth_l1", "giou"] = "smooth_l1"
    """Smooth L1 of the offsets, or generalised IoU of the boxes."""
    detections: Count = 100
    """Boxes per image that are returned and scored; COCO's measures take 100."""
    score_threshold: Fraction = 0.05
    """Boxes with a lower score are dropped."""
    iou_threshold: Fraction = 0.5
    """Of two boxes of one category that overlap more, the one with the lower score is dropped."""

    def task(self, categories: Sequence[str], max_boxes: int) -> Detection:
        """The task.

        Args:
          categories: their names.
          max_boxes: rows of the labels.
        """
        return Detection(
            tuple(categories),
            max_boxes,
            self.box_loss,
            self.detections,
            self.score_threshold,
            self.iou_threshold,
        )
