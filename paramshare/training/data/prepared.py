"""A prepared builder of tensorflow-datasets for a name; every way that can fail, in one line."""

import contextlib
import difflib
import errno
import importlib.util
import io
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from paramshare.training.data.error import DataError, one_line, require

OWN = ("digits", "idx")
_FORMAT = "array_record"  # TFDS's format of random access
_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOSPC, errno.EDQUOT, errno.ENOENT)


def builder(name: str, data_dir: str | None = None, path: str | None = None) -> Any:
    """A builder whose data lie prepared on disk, preparing them if need be.

    Two processes may do so at once: each writes a folder of its own and renames it once it is whole; the first to finish wins.

    Args:
        name: "digits", "idx" or a name of tensorflow-datasets, with its configuration after a slash if it has several.
        data_dir: where prepared sets lie; None for TFDS's default, ~/tensorflow_datasets.
        path: the folder of IDX files, for "idx" only.

    Returns:
        A `tfds.core.DatasetBuilder`.

    Raises:
        DataError: if there is no such set or it cannot be prepared or read.
    """
    if (name == "idx") != (path is not None):
        if path is None:
            raise DataError(
                "the data set 'idx' is read from a folder; pass path= the folder that holds train-images-idx3-ubyte[.gz] and the rest"
            )
        raise DataError(f"path={str(path)!r} is for the data set 'idx' only, not for {name!r}; leave it out, or ask for 'idx'")
    tfds = require("tensorflow_datasets", "tensorflow-datasets", f"the data set {name!r}")
    data_dir = None if data_dir is None else os.fspath(pathlib.Path(data_dir).expanduser())
    if name not in OWN:
        _known(tfds, name, data_dir)
    with _quiet():
        make = _maker(tfds, name, data_dir, path)
        found = _constructed(make, name, data_dir)
        if found.is_prepared():
            return found
        if needs_tensorflow(tfds, found) and not _readable(found):
            raise DataError(_no_tensorflow(name))
    # Our own sets take seconds; of a download one wants to see the progress.
    with _quiet() if name in OWN else contextlib.redirect_stdout(sys.stderr):
        _prepare(found, name)
    with _quiet():
        return _constructed(make, name, data_dir)  # what is on disk now, whoever wrote it


def _maker(tfds: Any, name: str, data_dir: str | None, path: str | None) -> Callable[[], Any]:
    if name == "digits":
        from paramshare.training.data.builders import digits

        return lambda: digits.Digits(data_dir=data_dir)
    if name == "idx":
        from paramshare.training.data.builders import idx

        return lambda: idx.Idx(path=str(path), data_dir=data_dir)
    return lambda: tfds.builder(name, data_dir=data_dir)


def _known(tfds: Any, name: str, data_dir: str | None) -> None:
    base = name.split("/")[0].split(":")[0]
    names = sorted({*OWN, *tfds.list_builders(with_community_datasets=False)})
    if base in names or (base and data_dir and (pathlib.Path(data_dir) / base).is_dir()):
        return
    near = difflib.get_close_matches(base, names, n=3)
    remedy = (
        f"did you mean {', '.join(near)}?" if near else "pass digits, idx, cifar10, cifar100, mnist, or another name of tensorflow-datasets"
    )
    raise DataError(f"there is no data set {name!r}; {remedy}")


def _constructed(make: Callable[[], Any], name: str, data_dir: str | None) -> Any:
    try:
        return make()
    except DataError:
        raise
    except Exception as error:
        if _wants_tensorflow(error):
            raise DataError(_no_tensorflow(name)) from error
        where = f" in data_dir={data_dir!r}" if data_dir else ""
        remedy = "check its name and configuration, or delete it and prepare it again"
        raise DataError(f"the data set {name!r}{where} cannot be opened ({one_line(error)}); {remedy}") from error


def _prepare(found: Any, name: str) -> None:
    downloads = pathlib.Path(found.data_dir_root) / "downloads"
    target = pathlib.Path(found.data_dir)
    absent = [p for p in (downloads / "extracted", downloads, *target.parents) if not p.exists()]
    with contextlib.ExitStack() as stack:
        # Our own sets download nothing, and are to leave no empty folder for it: two processes could not agree on who removes it.
        scratch = stack.enter_context(tempfile.TemporaryDirectory()) if name in OWN else None
        try:
            found.download_and_prepare(file_format=_FORMAT, download_dir=scratch)
        except Exception as error:
            if (target / "dataset_info.json").exists():
                return  # another process was first: renaming onto its folder fails, and ours has been removed
            _remove_empty(absent)
            raise error if isinstance(error, DataError) else DataError(_told(error, found, name)) from error


def needs_tensorflow(tfds: Any, found: Any) -> bool:
    """Whether preparing calls for TensorFlow, which is not there: TFDS encodes the pictures of its `Image` features with it.

    Asked before anything is downloaded. A few sets hand over encoded pictures and could do without;
    they are not told apart.
    """
    if importlib.util.find_spec("tensorflow") is not None:
        return False
    features = found.info.features
    return any(isinstance(feature, tfds.features.Image) for feature in (features or {}).values())


def _readable(found: Any) -> bool:
    # Under tfds.testing.mock_data nothing is prepared, and all can be read.
    try:
        return found.as_data_source(split="train") is not None
    except Exception:
        return False


def _no_tensorflow(name: str) -> str:
    what = f"the data set {name!r} is not prepared yet, and preparing it needs TensorFlow, which is not installed"
    return f'{what}; run `pip install "paramshare[tfds]"`, then the same command again'


def _wants_tensorflow(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, ImportError) and "tensorflow" in f"{error.name} {error}".lower():
            return True
        error = error.__cause__ or error.__context__
    return False


def _told(error: Exception, found: Any, name: str) -> str:
    if _wants_tensorflow(error):
        return _no_tensorflow(name)
    if isinstance(error, OSError) and error.errno in _UNWRITABLE:
        return (
            f"the data set {name!r} cannot be written to {str(found.data_dir)!r} ({one_line(error)}); pass a data_dir that can be written"
        )
    remedy = "then run the same command again"
    if found.MANUAL_DOWNLOAD_INSTRUCTIONS and "manual" in str(error).lower():
        place = pathlib.Path(found.data_dir_root) / "downloads" / "manual"
        return f"the data set {name!r} must be downloaded by hand into {str(place)!r}; see {found.info.homepage}, {remedy}"
    return f"the data set {name!r} cannot be prepared in {str(found.data_dir)!r} ({one_line(error)}); mend that, {remedy}"


def _remove_empty(folders: list[pathlib.Path]) -> None:
    for folder in folders:  # the deepest first
        with contextlib.suppress(OSError):
            folder.rmdir()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps TFDS from printing: banners, bars and warnings of what is told better here, or is none of a user's business."""
    from absl import logging

    level = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(level)
