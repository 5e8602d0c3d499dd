"""Prepared builders of tensorflow-datasets, with every failure described in one line."""

import contextlib
import errno
import importlib.util
import io
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from paramshare.data.error import DataError, require
from paramshare.errors import one_line, without_logs

_FORMAT = "array_record"  # the format of tensorflow-datasets with random access
_UNWRITABLE = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.ENOENT,
)


def prepared_builder(
    make: Callable[[str | None], Any], name: str, data_dir: str | None, *, local: bool = False
) -> Any:
    """A builder whose data are on disk; they are prepared if they are not.

    Two processes may do so at once: each writes its own folder and renames it when it is
    complete; the first to finish wins.

    Args:
      make: makes a builder that keeps its data in the given folder.
      name: name of the data set, for messages.
      data_dir: where prepared data are; None for ~/tensorflow_datasets.
      local: whether preparing downloads nothing and takes seconds, so that no progress is shown.

    Returns:
      A `tfds.core.DatasetBuilder`.

    Raises:
      DataError: if the data cannot be prepared or read.
    """
    tfds = require("tensorflow_datasets", "tensorflow-datasets", f"the data set {name!r}")
    folder = None if data_dir is None else os.fspath(pathlib.Path(data_dir).expanduser())
    with _quiet():
        builder = _open(make, name, folder)
        if builder.is_prepared():
            return builder
        if needs_tensorflow(tfds, builder) and not _readable(builder):
            raise DataError(_no_tensorflow(name))
    # The progress of a download is shown.
    with _quiet() if local else contextlib.redirect_stdout(sys.stderr):
        _prepare(builder, name, local)
    with _quiet():
        return _open(make, name, folder)  # what is on disk now, whichever process wrote it


def _open(make: Callable[[str | None], Any], name: str, data_dir: str | None) -> Any:
    try:
        return make(data_dir)
    except DataError:
        raise
    except Exception as error:
        if _misses_tensorflow(error):
            raise DataError(_no_tensorflow(name)) from error
        where = f" in data_dir={data_dir!r}" if data_dir else ""
        raise DataError(
            f"the data set {name!r}{where} cannot be opened ({one_line(error)}); check its name "
            "and configuration, or delete it and prepare it again"
        ) from error


def _prepare(builder: Any, name: str, local: bool) -> None:
    downloads = pathlib.Path(builder.data_dir_root) / "downloads"
    target = pathlib.Path(builder.data_dir)
    absent = [p for p in (downloads / "extracted", downloads, *target.parents) if not p.exists()]
    with contextlib.ExitStack() as stack:
        # An empty folder for downloads would remain: two processes could not agree who removes it.
        scratch = stack.enter_context(tempfile.TemporaryDirectory()) if local else None
        try:
            builder.download_and_prepare(file_format=_FORMAT, download_dir=scratch)
        except Exception as error:
            if (target / "dataset_info.json").exists():
                return  # another process was first: renaming onto its folder failed
            _remove_empty(absent)
            raise (
                error if isinstance(error, DataError) else DataError(_failure(error, builder, name))
            ) from error


def needs_tensorflow(tfds: Any, builder: Any) -> bool:
    """Whether preparing needs TensorFlow and it is not installed.

    tensorflow-datasets encodes the pictures of its `Image` features with it. This is checked before
    anything is downloaded. A few sets contain encoded pictures and would not need it; they are
    refused too.
    """
    if importlib.util.find_spec("tensorflow") is not None:
        return False
    features = builder.info.features
    return any(isinstance(feature, tfds.features.Image) for feature in (features or {}).values())


def _readable(builder: Any) -> bool:
    # Under tfds.testing.mock_data nothing is prepared and everything can be read.
    try:
        return builder.as_data_source(split="train") is not None
    except Exception:
        return False


def _no_tensorflow(name: str) -> str:
    return (
        f"the data set {name!r} is not prepared yet, and preparing it needs TensorFlow, which is "
        'not installed; run `pip install "paramshare[tfds]"`, then rerun the same command'
    )


def _misses_tensorflow(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, ImportError) and "tensorflow" in f"{error.name} {error}".lower():
            return True
        error = error.__cause__ or error.__context__
    return False


def _failure(error: Exception, builder: Any, name: str) -> str:
    if _misses_tensorflow(error):
        return _no_tensorflow(name)
    folder = str(builder.data_dir)
    if isinstance(error, OSError) and error.errno in _UNWRITABLE:
        return (
            f"the data set {name!r} cannot be written to {folder!r} ({one_line(error)}); pass a "
            "data_dir that can be written"
        )
    remedy = "then rerun the same command"
    if builder.MANUAL_DOWNLOAD_INSTRUCTIONS and "manual" in str(error).lower():
        place = pathlib.Path(builder.data_dir_root) / "downloads" / "manual"
        return (
            f"the data set {name!r} must be downloaded by hand into {str(place)!r}; see "
            f"{builder.info.homepage}, {remedy}"
        )
    return (
        f"the data set {name!r} cannot be prepared in {folder!r} ({one_line(error)}); fix the "
        f"cause, {remedy}"
    )


def _remove_empty(folders: list[pathlib.Path]) -> None:
    for folder in folders:  # the deepest first
        with contextlib.suppress(OSError):
            folder.rmdir()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences the banners, progress bars and warnings of tensorflow-datasets."""
    with (
        without_logs(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        yield
