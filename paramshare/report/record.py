"""What a run left in its workdir, read without its data set: the input of the report."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import numpy as np

from paramshare.layout import Layout
from paramshare.measure.cost import Cost, cost
from paramshare.measure.snapshots import THRESHOLDS, Snapshot, make_snapshot, snapshots
from paramshare.models import ModelError
from paramshare.report.predictions import PREDICTIONS
from paramshare.shared import Shared
from paramshare.storage import run_path
from paramshare.tasks import Measure
from paramshare.training.checkpoint import CheckpointError
from paramshare.training.config import Config
from paramshare.training.metrics import METRICS, metrics_digest, read_metrics
from paramshare.training.optimizer import learning_rate, optimizer
from paramshare.training.result import Result, RunFacts
from paramshare.training.workdir import (
    RESULT,
    network_variables,
    stored_config,
    stored_facts,
    stored_network,
)
from paramshare.transform.folding import Folded, FoldError, fold
from paramshare.transform.packing import PACKED


@dataclasses.dataclass(frozen=True)
class Record:
    """What a run left.

    Attributes:
      config: the configuration.
      lines: the lines of `metrics.jsonl`.
      result: None for a run that has not finished.
      facts: None if they could not be read.
      layout: which layers share which bank; None for a network without sharing, or one that could
        not be built.
      cost: cost of the network; None if it could not be built.
      snapshots: the layers' similarity over training, in order.
      now: the layers' similarity in the newest state.
      foldings: the newest state folded by `paramshare.fold`, once per threshold.
      notes: what is missing from the record, and why.
      examples: `predictions.png`, predictions for test examples; None if there is none.
      packed: bytes of the workdir's `variables.pack`; None if there is none.
    """

    config: Config
    lines: Sequence[Mapping[str, Any]] = ()
    result: Result | None = None
    facts: RunFacts | None = None
    layout: Layout | None = None
    cost: Cost | None = None
    snapshots: Sequence[Snapshot] = ()
    now: Snapshot | None = None
    foldings: Sequence[Folded] = ()
    notes: Sequence[str] = ()
    examples: bytes | None = None
    packed: int | None = None

    @property
    def title(self) -> str:
        """The network and the data set."""
        return f"{self.config.model.name} on {self.config.data.name}"

    @property
    def score(self) -> Measure | None:
        """The task's score; None if neither a result nor the run's facts could be read."""
        source = self.result or self.facts
        return source.score if source else None

    @property
    def epochs(self) -> list[Mapping[str, Any]]:
        """The lines of kind "epoch"."""
        return [line for line in self.lines if line["kind"] == "epoch"]


def read_run(workdir: str | pathlib.Path, model: nn.Module | None = None) -> Record:
    """Reads what a run has left so far.

    Where something cannot be read, or does not exist yet, a note of the record says so.

    Args:
      workdir: workdir of a training run, finished or not.
      model: the network, if the run did not create it by name.

    Raises:
      ConfigError: if the folder holds no run.
      CheckpointError: if its result is damaged.
    """
    workdir = run_path(workdir)
    config = stored_config(workdir)
    result = Result.read(workdir / RESULT) if (workdir / RESULT).is_file() else None
    lines, notes = read_metrics(workdir / METRICS), []
    fields: dict[str, Any] = {}
    if not lines:
        notes.append("metrics.jsonl is missing or has no complete line.")
    elif result and result.metrics not in ("", metrics_digest(workdir / METRICS)):
        notes.append("metrics.jsonl has changed since the run ended; the curves may be wrong.")
    try:
        facts = fields["facts"] = stored_facts(workdir)
        network = stored_network(workdir)[2] if model is None else model
        rule = optimizer(config, learning_rate(config, 1))
        fields["cost"] = cost(network, facts.example, optimizer=rule)
        if isinstance(network, Shared):
            fields["layout"] = network.layout
            variables, step = network_variables(workdir, config, facts, network)
            fields["now"] = snapshot_of(network, variables, step, lines)
            fields["foldings"] = [fold(network, variables, threshold=t) for t in THRESHOLDS]
    except ModelError as error:
        notes.append(
            f"The network cannot be built from its name: {error}. "
            "If it is your own, pass it to read_run in Python."
        )
    except (CheckpointError, FoldError) as error:
        notes.append(f"{error}.")
    if (workdir / PREDICTIONS).is_file():
        fields["examples"] = (workdir / PREDICTIONS).read_bytes()
    if (workdir / PACKED).is_file():
        fields["packed"] = (workdir / PACKED).stat().st_size
    return Record(config, lines, result, snapshots=snapshots(lines), notes=tuple(notes), **fields)


def snapshot_of(
    model: nn.Module,
    variables: Mapping[str, Any],
    step: int,
    lines: Sequence[Mapping[str, Any]],
) -> Snapshot | None:
    """The layers' similarity in the state after `step` updates; None if no two layers share.

    The epoch of that state is read from the lines of `metrics.jsonl`.
    """
    snapshot = make_snapshot(model)
    if snapshot is None:
        return None
    epochs = [line["epoch"] for line in lines if line["kind"] == "epoch" and line["step"] <= step]
    matrices = {name: np.asarray(matrix) for name, matrix in snapshot(variables).items()}
    return Snapshot(epochs[-1] if epochs else 0, step, matrices)
