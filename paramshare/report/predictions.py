"""Pictures with what a network sees in them."""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from paramshare.report.pictures import blank, save
from paramshare.tasks import Task

LONGEST = 8.0  # inches


def draw_prediction(
    image_HxWx3: np.ndarray,
    task: Task,
    description: Mapping[str, Any],
    file: str | pathlib.Path,
) -> None:
    """Draws a prediction onto its picture.

    Args:
      image_HxWx3: the picture, uint8.
      task: whose `draw` is used.
      description: as `task.describe` returns it.
      file: the PNG to write.
    """
    height, width = image_HxWx3.shape[:2]
    scale = LONGEST / max(height, width)
    figure, axes = blank(1, 1, (max(width * scale, 2.0), max(height * scale, 2.0)))
    axes.imshow(image_HxWx3, extent=(0, width, height, 0), interpolation="nearest")
    axes.axis("off")
    task.draw(axes, description)
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    save(figure, file)
