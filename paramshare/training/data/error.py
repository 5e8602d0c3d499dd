"""The one exception a user of this package meets."""

import importlib
import types


class DataError(ValueError):
    """A mistake in what was asked of the data, told in one line.

    The line names the thing, the value found, the value wanted and the remedy, so that a command line can print it as it is.

    Example:
        >>> raise DataError("batch_size=0: a batch holds at least one example; pass batch_size >= 1")
        Traceback (most recent call last):
        ...
        paramshare.training.data.error.DataError: batch_size=0: a batch holds at least one example; pass batch_size >= 1
    """


def one_line(error: BaseException, limit: int = 300) -> str:
    """A foreign exception as ``Type: first line of its message``, cut at `limit` characters.

    Example:
        >>> one_line(OSError("disk full\\nmore"))
        'OSError: disk full'
    """
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


def require(module: str, package: str, purpose: str) -> types.ModuleType:
    """Imports an optional dependency where it is used.

    Args:
        module: what to import, e.g. ``"tensorflow_datasets"``.
        package: what pip calls it.
        purpose: what needs it, the subject of the message.

    Raises:
        DataError: if the import fails, with the pip command that mends it.

    Example:
        >>> require("math", "math", "arithmetic").__name__
        'math'
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        remedy = f'run `pip install "{package}"`, then the same command again'
        if error.name and error.name.split(".")[0] != module.split(".")[0]:
            raise DataError(f"{purpose} needs {package}, whose import failed ({one_line(error)}); {remedy}") from error
        raise DataError(f"{purpose} needs {package}, which is not installed; {remedy}") from error
