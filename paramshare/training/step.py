"""One step of training and one of evaluation: pure functions of one device's share of a batch."""

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from paramshare import ops
from paramshare.layout import count_leaves
from paramshare.training.losses import weighted
from paramshare.training.penalty import penalties
from paramshare.training.pruning import prune_average
from paramshare.training.run import Run
from paramshare.training.slices import BANKS, norm_over
from paramshare.training.state import AXIS, State, moved

Batch = dict[str, Any]
Metrics = dict[str, jax.Array]


def make_train_step(
    run: Run, seed: int | jax.Array
) -> Callable[[State, Any, Batch], tuple[State, Metrics]]:
    """The step `(state, data, batch) -> (state, metrics)`, to be mapped over the axis `AXIS`.

    `batch` is this device's share of the batch: `{"input": (b, ...), "label": a pytree of
    (b, ...)}`. If the whole training set is on the device, `data` holds it in the same form and
    `batch` is `{"index": (b,)}`.

    Gradients are averaged over devices on `state.trainable`; expanded kernels are never
    communicated. With `config.shard_banks`, each device holds a slice of every bank instead:
    kernels are all-gathered, and gradients of banks are reduce-scattered.

    Randomness is a function of (seed, step, position in the global batch), so it does not depend on
    the number of devices; only the model's own random streams, such as dropout, also depend on the
    device. If the loss or a gradient is not finite on any device, this update and all later ones
    are skipped; with `config.non_finite` "skip", only this one.

    Metrics, the same on all devices:
      loss: mean over the batch of the sum of the task's losses, times their weights.
      loss/NAME: mean of each loss, times its weight, if the task has several.
      the task's `batch_measures`, such as accuracy, over the global batch.
      finite: whether the loss and the gradient are finite.
      orthogonality, recurrence: the configured penalties, without their weights.
      gradient_mean/BANK, gradient_max/BANK: with `config.gradient_flow`; see `flow`.
    Penalties and gradient flow add no communication.

    Args:
      run: the run.
      seed: the seed of augmentation and dropout.
    """
    config, data_set, task, model = run.config, run.data, run.task, run.device_model
    norm = norm_over(config.shard_banks)

    @ops.form(config.ops)
    def train_step(state: State, data: Any, batch: Batch) -> tuple[State, Metrics]:
        if data is not None:
            batch = jax.tree.map(lambda x: jnp.take(x, batch["index"], axis=0), data)
        device, size = jax.lax.axis_index(AXIS), len(batch["input"])
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        augment_key, model_key = jax.random.split(key)
        inputs, labels = task.augment(
            augment_key,
            batch["input"],
            batch["label"],
            config.augment,
            data_set.mean,
            data_set.std,
            first=device * size,
        )
        # Flax draws every random stream that is not passed by name from "params".
        device_key = jax.random.fold_in(model_key, device)

        def loss_fn(
            trainable: Any, collections: Any, key: jax.Array, inputs: Any, labels: Any
        ) -> tuple[jax.Array, Any]:
            outputs, collections = model.apply(
                {**trainable, **collections},
                inputs,
                train=True,
                mutable=list(collections),
                rngs={"params": key},
            )
            losses = weighted(config, task.losses(outputs, labels, train=True))
            means = {name: loss.mean() for name, loss in losses.items()}
            loss = functools.reduce(operator.add, means.values())
            added = penalties(config.penalty, model, trainable)
            total = loss + sum(getattr(config.penalty, name) * x for name, x in added.items())
            return total, (loss, means, added, outputs, collections)

        derivative = functools.partial(jax.grad(loss_fn, has_aux=True), state.trainable)
        gradient, (loss, losses, added, outputs, collections) = (
            derivative(state.collections, device_key, inputs, labels)
            if config.accumulate == 1
            else _accumulated(
                derivative, config.accumulate, state.collections, device_key, (inputs, labels)
            )
        )
        gradient = average(gradient, config.shard_banks)
        collections = jax.tree.map(
            lambda x: jax.lax.pmean(x, AXIS) if jnp.issubdtype(x.dtype, jnp.inexact) else x,
            dict(collections),
        )
        several = losses if len(losses) > 1 else {}
        loss, several = jax.lax.pmean((loss, several), AXIS)
        measures = task.batch_measures(outputs, labels)
        sums = jax.lax.psum(jax.tree.map(jnp.sum, measures), AXIS)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm(gradient))

        def update() -> State:
            updates, optimizer_state = run.optimizer.update(
                gradient, state.optimizer, state.trainable
            )
            trainable: Any = optax.apply_updates(state.trainable, updates)
            average = state.ema
            if average is not None and config.ema is not None:
                average = moved(average, {**trainable, **collections}, config.ema, state.step)
                if config.compression.prune:
                    average = prune_average(config.compression, average, trainable)
            return State(
                state.step + 1, trainable, collections, optimizer_state, state.failed, average
            )

        def leave() -> State:
            if config.non_finite == "skip":
                return dataclasses.replace(state, step=state.step + 1)
            return dataclasses.replace(state, failed=jnp.ones((), jnp.bool_))

        state = jax.lax.cond(finite & ~state.failed, update, leave)
        return state, {
            "loss": loss,
            **{f"loss/{name}": value for name, value in several.items()},
            **{name: above / below for name, (above, below) in sums.items()},
            "finite": finite,
            **added,
            **(flow(gradient, run.shapes.trainable) if config.gradient_flow else {}),
        }

    return train_step


