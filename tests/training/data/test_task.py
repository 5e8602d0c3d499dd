"""What is asked of a network: losses and measures against NumPy's, and against an exact search on real grids."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from paramshare.training.data.grids import Grids, shortest_paths
from paramshare.training.data.task import CLASSES, Classes, Paths

RNG = np.random.default_rng(0)
GRIDS = Grids(12, 12, window=7, density=0.3)


def logits(cells: np.ndarray) -> Any:
    """Logits, of some size or other, whose sign says which cells are predicted."""
    sizes = RNG.uniform(0.1, 3, cells.shape)
    return jnp.asarray(np.where(cells, sizes, -sizes), jnp.float32)


def ends(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    cells = np.argwhere(images[..., 1]).reshape(len(images), 2, 3)
    return cells[:, 0, 1:], cells[:, 1, 1:]


def drawn(image: str, found: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A grid of one, `#` an obstacle and `o` an end, with its target; and the cells predicted, marked by anything but `.`."""
    cells = np.array([list(row) for row in image.split()])
    images = np.stack([cells == "#", cells == "o"], axis=-1).astype(np.uint8)[None]
    target = shortest_paths(images[..., 0] == 0, *ends(images))[0].astype(np.uint8)
    return images, target, np.array([list(row) for row in found.split()])[None] != "."


def flags(images: np.ndarray, targets: np.ndarray, found: np.ndarray) -> dict[str, np.ndarray]:
    parts = Paths().more_parts(logits(found), jnp.asarray(images), jnp.asarray(targets))
    assert all(part.dtype == jnp.float32 and part.shape == (len(images),) for part in parts.values())
    return {name: np.asarray(part) for name, part in parts.items()}


