"""Digits on canvases: object detection, and several tasks, without a download."""

from typing import Any, Literal

import numpy as np

from paramshare.data import statistics
from paramshare.data.canvases import Drawing
from paramshare.data.dataset import Dataset
from paramshare.data.detector import DetectorOptions
from paramshare.data.registry import DataConfig, register
from paramshare.data.sets.grey_digits import grey_digits
from paramshare.data.sets.idx import Folder
from paramshare.data.sources import ArraySource
from paramshare.tasks import Classification, Regression, Several, Task
from paramshare.tasks.config import Count, Fraction

PARTS = ("train", "validation", "test")


@register("canvases")
class Canvases(DataConfig):
    """Several digits on a canvas, with boxes and classes; or one, with class, place and angle.

    The digits are scikit-learn's, 8x8, or those of a folder of IDX files such as MNIST's. Digits of
    test canvases are test digits; validation canvases have digits of the training part. Of an .npz
    file every fifth digit is a test digit.
    """

    name: str = "canvases"
    task: Literal["detection", "several"] = "detection"
    """What to predict: the boxes and classes of all digits; or the class (`digit`), the centre in
    pixels (`place`) and the angle in degrees (`angle`) of one turned digit, as several tasks."""
    path: Folder = None
    """Folder of four IDX files, or an .npz file of `image` and `label`; stored as an absolute path.
    None for the digits of scikit-learn."""
    data_dir: str | None = None
    """Where tensorflow-datasets keeps the prepared digits; None for ~/tensorflow_datasets."""
    examples: Count = 2000
    """Canvases to train on."""
    tests: Count = 500
    """Canvases to test on."""
    validation: Fraction = 0.1
    """Validation canvases, drawn in addition, as a fraction of `examples`; 0 for none."""
    drawing: Drawing = Drawing()
    """How canvases are drawn."""
    detector: DetectorOptions = DetectorOptions()
    """For detection: its loss of boxes, and which boxes it returns."""

    def __post_init__(self) -> None:
        drawing = self.drawing
        if self.task == "several" and (drawing.most > 1 or not 0 < drawing.turn <= 90):
            raise ValueError(
                f'data.task "several" needs one digit on a canvas, turned by at most 90 degrees, '
                f"but data.drawing.most is {drawing.most} and data.drawing.turn is "
                f"{drawing.turn:g}; set them to 1 and, for example, 60"
            )

    def load(self, seed: int = 0) -> Dataset:
        """The canvases, drawn in some seconds. They do not depend on the seed."""
        del seed
        digits, classes = grey_digits(self.path, self.data_dir)
        count = max(1, round(self.validation * self.examples)) if self.validation else 0

        def part(name: str, count: int) -> ArraySource:
            image, label = digits["test" if name == "test" else "train"]
            seed = PARTS.index(name)
            images, labels, angle = self.drawing.draw(image, label, seed, range(count))
            return ArraySource(images, self._labels(labels, angle))

        train = part("train", self.examples)
        mean, std = statistics.mean_and_std(train.input)
        return Dataset(
            name="canvases",
            train=train,
            validation=part("validation", count),
            test=part("test", self.tests),
            task=self._task(classes),
            input_shape=(self.drawing.size, self.drawing.size, 1),
            mean=mean,
            std=std,
        )

    def _labels(self, drawn: dict[str, np.ndarray], angle: np.ndarray) -> dict[str, Any]:
        """The labels of canvases that the task has."""
        if self.task == "detection":
            return drawn
        corners = drawn["box"][:, 0].reshape(-1, 2, 2)
        return {"angle": angle, "digit": drawn["category"][:, 0], "place": corners.mean(axis=1)}

    def _task(self, classes: int) -> Task:
        if self.task == "detection":
            return self.detector.task([str(digit) for digit in range(classes)], self.drawing.most)
        half = self.drawing.size / 2
        return Several(
            {
                "angle": Regression(("angle",), scale=self.drawing.turn),
                "digit": Classification(classes),
                "place": Regression(("x", "y"), mean=half, scale=half, point=True),
            }
        )
