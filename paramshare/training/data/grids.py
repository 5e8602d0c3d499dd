"""Shortest paths on grids: problems for networks that have to learn an algorithm. Exact, of any size, a pure function of seed and index."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from paramshare.training.data.error import DataError

PAIRS_A_GRID = 8  # pairs of points drawn on one grid before all of it is drawn again
GRIDS = 200  # drawn for one problem before giving up


@dataclasses.dataclass(frozen=True)
class Grids:
    """A kind of problem: which cells lie on a shortest path between two points of a grid with obstacles.

    Cells are obstacles independently of each other, with probability `density`. Two different free cells are the points, of all pairs
    that some square of `window` x `window` cells holds, equally likely; steps go to the four neighbours. A pair without a path is drawn
    again; after 8 in vain, so is the grid. The target is the union of all shortest paths, both points included.

    The paper (Savarese & Maire, ICLR 2019, section 4.3) describes the task; connectivity, target and the meaning of the window are this
    library's reading.

    Attributes:
      height: of the grid, in cells.
      width: likewise.
      window: side of the square that holds both points; the grid's longer side or more leaves them free.
      density: of obstacles, in [0, 1).

    Raises:
      DataError: if a number is not a legal one.

    Example:
      >>> from paramshare.training.data.grids import Grids
      >>> images, targets = Grids(window=9).draw(seed=0, indices=range(100))
      >>> images.shape, targets.shape
      ((100, 32, 32, 2), (100, 32, 32))
      >>> bool((targets[images[..., 1] > 0] == 1).all()), bool((targets[images[..., 0] > 0] == 0).all())
      (True, True)
    """

    height: int = 32
    width: int = 32
    window: int = 5
    density: float = 0.1

    def __post_init__(self):
        for name, least in (("height", 1), ("width", 1), ("window", 2)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
                raise DataError(f"Grids({name}={value!r}): {name} must be an integer, {least} or more")
        if self.height * self.width < 2:
            raise DataError("Grids: a grid of one cell has no two points; make it larger")
        if isinstance(self.density, bool) or not isinstance(self.density, int | float) or not 0 <= self.density < 1:
            raise DataError(f"Grids(density={self.density!r}): the density of obstacles must be in [0, 1)")

    def draw(self, seed: int, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """The problems of these numbers; each depends on (seed, index) and the attributes alone.

        Args:
          seed: of the set, 0 or more.
          indices: which problems, each 0 or more.

        Returns:
          Images (N, H, W, 2), uint8: obstacles, and the two points; and targets (N, H, W), uint8: 1 on a shortest path, else 0.

        Raises:
          DataError: if seed or an index is negative, or density and window leave no problem to be found.
        """
        numbers = np.asarray(list(indices), np.int64)
        if seed < 0 or (numbers < 0).any():
            raise DataError(f"Grids.draw(seed={seed}): seeds and indices are 0 or more")
        # What sets kinds apart lies in the counter's high words: their streams do not meet.
        place = [0, 0, self.window, (self.height << 32) + self.width]
        streams = [np.random.Generator(np.random.Philox(key=[seed, index], counter=place)) for index in numbers]
        free = np.zeros((len(numbers), self.height, self.width), bool)
        ends, targets = np.zeros((len(numbers), 2, 2), np.int64), np.zeros_like(free)
        left = np.arange(len(numbers))
        for attempt in range(GRIDS * PAIRS_A_GRID):
            for i in left:
                if attempt % PAIRS_A_GRID == 0:
                    free[i] = streams[i].random(free[i].shape) >= self.density
                ends[i] = self._pair(streams[i], free[i])
            targets[left], lengths = shortest_paths(free[left], ends[left, 0], ends[left, 1])
            left = left[lengths < 1]  # none, or from a cell to itself
            if not len(left):
                break
        else:
            raise DataError(f"{self}: no problem found in {GRIDS} grids; lower the density, or widen the window")
        images = np.zeros((*free.shape, 2), np.uint8)
        images[..., 0] = ~free
        rows = np.arange(len(numbers))
        for end in (0, 1):
            images[rows, ends[:, end, 0], ends[:, end, 1], 1] = 1
        return images, targets.astype(np.uint8)

    def stream(self, seed: int, batch_size: int, start: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Problems without end, none twice: batch s holds the numbers s batch_size .. (s + 1) batch_size - 1 of `draw`.

        `paramshare.training.data.curriculum` draws its fixed sets to train, validate and test on by seeds 0, 1 and 2: give another one.

        Args:
          seed: of the stream, 0 or more.
          batch_size: problems a batch, B, 1 or more.
          start: the first batch; a stream that starts at s goes on where s batches ended.

        Returns:
          Iterator of images (B, H, W, 2) and targets (B, H, W), uint8, as `draw` gives them.

        Raises:
          DataError: if a number is not a legal one.

        Example:
          >>> stream = Grids(window=9).stream(seed=3, batch_size=4, start=2)
          >>> bool((next(stream)[0] == Grids(window=9).draw(3, range(8, 12))[0]).all())
          True
        """
        for name, value, least in (("seed", seed, 0), ("batch_size", batch_size, 1), ("start", start, 0)):
            if not isinstance(value, int | np.integer) or value < least:
                raise DataError(f"Grids.stream({name}={value!r}): {name} must be an integer, {least} or more")
        batches = (range(batch * batch_size, (batch + 1) * batch_size) for batch in itertools.count(start))
        return (self.draw(seed, numbers) for numbers in batches)

    def _pair(self, stream: np.random.Generator, free_HxW: np.ndarray) -> np.ndarray:
        """Two cells that a window holds; the same one twice where the draw is to be repeated. All legal pairs are equally likely."""
        if np.count_nonzero(free_HxW) < 2:
            return np.zeros((2, 2), np.int64)
        # A first cell and an offset, both uniform; what leaves the grid, or is an obstacle, is rejected.
        size, reach = np.array([self.height, self.width]), np.minimum(self.window, [self.height, self.width]) - 1
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


