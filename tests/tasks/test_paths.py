"""Shortest paths: losses and measures against NumPy's and an exact search on real grids."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paramshare.data.grid_problems import GridProblems, shortest_paths
from paramshare.tasks import Augment, AugmentError, Paths

RNG = np.random.default_rng(0)
STATISTICS = jax.jit(Paths().statistics)


def logits(cells: np.ndarray) -> np.ndarray:
    """Logits of random sizes whose signs say which cells are predicted."""
    sizes = RNG.uniform(0.1, 3, cells.shape).astype(np.float32)
    return np.where(cells, sizes, -sizes)


def ends(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    cells = np.argwhere(images[..., 1]).reshape(len(images), 2, 3)
    return cells[:, 0, 1:], cells[:, 1, 1:]


def statistics(images: np.ndarray, targets: np.ndarray, cells: np.ndarray) -> dict[str, Any]:
    return jax.device_get(STATISTICS(logits(cells), images, targets))


@pytest.fixture(scope="module")
def problems() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Problems, and predictions of very different quality: missing cells, and cells too many."""
    images, targets = GridProblems(12, 12, window=7, density=0.3).draw(7, range(300))
    rng = np.random.default_rng(1)
    rates = np.array([(0, 0), (0, 0.1), (0.1, 0.1), (0.2, 1)])[np.arange(300) % 4]
    missing, extra = (rng.random(targets.shape) < rate[:, None, None] for rate in rates.T)
    return images, targets, (targets > 0) & ~missing | (targets == 0) & extra


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_is_averaged_over_cells_and_smoothed_in_training_only(smoothing):
    output, label = RNG.normal(0, 4, (5, 6, 7)), RNG.integers(0, 2, (5, 6, 7)).astype(np.uint8)

    def expected(smoothing: float) -> np.ndarray:
        target = label * (1 - smoothing) + smoothing / 2
        return (np.logaddexp(0, output) - target * output).mean((1, 2))

    def loss(train: bool, dtype: Any = jnp.float32) -> jax.Array:
        task = Paths().with_label_smoothing(smoothing)
        return task.losses(jnp.asarray(output, dtype), label, train=train)["cross_entropy"]

    np.testing.assert_allclose(loss(True), expected(smoothing), rtol=1e-5)  # means of 42 float32
    np.testing.assert_allclose(loss(False), expected(0.0), rtol=1e-5)
    assert loss(True, jnp.bfloat16).dtype == jnp.float32
    # Logits rounded to 8 bits.
    np.testing.assert_allclose(loss(True, jnp.bfloat16), expected(smoothing), rtol=1e-2)


def test_f1_is_of_the_cells_of_all_grids_together(problems):
    _, targets, cells = problems
    right, wrong, missed = (
        int(x.sum())
        for x in (cells & (targets > 0), cells & (targets == 0), ~cells & (targets > 0))
    )
    expected = 2 * right / (2 * right + wrong + missed)
    assert Paths().reduce(statistics(*problems))["f1"] == pytest.approx(expected, rel=1e-12)
    numerators, denominators = Paths().batch_measures(logits(cells), targets)["f1"]
    assert float(numerators.sum() / denominators.sum()) == pytest.approx(expected, rel=1e-6)


def test_a_logit_of_zero_predicts_nothing():
    numerators, denominators = Paths().batch_measures(
        jnp.zeros((1, 2, 2)), jnp.ones((1, 2, 2), jnp.uint8)
    )["f1"]
    assert (float(numerators[0]), float(denominators[0])) == (0, 4)


def test_measures_are_those_of_an_exact_search(problems):
    images, targets, cells = problems
    steps = shortest_paths(cells & (images[..., 0] == 0), *ends(images))[1]
    least = shortest_paths(images[..., 0] == 0, *ends(images))[1]
    expected = {
        "exact": (cells == targets).all((1, 2)),
        "connected": steps >= 0,
        "shortest": (steps >= 0) & (steps == least),
    }
    kinds = [
        expected["exact"],
        expected["shortest"] & ~expected["exact"],
        expected["connected"] & ~expected["shortest"],
        ~expected["connected"],
    ]
    assert min(kind.sum() for kind in kinds) > 3
    actual = statistics(*problems)
    for name, flags in expected.items():
        np.testing.assert_array_equal(actual[name], flags, err_msg=name)
    measures = Paths().reduce(actual)
    assert list(measures) == [measure.name for measure in Paths.measures]
    assert {name: measures[name] for name in expected} == {
        name: flags.mean() for name, flags in expected.items()
    }


