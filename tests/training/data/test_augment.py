"""What each augmentation does to pixels, and that it does so example by example."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paramshare.training.data import Augment, DataError, augment, normalise

KEY = jax.random.key(3)


def coordinates(batch: int, height: int = 6, width: int = 8) -> np.ndarray:
    """Images whose pixels all differ and are never 0: 1 + row * width + column."""
    one = 1 + np.arange(height * width, dtype=np.uint8).reshape(height, width, 1)
    return np.broadcast_to(one, (batch, height, width, 1))


@functools.partial(jax.jit, static_argnames=("config", "mean", "std"))
def jitted(key, image, config, mean, std, first):
    return augment(key, image, config, mean, std, first=first)


def run(image, config, key=KEY, mean=(0.0,), std=(1.0,), first=0):
    return np.asarray(jitted(key, jnp.asarray(image), config, mean, std, first))


@pytest.mark.parametrize("config", [Augment(), Augment(True, 2, 3)])
@pytest.mark.parametrize("parts", [1, 2, 3, 6])
def test_cutting_a_batch_changes_nothing(config, parts):
    image = coordinates(6)
    whole = run(image, config)
    size = 6 // parts
    cut = [run(image[p * size : (p + 1) * size], config, first=p * size) for p in range(parts)]
    assert np.array_equal(np.concatenate(cut), whole)


def test_first_may_be_traced():
    image = jnp.asarray(coordinates(4))
    config = Augment(True, 2, 3)
    later = jax.jit(lambda i: augment(KEY, image[2:], config, (0.0,), (1.0,), first=i))(jnp.int32(2))
    assert np.array_equal(later, run(image, config)[2:])


def test_examples_of_a_batch_differ_and_keys_matter():
    config = Augment(True, 2, 3)
    found = run(coordinates(32), config)
    assert len({example.tobytes() for example in found}) > 16
    assert not np.array_equal(found, run(coordinates(32), config, key=jax.random.key(4)))


def test_flips_mirror_about_half():
    image = coordinates(400)
    found = run(image, Augment(flip=True))
    same = (found == image).all(axis=(1, 2, 3))
    mirrored = (found == image[:, :, ::-1]).all(axis=(1, 2, 3))
    assert (same ^ mirrored).all()
    assert 140 < mirrored.sum() < 260  # six standard deviations, of 10


def test_crops_are_windows_of_the_padded_image_and_every_offset_occurs():
    pad, height, width = 2, 6, 8
    image = coordinates(600)
    found = run(image, Augment(pad_crop=pad))
    padded = np.pad(image[0], ((pad, pad), (pad, pad), (0, 0)))
    windows = {padded[y : y + height, x : x + width].astype(np.float32).tobytes() for y in range(2 * pad + 1) for x in range(2 * pad + 1)}
    # A given one of 25 offsets is missed by all 600 with probability (24/25)**600, some 2e-11.
    assert {example.tobytes() for example in found} == windows


def test_cutout_is_a_clipped_square_and_every_centre_occurs():
    side, height, width = 4, 6, 8
    found = run(coordinates(1000), Augment(cutout=side))
    holes = found[..., 0] == 0
    expected = set()
    for y in range(height):
        for x in range(width):
            hole = np.zeros((height, width), bool)
            hole[max(y - side // 2, 0) : y - side // 2 + side, max(x - side // 2, 0) : x - side // 2 + side] = True
            expected.add(hole.tobytes())
    # 48 centres; one is missed with probability (47/48)**1000, some 7e-10.
    assert {hole.tobytes() for hole in holes} == expected
    assert np.array_equal(found[~holes], np.broadcast_to(coordinates(1), found.shape)[~holes])


def test_padding_is_black_and_cutout_is_the_mean():
    image = np.full((200, 8, 8, 1), 100, np.uint8)
    assert set(np.unique(run(image, Augment(pad_crop=4), mean=(100.0,), std=(50.0,)))) == {-2.0, 0.0}
    assert set(np.unique(run(image, Augment(cutout=4), mean=(50.0,), std=(50.0,)))) == {0.0, 1.0}


def test_cutout_does_not_follow_the_crop():
    image = coordinates(100, 5, 5)  # as many centres as offsets: equal keys would draw equal numbers
    shifts = run(image, Augment(pad_crop=2))[:, 2, 2, 0]  # the pixel that the crop brings to the middle tells its offset
    holes = (run(image, Augment(cutout=1))[..., 0] == 0).reshape(100, -1).argmax(1)
    assert len(set(zip(shifts, holes, strict=True))) > 60  # of 625 pairs, not of 25


def test_switching_cutout_on_leaves_flips_and_crops():
    plain, cut = run(coordinates(50), Augment(True, 2)), run(coordinates(50), Augment(True, 2, 3))
    kept = cut != 0
    assert np.array_equal(cut[kept], plain[kept])


def test_normalise_is_by_channel():
    image = np.arange(24, dtype=np.uint8).reshape(1, 2, 4, 3)
    mean, std = (1.0, 2.0, 3.0), (4.0, 5.0, 6.0)
    # float32 rounds the difference never (small integers) and the quotient once.
    np.testing.assert_allclose(normalise(jnp.asarray(image), mean, std), (image - np.array(mean)) / np.array(std), rtol=2**-23)
    assert np.array_equal(run(image, Augment(), mean=mean, std=std), normalise(jnp.asarray(image), mean, std))


def test_strict_promotion_is_respected():
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        assert augment(KEY, jnp.asarray(coordinates(2)), Augment(True, 2, 3), (0.0,), (1.0,)).dtype == jnp.float32


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Augment(pad_crop=-1), "pad_crop=-1"),
        (lambda: Augment(cutout=-2), "cutout=-2"),
        (lambda: run(coordinates(1), Augment(pad_crop=7)), "pad_crop=7 is larger than the images, 6x8"),
        (lambda: run(coordinates(1), Augment(cutout=7)), "cutout=7 is larger than the images, 6x8"),
        (lambda: run(coordinates(1).astype(np.float32), Augment()), "uint8 of shape"),
        (lambda: run(coordinates(1)[0], Augment()), "uint8 of shape"),
        (lambda: run(coordinates(1), Augment(), mean=(0.0, 0.0)), "mean has 2 and std 1 numbers but images have 1 channels"),
    ],
)
def test_mistakes_are_told(call, words):
    with pytest.raises(DataError, match=words):
        call()
