"""Pictures with what a network sees in them."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paramshare import ops
from paramshare.report.pictures import blank, save
from paramshare.tasks import Task, TaskError
from paramshare.training.run import Run
from paramshare.training.step import eval_outputs

PREDICTIONS = "predictions.png"
LONGEST = 8.0  # inches
CELL = 2.4  # inches
BATCH = 8


def predictor(run: Run) -> Callable[[Any, np.ndarray], tuple[list[Any], Any]]:
    """A function of variables and inputs (n, ...), as loaded: a prediction each, and heatmaps.

    Predictions are as `task.predict` returns them, heatmaps (n, h, w) or None as `task.heatmap`.
    The function is compiled once for batches of `BATCH`.
    """

    @jax.jit
    @ops.form(run.config.ops)
    def predict(variables: Any, inputs: jax.Array) -> Any:
        outputs = eval_outputs(run, run.model, variables, inputs)
        return run.task.predict(outputs, run.data.input_shape), run.task.heatmap(outputs)

    def predictions(variables: Any, inputs: np.ndarray) -> tuple[list[Any], Any]:
        parts = []
        for first in range(0, len(inputs), BATCH):
            part = inputs[first : first + BATCH]
            real = slice(len(part))
            fill = np.zeros((BATCH - len(part), *part.shape[1:]), part.dtype)
            batch = jax.device_get(predict(variables, jnp.asarray(np.concatenate([part, fill]))))
            parts.append(jax.tree.map(lambda leaf, real=real: leaf[real], batch))
        predicted, heatmaps = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
        count = len(inputs)
        return [jax.tree.map(lambda leaf, i=i: leaf[i], predicted) for i in range(count)], heatmaps

    return predictions


def draw_examples(run: Run, variables: Any, file: str | pathlib.Path, count: int = 6) -> bool:
    """Draws the predictions for some test examples, evenly spaced, and heatmaps below them.

    Args:
      run: the run.
      variables: of its network.
      file: the PNG to write.
      count: number of examples.

    Returns:
      Whether the file was written: not if inputs are not images of one or three channels, or the
      task cannot show predictions.
    """
    shape, source = run.data.input_shape, run.data.test
    if len(shape) != 3 or shape[2] not in (1, 3) or not len(source):
        return False
    places = sorted({i * (len(source) - 1) // max(count - 1, 1) for i in range(count)})
    inputs = np.stack([source[i]["input"] for i in places])
    try:
        predictions, heatmaps = predictor(run)(variables, inputs)
        described = [run.task.describe(one, lambda point: point) for one in predictions]
        rows = 1 if heatmaps is None else 2
        height = CELL * rows * shape[0] / shape[1] + 0.4
        figure, axes = blank(rows, len(places), (CELL * len(places), height), squeeze=False)
        for column, (image, description) in enumerate(zip(inputs, described, strict=True)):
            _draw(axes[0, column], _picture(image), run.task, description)
            if heatmaps is not None:
                _show(axes[1, column], _picture(image))
                extent = (0, shape[1], shape[0], 0)
                axes[1, column].imshow(
                    heatmaps[column], extent=extent, alpha=0.6, cmap="magma", vmin=0
                )
    except TaskError:
        return False
    save(figure, file)
    return True


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
    _draw(axes, image_HxWx3, task, description)
    save(figure, file)


def _draw(axes: Any, image: np.ndarray, task: Task, description: Mapping[str, Any]) -> None:
    _show(axes, image)
    task.draw(axes, description)
    axes.set_xlim(0, image.shape[1])
    axes.set_ylim(image.shape[0], 0)


def _show(axes: Any, image: np.ndarray) -> None:
    height, width = image.shape[:2]
    axes.imshow(image, extent=(0, width, height, 0), interpolation="nearest")
    axes.axis("off")


def _picture(image_HxWxC: np.ndarray) -> np.ndarray:
    """(H, W, 3) between 0 and 1, from the least to the greatest value unless pixels are bytes."""
    image = np.asarray(image_HxWxC, np.float32)
    low, high = (0.0, 255.0) if image_HxWxC.dtype == np.uint8 else (image.min(), image.max())
    scaled = (image - low) / max(high - low, 1e-6)
    return np.broadcast_to(scaled, (*image.shape[:2], 3))