def test_a_perfect_prediction_scores_1_in_everything(problems):
    images, targets, _ = problems
    measures = Paths().reduce(statistics(images, targets, targets > 0))
    assert measures == {"f1": 1, "exact": 1, "connected": 1, "shortest": 1}


@pytest.mark.parametrize(
    ("image", "cells", "exact", "connected", "shortest"),
    [
        ("o..o ....", "xxxx ....", 1, 1, 1),
        ("o..o ....", "x..x xxxx", 0, 1, 0),  # a detour
        ("o..o ....", "xxxx xxxx", 0, 1, 1),  # the path, and more
        ("o#.o ....", "xxxx ....", 0, 0, 0),  # through an obstacle
        ("o#.o ....", "xxxx xxxx", 0, 1, 1),  # ... beside a path around it
        ("o..o ....", ".xxx ....", 0, 0, 0),  # an end is missing
        ("o..o ....", "xxx. ....", 0, 0, 0),  # the other one
        ("o..o ....", "x.xx ....", 0, 0, 0),  # a gap
        ("o... .o..", "x... .x..", 0, 0, 0),  # no steps across corners
        ("o... .o..", "xx.. .x..", 0, 1, 1),  # one of two
        ("...o o...", "...x xxxx", 0, 1, 1),  # no wrapping around an edge is needed
        ("...o o...", "x..x x..x", 0, 0, 0),  # ... or helps
        (".oo. ....", ".xx. ....", 1, 1, 1),  # neighbours
        (".oo. ....", "xx.. ....", 0, 0, 0),
        (".oo. ....", ".... ....", 0, 0, 0),
    ],
)
def test_grids_drawn_by_hand(image, cells, exact, connected, shortest):
    """`#` is an obstacle, `o` an end; predicted cells are marked `x`."""
    rows = np.array([list(row) for row in image.split()])
    images = np.stack([rows == "#", rows == "o"], axis=-1).astype(np.uint8)[None]
    targets = shortest_paths(images[..., 0] == 0, *ends(images))[0].astype(np.uint8)
    marked = np.array([list(row) for row in cells.split()])[None] == "x"
    actual = statistics(images, targets, marked)
    assert (actual["exact"], actual["connected"], actual["shortest"]) == (
        exact,
        connected,
        shortest,
    )


def test_grids_of_a_batch_do_not_influence_each_other(problems):
    """Some of them are finished long before others."""
    images, targets, cells = problems
    whole = statistics(*problems)
    parts = [
        statistics(images[i : i + 60], targets[i : i + 60], cells[i : i + 60])
        for i in range(0, 300, 60)
    ]
    for name, values in whole.items():
        joined = np.concatenate([part[name] for part in parts])
        np.testing.assert_array_equal(values, joined, err_msg=name)


def test_image_and_label_are_mirrored_together(problems):
    images, targets, _ = problems
    augment = jax.jit(
        lambda key, x, y: Paths().augment(key, x, y, Augment(flip=True), (0.0, 0.0), (1.0, 1.0))
    )
    x, labels = augment(jax.random.key(0), images, targets)
    assert (x.dtype, labels.dtype) == (jnp.float32, jnp.uint8)
    mirrored = (np.asarray(x) != images).any((1, 2, 3))
    assert 98 < mirrored.sum() < 202  # six standard deviations, of 8.7
    solved = shortest_paths(np.asarray(x)[..., 0] == 0, *ends(np.asarray(x)))[0]
    np.testing.assert_array_equal(labels, solved)


@pytest.mark.parametrize("options", [{"pad_crop": 1}, {"cutout": 2}, {"turn": 90}], ids=str)
def test_augmentation_that_cuts_paths_is_refused(options):
    with pytest.raises(AugmentError, match="has a label for each cell"):
        Paths().check_augment(Augment(**options), (12, 12, 2))
