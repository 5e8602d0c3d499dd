"""Pixels of encoded pictures: those of Pillow's convert, whatever else is installed."""

import io

import numpy as np
import pytest
from PIL import Image

from paramshare.data import DataError
from paramshare.data.decoding import decode

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
COLOURS = np.stack([RAMP, RAMP.T, RAMP[::-1]], axis=-1)


def encoded(picture: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


RGB = Image.fromarray(COLOURS)
GREY = Image.fromarray(RAMP)
FILES = {
    "jpeg": encoded(RGB, "JPEG"),
    "grey jpeg": encoded(GREY, "JPEG"),
    "cmyk jpeg": encoded(RGB.convert("CMYK"), "JPEG"),
    "palette png": encoded(RGB.quantize(64), "PNG"),
    "palette png, transparent": encoded(RGB.quantize(64), "PNG", transparency=bytes([0, 9, 255])),
    "gif": encoded(RGB.quantize(256), "GIF"),
    "bilevel png": encoded(GREY.convert("1"), "PNG"),
    "grey and alpha": encoded(GREY.convert("LA"), "PNG"),
    "rgba": encoded(Image.merge("RGBA", [*RGB.split(), GREY]), "PNG"),
    "rgb, transparent colour": encoded(RGB, "PNG", transparency=(0, 0, 240)),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(("channels", "mode"), [(3, "RGB"), (1, "L")])
@pytest.mark.filterwarnings("error")
def test_pixels_are_those_of_pillow(name, channels, mode):
    picture = Image.open(io.BytesIO(FILES[name]))
    picture.info.pop("transparency", None)
    expected = np.asarray(picture.convert(mode)).reshape(16, 16, channels)
    assert np.array_equal(decode(FILES[name], channels), expected)


def test_known_colours():
    red = Image.new("CMYK", (8, 8), (54, 224, 224, 0))  # of 255: the complement of (201, 31, 31)
    assert np.abs(decode(encoded(red, "JPEG"), 3).astype(int) - (201, 31, 31)).max() <= 2
    palette = Image.new("RGB", (2, 1), (10, 200, 30)).quantize(2)
    assert decode(encoded(palette, "PNG"), 3).tolist() == [[[10, 200, 30]] * 2]
    assert set(decode(FILES["bilevel png"], 1).ravel()) == {0, 255}


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled(kind):
    values = np.array([[0, 255, 256, 40000, 65535]], np.uint16)
    file = encoded(Image.fromarray(values), kind)
    assert decode(file, 1)[..., 0].tolist() == [[0, 0, 1, 156, 255]]
    assert np.array_equal(decode(file, 3)[..., 2], decode(file, 1)[..., 0])


def test_an_alpha_channel_is_kept_where_the_set_has_one():
    assert np.array_equal(decode(FILES["rgba"], 4)[..., 3], RAMP)
    assert decode(FILES["grey and alpha"], 2)[0, 0].tolist() == [0, 255]


def test_exif_orientation_is_ignored():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    wide = Image.new("RGB", (4, 2))
    assert decode(encoded(wide, "JPEG", exif=exif), 3).shape == (2, 4, 3)


@pytest.mark.parametrize(
    "values", [np.array([[70000]], np.int32), np.array([[0.5]], np.float32)], ids=["int32", "float"]
)
def test_pixels_of_more_than_16_bits_are_refused(values):
    with pytest.raises(DataError, match="save it with 8 or 16 bits"):
        decode(encoded(Image.fromarray(values), "TIFF"), 1)
