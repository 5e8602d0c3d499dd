"""A folder of images with annotations in the format of COCO."""

import pathlib
from typing import Literal

from paramshare.data.coco import check_same, read_annotations
from paramshare.data.coco_images import CocoImages
from paramshare.data.dataset import Dataset
from paramshare.data.detector import DetectorOptions
from paramshare.data.error import DataError
from paramshare.data.objects import DetectionSource
from paramshare.data.people import PoseSource
from paramshare.data.reading import ANNOTATED_SIZE, from_sources
from paramshare.data.registry import DataConfig, register
from paramshare.data.sets.idx import Folder
from paramshare.data.views import person
from paramshare.tasks import Pose
from paramshare.tasks.config import Count, Fraction

_WORDS = {"train": ("train",), "validation": ("val", "validation", "valid"), "test": ("test",)}
_FIELDS = {"train": "train", "validation": "validation_set", "test": "test"}


@register("coco")
class Coco(DataConfig):
    """Images with boxes or keypoints, in the format of COCO.

    `path` holds the annotation files and, below it, the images. A set without a test file is tested
    on its validation file, and validation images are held out of train.
    """

    name: str = "coco"
    path: Folder = None
    """Folder with the annotation files and the images; stored as an absolute path."""
    task: Literal["detection", "pose"] = "detection"
    """What to predict: boxes and categories, or the joints of each person."""
    train: str | None = None
    """Annotation file of the training images, relative to path; None for train.json,
    instances_train2017.json (pose: person_keypoints_train2017.json), or either in annotations/."""
    validation_set: str | None = None
    """Annotation file of the validation images; None for val.json and so on, as for train."""
    test: str | None = None
    """Annotation file of the test images; None for test.json and so on, as for train."""
    images: str | None = None
    """Folder of the images, relative to path; None looks in the folders named after the annotation
    file (train for train.json, train2017 for instances_train2017.json), beside it, and in
    images."""
    image_size: Count | None = None
    """Side of the inputs; None for 320. Images are resized with their aspect ratio and filled up;
    for pose, a square around each person is."""
    max_boxes: Count = 100
    """Boxes in a label; the largest boxes of an image are kept, in evaluation too."""
    detector: DetectorOptions = DetectorOptions()
    """For detection: its loss of boxes, and which boxes it returns."""
    validation: Fraction = 0.1
    """Fraction of the training images held out for validation (to choose an epoch), where there is
    no validation file; 0 for none."""
    train_examples: Count | None = None
    """Train on this many images only (pose: people); None for all."""
    person_crop: bool = True
    """For pose, crops each person by its box. False takes whole images, of one person each."""

    def load(self, seed: int = 0) -> Dataset:
        """The images of the folder; the seed chooses the validation images."""
        files = self._files()
        annotations = {
            part: read_annotations(file, keypoints=self.task == "pose")
            for part, file in files.items()
        }
        for other in annotations.values():
            check_same(annotations["train"], other)
        size = self.image_size or ANNOTATED_SIZE
        images = {part: CocoImages(x, self._folders(x.file)) for part, x in annotations.items()}
        for part in images.values():
            part.check_sizes()  # now, and not when training comes to an image
        group = None
        if self.task == "detection":
            for part in annotations.values():
                part.warn_above(self.max_boxes)
            annotations["test"].warn_without()
            sources = {part: DetectionSource(x, size, self.max_boxes) for part, x in images.items()}
            task = self.detector.task(annotations["train"].categories, self.max_boxes)
        else:
            sources = {
                part: PoseSource(x, size, person_crop=self.person_crop)
                for part, x in images.items()
            }
            group = sources["train"].image
            joints, limbs = annotations["train"].joints, annotations["train"].limbs
            task = Pose(joints=joints, limbs=limbs, image_size=(size, size))
        return from_sources(
            sources["train"],
            sources.get("validation"),
            sources["test"],
            name=self.name,
            task=task,
            size=size,
            fraction=self.validation,
            train_examples=self.train_examples,
            seed=seed,
            group=group,
            view_of=person(size) if self.task == "pose" and self.person_crop else None,
        )

    def _files(self) -> dict[str, pathlib.Path]:
        """The annotation files: train, test and, if there is one, validation."""
        if self.path is None or not pathlib.Path(self.path).is_dir():
            raise DataError(
                f"the data set {self.name!r} is read from a folder, but path is {self.path!r}; "
                "pass the folder that holds the annotation files and the images"
            )
        files: dict[str, pathlib.Path] = {}
        for part in _WORDS:
            given = getattr(self, _FIELDS[part])
            file = self._file(part) if given is None else pathlib.Path(self.path) / given
            if file is not None:
                files[part] = file
        if "test" not in files and "validation" in files:
            files["test"] = files["validation"]
        if files.get("validation") == files.get("test"):  # no epoch is chosen on the test set
            files.pop("validation", None)
        for part in ("train", "test"):
            if part not in files:
                names = ", ".join(self._names(part)[:3])
                raise DataError(
                    f"{self.path!r} has no annotation file for {part} ({names}, ...); pass "
                    f"{_FIELDS[part]}, the name of its JSON in that folder"
                )
        return files

    def _file(self, part: str) -> pathlib.Path | None:
        places = (pathlib.Path(str(self.path)) / name for name in self._names(part))
        return next((file for file in places if file.is_file()), None)

    def _names(self, part: str) -> list[str]:
        """The usual names of a part's annotation file, the likeliest first."""
        prefix = "instances_" if self.task == "detection" else "person_keypoints_"
        return [
            f"{folder}{stem}.json"
            for folder in ("", "annotations/")
            for word in _WORDS[part]
            for stem in (word, f"{prefix}{word}", f"{prefix}{word}2017")
        ]

    def _folders(self, file: pathlib.Path) -> list[pathlib.Path]:
        """Where the images of an annotation file may be."""
        root, named = pathlib.Path(str(self.path)), (file.stem.split("_")[-1], file.stem)
        if self.images is not None:
            folder = root / self.images
            places = [folder, *(folder / name for name in named)]
        else:
            folder = root / "images"
            places = [root / name for name in named]
            places += [file.parent, file.parent.parent, *(folder / name for name in named), folder]
        return list(dict.fromkeys(places))
