"""The curriculum: kinds and their names, parts and kinds without a problem in common, phases in their order, always the same."""

import inspect
from typing import Literal

import numpy as np
import pytest

from paramshare.training.data import ArraySource, Curriculum, DataError
from paramshare.training.data.curriculum import PARTS, curriculum_set, fixed_set
from paramshare.training.data.grids import Grids

Part = Literal["train", "validation", "test"]
SMALL = Curriculum(size=12, windows=(3, 6, 9), examples=40, tests=10, far_windows=(12,), far_sizes=(16,), far_densities=(0.3,))


def held(source) -> ArraySource:
    assert isinstance(source, ArraySource)
    return source


def reach(images: np.ndarray) -> np.ndarray:
    """The side of the smallest square that holds both points, of each image."""
    cells = [np.argwhere(image[..., 1]) for image in images]
    return np.array([np.abs(first - second).max() + 1 for first, second in cells])


def test_default_kinds():
    """Training as in the paper: 32 x 32, obstacles with probability 0.1, five windows, 5000 problems each. The other sets are ours."""
    curriculum = Curriculum()
    curriculum.check()
    assert len(curriculum.windows) == 5 and curriculum.examples == 5000
    phases = {f"window {w}": Grids(32, 32, w, 0.1) for w in (5, 9, 13, 17, 21)}
    beyond = {
        "window 25": Grids(32, 32, 25, 0.1),
        "window 32": Grids(32, 32, 32, 0.1),
        "size 48": Grids(48, 48, 21, 0.1),
        "size 48, window 48": Grids(48, 48, 48, 0.1),
        "size 64": Grids(64, 64, 21, 0.1),
        "size 64, window 64": Grids(64, 64, 64, 0.1),
        "density 0.2": Grids(32, 32, 21, 0.2),
        "density 0.3": Grids(32, 32, 21, 0.3),
    }
    assert list(curriculum.kinds().items()) == list((phases | beyond).items())


def test_parts_have_no_problem_in_common():
    """Nor does any problem occur twice in one: the first of each part of all default sets."""
    for kind, grids in Curriculum().kinds().items():
        problems = [image.tobytes() for part in PARTS for image in fixed_set(grids, part, 40)[0]]
        assert len(set(problems)) == len(problems), kind


def test_kinds_have_no_grid_in_common():
    """A set of another window is not the same grids with other points."""
    kinds = [grids for grids in Curriculum().kinds().values() if (grids.height, grids.density) == (32, 0.1)]
    assert len(kinds) == 7
    obstacles = [image[..., 0].tobytes() for grids in kinds for image in fixed_set(grids, "train", 40)[0]]
    assert len(set(obstacles)) == 7 * 40


def test_a_smaller_set_is_the_beginning_of_a_larger_one():
    for few, many in zip(fixed_set(Grids(9, 9), "test", 5), fixed_set(Grids(9, 9), "test", 20), strict=True):
        np.testing.assert_array_equal(few, many[:5])


def test_phases_stand_in_their_order():
    images = curriculum_set(SMALL, validation=0.5)
    assert images.phases == 3 and images.image_shape == (12, 12, 2)
    parts: list[Part] = ["train", "validation"]
    for part, count in zip(parts, (40, 20), strict=True):
        source = held(getattr(images, part))
        assert len(source) == 3 * count
        for phase, window in enumerate(SMALL.windows):
            here = slice(phase * count, (phase + 1) * count)
            sides = reach(source.image[here])
            assert (sides <= window).all()
            assert phase == 0 or sides.max() > SMALL.windows[phase - 1]  # it is not an easier phase
            wanted = fixed_set(Grids(12, 12, window), part, count)
            np.testing.assert_array_equal(source.image[here], wanted[0])
            np.testing.assert_array_equal(source.label[here], wanted[1])


def test_every_kind_is_a_test_set():
    images = curriculum_set(SMALL)
    assert list(images.others) == ["window 3", "window 6", "window 9", "window 12", "size 16", "size 16, window 16", "density 0.3"]
    for kind, grids in SMALL.kinds().items():
        source, wanted = held(images.others[kind]), fixed_set(grids, "test", 10)
        np.testing.assert_array_equal(source.image, wanted[0])
        np.testing.assert_array_equal(source.label, wanted[1])
    np.testing.assert_array_equal(held(images.test).image, held(images.others["window 9"]).image)  # of the last phase


def test_a_fresh_draw_is_identical():
    one, other = (inspect.unwrap(curriculum_set)(SMALL) for _ in range(2))  # not one that is kept in memory
    sources = ((s.train, s.validation, s.test, *s.others.values()) for s in (one, other))
    for first, second in zip(*sources, strict=True):
        np.testing.assert_array_equal(held(first).image, held(second).image)
        np.testing.assert_array_equal(held(first).label, held(second).label)


def test_validation_takes_nothing_from_training():
    without, least, some = (curriculum_set(SMALL, validation=share) for share in (0, 1e-9, 0.1))
    assert [len(images.validation) for images in (without, least, some)] == [0, 3, 12]  # one a phase at least
    for images in (least, some):
        np.testing.assert_array_equal(held(images.train).image, held(without.train).image)
        np.testing.assert_array_equal(held(images.test).image, held(without.test).image)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"windows": ()}, "a curriculum has a window or more"),
        ({"examples": 0}, "an example and a test or more"),
        ({"tests": 0}, "an example and a test or more"),
        ({"windows": (5, 9, 5)}, r"curriculum.windows=\(5, 9, 5\): each phase has another window"),
        ({"windows": (5, 1)}, "window must be an integer, 2 or more"),
        ({"size": 0}, "height must be an integer, 1 or more"),
        ({"density": 1.0}, r"density of obstacles must be in \[0, 1\)"),
        ({"windows": (5, 9), "far_windows": (9,)}, "two test sets are the same"),
        ({"far_windows": (25, 25)}, "two test sets are the same"),
        ({"far_sizes": (48, 48)}, "two test sets are the same"),
        ({"far_densities": (0.2, 0.2000001)}, "two test sets are the same"),  # by their names
        ({"far_densities": (0.1,)}, "two test sets are the same"),  # that of the last phase, under another name
    ],
    ids=str,
)
def test_impossible_curricula(options, said):
    for call in (Curriculum.check, curriculum_set):
        with pytest.raises(DataError, match=said) as told:
            call(Curriculum(**options))
        assert "\n" not in str(told.value)


@pytest.mark.parametrize("name", ["windows", "far_windows", "far_sizes", "far_densities"])
def test_a_list_is_told_from_a_tuple(name):
    with pytest.raises(DataError, match=rf"curriculum.{name}=\[5\]: a tuple is wanted"):
        Curriculum(**{name: [5]})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("share", [-0.5, 1.0, float("nan")])
def test_a_share_to_validate_on_is_a_share(share):
    with pytest.raises(DataError, match=r"validation=.*share in \[0, 1\)"):
        curriculum_set(SMALL, share)
