"""Update rules and schedules against the papers' recipes, written out by hand."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from paramshare.training.config import Config, Optimizer, Schedule
from paramshare.training.optimizer import learning_rate, optimizer

VARIABLES = {
    "banks": {"b": {"templates": jnp.array([[1.0, -2.0]])}},
    "params": {"coefficients": {"b": jnp.array([[0.5], [2.0]])}, "model": {"bn": {"scale": jnp.array([3.0])}}},
}


def gradients(step):
    return jax.tree.map(lambda x: jnp.cos(x * (step + 1)), VARIABLES)


def run(config, steps=5) -> Any:
    rule = optimizer(config, optax.constant_schedule(config.optimizer.learning_rate))
    variables: Any = VARIABLES
    state = rule.init(VARIABLES)
    for step in range(steps):
        updates, state = rule.update(gradients(step), state, variables)
        variables = optax.apply_updates(variables, updates)
    return variables


def test_sgd_decays_before_momentum_with_nesterov_and_spares_coefficients():
    """As the reference's recipe: g += wd w; v = m v + g; w -= lr (g + m v)."""
    rate, m, wd = 0.1, 0.9, 0.05
    found = run(Config(optimizer=Optimizer("sgd", rate, m, nesterov=True, weight_decay=wd)))

    def by_hand(decay):
        def leaf(w, *path_gradients):
            w, v = np.asarray(w, np.float64), 0.0
            for g in path_gradients:
                g = np.asarray(g, np.float64) + decay * w
                v = m * v + g
                w = w - rate * (g + m * v)
            return w

        return jax.tree.map(leaf, VARIABLES, *[gradients(step) for step in range(5)])

    np.testing.assert_allclose(found["banks"]["b"]["templates"], by_hand(wd)["banks"]["b"]["templates"], rtol=1e-5)
    np.testing.assert_allclose(found["params"]["model"]["bn"]["scale"], by_hand(wd)["params"]["model"]["bn"]["scale"], rtol=1e-5)
    np.testing.assert_allclose(found["params"]["coefficients"]["b"], by_hand(0.0)["params"]["coefficients"]["b"], rtol=1e-5)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_weight_decay_moves_everything_but_coefficients(name):
    settings = Optimizer(name, 0.1, weight_decay=0.0)
    without, strong = (run(Config(optimizer=dataclasses.replace(settings, weight_decay=w))) for w in (0.0, 0.5))
    same = jax.tree.map(lambda a, b: bool(jnp.all(a == b)), without, strong)
    assert same == {"banks": {"b": {"templates": False}}, "params": {"coefficients": {"b": True}, "model": {"bn": {"scale": False}}}}


def test_the_papers_cifar_schedule_drops_at_60_120_and_160():
    rate: Any = learning_rate(Config(), steps_per_epoch=390)
    for epoch, expected in [(0, 0.1), (59, 0.1), (60, 0.02), (119, 0.02), (120, 0.004), (159, 0.004), (160, 0.0008), (199, 0.0008)]:
        for step in (epoch * 390, epoch * 390 + 389):
            assert float(rate(step)) == pytest.approx(expected, rel=1e-5), epoch


def test_a_milestone_keeps_its_epoch_under_warm_up():
    config = Config(schedule=Schedule("step", milestones=(4,), factor=0.1, warmup_epochs=2), epochs=8)
    rate: Any = learning_rate(config, steps_per_epoch=10)
    found = [float(rate(step)) for step in (0, 10, 19, 20, 39, 40)]
    np.testing.assert_allclose(found, [0, 0.05, 0.095, 0.1, 0.1, 0.01], rtol=1e-5)


def test_cosine_ends_at_zero():
    rate: Any = learning_rate(Config(schedule=Schedule("cosine"), epochs=3), steps_per_epoch=10)
    np.testing.assert_allclose([float(rate(step)) for step in (0, 15, 30)], [0.1, 0.05, 0], atol=1e-8)
