"""Digits on canvases: object detection without a download."""

from paramshare.data import statistics
from paramshare.data.canvases import Drawing
from paramshare.data.dataset import Dataset
from paramshare.data.error import DataError
from paramshare.data.registry import DataConfig, register
from paramshare.data.sets.digits import Digits
from paramshare.data.sets.idx import Folder, Idx
from paramshare.data.sources import ArraySource
from paramshare.tasks import Classification, Detection
from paramshare.tasks.config import Count, Fraction

PARTS = ("train", "validation", "test")


@register("canvases")
class Canvases(DataConfig):
    """Several digits on a canvas, with boxes and classes.

    The digits are scikit-learn's, 8x8, or those of a folder of IDX files such as MNIST's. Digits of
    test canvases are test digits; validation canvases have digits of the training part.
    """

    name: str = "canvases"
    path: Folder = None
    """Folder of four IDX files; stored as an absolute path. None for the digits of scikit-learn."""
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

    def load(self, seed: int = 0) -> Dataset:
        """The canvases, drawn in some seconds. They do not depend on the seed."""
        del seed
        digits, classes = self._digits()
        count = max(1, round(self.validation * self.examples)) if self.validation else 0

        def part(name: str, count: int) -> ArraySource:
            source = digits["test" if name == "test" else "train"]
            image, label = source.input[..., 0], source.label
            return ArraySource(*self.drawing.draw(image, label, PARTS.index(name), range(count)))

        train = part("train", self.examples)
        mean, std = statistics.mean_and_std(train.input)
        return Dataset(
            name="canvases",
            train=train,
            validation=part("validation", count),
            test=part("test", self.tests),
            task=Detection(tuple(map(str, range(classes))), max_boxes=self.drawing.most),
            input_shape=(self.drawing.size, self.drawing.size, 1),
            mean=mean,
            std=std,
        )

    def _digits(self) -> tuple[dict[str, ArraySource], int]:
        """Training and test digits, and their number of classes."""
        options = {"data_dir": self.data_dir, "validation": 0.0}
        data = (Idx(path=self.path, **options) if self.path else Digits(**options)).load()
        parts = {"train": data.train, "test": data.test}
        held = {name: part for name, part in parts.items() if isinstance(part, ArraySource)}
        if len(held) < 2 or data.input_shape[2] != 1:
            raise DataError(
                f"the images of {self.path!r} have shape {data.input_shape}; canvases need grey "
                "images that fit into memory: pass another folder"
            )
        assert isinstance(data.task, Classification)
        return held, data.task.num_classes
