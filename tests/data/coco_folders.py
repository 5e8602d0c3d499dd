"""Small folders in the format of COCO: black images with painted boxes, and their annotations.

Tests get this module as the fixture `coco`.
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from paramshare.data import Coco, Dataset

RED, BLUE = (255, 0, 0), (0, 0, 255)
CATEGORIES = [{"id": 3, "name": "cat"}, {"id": 90, "name": "dog"}, {"id": 7, "name": "bird"}]
PERSON = {"id": 1, "name": "person", "keypoints": ["head", "left", "right"], "skeleton": [[1, 3]]}


def write(file: pathlib.Path, data: Any) -> pathlib.Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(data))
    return file


def paint(
    file: pathlib.Path, size: tuple[int, int], *boxes: Sequence[float], colour=RED, mode="RGB"
) -> None:
    """A black image of this width and height with filled boxes (left, top, width, height)."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    for x, y, w, h in boxes:
        pixels[int(y) : int(y + h), int(x) : int(x + w)] = colour
    Image.fromarray(pixels).convert(mode).save(file)


def part(count: int, categories=CATEGORIES, size=(40, 20)) -> dict[str, Any]:
    """`count` images with a box each, which moves from image to image."""
    return {
        "images": [
            {"id": 10 + i, "file_name": f"{i}.png", "width": size[0], "height": size[1]}
            for i in range(count)
        ],
        "annotations": [
            {
                "id": 500 + i,
                "image_id": 10 + i,
                "category_id": categories[i % len(categories)]["id"],
                "bbox": [2 + i, 4, 12, 8],
                "area": 50.0,
                "iscrowd": 0,
            }
            for i in range(count)
        ],
        "categories": categories,
    }


def people(count: int) -> dict[str, Any]:
    """Images of two people each, of which the second one's left side is not labelled."""
    data = part(count, [PERSON])
    for i, first in enumerate(data["annotations"][:]):
        x, y, _, _ = first["bbox"]
        first |= {"keypoints": [x + 1, y + 2, 2, x + 5, y + 4, 1, x + 9, y + 7, 2]}
        second = {**first, "id": 900 + i, "bbox": [20, 1, 8, 18]}
        data["annotations"].append({**second, "keypoints": [21, 3, 2, 0, 0, 0, 26, 17, 2]})
    return data


def standing(count: int, joints: Sequence[str]) -> dict[str, Any]:
    """Images of one person each, whose joints are in random places of the box."""
    person = {"id": 1, "name": "person", "keypoints": list(joints), "skeleton": [[1, 2]]}
    data, rng = part(count, [person]), np.random.default_rng(0)
    for annotation in data["annotations"]:
        x, y, w, h = annotation["bbox"]
        point = np.round(rng.uniform([x, y], [x + w, y + h], (len(joints), 2)), 1)
        annotation["keypoints"] = np.insert(point, 2, 2, axis=1).ravel().tolist()
    return data


def make(root: pathlib.Path, **parts: dict[str, Any]) -> pathlib.Path:
    """A folder with a JSON and a folder of images for each part."""
    for name, data in parts.items():
        write(root / f"{name}.json", data)
        for image in data["images"]:
            boxes = [a["bbox"] for a in data["annotations"] if a["image_id"] == image["id"]]
            paint(root / name / image["file_name"], (image["width"], image["height"]), *boxes)
    return root


def load(folder: pathlib.Path, seed: int = 0, **options) -> Dataset:
    return Coco(path=str(folder), **{"image_size": 16, "max_boxes": 4, **options}).load(seed)


def examples(source) -> list[dict[str, Any]]:
    return [source[i] for i in range(len(source))]
