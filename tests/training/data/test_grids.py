"""Grid problems: exact against SciPy's shortest paths, and a pure function of seed and index."""

import dataclasses
import itertools

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import shortest_path

from paramshare.training.data import DataError
from paramshare.training.data.grids import Grids, apart, shortest_paths

RNG = np.random.default_rng(0)


def by_scipy(free_HxW: np.ndarray, source: tuple, target: tuple) -> tuple[np.ndarray, int]:
    """Cells whose distances from both ends add up to the distance between them."""
    height, width = free_HxW.shape
    number = np.arange(height * width).reshape(height, width)
    steps = [(number[1:], number[:-1], free_HxW[1:] & free_HxW[:-1]), (number[:, 1:], number[:, :-1], free_HxW[:, 1:] & free_HxW[:, :-1])]
    rows, columns = (np.concatenate([part[i][part[2]] for part in steps]) for i in (0, 1))
    graph = csr_matrix((np.ones(len(rows)), (rows, columns)), shape=(number.size,) * 2)
    distances = shortest_path(graph, directed=False, unweighted=True, indices=[number[source], number[target]])
    total = distances[0, number[target]]
    if not (np.isfinite(total) and free_HxW[source] and free_HxW[target]):
        return np.zeros_like(free_HxW), -1
    return (distances.sum(axis=0) == total).reshape(height, width), int(total)


@pytest.mark.parametrize(("height", "width", "density"), [(9, 9, 0.1), (7, 13, 0.35), (20, 5, 0.5), (1, 8, 0.1), (3, 3, 0.0)])
def test_paths_are_those_of_scipy(height, width, density):
    """70 grids: more than a machine word holds. Some have no path, some begin and end in one cell."""
    free = RNG.random((70, height, width)) >= density
    ends = RNG.integers([height, width], size=(2, 70, 2))
    ends[1, :5] = ends[0, :5]
    cells, steps = shortest_paths(free, *ends)
    for i in range(70):
        wanted, length = by_scipy(free[i], tuple(ends[0, i]), tuple(ends[1, i]))
        assert steps[i] == length
        np.testing.assert_array_equal(cells[i], wanted)
    assert density < 0.3 or (steps == -1).any()


@pytest.mark.parametrize("grids", [Grids(), Grids(window=21, density=0.35), Grids(8, 70, window=70), Grids(64, 64, window=3)], ids=str)
def test_problems_are_what_they_say(grids):
    images, targets = grids.draw(3, range(80))
    assert images.dtype == targets.dtype == np.uint8 and set(np.unique(images)) <= {0, 1}
    for image, target in zip(images, targets, strict=True):
        (first, second) = np.argwhere(image[..., 1])  # two, and different ones
        assert (np.abs(first - second) < grids.window).all()
        assert not (image[..., 0] * image[..., 1]).any()
        wanted, length = by_scipy(image[..., 0] == 0, tuple(first), tuple(second))
        np.testing.assert_array_equal(target, wanted)
        assert length >= 1
    obstacles = images[..., 0].mean()
    assert abs(obstacles - grids.density) < 0.03  # drawing grids again, where none of 8 pairs has a path, favours free ones


def test_pairs_are_uniform_over_all_that_a_window_holds():
    """Without obstacles, on a grid of 4 x 4 with windows of 2 x 2: every pair of neighbours, diagonal ones included, as often."""
    images, _ = Grids(4, 4, window=2, density=0.0).draw(0, range(4200))
    found = {tuple(np.flatnonzero(image[..., 1])) for image in images}
    assert len(found) == 24 + 18  # straight and diagonal neighbours
    counts = np.unique(images[..., 1].reshape(len(images), -1), axis=0, return_counts=True)[1]
    assert np.sum((counts - 100.0) ** 2 / 100) < 90  # chi squared of 41 degrees of freedom: 1 in 10^5


@pytest.mark.parametrize("grids", [Grids(7, 13, window=5), Grids(12, 9, window=12, density=0.3)], ids=str)
def test_how_far_apart_points_are(grids):
    images, _ = grids.draw(3, range(200))
    wanted = [1 + np.ptp(np.argwhere(image[..., 1]), axis=0).max() for image in images]
    np.testing.assert_array_equal(apart(images), wanted)


def test_a_problem_depends_on_seed_and_index_alone():
    grids = Grids(12, 12, window=6, density=0.3)
    images, targets = grids.draw(1, range(100))
    some = [97, 5, 64]
    np.testing.assert_array_equal(grids.draw(1, some)[0], images[some])
    np.testing.assert_array_equal(grids.draw(1, some)[1], targets[some])
    assert len(np.unique(images.reshape(100, -1), axis=0)) == 100
    assert not np.array_equal(grids.draw(2, range(100))[0], images)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"height": 0}, r"Grids\(height=0\): height must be an integer, 1 or more"),
        ({"width": 2.5}, r"width=2.5"),
        ({"window": 1}, "window must be an integer, 2 or more"),
        ({"density": 1.0}, r"density of obstacles must be in \[0, 1\)"),
        ({"density": float("nan")}, "density"),
        ({"height": 1, "width": 1}, "one cell has no two points"),
    ],
    ids=str,
)
def test_impossible_grids(options, said):
    with pytest.raises(DataError, match=said):
        dataclasses.replace(Grids(), **options)


def test_impossible_requests():
    with pytest.raises(DataError, match="0 or more"):
        Grids().draw(-1, [0])
    with pytest.raises(DataError, match="0 or more"):
        Grids().draw(0, [-1])
    with pytest.raises(DataError, match="no problem found in 200 grids"):
        Grids(1, 2, density=0.9999).draw(0, [0])
    assert Grids().draw(0, [])[0].shape == (0, 32, 32, 2)


def test_a_stream_is_what_is_drawn_by_number():
    grids = Grids(10, 10, window=7, density=0.2)
    batches = list(itertools.islice(grids.stream(3, batch_size=6), 30))
    for stacked, drawn in zip(zip(*batches, strict=True), grids.draw(3, range(180)), strict=True):
        np.testing.assert_array_equal(np.concatenate(stacked), drawn)
    assert len({image.tobytes() for images, _ in batches for image in images}) == 180  # none twice


@pytest.mark.parametrize("start", [1, 7, 10**12])
def test_a_stream_goes_on_where_batches_ended(start):
    """Without drawing what came before, however much it was."""
    grids = Grids(10, 10, window=7)
    resumed = list(itertools.islice(grids.stream(0, batch_size=4, start=start), 3))
    for stacked, drawn in zip(zip(*resumed, strict=True), grids.draw(0, range(4 * start, 4 * (start + 3))), strict=True):
        np.testing.assert_array_equal(np.concatenate(stacked), drawn)


def test_impossible_streams():
    for options in ({"batch_size": 0}, {"batch_size": -4}, {"batch_size": 2.5}, {"start": -1}, {"seed": -1}):
        ((name, value),) = options.items()
        with pytest.raises(DataError, match=rf"Grids.stream\({name}={value}\): {name} must be an integer, [01] or more"):
            Grids().stream(**{"seed": 0, "batch_size": 4} | options)  # pyright: ignore[reportArgumentType]  # before a batch is asked for
