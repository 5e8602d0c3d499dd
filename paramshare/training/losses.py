"""Losses of a task as a run is configured: label smoothing and weights."""

import math
from typing import Any

import jax

from paramshare.tasks import Several, Task
from paramshare.training.config import Config, ConfigError


def smoothed(task: Task, smoothing: float) -> Task:
    """The task with the configured label smoothing; 0 keeps what the task has itself."""
    if not smoothing:
        return task
    if isinstance(task, Several) and task.has_label_smoothing:
        return task.map(lambda one: smoothed(one, smoothing) if one.has_label_smoothing else one)
    of_task = getattr(task, "label_smoothing", 0.0)
    if of_task not in (0.0, smoothing):
        raise ConfigError(
            f"label_smoothing is {smoothing}, but the task has {of_task}; it must be 0 or {of_task}"
        )
    return task.with_label_smoothing(smoothing)


def weights(config: Config) -> dict[str, float]:
    """The configured weights of losses, by name.

    Raises:
      ConfigError: if an entry is not NAME=WEIGHT, the weight is not a positive number, or a name
        occurs twice.

    Example:
      >>> weights(Config(loss_weights=("place=2", "digit=0.5")))
      {'place': 2.0, 'digit': 0.5}
    """
    found: dict[str, float] = {}
    for entry in config.loss_weights:
        name, _, text = entry.partition("=")
        try:
            weight = float(text)
        except ValueError:
            weight = math.nan
        if not name or not 0 < weight < math.inf:
            raise ConfigError(
                f"loss_weights holds {entry!r}; it must be NAME=WEIGHT with a positive weight, "
                "such as box=2"
            )
        if name in found:
            raise ConfigError(f"loss_weights holds {name!r} twice; leave one out")
        found[name] = weight
    return found


def weighted(config: Config, losses: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The losses of a task, multiplied by the configured weights.

    A weight applies to the loss of its name and, of several tasks, to all losses of the task of its
    name; a loss's own weight takes precedence over its task's.

    Example:
      >>> import jax.numpy as jnp
      >>> losses = {"place/huber": jnp.ones(1), "digit/cross_entropy": jnp.ones(1)}
      >>> weighted(Config(loss_weights=("place=2",)), losses)["place/huber"].item()
      2.0
    """
    factors = weights(config)
    result = {}
    for name, loss in losses.items():
        factor = next((factors[part] for part in _parts(name) if part in factors), None)
        result[name] = loss if factor is None else factor * loss
    return result


def _parts(name: str) -> list[str]:
    """The name of a loss, then of its task, and of the tasks that hold that one.

    Example:
      >>> _parts("place/x/huber")
      ['place/x/huber', 'place/x', 'place']
    """
    words = name.split("/")
    return ["/".join(words[:count]) for count in range(len(words), 0, -1)]


def check_weights(config: Config, task: Task, outputs: Any, input_shape: tuple[int, ...]) -> None:
    """Raises `ConfigError` if a weight has no loss.

    Args:
      config: the configuration.
      task: the task.
      outputs: of the network, for a batch of one; shapes suffice.
      input_shape: shape of one input.
    """
    factors = weights(config)
    if not factors:
        return
    labels = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype),
        task.label_spec(input_shape),
    )
    losses = jax.eval_shape(lambda o, y: task.losses(o, y, train=True), outputs, labels)
    known = {part for name in losses for part in _parts(name)}
    for name in factors:
        if name not in known:
            raise ConfigError(
                f"loss_weights names {name!r}, but the losses of the task {task.name!r} are "
                f"{', '.join(losses)}; use their names, or those of tasks"
            )
