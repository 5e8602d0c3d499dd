"""One training step and one evaluation step: pure functions of one device's share of a batch, to be mapped over a named axis."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from paramshare.penalties import orthogonality, recurrence
from paramshare.training.config import Penalty
from paramshare.training.data import CLASSES, Augment, Task, augment, normalise
from paramshare.training.state import AXIS, State

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    augmentation: Augment,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    *,
    task: Task = CLASSES,
    seed: int = 0,
    label_smoothing: float = 0.0,
    penalty: Penalty = Penalty(),  # noqa: B008 (frozen)
    gradient_flow: bool = False,
) -> Callable[[State, Any, Batch], tuple[State, Metrics]]:
    """The step `(state, data, batch) -> (state, metrics)`, to be mapped over the axis `AXIS`.

    `batch` is this device's share, `{"image": (b, H, W, C) uint8, "label": (b, ...)}`, labels as `task` wants them; or, where the whole
    training set lives on the device as `data = {"image": (N, H, W, C), "label": (N, ...)}`, `{"index": (b,)}` into it.

    Gradients are averaged over devices on `state.trainable`, and nothing larger: kernels made from banks never travel. Randomness
    is a function of (seed, step, position in the global batch), so that it does not depend on the number of devices; except for the
    model's own dropout, which also takes the device's number. If the loss or a gradient is not finite, on any device, the update
    is not applied, and no later one either.

    Metrics, the same on all devices: `loss` (the task's, the mean over examples), the task's score (such as `accuracy`), `finite`; where
    penalties are added to the loss, `orthogonality` and `recurrence`, not yet multiplied; with `gradient_flow`, `gradient_mean/BANK` and
    `gradient_max/BANK` (see `flow`). The last four travel no further than the gradient they are made of.
    """

    def train_step(state: State, data: Any, batch: Batch) -> tuple[State, Metrics]:
        if data is not None:
            batch = {name: jnp.take(value, batch["index"], axis=0) for name, value in data.items()}
        label = batch["label"]
        device, size = jax.lax.axis_index(AXIS), label.shape[0]
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        image_key, model_key = jax.random.split(key)
        x_BxHxWxC = augment(image_key, batch["image"], augmentation, mean, std, first=device * size)
        # Flax draws dropout, and any other stream that a model asks for, from "params" where it is not given by name.
        rngs = {"params": jax.random.fold_in(model_key, device)}

        def loss_fn(trainable):
            output, collections = model.apply(
                {**trainable, **state.collections}, x_BxHxWxC, train=True, mutable=list(state.collections), rngs=rngs
            )
            loss = task.loss(output, label, label_smoothing).mean()
            added = penalties(penalty, trainable)
            total = loss + sum(getattr(penalty, name) * value for name, value in added.items())
            return total, (loss, added, output, collections)

        gradient, (loss, more, output, collections) = jax.grad(loss_fn, has_aux=True)(state.trainable)
        gradient = jax.lax.pmean(gradient, AXIS)
        collections = jax.tree.map(lambda x: jax.lax.pmean(x, AXIS) if jnp.issubdtype(x.dtype, jnp.inexact) else x, dict(collections))
        parts = {name: jnp.sum(part) for name, part in task.parts(output, label).items()}
        loss, parts = jax.lax.pmean((loss, parts), AXIS)
        finite = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(gradient))

        def update() -> State:
            updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.trainable)
            trainable: Any = optax.apply_updates(state.trainable, updates)
            return State(state.step + 1, trainable, collections, optimizer_state, state.failed)

        state = jax.lax.cond(finite & ~state.failed, update, lambda: dataclasses.replace(state, failed=jnp.ones((), jnp.bool_)))
        more |= flow(gradient) if gradient_flow else {}
        return state, {"loss": loss, **task.means(parts | {"count": size}), "finite": finite, **more}

    return train_step


PENALTIES = ("orthogonality", "recurrence")  # the weights among the fields of `Penalty`


def alone(penalty: Penalty, name: str) -> Penalty:
    """One of the penalties, without the others."""
    return dataclasses.replace(penalty, **{other: 0.0 for other in PENALTIES if other != name})


def penalties(penalty: Penalty, variables: Mapping[str, Any]) -> Metrics:
    """The penalties that a configuration adds to the loss, by name, not yet multiplied; `PenaltyError` if their banks are not there."""
    found = {}
    if penalty.orthogonality:
        found["orthogonality"] = orthogonality(variables, *penalty.pools, unique=penalty.unique)
    if penalty.recurrence:
        found["recurrence"] = recurrence(variables)
    return found


def flow(gradient: Any) -> Metrics:
    """How strong a gradient reaches every bank: `gradient_mean/BANK` and `gradient_max/BANK`, of |gradient| over all numbers of the bank.

    Args:
      gradient: in the form of the variables it is taken by, `{"banks": ..., "params": ...}`. A bank of a `Shared` that is nested in a
        larger module goes by its path.

    Example:
      >>> gradient = {"banks": {"b": {"templates": jnp.array([1.0, -3.0])}}, "params": {}}
      >>> {name: float(value) for name, value in flow(gradient).items()}
      {'gradient_mean/b': 2.0, 'gradient_max/b': 3.0}
    """
    found = {}
    for path, bank in _banks(gradient.get("banks", {})):
        leaves = [jnp.abs(leaf) for leaf in jax.tree.leaves(bank)]
        found[f"gradient_mean/{path}"] = sum(jnp.sum(leaf) for leaf in leaves) / sum(leaf.size for leaf in leaves)
        found[f"gradient_max/{path}"] = jnp.max(jnp.stack([jnp.max(leaf) for leaf in leaves]))
    return found


def _banks(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every bank with its path: what holds arrays is a bank, what holds mappings only is a module with banks inside."""
    for name, value in tree.items():
        if isinstance(value, Mapping) and all(isinstance(part, Mapping) for part in value.values()):
            yield from _banks(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value


def make_eval_step(
    model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...], *, task: Task = CLASSES
) -> Callable[[Any, Any, Batch], Metrics]:
    """The step `(variables, None, batch) -> sums` over `{"image", "label", "weight": (b,)}`; examples of weight 0 do not count.

    Sums over all devices: `loss`, `count`, and what `task.means` makes its measures of.
    """

    def eval_step(variables: Any, data: None, batch: Batch) -> Metrics:
        output: Any = model.apply(variables, normalise(batch["image"], mean, std), train=False)
        label, weight_B = batch["label"], batch["weight"]
        parts = {"loss": task.loss(output, label), "count": jnp.ones_like(weight_B)}
        parts |= task.parts(output, label) | task.more_parts(output, batch["image"], label)
        sums = {name: jnp.sum(weight_B * part) for name, part in parts.items()}
        return jax.lax.psum(sums, AXIS)

    return eval_step
