"""Sets of plain arrays: how they are divided, measured and checked."""

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from paramshare.training.data import ArraySource, DataError, ImageSet, Source, from_arrays, statistics
from paramshare.training.data.image_set import Subset


def part(n: int, seed: int = 0, shape=(4, 4, 2)):
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), np.uint8), np.arange(n) % 5


def test_heavy_packages_are_imported_where_used():
    heavy = ("tensorflow_datasets", "tensorflow", "grain", "PIL", "sklearn")
    code = f"import sys, paramshare.training.data as d; print([m for m in {heavy} if m in sys.modules], sorted(d.__all__))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("[] ['ArraySource', ")


def test_parts_are_disjoint_and_statistics_are_of_the_training_part():
    image, label = part(50)
    images = from_arrays((image, label), part(9, seed=1), validation=0.2, seed=3)
    train, validation = images.train, images.validation
    assert isinstance(train, ArraySource)
    assert isinstance(validation, ArraySource)
    assert isinstance(images.test, Source)
    rows = sorted(row.tobytes() for row in [*train.image, *validation.image])
    assert rows == sorted(row.tobytes() for row in image)
    assert (len(train), len(validation), len(images.test), images.num_classes) == (40, 10, 9, 5)
    np.testing.assert_allclose(images.mean, train.image.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(images.std, train.image.std((0, 1, 2)), rtol=1e-12)


def test_test_part_is_untouched_whatever_is_asked():
    test = part(9, seed=1)
    asked: tuple[dict[str, Any], ...] = ({}, {"validation": 0}, {"seed": 5}, {"train_examples": 3}, {"held": part(4, seed=2)})
    for keywords in asked:
        source = from_arrays(part(50), test, **keywords).test
        assert isinstance(source, ArraySource)
        assert np.array_equal(source.image, test[0])
        assert np.array_equal(source.label, test[1])


def test_own_validation_examples_are_kept_whole_or_dropped():
    kept = from_arrays(part(50), part(9), held=part(4, seed=2), validation=0.1)
    assert (len(kept.train), len(kept.validation)) == (50, 4)
    dropped = from_arrays(part(50), part(9), held=part(4, seed=2), validation=0)
    assert (len(dropped.train), len(dropped.validation)) == (50, 0)


def test_constant_channels_do_not_divide_by_zero():
    black = np.zeros((10, 4, 4, 1), np.uint8)
    images = from_arrays((black, [0, 1] * 5), (black, [0, 1] * 5))
    assert (images.mean, images.std) == ((0.0,), (1.0,))


def test_known_constants():
    assert statistics.known("cifar10") == ((125.3, 123.0, 113.9), (63.0, 62.1, 66.7))
    assert statistics.known("cifar100") == ((129.3, 124.1, 112.4), (68.2, 65.4, 70.4))
    known = statistics.known("imagenet2012")
    assert known is not None
    np.testing.assert_allclose(np.array(known) / 255, ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ArraySource(np.zeros((2, 4, 4), np.uint8), [0, 1]), r"pass image\[..., None\]"),
        (lambda: ArraySource(np.zeros((2, 4), np.uint8), [0, 1]), r"shape \(2, 4\)"),
        (lambda: ArraySource(np.zeros((2, 4, 4, 1)), [0, 1]), "dtype float64; uint8"),
        (lambda: ArraySource(np.zeros((2, 4, 4, 1), np.uint8), [0]), r"label has shape \(1,\) .* beside 2 images"),
        (lambda: ArraySource(np.zeros((2, 4, 4, 1), np.uint8), [0.0, 1.0]), "label has dtype float64"),
        (lambda: ArraySource(np.zeros((2, 4, 4, 1), np.uint8), [0, -1]), "label runs from -1 to 0"),
        (lambda: from_arrays(part(9), part(9, shape=(4, 4, 1))), r"test images are \(4, 4, 1\) but train images are \(4, 4, 2\)"),
        (lambda: from_arrays(part(9), part(9), num_classes=3), "label 4 is not below num_classes=3"),
        (lambda: from_arrays(part(9), part(0)), "the test part holds no examples"),
        (lambda: from_arrays(part(9), part(9), train_examples=9), "train_examples=9: there are 8"),
        (lambda: from_arrays(part(9), part(9), validation=2), "validation=2"),
    ],
)
def test_mistakes_are_told(call, words):
    with pytest.raises(DataError, match=words):
        call()


@pytest.mark.parametrize(
    ("train_size", "validation_size", "phases", "said"),
    [
        (10, 0, 3, r"own: 10 train examples \(ArraySource\) cannot be a curriculum of 3 phases"),
        (9, 4, 3, r"own: 4 validation examples \(ArraySource\) cannot be a curriculum of 3 phases"),
        (9, 3, 0, "a curriculum of 0 phases"),
    ],
)
def test_sets_that_do_not_divide_into_phases(train_size, validation_size, phases, said):
    def source(size: int) -> ArraySource:
        return ArraySource(np.zeros((size, 4, 4, 1), np.uint8), np.zeros(size, np.int32))

    parts = source(train_size), source(validation_size), source(1)
    with pytest.raises(DataError, match=said) as caught:
        ImageSet("own", *parts, 2, (4, 4, 1), (0.0,), (1.0,), True, phases=phases)
    assert "\n" not in str(caught.value)
    assert ImageSet("own", *parts, 2, (4, 4, 1), (0.0,), (1.0,), True).phase_examples == train_size
    lazy = Subset(source(9), np.arange(9))
    with pytest.raises(DataError, match=r"9 train examples \(Subset\) cannot be a curriculum of 3 phases; give an ArraySource"):
        ImageSet("own", lazy, source(3), source(1), 2, (4, 4, 1), (0.0,), (1.0,), False, phases=3)
