"""Shortest paths on grids: problems for networks that have to learn an algorithm.

They are exact, of any size, and a pure function of seed and index.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Annotated

import numpy as np
import pydantic

from paramshare.data.error import DataError
from paramshare.tasks.config import Count, Fraction, checked_dataclass

PAIRS_PER_GRID = 8  # pairs of points drawn on one grid before the grid is drawn again
GRIDS = 200  # grids drawn for one problem before giving up


@checked_dataclass(DataError)
class GridProblems:
    """A kind of problem: which cells lie on a shortest path between two points of a grid.

    Cells are obstacles independently of each other, with probability `density`. The points are two
    different free cells, uniform over all pairs that some square of `window` x `window` cells
    holds; steps go to the four neighbours. A pair without a path is drawn again; after 8 such
    pairs, so is the grid. The target is the union of all shortest paths, both points included.

    The paper (Savarese & Maire, ICLR 2019, section 4.3) describes the task; connectivity, target
    and the meaning of the window are this library's reading.

    Raises:
      DataError: if a value is out of range.

    Example:
      >>> from paramshare.data.grid_problems import GridProblems
      >>> images, targets = GridProblems(window=9).draw(seed=0, indices=range(100))
      >>> images.shape, targets.shape
      ((100, 32, 32, 2), (100, 32, 32))
      >>> obstacles, points = images[..., 0] > 0, images[..., 1] > 0
      >>> bool((targets[points] == 1).all()), bool((targets[obstacles] == 0).all())
      (True, True)
    """

    height: Count = 32
    """Height of the grid, in cells."""
    width: Count = 32
    """Width of the grid, in cells."""
    window: Annotated[int, pydantic.Field(ge=2)] = 5
    """Side of the square that holds both points; the longer side of the grid, or more, puts them
    anywhere."""
    density: Fraction = 0.1
    """Probability that a cell is an obstacle."""

    def __post_init__(self) -> None:
        if self.height * self.width < 2:
            raise DataError("GridProblems: a grid of one cell has no two points; make it larger")

    def draw(self, seed: int, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """The problems with these indices; each depends only on (seed, index) and the fields.

        Args:
          seed: seed of the set, 0 or more.
          indices: which problems, each 0 or more.

        Returns:
          Images (N, H, W, 2) uint8, obstacles and the two points; and targets (N, H, W) uint8, 1 on
          shortest paths, else 0.

        Raises:
          DataError: if the seed or an index is negative, or density and window allow no problem.
        """
        index_N = np.asarray(list(indices), np.int64)
        if seed < 0 or (index_N < 0).any():
            raise DataError(
                f"GridProblems.draw: seed is {seed}; it and all indices must be 0 or more"
            )
        # The high words of the counter tell kinds apart: their streams do not overlap.
        place = [0, 0, self.window, (self.height << 32) + self.width]
        streams = [
            np.random.Generator(np.random.Philox(key=[seed, index], counter=place))
            for index in index_N
        ]
        free = np.zeros((len(index_N), self.height, self.width), bool)
        ends, targets = np.zeros((len(index_N), 2, 2), np.int64), np.zeros_like(free)
        left = np.arange(len(index_N))
        for attempt in range(GRIDS * PAIRS_PER_GRID):
            for i in left:
                if attempt % PAIRS_PER_GRID == 0:
                    free[i] = streams[i].random(free[i].shape) >= self.density
                ends[i] = self._pair(streams[i], free[i])
            targets[left], lengths = shortest_paths(free[left], ends[left, 0], ends[left, 1])
            left = left[lengths < 1]  # none, or from a cell to itself
            if not len(left):
                break
        else:
            raise DataError(
                f"{self}: no problem in {GRIDS} grids; lower the density or widen the window"
            )
        images = np.zeros((*free.shape, 2), np.uint8)
        images[..., 0] = ~free
        rows = np.arange(len(index_N))
        for end in (0, 1):
            images[rows, ends[:, end, 0], ends[:, end, 1], 1] = 1
        return images, targets.astype(np.uint8)

    def stream(
        self, seed: int, batch_size: int, start: int = 0
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """An endless stream of problems, none twice.

        Batch s holds the indices s batch_size .. (s + 1) batch_size - 1 of `draw`. The fixed sets
        of `paramshare.data.sets.grids` use the seeds 0, 1 and 2: pass another one.

        Args:
          seed: seed of the stream, 0 or more.
          batch_size: problems in a batch, B, 1 or more.
          start: index of the first batch.

        Returns:
          Iterator of images (B, H, W, 2) and targets (B, H, W), as `draw` returns them.

        Raises:
          DataError: if a value is out of range.

        Example:
          >>> problems = GridProblems(window=9)
          >>> stream = problems.stream(seed=3, batch_size=4, start=2)
          >>> bool((next(stream)[0] == problems.draw(3, range(8, 12))[0]).all())
          True
        """
        for name, value, least in (
            ("seed", seed, 0),
            ("batch_size", batch_size, 1),
            ("start", start, 0),
        ):
            if not isinstance(value, int | np.integer) or value < least:
                raise DataError(
                    f"GridProblems.stream: {name} is {value!r}; it must be an integer, {least} or "
                    "more"
                )
        batches = (
            range(batch * batch_size, (batch + 1) * batch_size) for batch in itertools.count(start)
        )
        return (self.draw(seed, indices) for indices in batches)

    def _pair(self, stream: np.random.Generator, free_HxW: np.ndarray) -> np.ndarray:
        """Two cells that a window holds, all pairs equally likely; twice one cell to draw again."""
        if np.count_nonzero(free_HxW) < 2:
            return np.zeros((2, 2), np.int64)
        # A uniform cell and a uniform offset; pairs off the grid or on obstacles are rejected.
        size, reach = (
            np.array([self.height, self.width]),
            np.minimum(self.window, [self.height, self.width]) - 1,
        )
        for _ in range(100):
            first = stream.integers(size)
            second = first + stream.integers(-reach, reach + 1)
            if (
                (second >= 0).all()
                and (second < size).all()
                and free_HxW[tuple(first)]
                and free_HxW[tuple(second)]
                and (first != second).any()
            ):
                return np.stack([first, second])
        return np.zeros((2, 2), np.int64)


def shortest_paths(
    free_BxHxW: np.ndarray, source_Bx2: np.ndarray, target_Bx2: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The cells on any shortest path between two cells.

    A breadth-first search of 64 grids at a time, one for each bit of a machine word.

    Args:
      free_BxHxW: cells without obstacle; steps go to the four neighbours.
      source_Bx2: (row, column) of one end in each grid.
      target_Bx2: (row, column) of the other end.

    Returns:
      (B, H, W) bool, and the number of steps, (B,) int. Where there is no path: no cell, and -1.

    Example:
      >>> import numpy as np
      >>> from paramshare.data.grid_problems import shortest_paths
      >>> free = np.array([[[1, 1, 1], [1, 0, 1], [1, 1, 1]]], bool)
      >>> cells, steps = shortest_paths(free, np.array([[0, 0]]), np.array([[2, 2]]))
      >>> int(steps[0]), cells[0].astype(int).tolist()  # both ways around
      (4, [[1, 1, 1], [1, 0, 1], [1, 1, 1]])
    """
    batch = len(free_BxHxW)
    free = _pack(free_BxHxW)
    source, target = (
        _pack(_points(free_BxHxW.shape, cells)) & free for cells in (source_Bx2, target_Bx2)
    )
    levels, reached = [source], source
    while levels[-1].any() and (target & ~reached).any():
        level = _spread(levels[-1]) & free & ~reached
        levels.append(level)
        reached = reached | level
    # Backwards: a cell is on a path if it is the target, or next to a cell of the following level
    # that is on a path.
    lengths, on_path, backward = np.full(batch, -1), np.zeros_like(free), np.zeros_like(free)
    for steps in range(len(levels) - 1, -1, -1):
        arrived = levels[steps] & target
        lengths[_unpack(arrived, batch).any(axis=(1, 2))] = steps
        backward = (_spread(backward) & levels[steps]) | arrived
        on_path |= backward
    return _unpack(on_path, batch), lengths


