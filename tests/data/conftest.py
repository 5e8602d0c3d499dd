"""Data that several files read, prepared once a session."""

import contextlib
import io
import pathlib

import pytest

from paramshare.data import Dataset, Digits


@pytest.fixture(scope="session")
def prepared_digits(tmp_path_factory) -> tuple[Dataset, str, str]:
    """The digits without validation examples, their data_dir, and what preparing them printed."""
    data_dir = str(tmp_path_factory.mktemp("prepared"))
    with (
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
    ):
        data = Digits(data_dir=data_dir, validation=0).load()
    return data, data_dir, out.getvalue() + err.getvalue()


@pytest.fixture(scope="session")
def digits(prepared_digits) -> Dataset:
    """The digits without validation examples."""
    return prepared_digits[0]


@pytest.fixture(scope="session")
def data_dir(prepared_digits) -> str:
    """Where they are prepared."""
    return prepared_digits[1]


@pytest.fixture
def folder(coco, tmp_path) -> pathlib.Path:
    """Ten training and three test images with a box each."""
    return coco.make(tmp_path / "set", train=coco.part(10), test=coco.part(3))
