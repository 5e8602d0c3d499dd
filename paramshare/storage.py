"""Files and folders that are written completely or not at all, and checks of their paths."""

import contextlib
import errno
import functools
import glob
import hashlib
import importlib.util
import json
import math
import os
import pathlib
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

from paramshare.errors import ParamshareError, one_line

try:
    import fcntl
    import resource
except ImportError:  # Windows
    fcntl = resource = None

_REMEDIES = {
    errno.EACCES: "check the folder's permissions",
    errno.EPERM: "check the folder's permissions",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOSPC: "free some space on that disk",
    errno.EDQUOT: "free some of your quota on that disk",
    errno.EFBIG: "raise the limit on the size of files (`ulimit -f`)",
    errno.EROFS: "choose a folder that is not read-only",
    errno.EISDIR: "move it away",
}
DIGEST = "sha256"  # JSON key of the digest of what stands beside it
_NAME_BYTES, _PATH_BYTES = 255, 4095  # the longest that Linux and macOS accept


class StorageError(ParamshareError):
    """A file or folder that cannot be written, or a path that cannot be one."""


def not_written(path: str | os.PathLike[str], error: OSError) -> StorageError:
    """The error to raise for a path that could not be written, with what to do about it.

    Example:
      >>> print(not_written("runs/a", OSError(28, "No space left on device")))
      runs/a cannot be written (No space left on device); free some space on that disk
    """
    remedy = _REMEDIES.get(error.errno or 0, "choose another folder, or fix the cause")
    return StorageError(f"{path} cannot be written ({error.strerror or error}); {remedy}")


def local_path(path: str | os.PathLike[str]) -> pathlib.Path:
    """A path on this machine.

    Raises:
      StorageError: if it is empty, a URL such as "gs://bucket/run", or no path at all.

    Example:
      >>> local_path("gs://bucket/run")
      Traceback (most recent call last):
      ...
      paramshare.storage.StorageError: 'gs://bucket/run' is a URL; give a folder of this machine, \
such as a bucket that is mounted
    """
    text = os.fspath(path)
    if not text or "\0" in text:
        raise StorageError(f"{text!r} is not a valid path; give the name of a file or folder")
    url = _url(text)
    if url:
        raise StorageError(
            f"'{url[1]}://{url[2]}' is a URL; give a folder of this machine, such as a bucket that "
            "is mounted"
        )
    longest = max(len(os.fsencode(part)) for part in text.split("/"))
    if longest > _NAME_BYTES or len(os.fsencode(text)) > _PATH_BYTES:
        raise StorageError(
            f"the path {text[:40]}... has a name of {longest} bytes, {len(text)} characters in "
            f"all; at most {_NAME_BYTES} and {_PATH_BYTES} are possible"
        )
    return pathlib.Path(path)


def run_path(path: str | os.PathLike[str]) -> pathlib.Path:
    """The folder of a run: on this machine, or in a bucket of Google Cloud Storage.

    Returns:
      A `pathlib.Path`; for a bucket ("gs://bucket/run") an `etils.epath.Path`, which has the same
      methods.

    Raises:
      StorageError: as `local_path`; also if the bucket cannot be reached, or the package that
        reads buckets is not installed.

    Example:
      >>> run_path("runs/a").name
      'a'
    """
    url = _url(os.fspath(path))
    if url is None or url[1].lower() != "gs":
        return local_path(path)
    text = f"gs://{url[2].rstrip('/')}"
    bucket, _, name = url[2].rstrip("/").partition("/")
    if not name:
        raise StorageError(
            f"{text!r} names no folder; give one, such as 'gs://{bucket or 'b'}/run'"
        )
    return _bucket(bucket) / name


def in_bucket(path: str | os.PathLike[str]) -> bool:
    """Whether a path that `run_path` returned lies in a bucket."""
    return os.fspath(path).startswith("gs://")


def absolute(path: pathlib.Path) -> pathlib.Path:
    """The absolute form of a path that `run_path` returned."""
    return path if in_bucket(path) else path.absolute()


def is_new(path: pathlib.Path) -> bool:
    """Whether nothing is at a path, or an empty folder, such as a volume that was just mounted."""
    return not path.exists() or (path.is_dir() and not any(path.iterdir()))


def _url(text: str) -> re.Match[str] | None:
    # A Path has lost one of the slashes.
    return re.match(r"([a-z][a-z0-9+.-]+):/+(.*)", text, re.IGNORECASE)


@functools.cache
def _bucket(name: str) -> Any:
    """The root of a bucket, seen to be readable."""
    if not any(map(importlib.util.find_spec, ("gcsfs", "tensorflow"))):
        raise StorageError(
            f"'gs://{name}' needs a package that reads buckets; run "
            '`pip install "paramshare[buckets]"`'
        )
    if importlib.util.find_spec("fsspec"):
        import fsspec.config

        # Other processes write there too, so that a listing is soon out of date.
        fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    from etils import epath

    root = epath.Path(f"gs://{name}")
    try:
        found = root.exists()
    except Exception as error:
        raise StorageError(
            f"'gs://{name}' cannot be read ({one_line(error)}); check its name, and your "
            "credentials (`gcloud auth application-default login`)"
        ) from error
    if not found:
        raise StorageError(
            f"there is no bucket 'gs://{name}', or it may not be read; check its name, and your "
            "credentials (`gcloud auth application-default login`)"
        )
    return root


