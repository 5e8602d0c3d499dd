"""The command `predict`: what a trained network sees in picture files."""

import argparse
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from paramshare.cli.errors import CommandError
from paramshare.cli.parsing import add_checkpoint

if TYPE_CHECKING:
    import numpy as np

    from paramshare.training.run import Run


def add(command: Any) -> None:
    """Declares the command."""
    predict = command(
        "predict", _predict, "show what a trained network sees in pictures, as JSON and drawn"
    )
    predict.add_argument("workdir", metavar="WORKDIR", help="of a training run")
    predict.add_argument("images", metavar="IMAGE", nargs="+", help="a picture file")
    predict.add_argument(
        "--output",
        metavar="DIR",
        help="folder for the drawn pictures (default: WORKDIR/predictions)",
    )
    predict.add_argument("--no-pictures", action="store_true", help="print JSON only")
    add_checkpoint(predict)


def _predict(args: argparse.Namespace, overrides: list[str]) -> int:
    from paramshare.data.views import check_picture
    from paramshare.report.predictions import draw_prediction
    from paramshare.storage import not_written, run_path
    from paramshare.training.derive import load_run

    for file in args.images:  # before anything slow
        check_picture(file)
    folder = run_path(args.output or run_path(args.workdir) / "predictions")
    names = _names(args.images)
    for name in () if args.no_pictures else names:
        if any(pathlib.Path(file).resolve() == folder / f"{name}.png" for file in args.images):
            raise CommandError(
                f"the drawing {folder / name}.png would replace a picture of the same name; give "
                "another --output"
            )
    run, variables, _ = load_run(args.workdir, args.checkpoint)
    if not args.no_pictures:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise not_written(folder, error) from error
    for name, file, (image, description) in zip(
        names, args.images, _descriptions(run, variables, args.images), strict=True
    ):
        line = {"image": file, **description}
        if not args.no_pictures:
            place = folder / f"{name}.png"
            draw_prediction(image, run.task, description, place)
            line["picture"] = str(place)
        print(json.dumps(line))
    return 0


def _descriptions(
    run: "Run", variables: Any, files: Sequence[str]
) -> Iterator[tuple["np.ndarray", dict[str, Any]]]:
    """The pixels of each picture, and what the network predicts for it, in its own pixels."""
    import numpy as np

    from paramshare.data.views import read_picture
    from paramshare.report.predictions import BATCH, predictor

    predict = predictor(run)
    for first in range(0, len(files), BATCH):  # not all pictures need to fit into memory
        images = [read_picture(file) for file in files[first : first + BATCH]]
        views = [run.data.view(image) for image in images]
        predictions, _ = predict(variables, np.stack([view.input for view in views]))
        for image, view, prediction in zip(images, views, predictions, strict=True):
            yield image, run.task.describe(prediction, view.original)


def _names(files: Sequence[str]) -> list[str]:
    """A name for the drawing of each file: its stem, numbered where stems are equal.

    Example:
      >>> _names(["a/x.jpg", "b/x.png", "y.png"])
      ['x', 'x-2', 'y']
    """
    names: list[str] = []
    for file in files:
        stem = pathlib.Path(file).stem
        name, number = stem, 1
        while name in names:
            number += 1
            name = f"{stem}-{number}"
        names.append(name)
    return names
