"""Data: sets by name, batches by step. Importing it imports no package that a set alone needs.

data = Digits(validation=0.1).load(seed=0)
for batch in train_batches(data.train, batch_size=128, seed=0, start_step=0):
    x = data.normalise(batch["input"])
"""

from paramshare.data.batches import Batch, eval_batches, train_batches
from paramshare.data.dataset import Dataset, from_arrays
from paramshare.data.error import DataError
from paramshare.data.order import epoch_order, train_indices
from paramshare.data.registry import AnyData, DataConfig, data_config, register, switch
from paramshare.data.sets import (
    Canvases,
    Coco,
    Curriculum,
    Digits,
    Grids,
    Idx,
    InMemory,
    RotatedDigits,
    Text,
    Tfds,
)
from paramshare.data.sources import ArraySource, Example, Source, Subset
from paramshare.data.vocabulary import Vocabulary

__all__ = [
    "AnyData",
    "ArraySource",
    "Batch",
    "Canvases",
    "Coco",
    "Curriculum",
    "DataConfig",
    "DataError",
    "Dataset",
    "Digits",
    "Example",
    "Grids",
    "Idx",
    "InMemory",
    "RotatedDigits",
    "Source",
    "Subset",
    "Text",
    "Tfds",
    "Vocabulary",
    "data_config",
    "epoch_order",
    "eval_batches",
    "from_arrays",
    "register",
    "switch",
    "train_batches",
    "train_indices",
]
