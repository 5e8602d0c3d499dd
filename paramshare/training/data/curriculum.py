"""The curriculum of grid problems: the same fixed sets for every run, easier problems first."""

import dataclasses
import functools
from typing import Literal

import numpy as np

from paramshare.training.data.error import DataError
from paramshare.training.data.grids import Grids
from paramshare.training.data.image_set import ArraySource, ImageSet
from paramshare.training.data.task import Paths

PARTS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Curriculum:
    """The problems of data set "grids": phases, and what lies beyond them."""

    size: int = 32
    """Cells a side of the grids that are trained on."""
    density: float = 0.1
    """The probability that a cell is an obstacle."""
    windows: tuple[int, ...] = (5, 9, 13, 17, 21)
    """A phase each: the side of the square that holds both points. Every phase takes the same share of the epochs."""
    examples: int = 5000
    """Problems to train on, each phase."""
    tests: int = 1000
    """Problems to test on, each set."""
    far_windows: tuple[int, ...] = (25, 32)
    """Test sets with points farther apart than trained on, on grids of the same size."""
    far_sizes: tuple[int, ...] = (48, 64)
    """Test sets on larger grids: with the last phase's window each, and with points anywhere."""
    far_densities: tuple[float, ...] = (0.2, 0.3)
    """Test sets with more obstacles, in the last phase's window."""

    def __post_init__(self):
        for name in ("windows", "far_windows", "far_sizes", "far_densities"):
            if not isinstance(getattr(self, name), tuple):
                raise DataError(f"curriculum.{name}={getattr(self, name)!r}: a tuple is wanted, as in {name}={getattr(Curriculum, name)}")

    def check(self) -> None:
        """Raises `DataError` if a number is not a legal one, or two test sets would be the same."""
        if not self.windows or self.examples < 1 or self.tests < 1:
            raise DataError(f"{self}: a curriculum has a window or more, and an example and a test or more in each")
        if len(set(self.windows)) < len(self.windows):
            raise DataError(f"curriculum.windows={self.windows}: each phase has another window")
        kinds = self.kinds()
        wanted = len(self.windows) + len(self.far_windows) + 2 * len(self.far_sizes) + len(self.far_densities)
        if min(len(kinds), len(set(kinds.values()))) < wanted:
            raise DataError(f"{self}: two test sets are the same; let windows, far_windows, far_sizes and far_densities differ")

    def kinds(self) -> dict[str, Grids]:
        """The test sets by name: those of the phases, in their order, and those beyond.

        Example:
          >>> list(Curriculum(windows=(5, 9), far_windows=(32,), far_sizes=(64,), far_densities=(0.3,)).kinds())
          ['window 5', 'window 9', 'window 32', 'size 64', 'size 64, window 64', 'density 0.3']
        """
        last = self.windows[-1]
        found = {f"window {window}": self._grids(window=window) for window in (*self.windows, *self.far_windows)}
        for size in self.far_sizes:
            found[f"size {size}"] = self._grids(height=size, width=size, window=last)
            found[f"size {size}, window {size}"] = self._grids(height=size, width=size, window=size)
        return found | {f"density {density:g}": self._grids(density=density, window=last) for density in self.far_densities}

    def _grids(self, **others: float) -> Grids:
        return Grids(**{"height": self.size, "width": self.size, "density": self.density} | others)  # pyright: ignore[reportArgumentType]


def fixed_set(grids: Grids, part: Literal["train", "validation", "test"], count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first problems of the fixed set of a kind, as `Grids.draw` gives them; parts have no problem in common but by chance.

    Example:
      >>> images, targets = fixed_set(Grids(window=5), "test", 10)
      >>> images.shape
      (10, 32, 32, 2)
    """
    return grids.draw(PARTS.index(part), range(count))


@functools.lru_cache(maxsize=2)  # runs of several seeds train on the same
def curriculum_set(curriculum: Curriculum, validation: float = 0.1) -> ImageSet:
    """The problems as a set to be trained on, phase by phase. Drawn in some seconds, always the same, and kept for the next caller.

    Args:
      curriculum: the phases.
      validation: for each phase, this share of the number of its training problems is drawn besides, to validate on; 0 for none.

    Returns:
      The set; its `test` part is the last phase's, `others` holds all of `Curriculum.kinds`.

    Raises:
      DataError: if a number is not a legal one.
    """
    curriculum.check()
    if not 0 <= validation < 1:
        raise DataError(f"curriculum_set(validation={validation!r}): a share in [0, 1) is wanted")
    phases = [curriculum.kinds()[f"window {window}"] for window in curriculum.windows]
    held = max(1, round(validation * curriculum.examples)) if validation else 0

    def source(kinds: list[Grids], part: Literal["train", "validation", "test"], count: int) -> ArraySource:
        images, targets = zip(*(fixed_set(kind, part, count) for kind in kinds), strict=True)
        return ArraySource(np.concatenate(images), np.concatenate(targets))

    return ImageSet(
        name="grids",
        train=source(phases, "train", curriculum.examples),
        validation=source(phases, "validation", held),
        test=source(phases[-1:], "test", curriculum.tests),
        num_classes=1,
        image_shape=(curriculum.size, curriculum.size, 2),
        mean=(0.0, 0.0),
        std=(1.0, 1.0),
        in_memory=True,
        task=Paths(),
        phases=len(phases),
        others={name: source([kind], "test", curriculum.tests) for name, kind in curriculum.kinds().items()},
    )
