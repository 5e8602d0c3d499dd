"""Learning-rate schedules and update rules, as the papers' recipes use them."""

import optax

from paramshare.shared import decay_mask
from paramshare.training.config import Config


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
        after = optax.piecewise_constant_schedule(peak, {m * steps_per_epoch - warmup: schedule.factor for m in schedule.milestones})
    elif schedule.name == "cosine":
        after = optax.cosine_decay_schedule(peak, max(1, total - warmup))
    else:
        after = optax.constant_schedule(peak)
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def optimizer(config: Config, rate: optax.Schedule) -> optax.GradientTransformation:
    """The update rule over `{"banks", "params"}`. Weight decay leaves sharing coefficients alone (`paramshare.decay_mask`)."""
    settings = config.optimizer
    if settings.name == "adamw":
        return optax.adamw(rate, weight_decay=settings.weight_decay, mask=decay_mask)
    rule = optax.sgd(rate, settings.momentum, settings.nesterov) if settings.name == "sgd" else optax.adam(rate)
    if not settings.weight_decay:
        return rule
    return optax.chain(optax.add_decayed_weights(settings.weight_decay, mask=decay_mask), rule)
