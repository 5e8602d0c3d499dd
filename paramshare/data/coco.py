"""Annotations in the format of COCO: one JSON file and its images.

Lin et al., "Microsoft COCO: Common objects in context" (2014). The format is described at
https://cocodataset.org/#format-data. Masks and captions are not read.
"""

import dataclasses
import pathlib

import numpy as np

from paramshare.data.coco_json import Picture, Reader, count, read_json, whole
from paramshare.data.error import DataError
from paramshare.data.objects import Objects, clip
from paramshare.errors import warn


@dataclasses.dataclass(frozen=True, eq=False)
class Annotations:
    """An annotation file, checked. Annotations are sorted by image, then as in the file."""

    file: pathlib.Path
    """The JSON."""
    digest: str
    """A hash of its bytes."""
    categories: tuple[str, ...]
    """Names, in the order of their ids. `objects["category"]` counts in this order, from 0."""
    category_ids: tuple[int, ...]
    """Their ids in the JSON, ascending; not always consecutive."""
    pictures: tuple[Picture, ...]
    """The images, in the file's order, those without annotations too."""
    image: np.ndarray
    """(A,) int64: the index in `pictures` of each annotation's image, ascending."""
    objects: Objects
    """All A annotations, clipped to their images; those without area are left out."""
    joints: tuple[str, ...] = ()
    """Names of the J keypoints; empty if they were not read."""
    limbs: tuple[tuple[int, int], ...] = ()
    """Pairs of joints, counted from 0, that are drawn as lines."""
    keypoints: np.ndarray | None = None
    """(A, J, 3) float64: x, y in pixels and visibility 0 (not labelled), 1 (hidden) or 2; None if
    they were not read."""

    def of_image(self, index: int) -> Objects:
        """The n objects of an image."""
        first, last = np.searchsorted(self.image, [index, index + 1])
        objects = self.objects
        return Objects(
            box=objects["box"][first:last],
            category=objects["category"][first:last],
            crowd=objects["crowd"][first:last],
            area=objects["area"][first:last],
        )

    def warn_without(self) -> None:
        """Warns if there is no object to find, so that average precision is not defined."""
        if self.objects["crowd"].all():
            warn(
                f"{self.file.name}: there is no box that is not a crowd's; its measures will be NaN"
            )

    def warn_above(self, max_boxes: int) -> None:
        """Warns if images have more boxes than a label holds."""
        counts = np.bincount(self.image, minlength=len(self.pictures))
        above = np.flatnonzero(counts > max_boxes)
        if len(above):
            images, rows = count(len(above), "image"), count(max_boxes, "box", "boxes")
            warn(
                f"{self.file.name}: {images} with more than {rows}, first "
                f"{self.pictures[above[0]].file!r} with {counts[above[0]]}; the largest boxes are "
                "kept, and what is found of the others counts as wrong: raise max_boxes, at most "
                f"{counts.max()}, to keep all"
            )


