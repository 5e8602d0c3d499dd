"""The curriculum: kinds and names, phases in order, parts without common problems, repeatable."""

import inspect

import numpy as np
import pytest

from paramshare.data import ArraySource, Curriculum, DataError, Dataset, Grids
from paramshare.data.grid_problems import GridProblems, smallest_window
from paramshare.data.sets import grids
from paramshare.data.sets.grids import PARTS, Part, fixed_set

SMALL = Curriculum(
    size=12,
    windows=(3, 6, 9),
    examples=40,
    tests=10,
    far_windows=(12,),
    far_sizes=(16,),
    far_densities=(0.3,),
)


def arrays(source) -> ArraySource:
    assert isinstance(source, ArraySource)
    return source


def draw(**options) -> Dataset:
    return Grids(curriculum=SMALL, **options).load()


def test_default_kinds():
    """The paper's: 32 x 32, density 0.1, five windows, 5000 problems each; the others are ours."""
    curriculum = Curriculum()
    assert len(curriculum.windows) == 5 and curriculum.examples == 5000
    phases = {f"window {w}": GridProblems(32, 32, w, 0.1) for w in (5, 9, 13, 17, 21)}
    beyond = {
        "window 25": GridProblems(32, 32, 25, 0.1),
        "window 32": GridProblems(32, 32, 32, 0.1),
        "size 48": GridProblems(48, 48, 21, 0.1),
        "size 48, window 48": GridProblems(48, 48, 48, 0.1),
        "size 64": GridProblems(64, 64, 21, 0.1),
        "size 64, window 64": GridProblems(64, 64, 64, 0.1),
        "density 0.2": GridProblems(32, 32, 21, 0.2),
        "density 0.3": GridProblems(32, 32, 21, 0.3),
    }
    assert list(curriculum.kinds().items()) == list((phases | beyond).items())


def test_parts_have_no_problem_in_common():
    """Nor does a problem occur twice in a part: the first ones of all default sets."""
    for kind, problems in Curriculum().kinds().items():
        images = [image.tobytes() for part in PARTS for image in fixed_set(problems, part, 40)[0]]
        assert len(set(images)) == len(images), kind


def test_kinds_have_no_grid_in_common():
    """A set of another window is not the same grids with other points."""
    kinds = [
        problems
        for problems in Curriculum().kinds().values()
        if (problems.height, problems.density) == (32, 0.1)
    ]
    assert len(kinds) == 7
    obstacles = [
        image[..., 0].tobytes()
        for problems in kinds
        for image in fixed_set(problems, "train", 40)[0]
    ]
    assert len(set(obstacles)) == 7 * 40


def test_a_smaller_set_is_the_beginning_of_a_larger_one():
    for few, many in zip(
        fixed_set(GridProblems(9, 9), "test", 5),
        fixed_set(GridProblems(9, 9), "test", 20),
        strict=True,
    ):
        np.testing.assert_array_equal(few, many[:5])


def test_phases_stand_in_their_order():
    images = draw(validation=0.5)
    assert images.phases == 3 and images.input_shape == (12, 12, 2)
    parts: list[Part] = ["train", "validation"]
    for part, count in zip(parts, (40, 20), strict=True):
        source = arrays(getattr(images, part))
        assert len(source) == 3 * count
        for phase, window in enumerate(SMALL.windows):
            here = slice(phase * count, (phase + 1) * count)
            sides = smallest_window(source.input[here])
            assert (sides <= window).all()
            assert phase == 0 or sides.max() > SMALL.windows[phase - 1]  # it is not an easier phase
            expected = fixed_set(GridProblems(12, 12, window), part, count)
            np.testing.assert_array_equal(source.input[here], expected[0])
            np.testing.assert_array_equal(source.label[here], expected[1])


def test_every_kind_is_a_test_set():
    images = draw()
    assert list(images.others) == [
        "window 3",
        "window 6",
        "window 9",
        "window 12",
        "size 16",
        "size 16, window 16",
        "density 0.3",
    ]
    for kind, problems in SMALL.kinds().items():
        source, expected = arrays(images.others[kind]), fixed_set(problems, "test", 10)
        np.testing.assert_array_equal(source.input, expected[0])
        np.testing.assert_array_equal(source.label, expected[1])
    np.testing.assert_array_equal(
        arrays(images.test).input, arrays(images.others["window 9"]).input
    )  # of the last phase


def test_drawing_again_gives_the_same_problems():
    draw_again = inspect.unwrap(grids._draw)  # not the cached data set
    one, other = draw(), draw_again(SMALL, 0.1)
    sources = ((s.train, s.validation, s.test, *s.others.values()) for s in (one, other))
    for first, second in zip(*sources, strict=True):
        assert first is not second
        np.testing.assert_array_equal(arrays(first).input, arrays(second).input)
        np.testing.assert_array_equal(arrays(first).label, arrays(second).label)


def test_validation_takes_nothing_from_training():
    without, least, some = (draw(validation=share) for share in (0, 1e-9, 0.1))
    # At least one per phase.
    assert [len(data.validation) for data in (without, least, some)] == [0, 3, 12]
    for data in (least, some):
        np.testing.assert_array_equal(arrays(data.train).input, arrays(without.train).input)
        np.testing.assert_array_equal(arrays(data.test).input, arrays(without.test).input)


def test_the_last_phase_alone():
    config = Grids(validation=0.2, curriculum=SMALL).last_phase()
    assert isinstance(config, Grids)
    assert (config.validation, config.curriculum.windows) == (0.2, (9,))
    data, whole = config.load(), draw()
    np.testing.assert_array_equal(arrays(data.train).input, arrays(whole.train).input[-40:])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"windows": ()}, "windows must have at least 1 item"),
        ({"examples": 0}, "examples must be greater than or equal to 1"),
        ({"windows": (5, 9, 5)}, r"windows is \(5, 9, 5\); no window may occur twice"),
        ({"windows": (5, 1)}, r"windows.1 must be greater than or equal to 2, got 1"),
        ({"windows": [5]}, r"windows must be a valid tuple, got \[5\]"),
        ({"density": 1.0}, "density must be less than 1"),
        ({"size": 1}, "a grid of one cell has no two points"),
        ({"windows": (5, 9), "far_windows": (9,)}, "two test sets are the same"),
        ({"far_windows": (25, 25)}, "two test sets are the same"),
        ({"far_sizes": (48, 48)}, "two test sets are the same"),
        # Their names are equal.
        ({"far_densities": (0.2, 0.2000001)}, "two test sets are the same"),
        # That of the last phase, under another name.
        ({"far_densities": (0.1,)}, "two test sets are the same"),
    ],
    ids=str,
)
def test_impossible_curricula(options, words):
    with pytest.raises(DataError, match=words) as caught:
        Curriculum(**options)
    assert "\n" not in str(caught.value)