def shortest_paths(free_BxHxW: np.ndarray, source_Bx2: np.ndarray, target_Bx2: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The cells that lie on any shortest path between two cells, by breadth-first search, 64 grids a machine word.

    Args:
      free_BxHxW: where one may go; steps lead to the four neighbours.
      source_Bx2: (row, column) of one end of each grid.
      target_Bx2: of the other.

    Returns:
      (B, H, W) bool, and the number of steps, (B,) int: -1, and no cell, where there is no path.

    Example:
      >>> import numpy as np
      >>> from paramshare.training.data.grids import shortest_paths
      >>> free = np.array([[[1, 1, 1], [1, 0, 1], [1, 1, 1]]], bool)
      >>> cells, steps = shortest_paths(free, np.array([[0, 0]]), np.array([[2, 2]]))
      >>> int(steps[0]), cells[0].astype(int).tolist()  # both ways around
      (4, [[1, 1, 1], [1, 0, 1], [1, 1, 1]])
    """
    batch = len(free_BxHxW)
    free = _pack(free_BxHxW)
    source, target = (_pack(_points(free_BxHxW.shape, cells)) & free for cells in (source_Bx2, target_Bx2))
    levels, seen = [source], source
    while levels[-1].any() and (target & ~seen).any():
        fresh = _spread(levels[-1]) & free & ~seen
        levels.append(fresh)
        seen = seen | fresh
    # Backwards: a cell of a level is on a path if it is the target, or next to one of the level behind it that is.
    lengths, on_path, behind = np.full(batch, -1), np.zeros_like(free), np.zeros_like(free)
    for steps in range(len(levels) - 1, -1, -1):
        arrived = levels[steps] & target
        lengths[_unpack(arrived, batch).any(axis=(1, 2))] = steps
        behind = (_spread(behind) & levels[steps]) | arrived
        on_path |= behind
    return _unpack(on_path, batch), lengths


def apart(image_NxHxWx2: np.ndarray) -> np.ndarray:
    """How far apart a problem's points are, (N,) int: the side of the smallest square that holds both, the least `window` that allows them.

    Example:
      >>> images, _ = Grids(window=9).draw(0, range(1000))
      >>> int(apart(images).min()), int(apart(images).max())
      (2, 9)
    """
    point_NxHxW = np.asarray(image_NxHxWx2[..., 1] > 0)
    return np.maximum(_extent(np.any(point_NxHxW, axis=2)), _extent(np.any(point_NxHxW, axis=1)))


def _extent(marked_NxL: np.ndarray) -> np.ndarray:
    """From the first to the last that is marked, both counted."""
    return marked_NxL.shape[1] - np.argmax(marked_NxL[:, ::-1], axis=1) - np.argmax(marked_NxL, axis=1)


def _points(shape: tuple[int, ...], cells_Bx2: np.ndarray) -> np.ndarray:
    marked = np.zeros(shape, bool)
    marked[np.arange(shape[0]), cells_Bx2[:, 0], cells_Bx2[:, 1]] = True
    return marked


def _pack(cells_BxHxW: np.ndarray) -> np.ndarray:
    """(H, W, ceil(B / 64)) uint64: bit b of a word is a grid's cell."""
    padded = np.pad(cells_BxHxW, ((0, -len(cells_BxHxW) % 64), (0, 0), (0, 0)))
    return np.packbits(np.ascontiguousarray(np.moveaxis(padded, 0, -1)), axis=-1).view(np.uint64)


def _unpack(words_HxWxN: np.ndarray, batch: int) -> np.ndarray:
    return np.moveaxis(np.unpackbits(words_HxWxN.view(np.uint8), axis=-1), -1, 0)[:batch].astype(bool)


def _spread(words_HxWxN: np.ndarray) -> np.ndarray:
    """The four neighbours of every cell."""
    spread = np.zeros_like(words_HxWxN)
    spread[1:] |= words_HxWxN[:-1]
    spread[:-1] |= words_HxWxN[1:]
    spread[:, 1:] |= words_HxWxN[:, :-1]
    spread[:, :-1] |= words_HxWxN[:, 1:]
    return spread
