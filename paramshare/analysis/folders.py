"""Folders that are written whole, or not at all."""

import contextlib
import pathlib
import shutil
import tempfile
from collections.abc import Iterator


@contextlib.contextmanager
def written_whole(folder: pathlib.Path, error: type[Exception]) -> Iterator[pathlib.Path]:
    """A fresh folder beside the wanted one, to be filled; at the end it takes that one's name, and if anything fails it is gone.

    Args:
      folder: that is not there yet, or is empty; its parents are made.
      error: raised if it cannot be written.

    Example:
      >>> import pathlib, tempfile
      >>> from paramshare.analysis.folders import written_whole
      >>> with tempfile.TemporaryDirectory() as above:
      ...     with written_whole(pathlib.Path(above) / "new", ValueError) as fresh:
      ...         _ = (fresh / "file").write_text("content")
      ...     (pathlib.Path(above) / "new" / "file").read_text()
      'content'
    """
    fresh = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        fresh = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        yield fresh
        fresh.chmod(0o755)  # mkdtemp's are closed to others
        fresh.rename(folder)
    except OSError as reason:
        raise error(f"{folder} cannot be written: {reason}") from None
    finally:
        if fresh is not None:
            shutil.rmtree(fresh, ignore_errors=True)