def _accumulated(
    derivative: Callable, parts: int, collections: Any, key: jax.Array, batch: Any
) -> tuple[Any, Any]:
    """What `derivative` returns for the whole batch, computed one part of it after the other."""
    batch = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)

    def body(carry: tuple[Any, Any], part: Any) -> tuple[tuple[Any, Any], Any]:
        total, collections = carry
        number, (inputs, labels) = part
        part_key = jax.random.fold_in(key, number)
        gradient, (*values, outputs, collections) = derivative(
            collections, part_key, inputs, labels
        )
        return (jax.tree.map(jnp.add, total, gradient), collections), (values, outputs)

    shapes, _ = jax.eval_shape(
        lambda: derivative(collections, key, *jax.tree.map(lambda x: x[0], batch))
    )
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    (total, collections), (values, outputs) = jax.lax.scan(
        body, (zeros, collections), (jnp.arange(parts), batch)
    )
    loss, losses, added = jax.tree.map(lambda x: jnp.mean(x, axis=0), values)
    outputs = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), outputs)
    gradient = jax.tree.map(lambda leaf: leaf / parts, total)
    return gradient, (loss, losses, added, outputs, collections)


def average(gradient: Any, sliced: bool) -> Any:
    """The mean over devices of a gradient; of slices of banks, the sum has been taken already."""
    if not sliced:
        return jax.lax.pmean(gradient, AXIS)
    devices = jax.lax.axis_size(AXIS)
    return {
        name: jax.tree.map(lambda leaf: leaf / devices, tree)
        if name == BANKS
        else jax.lax.pmean(tree, AXIS)
        for name, tree in gradient.items()
    }


def flow(gradient: Any, whole: Any) -> Metrics:
    """Size of the gradient of every bank: `gradient_mean/BANK` and `gradient_max/BANK`, of |.|.

    Args:
      gradient: the gradient of the variables, `{"banks": ..., "params": ...}`. The bank of a
        `Shared` that is nested in a larger module is named by its path. If it is smaller than
        `whole`, it is this device's slice.
      whole: the variables, with whole banks; shapes suffice.

    Example:
      >>> gradient = {"banks": {"b": {"weights": jnp.array([1.0, -3.0])}}, "params": {}}
      >>> {name: float(value) for name, value in flow(gradient, gradient).items()}
      {'gradient_mean/b': 2.0, 'gradient_max/b': 3.0}
    """
    metrics = {}
    sizes = {path: count_leaves(bank) for path, bank in _banks(whole.get(BANKS, {}))}
    for path, bank in _banks(gradient.get(BANKS, {})):
        leaves = [jnp.abs(leaf) for leaf in jax.tree.leaves(bank)]
        total = functools.reduce(operator.add, map(jnp.sum, leaves))
        largest = jnp.max(jnp.stack([jnp.max(leaf) for leaf in leaves]))
        if count_leaves(bank) < sizes[path]:
            total, largest = jax.lax.psum(total, AXIS), jax.lax.pmax(largest, AXIS)
        metrics |= {f"gradient_mean/{path}": total / sizes[path], f"gradient_max/{path}": largest}
    return metrics


def _banks(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every bank and its path. A mapping that holds only mappings is a module, not a bank."""
    for name, value in tree.items():
        if isinstance(value, Mapping) and all(isinstance(part, Mapping) for part in value.values()):
            yield from _banks(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value


def eval_outputs(run: Run, model: Any, variables: Any, inputs: jax.Array) -> Any:
    """A network's outputs in evaluation, merged over the task's views of each input.

    Args:
      run: the run.
      model: its network, or that of one device.
      variables: of the network.
      inputs: (B, ...), as loaded.
    """
    views = run.task.views(run.data.normalise(inputs))
    outputs = model.apply(variables, views.reshape(-1, *views.shape[2:]), train=False)
    return run.task.merge(
        jax.tree.map(lambda x: x.reshape(*views.shape[:2], *x.shape[1:]), outputs)
    )


def make_eval_step(run: Run) -> Callable[[Any, None, Batch], dict[str, Any]]:
    """The step `(variables, None, batch) -> per-example values`, to be mapped over `AXIS`.

    `batch` is `{"input", "label", "weight": (b,)}`. Returned, gathered from all devices in the
    order of the global batch: `losses` by name, the task's `statistics`, and `weight`, which is 0
    for examples that only fill up the batch.
    """
    task, model = run.task, run.device_model

    @ops.form(run.config.ops)
    def eval_step(variables: Any, data: None, batch: Batch) -> dict[str, Any]:
        inputs, labels = batch["input"], batch["label"]
        outputs = eval_outputs(run, model, variables, inputs)
        values = {
            "losses": weighted(run.config, task.losses(outputs, labels, train=False)),
            "statistics": task.statistics(outputs, inputs, labels),
            "weight": batch["weight"],
        }
        return jax.lax.all_gather(values, AXIS, tiled=True)

    return eval_step
