"""The images of an annotation file, found in a folder and decoded."""

import concurrent.futures
import hashlib
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from paramshare.data.coco import Annotations
from paramshare.data.coco_json import count
from paramshare.data.decoding import decode, is_turned
from paramshare.data.error import DataError, require
from paramshare.data.sources import Example
from paramshare.errors import one_line, warn


class CocoImages:
    """The images of an annotation file (H, W, 3), with their `Objects` as labels.

    Grey, palette and CMYK images are converted to RGB.

    Args:
      annotations: the checked file.
      folders: where images may be; each is taken from the first folder that has it.

    Attributes:
      fingerprint: a hash of the JSON and of the images' names and sizes on disk.

    Raises:
      DataError: if an image is missing or, when it is read, unreadable or of another size than the
        JSON says.
    """

    def __init__(self, annotations: Annotations, folders: Sequence[pathlib.Path]) -> None:
        require("PIL.Image", "pillow", "a data set of encoded pictures")
        self.annotations = annotations
        result = hashlib.sha256(annotations.digest.encode())
        self._files: list[str] = []
        for picture in annotations.pictures:
            path, size = self._found(picture.file, folders)
            self._files.append(path)
            result.update(f"\n{picture.file} {size}".encode())
        self.fingerprint = result.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Example:
        return {"input": self.picture(index), "label": self.annotations.of_image(index)}

    def __repr__(self) -> str:
        return f"CocoImages({str(self.annotations.file)!r}, {len(self)} images)"

    def picture(self, index: int) -> np.ndarray:
        """The pixels of an image, (H, W, 3) uint8."""
        try:
            pixels = decode(pathlib.Path(self._files[index]).read_bytes(), 3)
        except Exception as error:
            raise self._unreadable(index, error) from error
        self._check_size(index, pixels.shape[1], pixels.shape[0])
        return pixels

    def check_sizes(self) -> None:
        """Reads the headers of all images, without decoding them.

        EXIF orientations, which are ignored, are a warning: boxes may be those of the turned image.

        Raises:
          DataError: if a header is unreadable, or an image has another size than the JSON says.
        """
        pil = require("PIL.Image", "pillow", "a data set of encoded pictures")

        def check(index: int) -> bool:
            try:
                with pil.open(self._files[index]) as picture:
                    (width, height), turned = picture.size, is_turned(picture)
            except Exception as error:
                raise self._unreadable(index, error) from error
            self._check_size(index, width, height)
            return turned

        with concurrent.futures.ThreadPoolExecutor() as pool:
            turned = [i for i, turned in enumerate(pool.map(check, range(len(self)))) if turned]
        if turned:
            warn(
                f"{self.annotations.file.name}: {count(len(turned), 'image')} with an EXIF "
                f"orientation, first {self._files[turned[0]]!r}; it is ignored, so the boxes must "
                "be those of the pixels as they are stored"
            )

    def _found(self, file: str, folders: Sequence[pathlib.Path]) -> tuple[str, int]:
        """The path of an image and its size in bytes."""
        for folder in folders:
            path = os.path.join(folder, file)
            try:
                size = os.stat(path).st_size
            except (OSError, ValueError):  # a name may hold a null character
                continue
            if os.path.isfile(path):
                return path, size
        raise DataError(
            f"{self.annotations.file.name}: the image {file!r} is in none of the folders "
            f"{', '.join(repr(str(folder)) for folder in folders)}; put it there, or pass images, "
            "the folder that holds it"
        )

    def _check_size(self, index: int, width: int, height: int) -> None:
        picture = self.annotations.pictures[index]
        if (width, height) != (picture.width, picture.height):
            remedy = "correct the JSON and the boxes, or restore the image"
            if (height, width) == (picture.width, picture.height):
                remedy = "rotate its pixels, since EXIF orientation is ignored, or correct the JSON"
            raise DataError(
                f"{self.annotations.file.name}: the image {self._files[index]!r} (id "
                f"{picture.id!r}) is {width} x {height}, but the JSON says {picture.width} x "
                f"{picture.height}; {remedy}"
            )

    def _unreadable(self, index: int, error: Exception) -> DataError:
        reason = str(error) if isinstance(error, DataError) else one_line(error)
        return DataError(
            f"{self.annotations.file.name}: the image {self._files[index]!r} (id "
            f"{self.annotations.pictures[index].id!r}) cannot be decoded ({reason}); replace it, "
            "or leave it out of the JSON"
        )
