"""Text as data: windows, vocabularies, files of several kinds, errors."""

import gzip
import lzma
from typing import Any

import numpy as np
import pytest

from paramshare.data import DataError, Text, Vocabulary, from_arrays
from paramshare.tasks import TaskError, Tokens

WORDS = "the quick brown fox jumps over the lazy dog. "
TEXT = WORDS * 20  # 900 characters


def load(**options: Any) -> Any:
    return Text(**options).load()


@pytest.fixture
def file(tmp_path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


def test_every_token_is_predicted_once_and_parts_are_in_order(file):
    data = Text(path=file, length=16, validation=0.1, test=0.1).load()
    vocabulary = data.vocabulary
    assert vocabulary is not None and vocabulary.characters == "".join(sorted(set(TEXT)))
    assert data.task == Tokens(len(set(TEXT)), "character") and data.input_shape == (16,)
    parts = {"train": TEXT[:720], "validation": TEXT[720:810], "test": TEXT[810:]}
    for part, text in parts.items():
        source = getattr(data, part)
        inputs, labels = source.input, source.label
        assert inputs.dtype == labels.dtype == np.int32
        # The label at a place is the input at the next one.
        assert (labels[:, :-1] == inputs[:, 1:])[labels[:, 1:] >= 0].all()
        assert vocabulary.decode(inputs[0]) == text[:16]
        predicted = vocabulary.decode(labels[labels >= 0])
        whole = (len(text) - 1) // 16 * 16
        assert predicted == (text[1:] if part != "train" else text[1 : whole + 1])
    assert data.task.label_spec(data.input_shape).shape == (16,)


def test_windows_may_overlap_in_training_only(file):
    apart, close = (load(path=file, length=16, stride=stride) for stride in (None, 4))
    assert (close.train.input[4] == apart.train.input[1]).all()
    assert (close.train.input[1, :12] == close.train.input[0, 4:]).all()
    assert len(close.test) == len(apart.test)


@pytest.mark.parametrize("ending", [".gz", ".xz", ""])
def test_compressed_files_hold_the_same_text(file, tmp_path, ending):
    opener = {".gz": gzip.open, ".xz": lzma.open, "": open}[ending]
    with opener(tmp_path / f"other{ending}", "wb") as stream:
        stream.write(TEXT.encode())
    other = Text(path=str(tmp_path / f"other{ending}"), length=16).load()
    assert other.digest == Text(path=file, length=16).load().digest


def test_bytes(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("é" * 100, encoding="utf-8")
    data = load(path=str(path), unit="bytes", length=8)
    assert data.task == Tokens(256, "byte")
    assert data.train.input[0].tolist() == [195, 169] * 4
    assert data.vocabulary.decode(data.train.input[0]) == "éééé"
    assert data.vocabulary.decode([195, 169, 195]) == "é\ufffd"


def test_the_text_that_comes_with_scikit_learn_is_english():
    data = load()
    text = data.vocabulary.decode(data.train.input.ravel())
    assert len(text) > 30_000 and text.count(" the ") > 150


def test_texts_of_other_characters_are_other_data(file, tmp_path):
    """Even where the numbers of the characters are equal."""
    path = tmp_path / "upper.txt"
    path.write_text(TEXT.upper())
    data = [load(path=name, length=16) for name in (file, str(path))]
    assert (data[0].train.input == data[1].train.input).all()
    assert data[0].digest != data[1].digest


@pytest.mark.parametrize(
    ("content", "name", "options", "message"),
    [
        (None, "text.txt", {}, "data.path is .*text.txt, which cannot be read .*No such file"),
        (b"caf\xe9" * 100, "text.txt", {}, "not text in UTF-8 .*position 3"),
        (b"plain", "text.gz", {}, "cannot be read .*Not a gzipped file"),
        (b"plain", "text.xz", {}, "cannot be read"),
        (b"", "text.txt", {}, "has 0 characters"),
        (TEXT.encode(), "text.txt", {"length": 900}, "leave 810 to train on .* at least 901"),
        (TEXT.encode(), "text.txt", {"test": 0.0}, "0 to test"),
        (TEXT.encode(), "text.txt", {"test": 0.5, "validation": 0.5}, "leave 0 to train on"),
    ],
)
def test_errors(tmp_path, content, name, options, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        Text(**{"path": str(path), "length": 16} | options).load()


def test_a_text_of_one_character_teaches_nothing(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("a" * 100)
    with pytest.raises(TaskError, match="fewer than two"):
        Text(path=str(path), length=8).load()


def test_unknown_characters_are_named():
    with pytest.raises(DataError, match=r"the text has 'X', 'z'.* its 3 characters are 'abc'"):
        Vocabulary("abc").encode("aXbz")


def test_an_example_has_integers_only_for_tokens():
    task = Tokens(9)
    token = np.ones((4, 6), np.int32)
    data = from_arrays((token, token), (token, token), task=task)
    assert (data.example.shape, data.example.dtype) == ((1, 6), np.int32)
    image = np.zeros((4, 8, 8, 1), np.uint8)
    label = np.arange(4) % 2
    images = from_arrays((image, label), (image, label), validation=0)
    assert (images.example.shape, images.example.dtype) == ((1, 8, 8, 1), np.float32)
