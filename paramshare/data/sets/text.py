"""A text file, cut into windows of characters or bytes."""

import functools
import gzip
import importlib.resources
import lzma
import pathlib
import zlib
from typing import Annotated, Literal

import numpy as np
import pydantic

from paramshare.data.dataset import Dataset
from paramshare.data.error import DataError, require
from paramshare.data.registry import DataConfig, register
from paramshare.data.sets.idx import Folder
from paramshare.data.sources import ArraySource
from paramshare.data.vocabulary import Vocabulary
from paramshare.errors import one_line
from paramshare.tasks import Tokens
from paramshare.tasks.config import Count, Fraction

OPENERS = {".gz": gzip.open, ".xz": lzma.open}
PADDING = -1  # a label that does not count


@register("text")
class Text(DataConfig):
    """The next character of a text.

    The text is divided in order: the training part first, the test part last. Without a path, it
    is scikit-learn's descriptions of its data sets, about 40 kB of English.
    """

    name: str = "text"
    path: Folder = None
    """A UTF-8 text file, or one compressed as .gz or .xz; stored as an absolute path. None takes
    scikit-learn's descriptions of its data sets."""
    unit: Literal["characters", "bytes"] = "characters"
    """What a token is: one of the characters that occur in the text, or a byte."""
    length: Annotated[int, pydantic.Field(ge=1, lt=2**31)] = 128
    """Tokens that the network sees at once."""
    stride: Count | None = None
    """Tokens from the start of a training window to that of the next one; None for `length`, so
    that each token is predicted once per epoch."""
    validation: Fraction = 0.05
    """Fraction of the text that is held out for validation, before the test part; 0 for none."""
    test: Fraction = 0.05
    """Fraction of the text, the last part, that is the test part."""

    def load(self, seed: int = 0) -> Dataset:
        """The windows of the text. They do not depend on the seed."""
        del seed
        text = read_text(self.path)
        vocabulary = Vocabulary.of(text) if self.unit == "characters" else Vocabulary()
        token_N = vocabulary.encode(text)
        place = self.path or "the text"
        sizes = [round(part * len(token_N)) for part in (self.validation, self.test)]
        last = len(token_N) - sizes[1]
        first = last - sizes[0]
        if first <= self.length or sizes[1] < 2:
            raise DataError(
                f"{place} has {len(token_N)} {self.unit}, of which data.validation="
                f"{self.validation} and data.test={self.test} leave {max(first, 0)} to train on "
                f"and {sizes[1]} to test; at least {self.length + 1} (data.length + 1) and 2 are "
                "needed: pass a longer text, or lower them"
            )
        return Dataset(
            name=self.name,
            train=windows(token_N[:first], self.length, self.stride or self.length),
            validation=windows(token_N[first:last], self.length),
            test=windows(token_N[last:], self.length),
            task=Tokens(vocabulary.size, self.unit.removesuffix("s")),
            input_shape=(self.length,),
            vocabulary=vocabulary,
        )


def windows(token_N: np.ndarray, length: int, stride: int | None = None) -> ArraySource:
    """Inputs of `length` tokens, with the tokens that follow each of them as labels.

    Args:
      token_N: the tokens of a text.
      length: of a window.
      stride: from one window to the next; what does not fill a window is left out. None puts
        windows end to end, and fills up the last one, with labels of -1, so that every token but
        the first is predicted exactly once.

    Example:
      >>> source = windows(np.arange(6), 3)
      >>> source.input.tolist(), source.label.tolist()
      ([[0, 1, 2], [3, 4, 0]], [[1, 2, 3], [4, 5, -1]])
    """
    inputs, labels = token_N[:-1], token_N[1:]
    if stride is None:
        missing = -len(inputs) % length
        inputs = np.pad(inputs, (0, missing))
        labels, stride = np.pad(labels, (0, missing), constant_values=PADDING), length
    if len(inputs) < length:
        empty = np.zeros((0, length), np.int32)
        return ArraySource(empty, empty)
    cut = functools.partial(np.lib.stride_tricks.sliding_window_view, window_shape=length)
    return ArraySource(cut(inputs)[::stride].copy(), cut(labels)[::stride].copy())


def read_text(path: str | None) -> str:
    """The text of a file, compressed or not; None for scikit-learn's descriptions.

    Raises:
      DataError: if it cannot be read, or is no text in UTF-8.
    """
    if path is None:
        require("sklearn", "scikit-learn", "the text of data set 'text' without a path")
        folder = importlib.resources.files("sklearn.datasets.descr")
        files = sorted(folder.iterdir(), key=lambda file: file.name)
        return "\n".join(x.read_text("utf-8") for x in files if x.name.endswith(".rst"))
    file = pathlib.Path(path)
    try:
        with OPENERS.get(file.suffix, open)(file, "rb") as stream:
            return stream.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"data.path is {path}, which is not text in UTF-8 ({one_line(error)}); convert it"
        ) from None
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise DataError(
            f"data.path is {path}, which cannot be read ({one_line(error)}); it must be a text "
            "file, or one compressed as .gz or .xz"
        ) from None