@contextlib.contextmanager
def written_whole(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a temporary folder to fill, and renames it to `folder` at the end.

    If anything fails, the temporary folder is removed and `folder` is left as it was. What a
    killed process left beside it is removed too. A bucket has no folders to rename: there, yields
    `folder` itself, which is removed if anything fails.

    Args:
      folder: a folder that does not exist yet, or is empty; its parents are created.

    Raises:
      StorageError: if the folder cannot be written.

    Example:
      >>> import pathlib, tempfile
      >>> with tempfile.TemporaryDirectory() as parent:
      ...     with written_whole(pathlib.Path(parent) / "new") as temporary:
      ...         _ = (temporary / "file").write_text("content")
      ...     (pathlib.Path(parent) / "new" / "file").read_text()
      'content'
    """
    if in_bucket(folder):
        try:
            yield folder
        except BaseException:
            folder.rmtree(missing_ok=True)  # pyright: ignore[reportAttributeAccessIssue] (epath)
            raise
        return
    temporary = _temporary(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        temporary.mkdir()
        with _held(temporary):
            yield temporary
            temporary.rename(folder)
    except OSError as error:
        raise not_written(folder, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_bytes(path: pathlib.Path, content: bytes) -> None:
    """Writes a file beside `path` and renames it, so that a reader never sees half of it.

    A link at `path` is replaced; the file that it points to stays as it is. In a bucket, a file
    appears once all of it is there.

    Raises:
      StorageError: if it cannot be written.
    """
    if in_bucket(path):
        try:
            path.write_bytes(content)
        except Exception as error:  # of several packages
            raise not_written(path, OSError(one_line(error))) from error
        return
    temporary = _temporary(path)
    try:
        _remove_leftovers(path)
        temporary.touch(exist_ok=False)
        with _held(temporary):
            with temporary.open("r+b") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())  # a power cut must not leave an empty file under this name
            os.replace(temporary, path)
    except OSError as error:
        raise not_written(path, error) from None
    finally:
        with contextlib.suppress(OSError):  # it is gone if all went well
            temporary.unlink()


def write_text(path: pathlib.Path, text: str) -> None:
    """`write_bytes` of a text in UTF-8."""
    write_bytes(path, text.encode())


def check_room(folder: pathlib.Path, size: int) -> None:
    """Checks that the disk and the limits of the process allow `size` more bytes in a folder.

    A quota is not seen here.

    Raises:
      StorageError: if they do not.
    """
    number = 0
    if shutil.disk_usage(folder).free < size:
        number = errno.ENOSPC
    elif resource is not None:
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        number = errno.EFBIG if limit != resource.RLIM_INFINITY and limit < size else 0
    if number:
        raise not_written(folder, OSError(number, os.strerror(number)))
    if not os.access(folder, os.W_OK):
        raise not_written(folder, OSError(errno.EACCES, os.strerror(errno.EACCES)))


@contextlib.contextmanager
def _held(path: pathlib.Path) -> Iterator[None]:
    """Marks a temporary file or folder as in use, until the process ends."""
    if fcntl is None:
        yield
        return
    number = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network disks have no locks
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(number)


def is_temporary(path: pathlib.Path, name: str) -> bool:
    """Whether a path is what `written_whole` or `write_bytes` makes before it becomes `name`."""
    return re.fullmatch(rf"\.{re.escape(name)}-[0-9a-f]{{8}}", path.name) is not None


def _temporary(target: pathlib.Path) -> pathlib.Path:
    return target.with_name(f".{target.name}-{secrets.token_hex(4)}")


def _remove_leftovers(target: pathlib.Path) -> None:
    """Removes what killed processes left of their attempts to write `target`."""
    if fcntl is None:
        return
    for path in target.parent.glob(f".{glob.escape(target.name)}-????????"):
        if not is_temporary(path, target.name) or path.is_symlink():
            continue
        with contextlib.suppress(OSError):
            number = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails if a process holds it
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            finally:
                os.close(number)


def write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON object, with a digest by which `read_json` notices that the file has changed.

    Raises:
      StorageError: if it cannot be written.
    """
    value = {name: part for name, part in value.items() if name != DIGEST}
    write_text(path, json_text(value | {DIGEST: _digest(value)}, indent=2) + "\n")


def _digest(value: Mapping[str, Any]) -> str:
    # Through JSON: what is read back has lists for tuples, and null for NaN.
    text = json.dumps(json.loads(json_text(value)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def read_json(path: pathlib.Path, error: type[Exception], remedy: str) -> dict[str, Any]:
    """Reads a JSON object from a file. Files without a digest are read as they are.

    Args:
      path: the file.
      error: raised, with the file and the remedy, if it cannot be read or holds no JSON object.
      remedy: what the user can do about it.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as reason:
        raise error(f"{path} cannot be read: {reason}; {remedy}") from None
    if not isinstance(value, dict):
        raise error(f"{path} must hold a JSON object, got {type(value).__name__}; {remedy}")
    digest = value.pop(DIGEST, None)
    try:
        same = digest in (None, _digest(value))
    except RecursionError:
        same = False
    if not same:
        raise error(
            f"{path} has changed since it was written; restore it, or, if you changed it yourself, "
            f"remove its {DIGEST!r}"
        )
    return value


def json_text(value: Any, indent: int | None = None) -> str:
    """A value as JSON. It has no NaN and no infinity: they become null.

    Example:
      >>> json_text({"loss": float("nan"), "scores": [1.5, float("inf")]})
      '{"loss": null, "scores": [1.5, null]}'
    """

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(part) for name, part in value.items()}
        if isinstance(value, list | tuple):
            return [plain(part) for part in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(value), indent=indent, allow_nan=False)
