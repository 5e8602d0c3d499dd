"""Data: sets by name, batches by step, augmentation on the device.

    images = load("digits")
    for batch in train_batches(images.train, batch_size=128, seed=0, start_step=0):
        x = augment(key, batch["image"], Augment(pad_crop=1), images.mean, images.std)

Only NumPy and JAX are imported here; tensorflow-datasets, grain, pillow and scikit-learn are where they are used.
"""

from paramshare.training.data.augment import Augment, augment, normalise
from paramshare.training.data.batches import Batch, eval_batches, train_batches
from paramshare.training.data.error import DataError
from paramshare.training.data.image_set import ArraySource, Example, ImageSet, Source, from_arrays
from paramshare.training.data.loading import load
from paramshare.training.data.order import epoch_order, train_indices

__all__ = [
    "ArraySource",
    "Augment",
    "Batch",
    "DataError",
    "Example",
    "ImageSet",
    "Source",
    "augment",
    "epoch_order",
    "eval_batches",
    "from_arrays",
    "load",
    "normalise",
    "train_batches",
    "train_indices",
]
