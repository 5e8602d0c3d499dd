"""Files and folders that are written completely or not at all."""

import contextlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def written_whole(folder: pathlib.Path, error: type[Exception]) -> Iterator[pathlib.Path]:
    """Yields a temporary folder to fill, and renames it to `folder` at the end.

    If anything fails, the temporary folder is removed and `folder` is left as it was.

    Args:
      folder: a folder that does not exist yet, or is empty; its parents are created.
      error: raised if the folder cannot be written.

    Example:
      >>> import pathlib, tempfile
      >>> from paramshare.storage import written_whole
      >>> with tempfile.TemporaryDirectory() as parent:
      ...     with written_whole(pathlib.Path(parent) / "new", ValueError) as temporary:
      ...         _ = (temporary / "file").write_text("content")
      ...     (pathlib.Path(parent) / "new" / "file").read_text()
      'content'
    """
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        yield temporary
        temporary.chmod(0o755)  # mkdtemp makes folders that only their owner can read
        temporary.rename(folder)
    except OSError as reason:
        raise error(f"{folder} cannot be written: {reason}") from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def write_bytes(path: pathlib.Path, content: bytes) -> None:
    """Writes a file beside `path` and renames it, so that a reader never sees half of it.

    Raises:
      OSError: if it cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def write_text(path: pathlib.Path, text: str) -> None:
    """`write_bytes` of a text in UTF-8."""
    write_bytes(path, text.encode())


def read_json(
    path: pathlib.Path,
    error: type[Exception],
    remedy: str = "remove it and rerun the same command to write it again",
) -> dict[str, Any]:
    """Reads a JSON object from a file.

    Args:
      path: the file.
      error: raised, with the file and the remedy, if it cannot be read or holds no JSON object.
      remedy: what the user can do about it.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as reason:
        raise error(f"{path} cannot be read: {reason}; {remedy}") from None
    if not isinstance(value, dict):
        raise error(f"{path} must hold a JSON object, got {type(value).__name__}; {remedy}")
    return value
