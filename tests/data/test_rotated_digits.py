"""Rotated digits: what they show, and which digit is in which part."""

from typing import Any

import numpy as np
import pytest

from paramshare.data import DataError, RotatedDigits
from paramshare.data.idx_files import write
from paramshare.data.rotation import rotated

BAR = np.zeros((1, 28, 28), np.uint8)
BAR[:, 12:16, 14:24] = 255  # to the right of the centre


def numbered(count: int) -> np.ndarray:
    """Digits of one grey level each, whose middle tells which one it is."""
    return np.broadcast_to(1 + np.arange(count, dtype=np.uint8)[:, None, None], (count, 28, 28))


def arrays(path: Any, count: int) -> str:
    np.savez(path / "digits.npz", image=numbered(count), label=np.arange(count) % 2)
    return str(path / "digits.npz")


def shown(source: Any) -> list[int]:
    """The digits that images of `numbered` show."""
    return [int(image[14, 14, 0]) - 1 for image in source.input]


def test_a_bar_points_where_its_angle_says():
    images, angles = rotated(np.repeat(BAR, 40, axis=0), 180, 29, 0, 0, range(40))
    y, x = np.mgrid[:29, :29] - 14.0
    ink = images[..., 0].astype(float)
    towards = np.arctan2(-(ink * y).sum((1, 2)), (ink * x).sum((1, 2)))
    # Unturned, the bar's middle is 4.5 pixels right of the centre and half a pixel above it.
    start = np.arctan2(0.5, 4.5)
    assert np.abs(np.angle(np.exp(1j * (towards - start - np.deg2rad(angles))))).max() < 0.02
    assert angles.min() < -120 and angles.max() > 120
    np.testing.assert_allclose(ink.sum((1, 2)), BAR.sum(), rtol=0.02)


def test_an_image_depends_on_its_seed_part_and_number_alone():
    digits = np.repeat(BAR, 5, axis=0)
    images, angles = rotated(digits, 180, 29, 0, 0, range(5))
    again, _ = rotated(digits[:1], 180, 29, 0, 0, [3])
    np.testing.assert_array_equal(again[0], images[3])
    for other in ((1, 0), (0, 1)):
        assert not np.array_equal(rotated(digits, 180, 29, *other, range(5))[1], angles)
    still, angles = rotated(BAR, 0, 29, 0, 0, [0])
    assert angles[0] == 0 and np.abs(still[0, :28, :28, 0].astype(int) - BAR[0]).max() < 90


def test_digits_are_divided_once_and_for_all(tmp_path):
    config = RotatedDigits(
        path=arrays(tmp_path, 200), examples=60, tests=100, validation=0.25, size=30
    )
    data: Any = config.load(seed=0)
    assert data.input_shape == (30, 30, 1) and data.task.num_classes == 2
    assert [len(part) for part in (data.train, data.validation, data.test)] == [45, 15, 100]
    parts = [shown(part) for part in (data.train, data.validation, data.test)]
    digits = [digit for part in parts for digit in part]
    assert len(set(digits)) == 160 and max(digits) < 200
    for part, source in zip(parts, (data.train, data.validation, data.test), strict=True):
        assert [digit % 2 for digit in part] == source.label.tolist()
    other: Any = config.load(seed=1)
    assert {*shown(other.train), *shown(other.validation)} == {*parts[0], *parts[1]}
    np.testing.assert_array_equal(other.test.input, data.test.input)
    assert shown(other.train) != parts[0]


def test_few_digits_are_shown_several_times_but_in_one_part_only(tmp_path):
    config = RotatedDigits(path=arrays(tmp_path, 40), examples=300, tests=100, validation=0)
    data: Any = config.load()
    train, test = shown(data.train), shown(data.test)
    assert (len(train), len(test)) == (300, 100)
    assert (len(set(train)), len(set(test))) == (30, 10)
    assert not set(train) & set(test)
    assert {train.count(digit) for digit in train} == {10}  # at as many angles
    one = [image for image, digit in zip(data.train.input, train, strict=True) if digit == train[0]]
    assert len({image.tobytes() for image in one}) > 1 or one[0].max() < 12


def test_digits_shown_several_times_are_not_validated_on(tmp_path):
    config = RotatedDigits(path=arrays(tmp_path, 40), examples=300, tests=100, validation=0.2)
    data: Any = config.load(seed=3)
    train, validation = set(shown(data.train)), set(shown(data.validation))
    assert not train & validation and len(validation) == 6 and len(train) == 24


def test_idx_files_and_other_sizes_of_digits_serve_too(tmp_path):
    square = np.full((6, 8, 8), 255, np.uint8)
    write(tmp_path / "idx", (square, [0, 1] * 3), (square[:4], [0, 1] * 2))
    data: Any = RotatedDigits(
        path=str(tmp_path / "idx"), data_dir=str(tmp_path), examples=6, tests=4, validation=0
    ).load()
    ink = (data.train.input > 127).sum((1, 2, 3))
    np.testing.assert_allclose(ink, 28**2, rtol=0.15)  # corners may leave the image


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"image": numbered(4)}, "label"),
        ({"image": numbered(4).astype(float), "label": np.arange(4)}, "dtype float64.*uint8"),
        ({"image": numbered(4)[0], "label": np.arange(4)}, r"shape \(28, 28\)"),
        ({"image": numbered(4), "label": np.arange(3)}, "one for each of the 4 images"),
        ({"image": numbered(4), "label": np.arange(4) - 1}, "begins at -1"),
        (None, "cannot be read"),
    ],
    ids=["no labels", "floats", "one image", "too few labels", "negative", "not a file of arrays"],
)
def test_files_that_do_not_fit_are_refused(tmp_path, saved, message):
    path = tmp_path / "digits.npz"
    if saved is None:
        path.write_bytes(b"no arrays")
    else:
        np.savez(path, **saved)
    with pytest.raises(DataError, match=message):
        RotatedDigits(path=str(path), examples=2, tests=2).load()
    assert str(path)


@pytest.mark.parametrize("options", [{"size": 27}, {"turn": 181}, {"examples": 0}], ids=str)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(DataError):
        RotatedDigits(**options)
