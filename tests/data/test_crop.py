"""Crops lie inside the image, follow the recipe, and are pure functions of (seed, epoch, index)."""

import numpy as np
import pytest

from paramshare.data import ArraySource, DataError, Example, crop, train_batches, train_indices


class Photographs:
    """Noise of many sizes."""

    def __init__(self, channels: int = 3):
        self.channels = channels

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Example:
        rng = np.random.default_rng(index)
        return {
            "input": rng.integers(
                0, 256, (20 + 3 * index, 60 - 2 * index, self.channels), np.uint8
            ),
            "label": np.int32(index),
        }


@pytest.mark.parametrize("channels", [1, 3])
def test_views_have_one_shape_and_repeat_themselves(channels):
    source = crop.CropSource(Photographs(channels), 16, channels)
    for index in range(len(source)):
        for view in (source[index], source.training_view(index, seed=1, epoch=2)):
            assert view["input"].shape == (16, 16, channels)
            assert view["input"].dtype == np.uint8
            assert view["label"] == index
        assert np.array_equal(
            source.training_view(index, 1, 2)["input"], source.training_view(index, 1, 2)["input"]
        )
    views = {
        source.training_view(3, seed, epoch)["input"].tobytes()
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(views) == 9


@pytest.mark.parametrize(("height", "width"), [(100, 100), (375, 500), (40, 400), (1, 1), (400, 3)])
def test_boxes_lie_inside(height, width):
    draws = np.random.default_rng(0).random((500, 40))
    boxes = np.array([crop.random_box(height, width, row) for row in draws])
    left, top, w, h = boxes.T
    assert (left >= 0).all() and (top >= 0).all() and (w >= 1).all() and (h >= 1).all()
    assert (left + w <= width).all() and (top + h <= height).all()


def test_boxes_have_the_area_and_aspect_of_the_recipe():
    draws = np.random.default_rng(0).random((3000, 40))
    _, _, w, h = np.array([crop.random_box(1000, 1000, row) for row in draws]).T
    area, aspect = w * h / 1e6, w / h
    assert 0.079 < area.min() < 0.1 and 0.95 < area.max() <= 1  # sides are rounded to pixels
    assert 0.745 < aspect.min() < 0.76 and 1.32 < aspect.max() < 1.34
    assert abs(np.mean(np.log(aspect))) < 0.02  # as often wide as tall


def test_the_largest_central_box_is_taken_when_no_try_fits():
    assert crop.random_box(10, 1000, np.full(40, 0.999)) == (493, 0, 13, 10)
    assert crop.random_box(1000, 10, np.full(40, 0.999)) == (0, 493, 10, 13)


def test_evaluation_keeps_the_centre():
    image = np.zeros((1, 256, 320, 3), np.uint8)
    image[:, 16:240, 48:272] = np.arange(224, dtype=np.uint8)[:, None, None]
    view = crop.CropSource(ArraySource(image, [0]), 224)[0]["input"]
    # No resampling: the shorter side is 256 already.
    assert np.array_equal(view, image[0, 16:240, 48:272])


def test_half_of_the_views_are_mirrored():
    # Rising from left to right: a mirrored view falls.
    image = np.broadcast_to(
        np.arange(0, 250, 2, dtype=np.uint8)[None, None, :, None], (1, 125, 125, 1)
    )
    source = crop.CropSource(ArraySource(image, [0]), 16, 1)
    rising = [
        int(v[0, -1, 0]) > int(v[0, 0, 0])
        for v in (source.training_view(0, 0, epoch)["input"] for epoch in range(300))
    ]
    assert 98 < sum(rising) < 202  # six standard deviations, of 8.7


def test_equal_images_are_cropped_differently():
    image = np.broadcast_to(
        np.random.default_rng(0).integers(0, 256, (1, 40, 40, 1), np.uint8), (6, 40, 40, 1)
    )
    source = crop.CropSource(ArraySource(image, range(6)), 8, 1)
    assert len({source.training_view(index, 0, 0)["input"].tobytes() for index in range(6)}) == 6


def test_batches_use_training_views_of_their_epoch():
    source = crop.CropSource(Photographs(), 8)
    stream = train_batches(source, 5, seed=4, start_step=3)
    for step in (3, 4):
        batch = next(stream)
        for image, index in zip(batch["input"], train_indices(12, 5, 4, step), strict=True):
            assert np.array_equal(image, source.training_view(int(index), 4, step // 2)["input"])
    stream.close()  # type: ignore[attr-defined]


def test_mistakes_raise_errors():
    with pytest.raises(DataError, match="image_size is 0"):
        crop.CropSource(Photographs(), 0)
    with pytest.raises(DataError, match="images have 2 channels"):
        crop.CropSource(Photographs(2), 8, 2)
