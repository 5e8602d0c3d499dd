"""What each augmentation does to pixels, and that it does so example by example."""

import functools
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paramshare.data import order
from paramshare.data.rotation import rotated
from paramshare.tasks import Augment, AugmentError, Classification, augment, normalise
from paramshare.tasks.augment import apply, draw

KEY = jax.random.key(3)


def coordinates(batch: int, height: int = 6, width: int = 8) -> np.ndarray:
    """Images whose pixels all differ and are never 0: 1 + row * width + column."""
    one = 1 + np.arange(height * width, dtype=np.uint8).reshape(height, width, 1)
    return np.broadcast_to(one, (batch, height, width, 1))


@functools.partial(jax.jit, static_argnames=("config", "mean", "std"))
def jitted(key, image, config, mean, std, first):
    draws = draw(key, config, image.shape, first)
    return apply(draws, image, config, mean, std)


def run(image, config, key=KEY, mean=(0.0,), std=(1.0,), first=0):
    return np.asarray(jitted(key, jnp.asarray(image), config, mean, std, first))


@pytest.mark.parametrize("parts", [2, 6])
def test_splitting_a_batch_changes_nothing(parts):
    """`first` is traced: a step knows its device only while it runs."""
    image, config = coordinates(6), Augment(True, 2, 3)
    whole = run(image, config)
    size = 6 // parts
    split = [run(image[p * size : (p + 1) * size], config, first=p * size) for p in range(parts)]
    assert np.array_equal(np.concatenate(split), whole)


def test_examples_of_a_batch_differ_and_keys_matter():
    config = Augment(True, 2, 3)
    examples = run(coordinates(100), config)
    assert len({example.tobytes() for example in examples}) > 50
    assert not np.array_equal(examples, run(coordinates(100), config, key=jax.random.key(4)))


def test_flips_mirror_about_half():
    image = coordinates(400)
    augmented = run(image, Augment(flip=True))
    same = (augmented == image).all(axis=(1, 2, 3))
    mirrored = (augmented == image[:, :, ::-1]).all(axis=(1, 2, 3))
    assert (same ^ mirrored).all()
    assert 140 < mirrored.sum() < 260  # six standard deviations, of 10


def test_crops_are_windows_of_the_padded_image_and_every_offset_occurs():
    pad, height, width = 2, 6, 8
    image = coordinates(600)
    augmented = run(image, Augment(pad_crop=pad))
    padded = np.pad(image[0], ((pad, pad), (pad, pad), (0, 0)))
    windows = {
        padded[y : y + height, x : x + width].astype(np.float32).tobytes()
        for y in range(2 * pad + 1)
        for x in range(2 * pad + 1)
    }
    # A given one of 25 offsets is missed by all 600 with probability (24/25)**600, some 2e-11.
    assert {example.tobytes() for example in augmented} == windows


