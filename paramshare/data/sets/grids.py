"""Shortest paths on grids, drawn as a curriculum: the same fixed sets for every run, easy first."""

import dataclasses
import functools
from typing import Annotated, Literal

import numpy as np
import pydantic

from paramshare.data.dataset import Dataset
from paramshare.data.error import DataError
from paramshare.data.grid_problems import GridProblems
from paramshare.data.registry import DataConfig, register
from paramshare.data.sources import ArraySource
from paramshare.tasks import Paths
from paramshare.tasks.config import Count, Fraction, checked_dataclass

PARTS = ("train", "validation", "test")
Part = Literal["train", "validation", "test"]
Window = Annotated[int, pydantic.Field(ge=2, lt=2**31)]


@checked_dataclass(DataError)
class Curriculum:
    """The phases of training, and the test sets beyond them.

    Raises:
      DataError: if a value is out of range, or two test sets would be the same.
    """

    size: Count = 32
    """Side length, in cells, of the grids that are trained on."""
    density: Fraction = 0.1
    """Probability that a cell is an obstacle."""
    windows: Annotated[tuple[Window, ...], pydantic.Field(min_length=1)] = (5, 9, 13, 17, 21)
    """One phase per entry: side of the square that holds both points. All phases take the same
    number of epochs."""
    examples: Count = 5000
    """Training problems of each phase."""
    tests: Count = 1000
    """Test problems of each set."""
    far_windows: tuple[Window, ...] = (25, 32)
    """Test sets with points farther apart than in training, on grids of the same size."""
    far_sizes: tuple[Count, ...] = (48, 64)
    """Test sets on larger grids: for each size, one with the last window and one with points
    anywhere."""
    far_densities: tuple[Fraction, ...] = (0.2, 0.3)
    """Test sets with more obstacles, in the last window."""

    def __post_init__(self) -> None:
        if len(set(self.windows)) < len(self.windows):
            raise DataError(f"curriculum.windows is {self.windows}; no window may occur twice")
        kinds = self.kinds()
        count = (
            len(self.windows)
            + len(self.far_windows)
            + 2 * len(self.far_sizes)
            + len(self.far_densities)
        )
        if min(len(kinds), len(set(kinds.values()))) < count:
            raise DataError(
                f"{self}: two test sets are the same; windows, far_windows, far_sizes and "
                "far_densities must differ"
            )

    def kinds(self) -> dict[str, GridProblems]:
        """The test sets by name: those of the phases, in their order, then those beyond.

        Example:
          >>> list(Curriculum(windows=(5, 9), far_windows=(32,), far_sizes=(64,)).kinds())[:4]
          ['window 5', 'window 9', 'window 32', 'size 64']
        """
        last = self.windows[-1]
        kinds = {
            f"window {window}": self._problems(window=window)
            for window in (*self.windows, *self.far_windows)
        }
        for size in self.far_sizes:
            kinds[f"size {size}"] = self._problems(size=size, window=last)
            kinds[f"size {size}, window {size}"] = self._problems(size=size, window=size)
        return kinds | {
            f"density {density:g}": self._problems(density=density, window=last)
            for density in self.far_densities
        }

    def _problems(
        self, *, window: int, size: int | None = None, density: float | None = None
    ) -> GridProblems:
        size = self.size if size is None else size
        density = self.density if density is None else density
        return GridProblems(size, size, window, density)


@register("grids")
class Grids(DataConfig):
    """Shortest paths on grids, drawn by number; nothing is read from disk.

    The `test` part is that of the last phase; `others` holds all of `Curriculum.kinds`.
    """

    name: str = "grids"
    validation: Fraction = 0.1
    """Validation problems of each phase, drawn in addition, as a fraction of `curriculum.examples`;
    0 for none."""
    curriculum: Curriculum = Curriculum()
    """The phases of training, and the test sets."""

    def load(self, seed: int = 0) -> Dataset:
        """The problems, drawn in some seconds. They do not depend on the seed."""
        del seed
        return _draw(self.curriculum, self.validation)

    def last_phase(self) -> "Grids":
        """The last window alone."""
        curriculum = dataclasses.replace(self.curriculum, windows=self.curriculum.windows[-1:])
        return dataclasses.replace(self, curriculum=curriculum)


def fixed_set(problems: GridProblems, part: Part, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `count` problems of a part; parts share no problem but by chance.

    Returns:
      Images and targets as `GridProblems.draw` returns them.

    Example:
      >>> images, targets = fixed_set(GridProblems(window=5), "test", 10)
      >>> images.shape
      (10, 32, 32, 2)
    """
    return problems.draw(PARTS.index(part), range(count))


@functools.lru_cache(maxsize=2)  # runs of several seeds train on the same problems
def _draw(curriculum: Curriculum, validation: float) -> Dataset:
    kinds = curriculum.kinds()
    phases = [kinds[f"window {window}"] for window in curriculum.windows]
    validations = max(1, round(validation * curriculum.examples)) if validation else 0

    def source(problems: list[GridProblems], part: Part, count: int) -> ArraySource:
        sets = [fixed_set(each, part, count) for each in problems]
        images, targets = zip(*sets, strict=True)
        return ArraySource(np.concatenate(images), np.concatenate(targets))

    return Dataset(
        name="grids",
        train=source(phases, "train", curriculum.examples),
        validation=source(phases, "validation", validations),
        test=source(phases[-1:], "test", curriculum.tests),
        task=Paths(),
        input_shape=(curriculum.size, curriculum.size, 2),
        mean=(0.0, 0.0),
        std=(1.0, 1.0),
        phases=len(phases),
        others={
            name: source([problems], "test", curriculum.tests) for name, problems in kinds.items()
        },
    )
