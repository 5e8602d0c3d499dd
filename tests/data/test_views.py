"""Pictures as inputs: where a painted dot goes, and the way back."""

import numpy as np
import pytest
from PIL import Image

from paramshare.data import DataError
from paramshare.data.views import centred, letterboxed, person, read_picture, stretched


@pytest.mark.parametrize(
    "view_of",
    [stretched((32, 32, 3)), stretched((32, 32, 1)), letterboxed(32), centred(32), person(32)],
)
def test_points_of_the_input_are_led_back_to_the_picture(view_of):
    picture = np.zeros((120, 80, 3), np.uint8)
    picture[48:60, 36:44] = 255  # centre (40, 54)
    view = view_of(picture)
    weight = view.input.astype(float).mean(axis=-1)
    weight = np.where(view.input.min(axis=-1) > 150, weight, 0)  # not the filling
    rows, columns = np.indices(weight.shape) + 0.5
    centre = np.array([(columns * weight).sum(), (rows * weight).sum()]) / weight.sum()
    np.testing.assert_allclose(view.original(centre), [40, 54], atol=1.5)


@pytest.mark.parametrize("view_of", [letterboxed(32), person(32)])
def test_points_beside_the_picture_are_moved_to_its_edge(view_of):
    """A picture of 80 x 120 fills 21 of 32 columns at most."""
    view = view_of(np.zeros((120, 80, 3), np.uint8))
    x, y = view.original(np.array([31.9, 16.0]))
    assert x == 80 and 0 < y < 120


def test_inputs_have_the_shape_that_the_network_takes():
    picture = np.zeros((10, 30, 3), np.uint8)
    assert stretched((8, 16, 1))(picture).input.shape == (8, 16, 1)
    assert letterboxed(16)(picture).input.shape == (16, 16, 3)
    assert centred(16, 1)(picture).input.shape == (16, 16, 1)


def test_grids_are_no_pictures():
    with pytest.raises(DataError, match=r"inputs have shape \(8, 8, 2\)"):
        stretched((8, 8, 2))


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(DataError, match=r"there is no file .*absent\.png"):
        read_picture(tmp_path / "absent.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(DataError, match=r"text\.png' cannot be read as a picture"):
        read_picture(tmp_path / "text.png")
    Image.new("L", (3, 2), 7).save(tmp_path / "grey.png")
    assert read_picture(tmp_path / "grey.png").tolist() == [[[7] * 3] * 3] * 2
