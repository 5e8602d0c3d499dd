"""Tasks: what networks are trained to do. Labels, augmentation, losses, measures; one per file."""

try:
    import pydantic  # noqa: F401
except ModuleNotFoundError as error:
    # `import paramshare` needs no pydantic; all from here on belongs to the extra "train".
    raise ModuleNotFoundError(
        f'{error.name} is not installed; run `pip install "paramshare[train]"`', name=error.name
    ) from None

from paramshare.tasks.augment import Augment, AugmentError, normalise
from paramshare.tasks.classification import Classification
from paramshare.tasks.detection import Detection
from paramshare.tasks.paths import Paths
from paramshare.tasks.pose import Pose
from paramshare.tasks.regression import Regression
from paramshare.tasks.several import Several
from paramshare.tasks.task import Curves, Measure, Task, TaskError
from paramshare.tasks.tokens import Tokens

__all__ = [
    "Augment",
    "AugmentError",
    "Classification",
    "Curves",
    "Detection",
    "Measure",
    "Paths",
    "Pose",
    "Regression",
    "Several",
    "Task",
    "TaskError",
    "Tokens",
    "normalise",
]
