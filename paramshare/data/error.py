"""The error of data sets, and imports of optional packages."""

import importlib
import types

from paramshare.errors import ParamshareError, one_line


class DataError(ParamshareError):
    """Data, or a request for data, that cannot be used.

    Example:
      >>> raise DataError("batch_size is 0; it must be 1 or more")
      Traceback (most recent call last):
      ...
      paramshare.data.error.DataError: batch_size is 0; it must be 1 or more
    """


def require(module: str, package: str, purpose: str) -> types.ModuleType:
    """Imports an optional package where it is used.

    Args:
      module: what to import, such as "tensorflow_datasets".
      package: its name for pip; of the extra "train".
      purpose: what needs it; the subject of the message.

    Raises:
      DataError: with the pip command, if the import fails.

    Example:
      >>> require("math", "math", "arithmetic").__name__
      'math'
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        remedy = 'run `pip install "paramshare[train]"`, then rerun the same command'
        if error.name and error.name.split(".")[0] != module.split(".")[0]:
            raise DataError(
                f"{purpose} needs {package}, which failed to import ({one_line(error)}); {remedy}"
            ) from error
        raise DataError(f"{purpose} needs {package}, which is not installed; {remedy}") from error
