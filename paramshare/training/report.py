"""What a workdir tells without its images: the network, its trained variables, and the report of the run."""

import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from paramshare.analysis.cost import cost
from paramshare.analysis.folding import FoldError, fold
from paramshare.analysis.report import Record, html_report
from paramshare.analysis.snapshots import THRESHOLDS, Snapshot, make_snapshot, snapshots
from paramshare.models import ModelError
from paramshare.shared import Shared
from paramshare.training import config as configs
from paramshare.training.checkpoint import CheckpointError, read_json
from paramshare.training.config import Config, ConfigError
from paramshare.training.metrics import read_metrics
from paramshare.training.optimizer import learning_rate, optimizer
from paramshare.training.run import named_network
from paramshare.training.state import init_state
from paramshare.training.workdir import stored_config, stored_variables

PAGE = "report.html"


def images_of(workdir: pathlib.Path) -> tuple[tuple[int, int, int], int]:
    """The shape of a run's images, (H, W, C), and the number of their classes; no image is read.

    Raises:
      CheckpointError: if the workdir does not tell.
    """
    told = re.fullmatch(r".* images of \((\d+), (\d+), (\d+)\), (\d+) classes", str(read_json(workdir / "identity.json").get("data")))
    if told is None:
        raise CheckpointError(f"{workdir / 'identity.json'} does not tell the shape of the run's images; it is not as training left it")
    height, width, channels, classes = map(int, told.groups())
    return (height, width, channels), classes


def variables_of(
    workdir: pathlib.Path, config: Config, model: nn.Module, image_shape: tuple[int, ...], checkpoint: str = "last"
) -> tuple[dict[str, Any], int]:
    """The trained variables of a run, of its "last" state or of the "best", and their step.

    Raises:
      ConfigError, CheckpointError: as `paramshare.training.workdir.stored_variables`.
    """
    rule = optimizer(config, learning_rate(config, 1))
    shapes = jax.eval_shape(lambda: init_state(model, rule, image_shape, config.seed))
    return stored_variables(workdir, shapes, checkpoint)


def snapshot_of(model: Shared, variables: Mapping[str, Any], step: int, lines: Sequence[Mapping[str, Any]]) -> Snapshot | None:
    """How alike the layers are in a state, `step` updates old; None where no two share. The lines of metrics tell which epoch that was."""
    snapshot = make_snapshot(model)
    if snapshot is None:
        return None
    epochs = [line["epoch"] for line in lines if line["kind"] == "epoch" and line["step"] <= step and isinstance(line.get("epoch"), int)]
    matrices = {name: np.asarray(matrix) for name, matrix in snapshot(variables).items()}
    return Snapshot(epochs[-1] if epochs else 0, step, matrices)


def read_run(workdir: str | pathlib.Path, *, model: nn.Module | None = None) -> Record:
    """What a run has left so far, for `paramshare.analysis.report.html_report`.

    What cannot be read, or not yet, is left out, and a note says why.

    Args:
      workdir: of a training run, finished or not.
      model: the network, where it is none by name.

    Raises:
      ConfigError: if the folder holds no run.
      CheckpointError: if its result is damaged.
    """
    workdir = pathlib.Path(workdir)
    config = stored_config(workdir)
    finished = workdir / "result.json"
    result = read_json(finished) if finished.is_file() else None
    if result is not None and not _whole(result):
        raise CheckpointError(f"{finished} does not hold what a run leaves there; remove it, and the same command makes it anew")
    lines, notes = read_metrics(workdir / "metrics.jsonl"), []
    if not lines:
        notes.append("metrics.jsonl is missing, or holds no whole line.")
    found: dict[str, Any] = {}
    try:
        shape, classes = images_of(workdir)
        network = named_network(config, classes, shape) if model is None else model
        found["cost"] = cost(network, shape, optimizer(config, learning_rate(config, 1)))
        if isinstance(network, Shared):
            found["layout"] = network.layout
            variables, step = variables_of(workdir, config, network, shape)
            found["now"] = snapshot_of(network, variables, step, lines)
            found["foldings"] = [fold(network, variables, threshold=threshold) for threshold in THRESHOLDS]
    except ModelError as error:
        notes.append(f"The network cannot be built by its name: {error}. If it is one of your own, hand it to read_run in Python.")
    except (CheckpointError, FoldError) as error:
        notes.append(f"{error}.")
    return Record(json.loads(configs.to_json(config)), lines, result, snapshots=snapshots(lines), notes=tuple(notes), **found)


def _whole(result: Mapping[str, Any]) -> bool:
    """Whether a result tells what a report tells of it."""
    try:
        chosen = [result["selected"]] if result.get("selected") else []
        numbers = [state["test"][name] for state in (result["last"], *chosen) for name in (result.get("score", "accuracy"), "count")]
        numbers += [state["epoch"] for state in chosen] + [result.get("images_per_second") or 0]
        numbers += [result[name] for name in ("epochs", "steps", "seconds")] + list(result["counts"].values())
        return "devices" in result and "trainable" in result["counts"] and all(isinstance(number, int | float) for number in numbers)
    except (AttributeError, KeyError, TypeError):
        return False


def write_report(record: Record, workdir: str | pathlib.Path) -> pathlib.Path:
    """Writes `report.html` into a workdir, and returns its path; `ConfigError` if it cannot be written."""
    page = pathlib.Path(workdir) / PAGE
    try:
        page.write_text(html_report(record), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{page} cannot be written: {error.strerror}; move it away, or see to the folder's permissions") from None
    return page
