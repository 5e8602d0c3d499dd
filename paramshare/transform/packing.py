"""Variables as one packed file: few different numbers take few bits, zeros a bit or less."""

import dataclasses
import json
import os
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

from paramshare.storage import local_path, write_bytes
from paramshare.transform.unpacking import MAGIC, read_packed
from paramshare.transform.variables_file import ExportError, flat

LARGEST = 256  # levels of a code of 8 bits
PACKED = "variables.pack"  # its name in a workdir and in an export


@dataclasses.dataclass(frozen=True)
class Packed:
    """A packed file.

    Attributes:
      content: the bytes of the file.
      banks: how many of them hold banks.
      rest: how many hold other arrays.
      float_banks: bytes of the banks as arrays.
      float_rest: bytes of the other arrays.
    """

    content: bytes
    banks: int
    rest: int
    float_banks: int
    float_rest: int

    @property
    def header(self) -> int:
        """Bytes of the names, shapes and forms of all arrays."""
        return len(self.content) - self.banks - self.rest

    def as_json(self) -> dict[str, dict[str, int]]:
        """All sizes, in bytes."""
        arrays = {"banks": self.float_banks, "rest": self.float_rest}
        packed = {"banks": self.banks, "rest": self.rest, "header": self.header}
        return {
            "arrays": arrays | {"total": sum(arrays.values())},
            "packed": packed | {"total": len(self.content)},
        }


def pack(variables: Mapping[str, Any]) -> Packed:
    """Packs variables, without loss.

    Each array is stored in the smallest of these forms:

    * its numbers as they are;
    * up to 256 different numbers: the list of them, and for each place a code of 0 to 8 bits. If
      the numbers are those of a uniform grid (see `paramshare.schemes.Compressed`), its step
      stands for the list;
    * either of them for the numbers that are not 0 alone, with a bitmap that tells where they are.

    A header, compressed, has the paths, shapes and forms. Pass variables that
    `paramshare.transform.compress.finalise` gave: a bank under `Compressed` holds floats.

    Args:
      variables: variables of any network; dtypes become those that `save_variables` stores.

    Raises:
      ExportError: as `save_variables`.

    Example:
      >>> import numpy as np
      >>> from paramshare.transform.packing import pack, unpack
      >>> ring = np.tile(np.float32([0, 0, 0.5, -1.5]), 1000)
      >>> packed = pack({"banks": {"ring": {"ring": ring}}})
      >>> packed.float_banks, packed.banks  # 4000 bits tell where, 2000 codes of 1 bit, 2 numbers
      (16000, 758)
      >>> bool((unpack(packed.content)["banks"]["ring"]["ring"] == ring).all())
      True
    """
    entries, payload, sizes = [], [], {"banks": [0, 0], "rest": [0, 0]}
    for path, array in flat(variables).items():
        form, content = _smallest(array)
        entries.append({"path": path, "dtype": array.dtype.str, "shape": array.shape} | form)
        payload.append(content)
        counts = sizes["banks" if path.startswith("banks/") else "rest"]
        counts[0] += len(content)
        counts[1] += array.nbytes
    header = zlib.compress(json.dumps(entries, separators=(",", ":")).encode(), 9)
    body = b"".join([header, *payload])
    numbers = [len(header), zlib.crc32(body)]
    content = b"".join([MAGIC, *(number.to_bytes(4, "little") for number in numbers), body])
    (banks, float_banks), (rest, float_rest) = sizes["banks"], sizes["rest"]
    return Packed(content, banks, rest, float_banks, float_rest)


def unpack(content: bytes) -> dict[str, Any]:
    """The inverse of `pack`: nested dictionaries of NumPy arrays, equal bit for bit.

    Raises:
      ExportError: if these are not the bytes of a packed file.
    """
    try:
        return unflatten_dict(read_packed(content), sep="/")
    except Exception as error:  # the bytes may be any
        raise ExportError(f"{error}; pass the bytes of a file that `pack` made") from None


def save_packed(packed: Packed, file: str | os.PathLike[str]) -> None:
    """Writes a packed file; `StorageError` if it cannot be written."""
    write_bytes(local_path(file), packed.content)


def load_packed(file: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a packed file as nested dictionaries of NumPy arrays, for `model.apply`.

    Raises:
      ExportError: if the file does not exist, or is no packed file.
    """
    try:
        return unpack(local_path(file).read_bytes())
    except (OSError, ExportError) as error:
        raise ExportError(f"{file} cannot be read as a packed file: {error}") from None


def _smallest(array: np.ndarray) -> tuple[dict[str, Any], bytes]:
    """The smallest form of an array: what the header says of it, and its bytes."""
    # Numbers are compared by their bits, so that -0.0 and every NaN come back as they were.
    bits = np.ascontiguousarray(array).ravel().view(f"u{array.dtype.itemsize}")
    forms = [_values(bits, array.dtype)]
    kept = bits != 0
    if not kept.all():
        bitmap = np.packbits(kept, bitorder="little").tobytes()
        form, content = _values(bits[kept], array.dtype)
        forms.append((form | {"bitmap": True}, bitmap + content))
    return min(forms, key=lambda form: len(form[1]))


def _values(bits: np.ndarray, dtype: np.dtype) -> tuple[dict[str, Any], bytes]:
    """The smallest form of numbers, given by their bits, without a bitmap."""
    form = {"bitmap": False, "bits": 0, "levels": None, "uniform": False}
    raw, levels, codes = bits.tobytes(), *np.unique(bits, return_inverse=True)
    if not 0 < len(levels) <= LARGEST:
        return form, raw
    step = _step(levels.view(dtype))
    if step is None:
        count, table = len(levels), levels.tobytes()
    else:
        count, order, table = step[0], step[1], step[2].tobytes()
        codes = order[codes]
    width = (count - 1).bit_length()
    bitwise = (codes.reshape(-1, 1) >> np.arange(width)) & 1
    content = table + np.packbits(bitwise.astype(np.uint8), bitorder="little").tobytes()
    if len(content) >= len(raw):
        return form, raw
    return form | {"bits": width, "levels": count, "uniform": step is not None}, content


def _step(levels: np.ndarray) -> tuple[int, np.ndarray, np.ndarray] | None:
    """The uniform grid that has these levels: its size, their numbers in it, and its step.

    None if there is none with up to 256 levels, or if it would take more bits.
    """
    if levels.dtype.kind != "f" or len(levels) < 2 or not np.isfinite(levels).all():
        return None
    gap, largest = np.min(np.diff(np.sort(levels.astype(np.float64)))), np.max(np.abs(levels))
    if not gap > 0 or largest / gap > LARGEST:
        return None
    offsets = np.floor(levels / gap) + 0.5
    count = 2 ** int(2 * np.max(np.abs(offsets))).bit_length()
    if count > 2 ** (len(levels) - 1).bit_length():
        return None
    step = np.asarray(largest / np.max(np.abs(offsets)), levels.dtype)
    for candidate in (step, *(np.nextafter(step, step.dtype.type(x)) for x in (0, np.inf))):
        if np.array_equal(candidate * offsets.astype(levels.dtype), levels):
            order = (offsets + count / 2 - 0.5).astype(np.int64)
            return count, order, candidate.reshape(1)
    return None
