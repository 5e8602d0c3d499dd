"""Learning-rate schedules and update rules of the papers' recipes."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from paramshare.shared import decay_mask
from paramshare.training.config import Config, Optimizer
from paramshare.training.pruning import keep_zeros, spare_zeros


def learning_rate(config: Config, steps_per_epoch: int) -> optax.Schedule:
    """The learning rate as a function of the step, counted from 0.

    Example:
      >>> from paramshare.training.config import Config
      >>> rate = learning_rate(Config(epochs=200), steps_per_epoch=10)
      >>> [round(float(rate(step)), 6) for step in (0, 599, 600, 1200, 1600)]
      [0.1, 0.1, 0.02, 0.004, 0.0008]
    """
    peak, schedule = config.optimizer.learning_rate, config.schedule
    warmup = round(schedule.warmup_epochs * steps_per_epoch)
    total = config.epochs * steps_per_epoch
    if schedule.name == "step":
        factors = schedule.factors or (schedule.factor,) * len(schedule.milestones)
        drops = {
            m * steps_per_epoch - warmup: factor
            for m, factor in zip(schedule.milestones, factors, strict=True)
            if m < config.epochs
        }
        after = optax.piecewise_constant_schedule(peak, drops)
    elif schedule.name == "cosine":
        after = optax.cosine_decay_schedule(peak, max(1, total - warmup))
    elif schedule.name == "exponential":
        steps: Any = schedule.period * steps_per_epoch  # optax annotates it as an integer
        after = optax.exponential_decay(peak, steps, schedule.factor)
    else:
        after = optax.constant_schedule(peak)
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def optimizer(
    config: Config,
    rate: optax.Schedule,
    norm: Callable[[Any], jax.Array] = optax.tree.norm,
    steps: int = 1,
) -> optax.GradientTransformation:
    """The update rule over `{"banks", "params"}`.

    The gradient is clipped, then weight decay is added, then the rule is applied, as with PyTorch's
    `clip_grad_norm_` and SGD. Sharing coefficients do not decay (`paramshare.decay_mask`), unless
    `decay_coefficients` is set; biases and scales of norms do, unless `decay_vectors` is off.
    Pruned parameters of banks stay 0 (`config.compression`).

    Args:
      config: the configuration.
      rate: the learning rate by step.
      norm: the norm of a gradient, for clipping.
      steps: updates of the whole run, for gradual pruning.
    """
    settings = config.optimizer
    mask = functools.partial(_decays, settings)
    rules = [] if settings.clip_norm is None else [_clip(settings.clip_norm, norm)]
    if settings.name == "adamw":
        rules.append(optax.adamw(rate, weight_decay=settings.weight_decay, mask=mask))
    else:
        if settings.weight_decay:
            rules.append(optax.add_decayed_weights(settings.weight_decay, mask=mask))
        rules.append(
            optax.sgd(rate, settings.momentum, settings.nesterov)
            if settings.name == "sgd"
            else optax.adam(rate)
        )
    if config.compression.prune:
        rules.insert(0, spare_zeros(config.compression))
        rules.append(keep_zeros(config.compression, steps))
    return rules[0] if len(rules) == 1 else optax.chain(*rules)


def _clip(largest: float, norm: Callable[[Any], jax.Array]) -> optax.GradientTransformation:
    """As `optax.clip_by_global_norm`, with another norm."""

    def clip(gradient: Any, _: Any) -> Any:
        length = norm(gradient)
        return jax.tree.map(
            lambda leaf: jnp.where(length < largest, leaf, leaf / length * largest), gradient
        )

    return optax.stateless(clip)


def _decays(settings: Optimizer, variables: Any) -> Any:
    """A pytree of bools: which parameters weight decay applies to."""
    whole = jax.tree.map(lambda _: True, variables)
    mask = whole if settings.decay_coefficients else decay_mask(variables)
    if settings.decay_vectors:
        return mask

    def decays(path: Any, leaf: Any, decays: bool) -> bool:
        # What belongs to a bank has options of its own, and may be a vector: a ring, coefficients.
        names = [str(getattr(key, "key", key)) for key in path]
        if {"own", "coefficients"} & set(names):
            return decays
        return decays and leaf.ndim > 1 and names[-1] not in ("bias", "scale")  # stacked by a scan

    params = jax.tree_util.tree_map_with_path(decays, variables["params"], mask["params"])
    return mask | {"params": params}
