"""Several tasks on the same inputs."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from paramshare.tasks.augment import Augment, Draws
from paramshare.tasks.task import Curves, Measure, Task, TaskError

TAKEN = ("image", "picture")  # what `paramshare predict` adds to a description


@dataclasses.dataclass(frozen=True)
class Several(Task):
    """Several tasks on the same inputs: labels and outputs are dicts with an entry for each task.

    Losses and measures are those of the tasks, named `TASK/LOSS` and `TASK/MEASURE`; training
    minimises the sum of all losses (`loss_weights` of the configuration weights them). The score is
    `mean`, the mean of the tasks' scores.

    Attributes:
      tasks: a mapping from names to tasks; stored as (name, task) pairs, sorted by name.

    Raises:
      TaskError: if there is no task, a name is not made of letters, digits and "_" or is "image" or
        "picture", or a task evaluates several views of an input, as `Pose` does with `flip_test`.

    Example:
      >>> from paramshare.tasks import Classification, Regression
      >>> task = Several({"digit": Classification(10), "place": Regression(("x", "y"))})
      >>> task.network_options()
      {'num_classes': {'digit': 10, 'place': 2}}
      >>> [measure.name for measure in task.measures]
      ['mean', 'digit/accuracy', 'digit/top5', 'place/r2', 'place/mae/x', 'place/mae/y']
    """

    tasks: tuple[tuple[str, Task], ...] | Mapping[str, Task]

    name: ClassVar[str] = "several"
    outputs_per_input: ClassVar[str] = "a dict with the outputs of each task"

    def __post_init__(self) -> None:
        pairs = self.tasks.items() if isinstance(self.tasks, Mapping) else self.tasks
        for pair in pairs:
            name, task = pair if isinstance(pair, tuple) and len(pair) == 2 else ("", pair)
            if not re.fullmatch(r"\w+", str(name)) or not isinstance(task, Task):
                raise TaskError(
                    f"tasks has an entry {name!r}: {task!r}; it must be a `Task` with a name of "
                    "letters, digits and underscores"
                )
            if name in TAKEN:
                raise TaskError(
                    f"a task is named {name!r}; predictions have an entry of that name already: "
                    "rename the task"
                )
        tasks = {str(name): task for name, task in pairs}
        if not tasks or len(tasks) < len(self.tasks):
            raise TaskError(
                f"tasks are {[name for name, _ in pairs]}; there must be at least one, and no "
                "name twice"
            )
        for name, task in tasks.items():
            views = jax.eval_shape(task.views, jax.ShapeDtypeStruct((1, 2, 2, 1), jnp.float32))
            if views.shape[0] > 1:
                raise TaskError(
                    f"the task {name!r} evaluates several views of an input, which tasks that "
                    f"share one network cannot: turn that off ({task.name}: flip_test=False)"
                )
        object.__setattr__(self, "tasks", tuple(sorted(tasks.items())))

    @property
    def _pairs(self) -> tuple[tuple[str, Task], ...]:
        assert isinstance(self.tasks, tuple)
        return self.tasks

    @property
    def measures(  # pyright: ignore[reportIncompatibleVariableOverride]
        self,
    ) -> tuple[Measure, ...]:
        """The mean score, then the measures of each task."""
        return (
            Measure("mean", "mean score", "mean", format_spec=".4f"),
            *(
                dataclasses.replace(
                    measure,
                    name=f"{name}/{measure.name}",
                    title=f"{name}: {measure.title}",
                    short=f"{name} {measure.short}",
                )
                for name, task in self._pairs
                for measure in task.measures
            ),
        )

    def label_spec(self, input_shape: tuple[int, ...]) -> dict[str, Any]:
        """The label of each task."""
        return {name: task.label_spec(input_shape) for name, task in self._pairs}

    def output_spec(self, input_shape: tuple[int, ...]) -> dict[str, Any]:
        """The outputs of each task."""
        return {name: task.output_spec(input_shape) for name, task in self._pairs}

    def network_options(self) -> dict[str, Any]:
        """The number of outputs of each task."""
        options = {name: task.network_options() for name, task in self._pairs}
        for name, given in options.items():
            if set(given) != {"num_classes"}:
                raise TaskError(
                    f"the task {name!r} asks a network for {sorted(given)}; networks for several "
                    "tasks are built by number of outputs only: pass a network of your own"
                )
        return {"num_classes": {name: given["num_classes"] for name, given in options.items()}}

    @property
    def has_label_smoothing(self) -> bool:
        """Whether a task has it."""
        return any(task.has_label_smoothing for _, task in self._pairs)

    def with_label_smoothing(self, smoothing: float) -> "Several":
        """The same tasks; those that support label smoothing have it.

        Raises:
          TaskError: if `smoothing` is not 0 and no task supports it.
        """
        if not self.has_label_smoothing:
            super().with_label_smoothing(smoothing)
        return self.map(
            lambda task: task.with_label_smoothing(smoothing) if task.has_label_smoothing else task
        )

    def map(self, function: Callable[[Task], Task]) -> "Several":
        """The same names with other tasks."""
        return Several({name: function(task) for name, task in self._pairs})

    def check_outputs(self, outputs: Any, input_shape: tuple[int, ...]) -> None:
        """Checks the names of the tasks, then the outputs of each."""
        self._check("outputs of the network", outputs)
        for name, task in self._pairs:
            task.check_outputs(outputs[name], input_shape)

    def check_labels(self, labels: Any, input_shape: tuple[int, ...]) -> None:
        """Checks the names of the tasks, then the labels of each."""
        self._check("labels", labels)
        for name, task in self._pairs:
            task.check_labels(labels[name], input_shape)

    def _check(self, what: str, tree: Any) -> None:
        names = [name for name, _ in self._pairs]
        if not isinstance(tree, Mapping) or sorted(tree) != names:
            found = sorted(tree) if isinstance(tree, Mapping) else jax.tree.map(np.shape, tree)
            raise TaskError(
                f"the {what} must be a dict with an entry for each of {names}, got {found}"
            )

    def check_augment(self, config: Augment, input_shape: tuple[int, ...]) -> None:
        """Checks the augmentation for every task."""
        for _, task in self._pairs:
            task.check_augment(config, input_shape)

    def move_labels(
        self, draws: Draws, labels: Any, config: Augment, shape: tuple[int, ...]
    ) -> dict[str, Any]:
        """The labels of each task, moved as the task does."""
        return {
            name: task.move_labels(draws, labels[name], config, shape) for name, task in self._pairs
        }

    def losses(self, outputs: Any, labels: Any, *, train: bool) -> dict[str, jax.Array]:
        """The losses of all tasks."""
        return {
            f"{name}/{loss}": value
            for name, task in self._pairs
            for loss, value in task.losses(outputs[name], labels[name], train=train).items()
        }

    def batch_measures(self, outputs: Any, labels: Any) -> dict[str, tuple[jax.Array, jax.Array]]:
        """The batch measures of all tasks."""
        return {
            f"{name}/{measure}": value
            for name, task in self._pairs
            for measure, value in task.batch_measures(outputs[name], labels[name]).items()
        }

    def statistics(self, outputs: Any, inputs: jax.Array, labels: Any) -> dict[str, Any]:
        """The statistics of each task."""
        return {
            name: task.statistics(outputs[name], inputs, labels[name]) for name, task in self._pairs
        }

    def reduce(self, statistics: Any) -> dict[str, float]:
        """The mean score, and the measures of each task."""
        values = {name: task.reduce(statistics[name]) for name, task in self._pairs}
        scores = [values[name][task.score.name] for name, task in self._pairs]
        return {
            "mean": float(np.mean(scores)),
            **{f"{name}/{key}": x for name, result in values.items() for key, x in result.items()},
        }

    def curves(self, statistics: Any) -> tuple[Curves, ...]:
        """The charts of all tasks."""
        return tuple(
            dataclasses.replace(chart, title=f"{name}: {chart.title}")
            for name, task in self._pairs
            for chart in task.curves(statistics[name])
        )

    def predict(self, outputs: Any, input_shape: tuple[int, ...]) -> dict[str, Any]:
        """What each task predicts."""
        return {name: task.predict(outputs[name], input_shape) for name, task in self._pairs}

    def heatmap(self, outputs: Any) -> jax.Array | None:
        """The maps of the first task that has some."""
        maps = (task.heatmap(outputs[name]) for name, task in self._pairs)
        return next((found for found in maps if found is not None), None)

    def describe(self, prediction: Any, original: Callable[[Any], Any]) -> dict[str, Any]:
        """What each task describes, by its name."""
        return {name: task.describe(prediction[name], original) for name, task in self._pairs}

    def draw(self, axes: Any, description: Mapping[str, Any]) -> None:
        """Draws the predictions of all tasks."""
        for name, task in self._pairs:
            task.draw(axes, description[name])
