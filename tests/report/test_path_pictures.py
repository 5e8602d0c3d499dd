"""Pictures for shortest paths: SciPy's intervals, the cells' colours, and complete PNG files."""

import itertools
import math

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from paramshare.report.path_pictures import CELLS, curves, grids, interval, painted, reach

C0, C1 = (31, 119, 180), (255, 127, 14)  # matplotlib's cycle
RNG = np.random.default_rng(0)


def pixels(file) -> np.ndarray:
    with Image.open(file) as image:
        image.load()
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def times(file, colour: tuple[int, int, int]) -> int:
    """How many pixels are of a colour."""
    return int(np.sum(np.all(pixels(file) == colour, axis=-1)))


def rgb(text: str) -> tuple[int, int, int]:
    return int(text[1:3], 16), int(text[3:5], 16), int(text[5:], 16)


@pytest.mark.parametrize("confidence", [0.5, 0.95])
@pytest.mark.parametrize("count", [2, 3, 5, 40])
def test_intervals_are_students(count, confidence):
    values = RNG.normal(0.8, 0.1, count)
    mean, half = interval(list(values), confidence)
    low, high = stats.t.interval(confidence, count - 1, loc=values.mean(), scale=stats.sem(values))
    np.testing.assert_allclose((mean - half, mean + half), (low, high), rtol=1e-12)


def test_intervals_of_few_values():
    mean, half = interval([0.25])
    assert mean == 0.25 and math.isnan(half)
    assert interval([0.25, 0.25]) == (0.25, 0.0)


def test_every_kind_of_cell_has_its_colour():
    """All combinations of image, target and prediction, including a path through an obstacle."""
    kinds = np.array(
        list(itertools.product((0, 1), repeat=4))
    )  # obstacle, end, on a path, predicted
    picture = painted(
        kinds[None, :, :2].astype(np.uint8),
        kinds[None, :, 2].astype(np.uint8),
        kinds[None, :, 3] > 0,
    )
    assert picture.shape == (1, 16, 3)
    for (obstacle, end, target, predicted), colour in zip(kinds, picture[0], strict=True):
        path = {(1, 1): "path, found", (1, 0): "path, missed", (0, 1): "no path, but predicted"}
        kind = "end" if end else path.get((target, predicted), "obstacle" if obstacle else "free")
        np.testing.assert_array_equal(np.round(colour * 255), rgb(CELLS[kind]), err_msg=kind)
    assert len(set(CELLS.values())) == len(CELLS) == 6


def test_curves_draw_a_line_per_network_and_a_band_over_seeds(tmp_path):
    x = [1, 2, 3, 4]
    seeds = [[0.5, 0.6, 0.7, 0.8], [0.4, 0.7, 0.75, 0.85], [0.6, 0.65, 0.7, 0.9]]
    both = {
        "left": {"plain": (x, seeds), "shared": (x, seeds[:1])},
        "right": {"shared": (x, seeds)},
    }
    curves(
        both,
        tmp_path / "both.png",
        xlabels=("epoch", "step"),
        marks={"left": [1.5, 2.5]},
        title="a run",
        floor=0.3,
    )
    curves({"left": {"plain": (x, seeds[:1])}}, str(tmp_path / "one.png"), xlabels=("epoch",))
    assert pixels(tmp_path / "both.png").shape == (462, 1144, 3) and pixels(
        tmp_path / "one.png"
    ).shape == (462, 660, 3)
    assert times(tmp_path / "both.png", C0) > 20 and times(tmp_path / "both.png", C1) > 20
    assert times(tmp_path / "one.png", C0) > 20 and times(tmp_path / "one.png", C1) == 0
    # The band is wide over several seeds and absent for a single one.
    pale = [np.round(255 - 0.18 * (255 - np.array(colour))) for colour in (C0, C1)]
    near = [
        [
            np.sum(np.all(np.abs(pixels(tmp_path / name).astype(int) - colour) <= 2, axis=-1))
            for colour in pale
        ]
        for name in ("both.png", "one.png")
    ]
    assert min(near[0]) > 1000 and near[1][0] < 200


