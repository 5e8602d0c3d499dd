"""The data sets that come with the library, one per file. Importing this package registers them."""

from paramshare.data.sets.arrays import InMemory
from paramshare.data.sets.canvases import Canvases
from paramshare.data.sets.coco import Coco
from paramshare.data.sets.digits import Digits
from paramshare.data.sets.grids import Curriculum, Grids
from paramshare.data.sets.idx import Idx
from paramshare.data.sets.rotated_digits import RotatedDigits
from paramshare.data.sets.text import Text
from paramshare.data.sets.tfds import Tfds

__all__ = [
    "Canvases",
    "Coco",
    "Curriculum",
    "Digits",
    "Grids",
    "Idx",
    "InMemory",
    "RotatedDigits",
    "Text",
    "Tfds",
]
