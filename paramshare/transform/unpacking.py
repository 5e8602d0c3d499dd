"""Reads a packed file of variables. Needs NumPy alone: `export` copies this file as it is."""

import json
import math
import zlib
from typing import Any

import numpy as np

MAGIC = b"paramshare packed 1\n"


def read_packed(content: bytes) -> dict[str, np.ndarray]:
    """The arrays of a packed file by path; `ValueError` if it is damaged. See `packing.pack`."""
    head = len(MAGIC) + 8
    if content[: len(MAGIC)] != MAGIC or zlib.crc32(content[head:]) != _integer(content, head - 4):
        raise ValueError("not a packed file of variables, or a damaged one; write it again")
    start = head + _integer(content, head - 8)
    entries: list[dict[str, Any]] = json.loads(zlib.decompress(content[head:start]))
    arrays = {}
    for entry in entries:
        dtype, shape, start_of_next = np.dtype(entry["dtype"]), entry["shape"], start
        size = math.prod(shape)

        def take(count: int) -> bytes:
            nonlocal start_of_next
            start_of_next += count
            return content[start_of_next - count : start_of_next]

        kept = np.ones(size, bool)
        if entry["bitmap"]:
            bitmap = np.frombuffer(take(-(-size // 8)), np.uint8)
            kept = np.unpackbits(bitmap, count=size, bitorder="little").astype(bool)
        count = int(kept.sum())
        if entry["levels"] is None:
            values = np.frombuffer(take(count * dtype.itemsize), dtype)
        else:
            bits = entry["bits"]
            if entry["uniform"]:
                (step,) = np.frombuffer(take(dtype.itemsize), dtype)
                first = np.arange(entry["levels"]) - entry["levels"] / 2
                levels = step * (first + 0.5).astype(dtype)
            else:
                levels = np.frombuffer(take(entry["levels"] * dtype.itemsize), dtype)
            packed = np.frombuffer(take(-(-count * bits // 8)), np.uint8)
            bitwise = np.unpackbits(packed, count=count * bits, bitorder="little")
            codes = bitwise.reshape(count, bits) @ (1 << np.arange(bits))
            values = levels[codes]
        array = np.zeros(size, dtype)
        array[kept] = values
        arrays[entry["path"]] = array.reshape(shape)
        start = start_of_next
    return arrays


def _integer(content: bytes, start: int) -> int:
    return int.from_bytes(content[start : start + 4], "little")