def test_cutout_is_a_clipped_square_and_every_centre_occurs():
    side, height, width = 4, 6, 8
    augmented = run(coordinates(1000), Augment(cutout=side))
    holes = augmented[..., 0] == 0
    expected = set()
    for y in range(height):
        for x in range(width):
            hole = np.zeros((height, width), bool)
            hole[
                max(y - side // 2, 0) : y - side // 2 + side,
                max(x - side // 2, 0) : x - side // 2 + side,
            ] = True
            expected.add(hole.tobytes())
    # 48 centres; one is missed with probability (47/48)**1000, some 7e-10.
    assert {hole.tobytes() for hole in holes} == expected
    assert np.array_equal(
        augmented[~holes], np.broadcast_to(coordinates(1), augmented.shape)[~holes]
    )


def test_padding_is_black_and_cutout_is_the_mean():
    image = np.full((200, 8, 8, 1), 100, np.uint8)
    assert set(np.unique(run(image, Augment(pad_crop=4), mean=(100.0,), std=(50.0,)))) == {
        -2.0,
        0.0,
    }
    assert set(np.unique(run(image, Augment(cutout=4), mean=(50.0,), std=(50.0,)))) == {0.0, 1.0}


def test_cutout_does_not_follow_the_crop():
    # As many centres as offsets: equal keys would draw equal numbers.
    image = coordinates(100, 5, 5)
    # The pixel that the crop brings to the middle tells its offset.
    shifts = run(image, Augment(pad_crop=2))[:, 2, 2, 0]
    holes = (run(image, Augment(cutout=1))[..., 0] == 0).reshape(100, -1).argmax(1)
    assert len(set(zip(shifts, holes, strict=True))) > 60  # of 625 pairs, not of 25


def test_turning_cutout_on_does_not_change_flips_and_crops():
    plain = run(coordinates(100), Augment(True, 2))
    with_holes = run(coordinates(100), Augment(True, 2, 3))
    visible = with_holes != 0
    assert np.array_equal(with_holes[visible], plain[visible])


def test_normalise_is_by_channel():
    image = np.arange(24, dtype=np.uint8).reshape(1, 2, 4, 3)
    mean, std = (1.0, 2.0, 3.0), (4.0, 5.0, 6.0)
    # float32 rounds the difference never (small integers) and the quotient once.
    np.testing.assert_allclose(
        normalise(jnp.asarray(image), mean, std),
        (image - np.array(mean)) / np.array(std),
        rtol=2**-23,
    )
    assert np.array_equal(
        run(image, Augment(), mean=mean, std=std), normalise(jnp.asarray(image), mean, std)
    )


def test_classification_leaves_labels_and_augments_images():
    image, labels, config = jnp.asarray(coordinates(6)), jnp.arange(6), Augment(True, 2, 3)
    task = Classification(6)
    augment = jax.jit(lambda key, x, y: task.augment(key, x, y, config, (0.0,), (1.0,), first=0))
    x, y = augment(KEY, image, labels)
    assert np.array_equal(y, labels)
    assert np.array_equal(x, run(image, config))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Augment(pad_crop=-1), "pad_crop must be greater than or equal to 0, got -1"),
        (lambda: Augment(flip=1), "flip must be a valid boolean"),  # pyright: ignore
        (lambda: Augment(pad_crop=7).check((6, 8, 1)), r"pad_crop is 7, .* at most 6"),
        (lambda: Augment(cutout=7).check((6, 8, 1)), r"cutout is 7, .* \(6, 8, 1\)"),
        (lambda: run(coordinates(1)[0], Augment(flip=True)), r"only images \(H, W, C\)"),
        (
            lambda: run(coordinates(1), Augment(), mean=(0.0, 0.0)),
            "mean has 2 numbers and std 1, but inputs have 1 channels",
        ),
    ],
)
def test_mistakes_raise_errors(call, words):
    with pytest.raises(AugmentError, match=words):
        call()


def test_colours_change_by_the_factors_of_the_draw():
    image: Any = np.random.default_rng(0).integers(40, 120, (3, 4, 4, 3)).astype(np.float32)
    one: Any = np.ones((3, 3), np.float32)
    np.testing.assert_allclose(augment.recolour(image, one), image, atol=1e-4)
    brighter = augment.recolour(image, one * [[2.0, 1.0, 1.0]])
    np.testing.assert_allclose(brighter, np.clip(2 * image, 0, 255), atol=1e-4)
    grey = np.asarray(augment.recolour(image, one * [[1.0, 1.0, 0.0]]))
    np.testing.assert_allclose(grey, np.repeat(grey[..., :1], 3, axis=-1), atol=1e-4)
    np.testing.assert_allclose(grey[..., 0], image @ np.array([0.299, 0.587, 0.114]), rtol=1e-5)
    flat = np.asarray(augment.recolour(image, one * [[1.0, 0.0, 1.0]]))
    assert np.ptp(flat, axis=(1, 2, 3)).max() < 1e-3


