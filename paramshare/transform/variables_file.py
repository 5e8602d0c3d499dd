"""Variables as flat arrays by path, and as a file that NumPy alone can read."""

import io
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from paramshare.errors import ParamshareError
from paramshare.storage import local_path, write_bytes


class ExportError(ParamshareError):
    """A network cannot be exported as requested, or a file of variables cannot be read."""


def flat(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Variables as NumPy arrays by path, joined by slashes, as an exported program takes them.

    bfloat16 and the float8 types, which NumPy lacks, become float32. This is exact, and an exported
    program converts them back.

    Raises:
      ExportError: if a name contains a slash, or a leaf is not a numeric array.
    """
    return {
        name: np.asarray(leaf).astype(stored_dtype(leaf.dtype))
        for name, leaf in leaves_by_path(variables).items()
    }


def save_variables(variables: Mapping[str, Any], file: str | os.PathLike) -> None:
    """Writes variables to an .npz file, one array per path ("params/model/stem/kernel").

    The file contains no pickles, so `numpy.load` reads it anywhere. bfloat16 and the float8 types
    are stored as float32, which is exact. Equal variables give equal files.

    Raises:
      ExportError: as `flat`.
      StorageError: if the file cannot be written.
    """
    arrays: Any = flat(variables)
    content = io.BytesIO()
    np.savez(content, **arrays)
    write_bytes(local_path(file), content.getvalue())


def load_variables(file: str | os.PathLike) -> dict[str, Any]:
    """Reads a file of `save_variables` as nested dictionaries of NumPy arrays, for `model.apply`.

    Raises:
      ExportError: if the file does not exist, or is not an .npz file of plain arrays.
    """
    try:
        with np.load(file, allow_pickle=False) as stored:
            return unflatten_dict({name: stored[name] for name in stored.files}, sep="/")
    except Exception as error:  # zipfile and NumPy raise many types, depending on the damage
        raise ExportError(f"{file} cannot be read as an .npz file of variables: {error}") from None


def leaves_by_path(tree: Any) -> dict[str, Any]:
    """Arrays, or shapes, by path, in the order of the tree's leaves."""
    leaves = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        names = [jax.tree_util.keystr((key,), simple=True) for key in path]
        slashed = [name for name in names if "/" in name]
        if slashed:
            raise ExportError(
                f"the name {slashed[0]!r} contains a slash, which separates the names of a path; "
                "rename the module, the bank or the entry"
            )
        name = "/".join(names)
        leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
        if not jnp.issubdtype(leaf.dtype, jnp.number) and leaf.dtype != bool:
            raise ExportError(f"{name!r} has dtype {leaf.dtype}; arrays must be numeric: remove it")
        leaves[name] = leaf
    return leaves


def stored_dtype(dtype: Any) -> np.dtype:
    """The dtype in a file: a dtype of NumPy, of a width that JAX supports."""
    dtype = np.dtype(jax.dtypes.canonicalize_dtype(dtype))
    return dtype if dtype.kind in "biufc" else np.dtype(np.float32)
