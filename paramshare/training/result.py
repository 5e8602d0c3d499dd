"""The result of a run (`result.json`) and the facts that identify it (`identity.json`), typed."""

import dataclasses
import json
import math
import pathlib
from typing import Annotated, Any, Self

import pydantic
from jax import ShapeDtypeStruct
from pydantic.dataclasses import dataclass

from paramshare.parameters import example_input
from paramshare.storage import read_json, run_path, write_json
from paramshare.tasks import Curves, Measure
from paramshare.training.checkpoint import CheckpointError

# JSON has no NaN and no infinity; they are written as strings, which `Number` reads back.
FORMAT = pydantic.ConfigDict(ser_json_inf_nan="strings", extra="forbid")


def _not_finite(value: Any) -> Any:
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else value


Number = Annotated[float, pydantic.BeforeValidator(_not_finite)]
"""A float that may be NaN or infinite."""


class _Stored:
    """Writes a dataclass as JSON and reads it back with its types checked."""

    @classmethod
    def read(cls, path: str | pathlib.Path) -> Self:
        """Reads what `write` wrote.

        Raises:
          CheckpointError: if the file cannot be read, or a field is missing, unknown or of another
            type.
        """
        path = run_path(path)
        remedy = f"remove it and run `paramshare train --workdir {path.parent}` to write it again"
        value = read_json(path, CheckpointError, remedy)
        try:
            # As JSON, which has no tuples: in Python a list would be refused.
            return pydantic.TypeAdapter(cls).validate_json(json.dumps(value), strict=True)
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            reason = f"{field}: {first['msg']}" if field else first["msg"]
            raise CheckpointError(f"{path} is damaged ({reason}); {remedy}") from None

    def write(self, path: str | pathlib.Path) -> None:
        """Writes the file as JSON; `StorageError` if it cannot be written."""
        write_json(run_path(path), self.as_json())

    def as_json(self) -> dict[str, Any]:
        """The fields as JSON values, for `json.dumps`."""
        return json.loads(pydantic.TypeAdapter(type(self)).dump_json(self))


@dataclass(frozen=True, config=FORMAT)
class Evaluation(_Stored):
    """What evaluation measured on a set of examples."""

    loss: Number
    """Mean over the examples of the sum of all losses."""
    count: int
    """Number of examples."""
    measures: dict[str, Number]
    """The task's measures over the whole set, by name."""
    losses: dict[str, Number] = dataclasses.field(default_factory=dict)
    """Mean of each loss over the examples, by name."""
    curves: tuple[Curves, ...] = ()
    """The task's charts over the whole set; only of the last epoch on the test set."""

    @pydantic.model_serializer(mode="wrap")
    def _without_empty_curves(self, serialise: Any) -> dict[str, Any]:
        fields = serialise(self)
        return fields if self.curves else {k: x for k, x in fields.items() if k != "curves"}

    def describe(self, measure: Measure) -> str:
        """A measure as text, with the number of examples.

        Example:
          >>> from paramshare.tasks import Measure
          >>> from paramshare.training.result import Evaluation
          >>> accuracy = Measure("accuracy", "accuracy", "acc", fraction_of_examples=True)
          >>> Evaluation(0.1, 355, {"accuracy": 352 / 355}).describe(accuracy)
          '99.15% (352 of 355 examples)'
        """
        value, count = self.measures[measure.name], self.count
        whole = measure.fraction_of_examples and math.isfinite(value)
        of = f"{round(value * count)} of {count}" if whole else str(count)
        return f"{measure.format(value)} ({of} examples)"


@dataclass(frozen=True, config=FORMAT)
class Selected(_Stored):
    """The epoch with the best validation score."""

    epoch: int
    """Counted from 1."""
    validation: Number
    """The score on the validation set after that epoch."""
    test: Evaluation
    """On the test set, with the parameters of that epoch."""