def smallest_window(image_NxHxWx2: np.ndarray) -> np.ndarray:
    """The side of the smallest square that holds both points of each problem, (N,) int.

    Example:
      >>> images, _ = GridProblems(window=9).draw(0, range(1000))
      >>> int(smallest_window(images).min()), int(smallest_window(images).max())
      (2, 9)
    """
    point_NxHxW = np.asarray(image_NxHxWx2[..., 1] > 0)
    return np.maximum(_extent(np.any(point_NxHxW, axis=2)), _extent(np.any(point_NxHxW, axis=1)))


def _extent(marked_NxL: np.ndarray) -> np.ndarray:
    """The number of places from the first marked one to the last, both included."""
    return (
        marked_NxL.shape[1] - np.argmax(marked_NxL[:, ::-1], axis=1) - np.argmax(marked_NxL, axis=1)
    )


def _points(shape: tuple[int, ...], cells_Bx2: np.ndarray) -> np.ndarray:
    marked = np.zeros(shape, bool)
    marked[np.arange(shape[0]), cells_Bx2[:, 0], cells_Bx2[:, 1]] = True
    return marked


def _pack(cells_BxHxW: np.ndarray) -> np.ndarray:
    """(H, W, ceil(B / 64)) uint64: each bit of a word is a cell of one grid."""
    padded = np.pad(cells_BxHxW, ((0, -len(cells_BxHxW) % 64), (0, 0), (0, 0)))
    return np.packbits(np.ascontiguousarray(np.moveaxis(padded, 0, -1)), axis=-1).view(np.uint64)


def _unpack(words_HxWxN: np.ndarray, batch: int) -> np.ndarray:
    return np.moveaxis(np.unpackbits(words_HxWxN.view(np.uint8), axis=-1), -1, 0)[:batch].astype(
        bool
    )


def _spread(words_HxWxN: np.ndarray) -> np.ndarray:
    """The four neighbours of every cell."""
    spread = np.zeros_like(words_HxWxN)
    spread[1:] |= words_HxWxN[:-1]
    spread[:-1] |= words_HxWxN[1:]
    spread[:, 1:] |= words_HxWxN[:, :-1]
    spread[:, :-1] |= words_HxWxN[:, 1:]
    return spread
