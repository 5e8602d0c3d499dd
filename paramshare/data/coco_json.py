"""The records of a JSON in the format of COCO, with every problem described in one line."""

import dataclasses
import hashlib
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

from paramshare.data.error import DataError
from paramshare.errors import one_line


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image as the JSON describes it."""

    id: int | str
    """Its id in the JSON."""
    file: str
    """Its file name, relative to a folder of images."""
    width: int
    """In pixels."""
    height: int
    """In pixels."""


def read_json(file: pathlib.Path) -> tuple[dict[str, Any], str]:
    """The content of an annotation file, and a hash of its bytes.

    Raises:
      DataError: if it cannot be read, or is not in the format of COCO.
    """
    try:
        encoded = file.read_bytes()
        data = json.loads(encoded)
    except OSError as error:
        raise DataError(f"{file} cannot be read ({one_line(error)}); check the path") from error
    except (ValueError, RecursionError) as error:  # also bytes that are not UTF-8
        raise DataError(
            f"{file} is not valid JSON ({one_line(error)}); restore it, or pass another file"
        ) from error
    keys = ("images", "annotations", "categories")
    missing = [key for key in keys if not (isinstance(data, dict) and key in data)]
    if missing:
        raise DataError(
            f"{file} has no {' and no '.join(missing)}; a file in the format of COCO has "
            "images, annotations and categories: pass another file"
        )
    return data, hashlib.sha256(encoded).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Reader:
    """Values of a file's records, checked; errors name the file and the record.

    Example:
      >>> Reader(pathlib.Path("train.json")).area({"area": -1}, "annotation 5")
      Traceback (most recent call last):
      ...
      paramshare.data.error.DataError: train.json: annotation 5 has the area -1; it must be a
      number, 0 or more, or left out
    """

    file: pathlib.Path

    def error(self, what: str, problem: str, remedy: str) -> DataError:
        """A problem of a record, such as "image 7"."""
        return DataError(f"{self.file.name}: {what} {problem}; {remedy}")

    def value(self, record: dict[str, Any], key: str, kinds: Any, what: str) -> Any:
        """A required value of one of these types (bools are no integers)."""
        if key not in record:
            raise self.error(what, f"has no {key!r}", "add it")
        value = record[key]
        if kinds is int and isinstance(value, float) and value.is_integer():
            value = int(value)  # some programs write 32.0
        if not isinstance(value, kinds) or isinstance(value, bool):
            text = (
                "an integer" if kinds is int else "text" if kinds is str else "an integer or text"
            )
            text = "a list" if kinds is list else text
            raise self.error(what, f"has the {key} {_short(value)}", f"it must be {text}")
        return value

    def by_id(self, data: dict[str, Any], key: str) -> dict[Any, dict[str, Any]]:
        """The records of a list, by id."""
        records = data[key]
        if not isinstance(records, list) or not all(isinstance(x, dict) for x in records):
            raise DataError(
                f"{self.file}: {key} must be a list of objects with an id; it is not in the format "
                "of COCO: pass another file"
            )
        result: dict[Any, dict[str, Any]] = {}
        singular = {"categories": "category"}.get(key, key[:-1])
        for position, record in enumerate(records):
            id = self.value(record, "id", (int, str), f"{singular} number {position + 1} of {key}")
            if id in result:
                raise self.error(
                    f"{singular} {id!r}",
                    "appears twice",
                    f"give each of the {key} an id of its own, or delete one",
                )
            result[id] = record
        return result

    def picture(self, id: int | str, record: dict[str, Any]) -> Picture:
        """An image without its annotations."""
        what = f"image {id!r}"
        file = self.value(record, "file_name", str, what)
        width, height = (self.value(record, key, int, what) for key in ("width", "height"))
        if not (1 <= width < 2**31 and 1 <= height < 2**31):
            raise self.error(
                f"image {id!r} ({file!r})",
                f"has the size {width} x {height}",
                "both must be 1 or more: correct them",
            )
        return Picture(id, file, width, height)

    def box(self, record: dict[str, Any], what: str) -> list[float]:
        """Left, top, width and height."""
        box = self.value(record, "bbox", list, what)
        if len(box) != 4 or not all(_finite(x) for x in box):
            raise self.error(
                what,
                f"has the bbox {_short(box)}",
                "it must be four finite numbers: left, top, width, height",
            )
        return box

    def crowd(self, record: dict[str, Any], what: str) -> bool:
        """Whether the box is around a group; False if not said."""
        crowd = record.get("iscrowd", 0)
        if crowd not in (0, 1):
            raise self.error(what, f"has the iscrowd {_short(crowd)}", "it must be 0 or 1")
        return bool(crowd)

    def area(self, record: dict[str, Any], what: str) -> float:
        """The area; NaN if not said."""
        area = record.get("area")
        if area is None:
            return math.nan  # that of the box
        if not _finite(area) or area < 0:
            raise self.error(
                what, f"has the area {_short(area)}", "it must be a number, 0 or more, or left out"
            )
        return area

    def skeleton(
        self, categories: dict[int, dict[str, Any]]
    ) -> tuple[int, tuple[str, ...], tuple[tuple[int, int], ...]]:
        """The category that has keypoints, their names, and the limbs counted from 0."""
        ids = [id for id, category in categories.items() if category.get("keypoints")]
        if len(ids) != 1:
            raise DataError(
                f"{self.file} has {count(len(ids), 'category', 'categories')} with keypoints; "
                "pose needs exactly one: pass another file, such as person_keypoints_train2017.json"
            )
        category, what = categories[ids[0]], f"category {ids[0]}"
        joints = self.value(category, "keypoints", list, what)
        if not all(isinstance(name, str) for name in joints):
            raise self.error(what, f"has the keypoints {_short(joints)}", "they must be names")
        limbs = category.get("skeleton") or []
        valid = isinstance(limbs, list) and all(
            isinstance(limb, list)
            and len(limb) == 2
            and all(whole(j) and 1 <= j <= len(joints) for j in limb)
            for limb in limbs
        )
        if not valid:
            raise self.error(
                what,
                f"has the skeleton {_short(limbs)}",
                f"it must be a list of pairs of keypoints, numbered from 1 to {len(joints)}",
            )
        return ids[0], tuple(joints), tuple((a - 1, b - 1) for a, b in limbs)

    def keypoints(self, record: dict[str, Any], joints: int, what: str) -> Sequence[float]:
        """3 J numbers; zeros where the annotation has none."""
        if record.get("keypoints") is None:
            return [0] * (3 * joints)
        points = self.value(record, "keypoints", list, what)
        if len(points) != 3 * joints:
            raise self.error(
                what,
                f"has {len(points)} numbers as keypoints",
                f"it must have x, y and visibility of {joints} joints, {3 * joints} numbers",
            )
        if not all(_finite(x) for x in points):
            raise self.error(
                what, f"has the keypoints {_short(points)}", "they must be finite numbers"
            )
        for visibility in points[2::3]:
            if visibility not in (0, 1, 2):
                raise self.error(
                    what,
                    f"has a keypoint with the visibility {visibility!r}",
                    "it must be 0 (not labelled), 1 (hidden) or 2 (visible)",
                )
        return points


def whole(value: Any) -> bool:
    """Whether a value is an integer, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def _finite(value: Any) -> bool:
    # The bounds also refuse NaN, and integers too large for a float.
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e9 < value < 1e9


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def count(number: int, singular: str, plural: str = "") -> str:
    """A number with its noun.

    Example:
      >>> count(1, "box", "boxes"), count(0, "image")
      ('1 box', '0 images')
    """
    return f"{number} {singular if number == 1 else plural or singular + 's'}"