@pytest.fixture(scope="module")
def problems() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Real problems, and what networks of very different skill might predict: cells lost and cells too many, obstacles among them."""
    images, targets = GRIDS.draw(7, range(300))
    rng = np.random.default_rng(1)
    rates = np.array([(0, 0), (0, 0.1), (0.1, 0.1), (0.2, 1)])[np.arange(300) % 4]
    lost, more = (rng.random(targets.shape) < rate[:, None, None] for rate in rates.T)
    return images, targets, (targets > 0) & ~lost | (targets == 0) & more


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_of_paths_is_the_mean_over_cells(smoothing):
    output, label = RNG.normal(0, 4, (5, 6, 7)), RNG.integers(0, 2, (5, 6, 7)).astype(np.uint8)
    target = label * (1 - smoothing) + smoothing / 2
    wanted = (np.logaddexp(0, output) - target * output).mean((1, 2))
    found = Paths().loss(jnp.asarray(output, jnp.float32), jnp.asarray(label), smoothing)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)  # means of 42 numbers in float32
    theirs = optax.sigmoid_binary_cross_entropy(jnp.asarray(output, jnp.float32), jnp.asarray(target, jnp.float32)).mean((1, 2))
    np.testing.assert_allclose(found, theirs, rtol=1e-6)
    half = Paths().loss(jnp.asarray(output, jnp.bfloat16), jnp.asarray(label), smoothing)
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, wanted, rtol=1e-2)  # of logits rounded to 8 bits


def test_f1_is_of_the_cells_of_all_grids_together():
    found, label = RNG.random((9, 6, 7)) < 0.3, RNG.random((9, 6, 7)) < RNG.random((9, 1, 1)) / 2
    sums = {name: float(part.sum()) for name, part in Paths().parts(logits(found), jnp.asarray(label, jnp.uint8)).items()}
    right, wrong, missed = (found & label).sum(), (found & ~label).sum(), (~found & label).sum()
    assert Paths().means(sums | {"count": 9.0}) == {"f1": pytest.approx(2 * right / (2 * right + wrong + missed), rel=1e-12)}


def test_a_logit_of_zero_predicts_nothing():
    parts = Paths().parts(jnp.zeros((1, 2, 2)), jnp.ones((1, 2, 2), jnp.uint8))
    assert {name: float(part[0]) for name, part in parts.items()} == {"both": 0, "found": 0, "wanted": 4}


def test_measures_of_grids_are_those_of_an_exact_search(problems):
    images, targets, found = problems
    steps = shortest_paths(found & (images[..., 0] == 0), *ends(images))[1]
    least = shortest_paths(images[..., 0] == 0, *ends(images))[1]
    wanted = {"exact": (found == targets).all((1, 2)), "connected": steps >= 0, "shortest": (steps >= 0) & (steps == least)}
    kinds = [wanted["exact"], wanted["shortest"] & ~wanted["exact"], wanted["connected"] & ~wanted["shortest"], ~wanted["connected"]]
    assert min(kind.sum() for kind in kinds) > 3
    for name, flag in flags(images, targets, found).items():
        np.testing.assert_array_equal(flag, wanted.pop(name), err_msg=name)
    assert not wanted


def test_a_perfect_prediction_scores_1_in_everything(problems):
    images, targets, _ = problems
    output = logits(targets > 0)
    parts = Paths().parts(output, jnp.asarray(targets)) | Paths().more_parts(output, jnp.asarray(images), jnp.asarray(targets))
    sums = {name: float(part.sum()) for name, part in parts.items()} | {"count": float(len(images))}
    assert Paths().means(sums) == {"f1": 1, "exact": 1, "connected": 1, "shortest": 1}


@pytest.mark.parametrize(
    ("image", "found", "exact", "connected", "shortest"),
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
def test_grids_drawn_by_hand(image, found, exact, connected, shortest):
    its = flags(*drawn(image, found))
    assert {name: float(flag[0]) for name, flag in its.items()} == {"exact": exact, "connected": connected, "shortest": shortest}


def test_parts_of_a_batch_are_those_of_its_examples(problems):
    """Grids of one batch, some of them done long before others, do not touch each other."""
    images, targets, found = problems
    output = logits(found)

    def parts(chosen: slice) -> dict[str, Any]:
        o, i, t = output[chosen], jnp.asarray(images[chosen]), jnp.asarray(targets[chosen])
        return Paths().parts(o, t) | Paths().more_parts(o, i, t)

    whole, cuts = parts(slice(None)), [parts(slice(a, b)) for a, b in ((0, 1), (1, 70), (70, 300))]
    assert set(whole) == {"both", "found", "wanted", "exact", "connected", "shortest"}
    for name, part in whole.items():
        np.testing.assert_array_equal(part, np.concatenate([cut[name] for cut in cuts]), err_msg=name)


@pytest.mark.parametrize("classes", [2, 4, 5, 10])
def test_classes_are_counted_as_numpy_counts_them(classes):
    output, label = RNG.normal(size=(50, classes)), RNG.integers(0, classes, 50)
    parts = CLASSES.parts(jnp.asarray(output, jnp.float32), jnp.asarray(label))
    more = CLASSES.more_parts(jnp.asarray(output, jnp.float32), jnp.zeros((50, 1, 1, 1)), jnp.asarray(label))
    order = np.argsort(-output, axis=1)
    np.testing.assert_array_equal(parts["correct"], order[:, 0] == label)
    np.testing.assert_array_equal(more["correct5"], (order[:, :5] == label[:, None]).any(1))
    assert classes > 5 or bool(more["correct5"].all())
    sums = {name: float(part.sum()) for name, part in (parts | more).items()} | {"count": 50.0}
    assert CLASSES.means(sums) == {"accuracy": np.mean(order[:, 0] == label), "top5": sums["correct5"] / 50}
    assert CLASSES.means({"correct": 2.0, "count": 4.0}) == {"accuracy": 0.5}  # of training, which does not look at five


@pytest.mark.parametrize("task", [Classes(), Paths()], ids=str)
def test_a_task_names_its_score_and_tells_the_shape_of_outputs(task):
    shape = task.outputs(3, (4, 5, 2))
    assert shape == {"accuracy": (3,), "f1": (4, 5)}[task.score]
    label = jnp.zeros((2, *(shape if task.score == "f1" else ())), jnp.int32)
    parts = {name: part.sum() for name, part in task.parts(jnp.ones((2, *shape)), label).items()}
    assert list(task.means(parts | {"count": jnp.float32(2)})) == [task.score]
    assert task.loss(jnp.ones((2, *shape)), label).shape == (2,)
    assert hash(task) == hash(type(task)()) and task == type(task)()
