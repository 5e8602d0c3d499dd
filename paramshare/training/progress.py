"""How far a run has come: what is stored with every checkpoint, beside the state."""

import dataclasses
import math


@dataclasses.dataclass
class Progress:
    """Stored with every checkpoint: sums of metrics, the best epoch, and times.

    Attributes:
      sums: the sums of each metric over the steps of the epoch so far.
      batches: number of those steps.
      line_sums: the same of the steps since the last line; of `gradient_max/BANK` the maximum.
      line_batches: number of those steps.
      without: how many steps of the epoch so far had no value (NaN) of a metric; they do not count.
      line_without: the same since the last line.
      best_score: best validation score so far; None before the first one.
      best_epoch: its epoch, counted from 1; 0 for none.
      best_step: its step.
      seconds: the duration of the whole run, with compilation, validation and saving.
      training_seconds: the duration of the training steps, without the first ones, which
        compile.
      training_examples: examples trained on in that time.
      environment: the devices, cores and versions that it was trained with.
      skipped: updates skipped because a loss or gradient was not finite.
    """

    sums: dict[str, float] = dataclasses.field(default_factory=dict)
    batches: int = 0
    best_score: float | None = None
    best_epoch: int = 0
    best_step: int = 0
    seconds: float = 0.0
    training_seconds: float = 0.0
    training_examples: int = 0
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    skipped: int = 0
    line_sums: dict[str, float] = dataclasses.field(default_factory=dict)
    line_batches: int = 0
    without: dict[str, int] = dataclasses.field(default_factory=dict)
    line_without: dict[str, int] = dataclasses.field(default_factory=dict)

    def add(self, lines: list[dict[str, float]], names: tuple[str, ...]) -> None:
        """Adds steps: the metrics `names` to the epoch's sums, all to those of the next line."""
        for line in lines:
            for name in names:
                _add(self.sums, self.without, name, line[name])
            for name, value in line.items():
                if name.startswith("gradient_max/"):
                    self.line_sums[name] = max(self.line_sums.get(name, 0.0), value)
                elif name != "finite":
                    _add(self.line_sums, self.line_without, name, value)
        self.batches += len(lines)
        self.line_batches += len(lines)

    def means(self) -> dict[str, float]:
        """Means over the epoch; starts the next epoch."""
        means = {
            name: _mean(total, self.batches - self.without.get(name, 0))
            for name, total in self.sums.items()
        }
        self.sums, self.without, self.batches = {}, {}, 0
        return means

    def line_means(self) -> dict[str, float]:
        """Means since the last line; of `gradient_max/BANK` the maximum."""
        return {
            name: total
            if name.startswith("gradient_max/")
            else _mean(total, self.line_batches - self.line_without.get(name, 0))
            for name, total in self.line_sums.items()
        }


def _add(sums: dict[str, float], without: dict[str, int], name: str, value: float) -> None:
    """Adds a value of a step; a batch without a joint, say, has no value of a measure."""
    if math.isnan(value):
        without[name] = without.get(name, 0) + 1
        value = 0.0
    sums[name] = sums.get(name, 0.0) + value


def _mean(total: float, count: int) -> float:
    return total / count if count else math.nan