def test_new_draws_leave_the_others_as_they_were():
    before = augment.draw(KEY, Augment(True, 4, 4), (8, 16, 16, 3))
    after = augment.draw(KEY, Augment(True, 4, 4, 0.3, (0.5, 2.0)), (8, 16, 16, 3))
    for name in ("mirrored_B", "offset_Bx2", "centre_Bx2"):
        np.testing.assert_array_equal(getattr(before, name), getattr(after, name))
    assert before.colour_Bx3 is None and before.factor_B is None
    factor, corner = np.asarray(after.factor_B), np.asarray(after.corner_Bx2)
    assert (factor >= 0.5).all() and (factor <= 2).all()
    # The content fills the image, or lies inside it.
    low, high = np.minimum(0, 16 - 16 * factor), np.maximum(0, 16 - 16 * factor)
    assert (corner >= low[:, None]).all() and (corner <= high[:, None]).all()


def test_a_zoom_is_the_resized_image():
    image = np.zeros((1, 16, 16, 1), np.float32)
    image[:, 4:8, 4:8] = 1
    twice = augment.zoom(jnp.asarray(image), jnp.array([2.0]), jnp.array([[-5.0, -4.0]]))
    assert np.asarray(twice)[0, 4:10, 5:11, 0].min() == 1  # inner pixels of rows 3-11, columns 4-12
    assert float(jnp.sum(twice)) == pytest.approx(64, rel=0.01)


@pytest.mark.parametrize(("height", "width"), [(6, 6), (7, 7), (6, 9)])
def test_half_and_quarter_turns_are_exact_up_to_smoothing(height, width):
    """The interpolation is symmetric: what it does to an image, it does to the turned one."""
    rng = np.random.default_rng(0)
    image = jnp.asarray(rng.uniform(0, 255, (2, height, width, 2)), jnp.float32)
    still = augment.turn(image, jnp.zeros(2))
    turned = augment.turn(image, jnp.array([180.0, -180.0]))
    np.testing.assert_allclose(turned, still[:, ::-1, ::-1], atol=2e-2)
    if height == width:
        turned = augment.turn(image, jnp.array([90.0, -90.0]))
        np.testing.assert_allclose(turned[0], np.rot90(still[0]), atol=2e-2)
        np.testing.assert_allclose(turned[1], np.rot90(still[1], -1), atol=2e-2)
    assert float(jnp.abs(still - image).max()) < 120  # neighbours blend, and nothing else


def test_turns_are_as_pillow_makes_them():
    """A smooth blob away from the border, by Pillow's enlarging, turning and reducing."""
    y, x = np.mgrid[:28, :28]
    blob = (200 * np.exp(-((x - 17) ** 2 + (y - 11) ** 2) / 12)).astype(np.uint8)
    for degrees in (-70.0, 33.0, 145.0):
        with mock.patch.object(order, "raw", lambda *_, d=degrees: draw_of(d / 180)):
            expected, angle = rotated(blob[None], 180, 29, 0, 0, [0])
        assert angle[0] == pytest.approx(degrees)
        padded = jnp.pad(blob, ((0, 1), (0, 1)))[None, ..., None]
        turned = augment.turn(padded, jnp.array(angle, jnp.float32))
        np.testing.assert_allclose(turned, expected, atol=1.0)


def draw_of(uniform):
    """The raw draw behind a number in [-1, 1)."""
    return np.array([int((uniform + 1) / 2 * 2.0**53) << 11], np.uint64)


def test_angles_fill_their_range():
    config = Augment(turn=30)
    angle = np.asarray(draw(KEY, config, (500, 8, 8, 1)).angle_B)
    assert -30 <= angle.min() < -28 and 28 < angle.max() <= 30
    assert abs(angle.mean()) < 4  # five standard errors


def test_zoom_factors_must_rise():
    with pytest.raises(AugmentError, match="the first factor must be the smaller"):
        Augment(zoom=(2.0, 1.0))
