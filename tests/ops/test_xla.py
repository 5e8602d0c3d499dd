"""The compiler option for convolutions on CPUs."""

import os
import pathlib

import jax
import jaxlib
import pytest

from paramshare.ops import xla


@pytest.fixture
def flags(monkeypatch):
    """Sets XLA_FLAGS, calls the function, and returns what has become of them."""

    def call(before: str) -> str:
        monkeypatch.setenv("XLA_FLAGS", before)
        xla.compute_convolutions_without_ynnpack()
        return os.environ["XLA_FLAGS"]

    monkeypatch.setattr(xla, "find_spec", lambda name: None)
    return call


def test_the_option_is_added_once_and_never_against_the_user(flags):
    assert flags("") == xla.WITHOUT_CONVOLUTIONS
    assert not xla.ynnpack_convolutions()
    both = f"--a=b {xla.WITHOUT_CONVOLUTIONS}"
    assert flags("--a=b") == flags(both) == both
    own = f"--{xla.OPTION}=LIBRARY_FUSION_TYPE_DOT"
    assert flags(own) == own
    assert xla.ynnpack_convolutions()
    several = f"{xla.WITHOUT_CONVOLUTIONS},+LIBRARY_FUSION_TYPE_REDUCE"
    assert flags(several) == several
    assert not xla.ynnpack_convolutions()


def test_nothing_is_added_where_another_compiler_reads_the_flags(flags, monkeypatch):
    monkeypatch.setattr(xla, "find_spec", lambda name: name == "libtpu")
    assert flags("") == ""
    monkeypatch.undo()
    monkeypatch.setattr(jax, "__version_info__", (0, 13, 0))
    assert flags("") == ""


def test_this_jaxlib_knows_the_option():
    """XLA aborts on options that it does not know."""
    library = pathlib.Path(jaxlib.__file__).parent
    found = any(xla.OPTION.encode() in file.read_bytes() for file in library.glob("*.so"))
    assert found == ((0, 10) <= jax.__version_info__[:2] < (0, 13))