def read_annotations(file: pathlib.Path, *, keypoints: bool = False) -> Annotations:
    """Reads and checks an annotation file.

    Boxes are clipped to their image. Boxes without area or outside their image are left out, with
    one warning for each kind that names the first annotation. An annotation without `iscrowd` is
    no crowd; one without `area`, or with 0 although its box has some, has that of its box.

    Args:
      file: the JSON.
      keypoints: reads keypoints too, and only the annotations of the category that has them.

    Raises:
      DataError: if the file cannot be read or is not in the format of COCO, an id is unknown or
        appears twice, a value is out of range, or, with `keypoints`, there are none.

    Example:
      >>> import tempfile
      >>> file = pathlib.Path(tempfile.mkdtemp()) / "train.json"
      >>> _ = file.write_text('''{"categories": [{"id": 7, "name": "cell"}],
      ...   "images": [{"id": 1, "file_name": "a.png", "width": 8, "height": 8}],
      ...   "annotations": [{"id": 3, "image_id": 1, "category_id": 7, "bbox": [4, 4, 2, 9]}]}''')
      >>> annotations = read_annotations(file)
      >>> annotations.categories, annotations.of_image(0)["box"].tolist()
      (('cell',), [[4.0, 4.0, 6.0, 8.0]])
    """
    data, digest = read_json(file)
    reader = Reader(file)
    names = reader.by_id(data, "categories")
    ids_of: dict[str, int] = {}
    for id, category in names.items():
        if not whole(id):
            raise reader.error(f"category {id!r}", f"has the id {id!r}", "use an integer")
        name = reader.value(category, "name", str, f"category {id!r}")
        if ids_of.setdefault(name, id) != id:
            problem = f"has the name {name!r}, as category {ids_of[name]!r} has"
            raise reader.error(f"category {id!r}", problem, "rename one of them")
    category_ids = sorted(names)
    pictures = [reader.picture(id, image) for id, image in reader.by_id(data, "images").items()]
    if not category_ids or not pictures:
        raise DataError(
            f"{file} has {count(len(category_ids), 'category', 'categories')} and "
            f"{count(len(pictures), 'image')}; it must have at least one of each: pass another "
            "file"
        )
    person, joints, limbs = reader.skeleton(names) if keypoints else (None, (), ())

    place = {picture.id: i for i, picture in enumerate(pictures)}
    number = {id: k for k, id in enumerate(category_ids)}
    ids, image, category, crowd, area, box, points = [], [], [], [], [], [], []
    for id, annotation in reader.by_id(data, "annotations").items():
        what = f"annotation {id!r}"
        image_id = reader.value(annotation, "image_id", (int, str), what)
        if image_id not in place:
            raise reader.error(
                what,
                f"has the image_id {image_id!r}, which no image has",
                "add the image or delete the annotation",
            )
        category_id = reader.value(annotation, "category_id", int, what)
        if category_id not in number:
            raise reader.error(
                what,
                f"has the category_id {category_id!r}, which no category has",
                "add the category or delete the annotation",
            )
        corner = reader.box(annotation, what)
        if person is not None:
            if category_id != person:
                continue
            points.append(reader.keypoints(annotation, len(joints), what))
        ids.append(id)
        image.append(place[image_id])
        category.append(number[category_id])
        crowd.append(reader.crowd(annotation, what))
        area.append(reader.area(annotation, what))
        box.append(corner)

    box_Ax4 = np.array(box, np.float64).reshape(-1, 4)
    box_Ax4[:, 2:] += box_Ax4[:, :2]  # COCO stores left, top, width, height
    size_Ix2 = np.array([(picture.width, picture.height) for picture in pictures], np.float64)
    image_A = np.array(image, np.int64)
    clipped_Ax4, empty_A, outside_A = clip(box_Ax4, size_Ix2[image_A])
    for left_out_A, kind in ((empty_A, "without area"), (outside_A, "outside their image")):
        if left_out_A.any():
            boxes = count(int(left_out_A.sum()), "box", "boxes")
            warn(
                f"{file.name}: left out {boxes} {kind}, first annotation "
                f"{ids[int(np.argmax(left_out_A))]!r}"
            )
    area_A = np.array(area, np.float64)
    of_box_A = np.prod(clipped_Ax4[:, 2:] - clipped_Ax4[:, :2], axis=1)
    unsaid_A = (area_A == 0) & (of_box_A > 0)  # converters write 0 where there is no mask
    if unsaid_A.any():
        boxes = count(int(unsaid_A.sum()), "annotation")
        warn(
            f"{file.name}: {boxes} with the area 0, first {ids[int(np.argmax(unsaid_A))]!r}; the "
            "areas of their boxes are taken"
        )
    area_A = np.where(np.isnan(area_A) | unsaid_A, of_box_A, area_A)
    order = np.argsort(image_A, kind="stable")
    order = order[~(empty_A | outside_A)[order]]
    return Annotations(
        file=file,
        digest=digest,
        categories=tuple(names[id]["name"] for id in category_ids),
        category_ids=tuple(category_ids),
        pictures=tuple(pictures),
        image=image_A[order],
        objects=Objects(
            box=clipped_Ax4[order],
            category=np.array(category, np.int32)[order],
            crowd=np.array(crowd, bool)[order],
            area=area_A[order],
        ),
        joints=joints,
        limbs=limbs,
        keypoints=np.array(points, np.float64).reshape(-1, len(joints), 3)[order]
        if keypoints
        else None,
    )


def check_same(first: Annotations, second: Annotations) -> None:
    """Checks that two files, such as those of train and test, have the same categories and joints.

    Raises:
      DataError: if they differ.
    """
    one = dict(zip(first.category_ids, first.categories, strict=True))
    other = dict(zip(second.category_ids, second.categories, strict=True))
    for id in sorted(one.keys() | other.keys()):
        if one.get(id) != other.get(id):
            names = [repr(x[id]) if id in x else "missing" for x in (one, other)]
            raise DataError(
                f"category {id} is {names[0]} in {first.file.name} but {names[1]} in "
                f"{second.file.name}; both must have the same categories: correct one of them"
            )
    if first.joints != second.joints:
        raise DataError(
            f"the keypoints are {', '.join(first.joints)} in {first.file.name} but "
            f"{', '.join(second.joints)} in {second.file.name}; they must be the same: correct one "
            "of them"
        )
