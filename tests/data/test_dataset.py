"""Data sets of arrays: how they are divided, measured and checked."""

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from paramshare.data import ArraySource, DataError, Dataset, Source, Subset, from_arrays
from paramshare.tasks import Classification, Paths


def part(n: int, seed: int = 0, shape=(4, 4, 2)):
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), np.uint8), np.arange(n) % 5


def test_packages_of_one_set_are_imported_where_they_are_used():
    """And importing the builder of grid problems registers it, without TensorFlow."""
    heavy = ("tensorflow_datasets", "tensorflow", "grain", "PIL", "sklearn")
    code = f"""if True:
        import sys, paramshare.data
        print([name for name in {heavy} if name in sys.modules])
        import paramshare.data.sets.builders.grids, tensorflow_datasets as tfds
        print("shortest_paths" in tfds.list_builders(with_community_datasets=False))
        print("tensorflow" in sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]", "True", "False"]


def test_parts_are_disjoint_and_statistics_are_of_the_training_part():
    image, label = part(50)
    data = from_arrays((image, label), part(9, seed=1), validation=0.2, seed=3)
    train, validation = data.train, data.validation
    assert isinstance(train, ArraySource)
    assert isinstance(validation, ArraySource)
    assert isinstance(data.test, Source)
    rows = sorted(row.tobytes() for row in [*train.input, *validation.input])
    assert rows == sorted(row.tobytes() for row in image)
    assert (len(train), len(validation), len(data.test)) == (40, 10, 9)
    assert (data.task, data.input_shape) == (Classification(5), (4, 4, 2))
    assert data.mean is not None and data.std is not None
    np.testing.assert_allclose(data.mean, train.input.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(data.std, train.input.std((0, 1, 2)), rtol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"validation": 0},
        {"seed": 5},
        {"train_examples": 3},
        {"validation_data": part(4, seed=2)},
    ],
    ids=lambda options: ", ".join(options),
)
def test_the_test_part_does_not_depend_on_options(options: dict[str, Any]):
    test = part(9, seed=1)
    source = from_arrays(part(50), test, **options).test
    assert isinstance(source, ArraySource)
    assert np.array_equal(source.input, test[0])
    assert np.array_equal(source.label, test[1])


def test_validation_examples_of_the_set_are_kept_whole_or_dropped():
    for share, count in ((0.1, 4), (0, 0)):
        data = from_arrays(part(50), part(9), validation_data=part(4, seed=2), validation=share)
        assert (len(data.train), len(data.validation)) == (50, count)


def test_constant_channels_do_not_divide_by_zero():
    black = np.zeros((10, 4, 4, 1), np.uint8)
    data = from_arrays((black, [0, 1] * 5), (black, [0, 1] * 5))
    assert (data.mean, data.std) == ((0.0,), (1.0,))


def test_a_task_takes_other_inputs_and_labels():
    image, cells = part(20)[0], np.zeros((20, 4, 4), np.uint8)
    data = from_arrays((image, cells), (image, cells), task=Paths())
    assert data.task == Paths() and data.mean is not None
    tokens = np.arange(60, dtype=np.int64).reshape(20, 3)
    data = from_arrays((tokens, cells[:, 0, 0]), (tokens, cells[:, 0, 0]), task=Classification(2))
    assert (data.mean, data.std, data.input_shape) == (None, None, (3,))
    assert isinstance(data.train, ArraySource) and data.train.input.dtype == np.int32
    batch = data.train.input
    assert data.normalise(batch) is batch  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: from_arrays((part(2)[0][..., 0], [0, 1]), part(2)), r"pass image\[..., None\]"),
        (lambda: from_arrays((np.zeros((2, 4)), [0, 1]), part(2)), r"shape \(2, 4\)"),
        (
            lambda: from_arrays((part(2)[0] / 255, [0, 1]), part(2)),
            "dtype float64; it must be uint8",
        ),
        (lambda: from_arrays((part(2)[0], [[0], [1]]), part(2)), r"label has shape \(2, 1\)"),
        (lambda: from_arrays((part(2)[0], [0.0, 1.0]), part(2)), "label has dtype float64"),
        (lambda: from_arrays((part(2)[0], [0, -1]), part(2)), "label runs from -1 to 0"),
        (
            lambda: from_arrays(part(9), part(9, shape=(4, 4, 1))),
            r"test inputs have shape \(4, 4, 1\) but train inputs \(4, 4, 2\)",
        ),
        (
            lambda: from_arrays(part(9), part(9), num_classes=3),
            "label 4 must be below num_classes=3",
        ),
        (lambda: from_arrays(part(9), part(0)), "the test part has no examples"),
        (
            lambda: from_arrays(part(9), part(9), mean=(1.0,)),
            "one finite number for each of the 2 channels",
        ),
        (lambda: from_arrays(part(9), part(9), task=Paths()), "train: the label of one input is"),
        (
            lambda: from_arrays(part(9), part(9), task=Paths(), num_classes=2),
            "got both num_classes=2 and a task",
        ),
        (lambda: ArraySource(part(2)[0], [0]), r"label has shape \(1,\), but input has shape"),
        (lambda: ArraySource(part(2)[0], {"a": [0]}), r"label\['a'\] has shape \(1,\)"),
        (lambda: ArraySource(["a", "b"], [0, 1]), "input has dtype <U1; it must hold numbers"),
        (lambda: ArraySource([[1], [1, 2]], [0, 1]), "input is not rectangular .* pad it"),
        (lambda: ArraySource(part(2)[0], [0, 2**40]), "integers must fit into 32 bits"),
    ],
)
def test_mistakes_raise_errors(call, words):
    with pytest.raises(DataError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


IMAGES = part(40)[0]


@pytest.mark.parametrize(
    ("train", "test", "words"),
    [
        (np.arange(40) % 4 + 1, np.arange(9) % 4 + 1, "no training example has label 0 .*from 1"),
        (np.arange(40) % 4 + 1, np.arange(9) % 4, "no training example has label 0"),
        (np.arange(40) % 4, np.arange(9) % 5, "labels run up to 4, .* has label 4"),
        ([*[0, 1] * 19, 0, 40_000], np.zeros(9, int), "no .* label 2 .*num_classes=40001"),
        (np.zeros(40, int), np.zeros(9, int), "num_classes is 1; .*fewer than two classes"),
    ],
)
def test_classes_without_training_examples_are_refused_unless_they_are_counted(train, test, words):
    with pytest.raises(DataError, match=words):
        from_arrays((IMAGES, train), (IMAGES[:9], test))
    classes = max(2, int(np.max(train)) + 1, int(np.max(test)) + 1)
    data = from_arrays((IMAGES, train), (IMAGES[:9], test), num_classes=classes)
    assert data.task == Classification(classes)


def test_channels_that_come_first_are_refused():
    image, label = np.zeros((10, 3, 32, 32), np.uint8), np.arange(10) % 2
    with pytest.raises(DataError, match=r"looks like \(N, C, H, W\); pass np.moveaxis"):
        from_arrays((image, label), (image, label))
    moved = np.moveaxis(image, 1, -1)
    assert from_arrays((moved, label), (moved, label)).input_shape == (32, 32, 3)
    assert from_arrays((image, label), (image, label), channels=32).input_shape == (3, 32, 32)
    with pytest.raises(DataError, match="so 32 channels, but channels is 3"):
        from_arrays((image, label), (image, label), channels=3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["mean", "std"])
def test_statistics_that_are_not_finite_are_refused(name, bad):
    options: Any = {name: (1.0, bad)}
    with pytest.raises(DataError, match="one finite number"):
        from_arrays(part(9), part(9), **options)


def test_uneven_images_and_labels_are_refused():
    uneven = [np.zeros((4, 4, 2), np.uint8), np.zeros((4, 5, 2), np.uint8)]
    with pytest.raises(DataError, match="images differ in shape; resize"):
        from_arrays((uneven, [0, 1]), part(2))
    with pytest.raises(DataError, match="labels differ in shape"):
        from_arrays((part(2)[0], [0, [1, 2]]), part(2))


@pytest.mark.parametrize(
    ("train", "validation", "phases", "words"),
    [
        (10, 0, 3, r"10 train examples \(ArraySource\) cannot be divided into 3 phases"),
        (9, 4, 3, r"4 validation examples \(ArraySource\) cannot be divided into 3 phases"),
        (9, 3, 0, "into 0 phases"),
    ],
)
def test_parts_that_do_not_divide_into_phases(train, validation, phases, words):
    def source(size: int) -> ArraySource:
        return ArraySource(np.zeros((size, 4)), np.zeros(size, np.int32))

    parts = source(train), source(validation), source(1)
    with pytest.raises(DataError, match=words) as caught:
        Dataset("arrays", *parts, Classification(2), (4,), phases=phases)
    assert "\n" not in str(caught.value)
    assert Dataset("arrays", *parts, Classification(2), (4,)).phase_examples == train
    lazy = Subset(source(9), np.arange(9))
    with pytest.raises(DataError, match=r"9 train examples \(Subset\) .* pass an ArraySource"):
        Dataset("arrays", lazy, source(3), source(1), Classification(2), (4,), phases=3)
