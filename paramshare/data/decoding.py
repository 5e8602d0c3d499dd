"""Pixels of encoded pictures, always by Pillow: other decoders differ in grey, palette and CMYK."""

import io
from typing import Any

import numpy as np

from paramshare.data.error import DataError, require

ORIENTATION = 0x0112  # the EXIF tag
_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


def decode(encoded: bytes, channels: int) -> np.ndarray:
    """Pixels of a picture: those of Pillow's `convert("RGB")` for three channels.

    Grey, palette, CMYK and transparent pictures are converted; an alpha channel is dropped, not
    blended. 16 bits a channel become the upper 8, in grey pictures as in coloured ones. Of an
    animation the first frame is taken. EXIF orientation is ignored, as the usual ImageNet
    pipelines do.

    Args:
      encoded: the bytes of a JPEG, PNG, GIF or any other file that Pillow reads.
      channels: 1 for grey, 2 for grey with alpha, 3 for RGB, 4 for RGB with alpha.

    Returns:
      (H, W, channels) uint8.

    Raises:
      DataError: if pillow is missing, or the pixels are no integers of 8 or 16 bits.
      Exception: whatever Pillow raises for bytes that it cannot read.

    Example:
      >>> from PIL import Image
      >>> stream = io.BytesIO()
      >>> Image.new("LA", (2, 1), (200, 0)).save(stream, "PNG")
      >>> decode(stream.getvalue(), 3).tolist()
      [[[200, 200, 200], [200, 200, 200]]]
    """
    pil = require("PIL.Image", "pillow", "a data set of encoded pictures")
    mode = _MODES[channels]
    with pil.open(io.BytesIO(encoded)) as picture:
        if picture.mode.startswith("I"):
            picture = pil.fromarray(_upper_bits(np.asarray(picture)))
        elif picture.mode == "F":
            raise DataError("its pixels are floating-point; save it with 8 or 16 bits a channel")
        elif mode in ("L", "RGB"):
            picture.info.pop("transparency", None)  # Pillow warns where it is dropped
        pixels = np.asarray(picture.convert(mode))
    return pixels.reshape(*pixels.shape[:2], channels)


def is_turned(picture: Any) -> bool:
    """Whether the header of a Pillow image asks viewers to rotate or mirror it (EXIF).

    Nothing is decoded: `picture.getexif()` would read a whole PNG.
    """
    exif = require("PIL.Image", "pillow", "reading a picture").Exif()
    exif.load(picture.info.get("exif", b""))
    return exif.get(ORIENTATION, 1) not in (0, 1)


def _upper_bits(grey: np.ndarray) -> np.ndarray:
    # Pillow opens 16-bit grey pictures with modes I;16, I;16B or I, and convert() would clip them.
    if grey.size and (grey.min() < 0 or grey.max() > 65535):
        raise DataError(
            f"its pixels run from {grey.min()} to {grey.max()}; save it with 8 or 16 bits a channel"
        )
    return (grey.astype(np.uint16) >> 8).astype(np.uint8)
