"""Grid problems: exact against SciPy's shortest paths, and a pure function of seed and index."""

import dataclasses
import itertools

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import shortest_path

from paramshare.data import DataError
from paramshare.data.grid_problems import GridProblems, shortest_paths, smallest_window

RNG = np.random.default_rng(0)


def by_scipy(free_HxW: np.ndarray, source: tuple, target: tuple) -> tuple[np.ndarray, int]:
    """Cells whose distances from both ends add up to the distance between them."""
    height, width = free_HxW.shape
    number = np.arange(height * width).reshape(height, width)
    steps = [
        (number[1:], number[:-1], free_HxW[1:] & free_HxW[:-1]),
        (number[:, 1:], number[:, :-1], free_HxW[:, 1:] & free_HxW[:, :-1]),
    ]
    rows, columns = (np.concatenate([part[i][part[2]] for part in steps]) for i in (0, 1))
    graph = csr_matrix((np.ones(len(rows)), (rows, columns)), shape=(number.size,) * 2)
    distances = shortest_path(
        graph, directed=False, unweighted=True, indices=[number[source], number[target]]
    )
    total = distances[0, number[target]]
    if not (np.isfinite(total) and free_HxW[source] and free_HxW[target]):
        return np.zeros_like(free_HxW), -1
    return (distances.sum(axis=0) == total).reshape(height, width), int(total)


@pytest.mark.parametrize(
    ("height", "width", "density"),
    [(9, 9, 0.1), (7, 13, 0.35), (20, 5, 0.5), (1, 8, 0.1), (3, 3, 0.0)],
)
def test_paths_are_those_of_scipy(height, width, density):
    """70 grids: more than a machine word holds. Some have no path, some end where they begin."""
    free = RNG.random((70, height, width)) >= density
    ends = RNG.integers([height, width], size=(2, 70, 2))
    ends[1, :5] = ends[0, :5]
    cells, steps = shortest_paths(free, *ends)
    for i in range(70):
        expected, length = by_scipy(free[i], tuple(ends[0, i]), tuple(ends[1, i]))
        assert steps[i] == length
        np.testing.assert_array_equal(cells[i], expected)
    assert density < 0.3 or (steps == -1).any()


@pytest.mark.parametrize(
    "problems",
    [
        GridProblems(),
        GridProblems(window=21, density=0.35),
        GridProblems(8, 70, window=70),
        GridProblems(64, 64, window=3),
    ],
    ids=str,
)
def test_problems_are_what_they_say(problems):
    images, targets = problems.draw(3, range(80))
    assert images.dtype == targets.dtype == np.uint8 and set(np.unique(images)) <= {0, 1}
    for image, target in zip(images, targets, strict=True):
        (first, second) = np.argwhere(image[..., 1])  # two, and different ones
        assert (np.abs(first - second) < problems.window).all()
        assert not (image[..., 0] * image[..., 1]).any()
        expected, length = by_scipy(image[..., 0] == 0, tuple(first), tuple(second))
        np.testing.assert_array_equal(target, expected)
        assert length >= 1
    obstacles = images[..., 0].mean()
    # Grids are drawn again if none of 8 pairs has a path, which favours free ones.
    assert abs(obstacles - problems.density) < 0.03


def test_pairs_are_uniform_over_all_that_a_window_holds():
    """On a free grid of 4 x 4, windows of 2 x 2 hold all neighbours, diagonal ones included."""
    images, _ = GridProblems(4, 4, window=2, density=0.0).draw(0, range(4200))
    pairs = {tuple(np.flatnonzero(image[..., 1])) for image in images}
    assert len(pairs) == 24 + 18  # straight and diagonal neighbours
    counts = np.unique(images[..., 1].reshape(len(images), -1), axis=0, return_counts=True)[1]
    # Chi squared of 41 degrees of freedom: 1 in 10^5.
    assert np.sum((counts - 100.0) ** 2 / 100) < 90


@pytest.mark.parametrize(
    "problems",
    [GridProblems(7, 13, window=5), GridProblems(12, 9, window=12, density=0.3)],
    ids=str,
)
def test_the_smallest_window_holds_both_points(problems):
    images, _ = problems.draw(3, range(200))
    sides = [1 + np.ptp(np.argwhere(image[..., 1]), axis=0).max() for image in images]
    np.testing.assert_array_equal(smallest_window(images), sides)


def test_a_problem_depends_on_seed_and_index_alone():
    problems = GridProblems(12, 12, window=6, density=0.3)
    images, targets = problems.draw(1, range(100))
    some = [97, 5, 64]
    np.testing.assert_array_equal(problems.draw(1, some)[0], images[some])
    np.testing.assert_array_equal(problems.draw(1, some)[1], targets[some])
    assert len(np.unique(images.reshape(100, -1), axis=0)) == 100
    assert not np.array_equal(problems.draw(2, range(100))[0], images)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"height": 0}, "height must be greater than or equal to 1, got 0"),
        ({"width": 2.5}, "width must be a valid integer, got 2.5"),
        ({"window": 1}, "window must be greater than or equal to 2"),
        ({"density": 1.0}, "density must be less than 1"),
        ({"density": float("nan")}, "density"),
        ({"height": 1, "width": 1}, "one cell has no two points"),
    ],
    ids=str,
)
def test_impossible_grids(options, words):
    with pytest.raises(DataError, match=words):
        dataclasses.replace(GridProblems(), **options)


def test_impossible_requests():
    with pytest.raises(DataError, match="0 or more"):
        GridProblems().draw(-1, [0])
    with pytest.raises(DataError, match="0 or more"):
        GridProblems().draw(0, [-1])
    with pytest.raises(DataError, match="no problem in 200 grids"):
        GridProblems(1, 2, density=0.9999).draw(0, [0])
    assert GridProblems().draw(0, [])[0].shape == (0, 32, 32, 2)


def test_a_stream_is_what_is_drawn_by_number():
    problems = GridProblems(10, 10, window=7, density=0.2)
    batches = list(itertools.islice(problems.stream(3, batch_size=6), 30))
    for stacked, drawn in zip(
        zip(*batches, strict=True), problems.draw(3, range(180)), strict=True
    ):
        np.testing.assert_array_equal(np.concatenate(stacked), drawn)
    assert len({image.tobytes() for images, _ in batches for image in images}) == 180  # none twice


@pytest.mark.parametrize("start", [1, 7, 10**12])
def test_a_stream_resumes_at_any_batch(start):
    """Without drawing what came before."""
    problems = GridProblems(10, 10, window=7)
    resumed = list(itertools.islice(problems.stream(0, batch_size=4, start=start), 3))
    for stacked, drawn in zip(
        zip(*resumed, strict=True), problems.draw(0, range(4 * start, 4 * (start + 3))), strict=True
    ):
        np.testing.assert_array_equal(np.concatenate(stacked), drawn)


def test_impossible_streams():
    for options in (
        {"batch_size": 0},
        {"batch_size": -4},
        {"batch_size": 2.5},
        {"start": -1},
        {"seed": -1},
    ):
        ((name, value),) = options.items()
        with pytest.raises(
            DataError,
            match=rf"stream: {name} is {value}; it must be an integer, [01] or more",
        ):  # before the first batch
            GridProblems().stream(**{"seed": 0, "batch_size": 4} | options)  # pyright: ignore
