"""Data: sets by name, batches by step, augmentation on the device.

    images = load("digits")
    for batch in train_batches(images.train, batch_size=128, seed=0, start_step=0):
        x = augment(key, batch["image"], Augment(pad_crop=1), images.mean, images.std)

Only NumPy and JAX are imported here; tensorflow-datasets, grain, pillow and scikit-learn are where they are used.
"""

from paramshare.training.data.augment import Augment, augment, normalise
from paramshare.training.data.batches import Batch, eval_batches, train_batches
from paramshare.training.data.curriculum import Curriculum
from paramshare.training.data.error import DataError
from paramshare.training.data.image_set import ArraySource, Example, ImageSet, Source, from_arrays
from paramshare.training.data.loading import load
from paramshare.training.data.order import epoch_order, train_indices
from paramshare.training.data.task import CLASSES, Classes, Paths, Task

__all__ = [
    "CLASSES",
    "ArraySource",
    "Augment",
    "Batch",
    "Classes",
    "Curriculum",
    "DataError",
    "Example",
    "ImageSet",
    "Paths",
    "Source",
    "Task",
    "augment",
    "epoch_order",
    "eval_batches",
    "from_arrays",
    "load",
    "normalise",
    "train_batches",
    "train_indices",
]