@dataclass(frozen=True, config=FORMAT)
class Result(_Stored):
    """The result of a finished run, stored as `result.json`.

    Example:
      >>> from paramshare.tasks import Measure
      >>> from paramshare.training.result import Evaluation, Result
      >>> score = Measure("accuracy", "accuracy", "acc", fraction_of_examples=True)
      >>> last = Evaluation(0.1, 355, {"accuracy": 352 / 355})
      >>> result = Result("swrn-16-1-1", "digits", {"trainable": 100}, 1, 2, score, last)
      >>> result.last.measures[result.score.name] == result.last_score
      True
    """

    model: str
    """Name of the network."""
    data: str
    """Name of the data set."""
    counts: dict[str, int]
    """Parameters: banks, coefficients, private, and trainable, the sum of all."""
    epochs: int
    """Epochs trained."""
    steps: int
    """Updates made."""
    score: Measure
    """The task's score."""
    last: Evaluation
    """On the test set, with the parameters of the last epoch."""
    others: dict[str, Evaluation] = dataclasses.field(default_factory=dict)
    """On the data set's further test sets, by name, with the parameters of the last epoch."""
    selected: Selected | None = None
    """The epoch with the best validation score; None without validation."""
    ema: Evaluation | None = None
    """On the test set, with the moving average at the end; None if none was kept."""
    skipped: int = 0
    """Updates that were skipped because a loss or gradient was not finite."""
    seconds: float = 0.0
    """Wall time of the whole run, over all its parts if it was resumed."""
    images_per_second: float | None = None
    """Training speed, without compilation, validation and saving; None if no step was timed."""
    measures: tuple[Measure, ...] = ()
    """All measures of the task; () where they were not stored."""
    devices: str = ""
    """Number and kind of the devices."""
    jax: str = ""
    """Version of jax."""
    metrics: str = ""
    """Digest of `metrics.jsonl` at the end; "" where it was not stored."""

    def __post_init__(self) -> None:
        tests = [self.last, *self.others.values(), *([self.selected.test] if self.selected else [])]
        tests += [self.ema] if self.ema else []
        for test in tests:
            if self.score.name not in test.measures:
                raise ValueError(f"score {self.score.name!r} is none of {sorted(test.measures)}")

    @property
    def last_score(self) -> float:
        """The test score after the last epoch."""
        return self.last.measures[self.score.name]

    @property
    def selected_score(self) -> float | None:
        """The test score of the selected epoch; None without validation."""
        return self.selected.test.measures[self.score.name] if self.selected else None


@dataclass(frozen=True, config=FORMAT)
class RunFacts(_Stored):
    """What identifies a run beside its configuration, stored as `identity.json`.

    A run is resumed only if its facts are those of the workdir. They also let other commands build
    the network without loading the data set.
    """

    model: str
    """Digest of the network's description."""
    train: int
    """Number of training examples."""
    validation: int
    """Number of validation examples."""
    test: int
    """Number of test examples."""
    input_shape: tuple[int, ...]
    """Shape of one input."""
    network_options: dict[str, Any]
    """Options of `create_model` that follow from the data set's task, such as num_classes."""
    task: str
    """Name of the task."""
    score: Measure
    """The task's score."""
    data: str = ""
    """Digest of the examples and their statistics; "" where it was not stored."""
    program: str = ""
    """Digest of what the network computes; "" where it was not stored."""
    input_dtype: str = "float32"
    """Of the inputs as the network takes them."""
    jax: str = ""
    """Versions of jax, flax and this library's operations, with which `program` changes."""

    @property
    def example(self) -> ShapeDtypeStruct:
        """One input as the network takes it, in a batch of one."""
        return example_input(self.input_shape, self.input_dtype)

    def differences(self, stored: "RunFacts") -> list[str]:
        """The facts that differ, as "field: stored value -> this value", or in words.

        Programs are compared only if they were traced with the same versions of jax, of flax and
        of this library's operations.
        """
        before, after = stored.as_json(), self.as_json()  # a tuple is read back as a list
        digests = ("data", "program", "jax")
        changed = [
            f"{name}: {before[name]} -> {after[name]}"
            for name in after
            if before[name] != after[name] and name not in digests
        ]
        if not changed and stored.data not in ("", self.data):
            changed.append("the images, labels or statistics of the data set have changed")
        if not changed and stored.jax == self.jax and stored.program not in ("", self.program):
            changed.append("the code of the network has changed: it computes something else")
        return changed