def test_equal_labels_have_equal_colours_in_all_panels(tmp_path):
    line = ([1, 2], [[0.5, 0.6]])
    curves({"a": {"plain": line}, "b": {"shared": line}}, tmp_path / "apart.png", xlabels=("", ""))
    curves({"a": {"plain": line}, "b": {"plain": line}}, tmp_path / "same.png", xlabels=("", ""))
    assert times(tmp_path / "apart.png", C1) > 20 and times(tmp_path / "same.png", C1) == 0


def test_curves_skip_missing_values(tmp_path):
    curves(
        {"a": {"plain": ([1, 2, 3], [[0.5, math.nan, 0.7], [0.4, math.nan, 0.7]])}},
        tmp_path / "gap.png",
        xlabels=("",),
    )
    assert pixels(tmp_path / "gap.png").shape == (462, 660, 3)


@pytest.mark.parametrize("networks", [0, 3])
def test_grids_show_the_target_and_every_prediction(tmp_path, networks):
    image = np.zeros((8, 6, 2), np.uint8)
    image[2, 2:5, 0] = image[0, 0, 1] = image[0, 5, 1] = 1
    target = np.zeros((8, 6), np.uint8)
    target[0] = 1
    missed, wrong = target.copy() > 0, target > 0
    missed[0, 2:4], wrong[5:7] = False, True
    shown = {f"network {number}": [missed, wrong] for number in range(networks)}
    grids(
        {"a": (image, target), "b": (image, target)}, shown, tmp_path / "grids.png", title="a run"
    )
    height, width = pixels(tmp_path / "grids.png").shape[:2]
    assert height == pytest.approx(110 * (2.2 * 2 + 0.9), abs=1) and width == pytest.approx(
        110 * (2.1 * (1 + networks) + 0.4), abs=1
    )
    cells = {kind: times(tmp_path / "grids.png", rgb(colour)) for kind, colour in CELLS.items()}
    legend = 1000  # pixels of a patch in the legend, at most
    assert min(cells[kind] for kind in ("obstacle", "path, found", "end")) > legend
    assert (
        (cells["path, missed"] > legend)
        == (cells["no path, but predicted"] > legend)
        == bool(networks)
    )


def test_reach_draws_lines_over_names_and_numbers(tmp_path):
    seeds = RNG.uniform(0.5, 1, (3, 4))
    few, gaps = seeds.copy(), seeds.copy()
    few[:, 1] = math.nan  # not measured by any seed
    gaps[0, 2] = math.nan  # not measured by one seed
    panels = {
        "numbers": {"plain": ([10, 12, 15, 20], few), "shared": ([10, 12, 15, 20], gaps)},
        "names": {
            "plain": (["1", "2", "4", "all"], seeds[:1]),
            "shared": (["2", "all"], seeds[:, :2]),
        },
    }
    reach(
        panels, tmp_path / "reach.png", xlabels=("layers", "bank size"), ylabel="F1", title="a run"
    )
    assert pixels(tmp_path / "reach.png").shape == (506, 968, 3)
    assert times(tmp_path / "reach.png", C0) > 20 and times(tmp_path / "reach.png", C1) > 20


def test_a_seed_that_was_not_measured_is_left_out(tmp_path):
    """The mean is over the others; here they are equal, so that the picture is the same."""
    for name, last in (("all", 0.75), ("some", math.nan)):
        reach(
            {"a": {"plain": ([1, 2], [[0.5, 0.75], [0.5, last]])}},
            tmp_path / f"{name}.png",
            xlabels=("",),
            ylabel="F1",
        )
    np.testing.assert_array_equal(pixels(tmp_path / "all.png"), pixels(tmp_path / "some.png"))


def test_reach_of_lines_without_a_point(tmp_path):
    """An arm that was not run leaves nothing to draw."""
    panels = {
        "none": {"plain": ([], np.array([]).T)},
        "nan": {"plain": ([1, 2], [[math.nan, math.nan]])},
    }
    reach(panels, tmp_path / "empty.png", xlabels=("", ""), ylabel="F1")
    assert pixels(tmp_path / "empty.png").shape == (506, 968, 3)
