"""Update rules and schedules against the papers' recipes, computed by hand."""

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
    "banks": {"b": {"weight": jnp.array([[1.0, -2.0]])}},
    "params": {
        "coefficients": {"b": {"site": jnp.array([0.5, 2.0])}},
        "model": {"bn": {"scale": jnp.array([3.0])}},
        "own": {"b": {"site": jnp.array([-1.5])}},
    },
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
    """As in the reference's recipe: g += wd w; v = m v + g; w -= lr (g + m v)."""
    rate, m, wd = 0.1, 0.9, 0.05
    trained = run(Config(optimizer=Optimizer("sgd", rate, m, nesterov=True, weight_decay=wd)))

    def by_hand(decay):
        def leaf(w, *path_gradients):
            w, v = np.asarray(w, np.float64), 0.0
            for g in path_gradients:
                g = np.asarray(g, np.float64) + decay * w
                v = m * v + g
                w = w - rate * (g + m * v)
            return w

        return jax.tree.map(leaf, VARIABLES, *[gradients(step) for step in range(5)])

    np.testing.assert_allclose(
        trained["banks"]["b"]["weight"], by_hand(wd)["banks"]["b"]["weight"], rtol=1e-5
    )
    np.testing.assert_allclose(
        trained["params"]["model"]["bn"]["scale"],
        by_hand(wd)["params"]["model"]["bn"]["scale"],
        rtol=1e-5,
    )
    np.testing.assert_allclose(
        trained["params"]["coefficients"]["b"]["site"],
        by_hand(0.0)["params"]["coefficients"]["b"]["site"],
        rtol=1e-5,
    )


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_weight_decay_moves_everything_but_coefficients(name):
    settings = Optimizer(name, 0.1, weight_decay=0.0)
    without, strong = (
        run(Config(optimizer=dataclasses.replace(settings, weight_decay=w))) for w in (0.0, 0.5)
    )
    same = jax.tree.map(lambda a, b: bool(jnp.all(a == b)), without, strong)
    assert same == {
        "banks": {"b": {"weight": False}},
        "params": {
            "coefficients": {"b": {"site": True}},
            "model": {"bn": {"scale": False}},
            "own": {"b": {"site": False}},
        },
    }


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_weight_decay_of_coefficients_is_that_of_every_other_parameter(name):
    """As if they were in a bank."""
    settings = Optimizer(name, 0.1, weight_decay=0.5, decay_coefficients=True)
    trained, without = (
        run(Config(optimizer=settings)),
        run(Config(optimizer=dataclasses.replace(settings, weight_decay=0.0))),
    )
    assert not any(
        jax.tree.leaves(jax.tree.map(lambda a, b: bool(jnp.any(a == b)), trained, without))
    )
    one_by_one = {"banks": {"b": jax.tree.leaves(VARIABLES)}}
    rule = optimizer(
        Config(optimizer=dataclasses.replace(settings, decay_coefficients=False)),
        optax.constant_schedule(0.1),
    )
    state, variables = rule.init(one_by_one), one_by_one
    for step in range(5):
        updates, state = rule.update(
            {"banks": {"b": jax.tree.leaves(gradients(step))}}, state, variables
        )
        variables = optax.apply_updates(variables, updates)
    for a, b in zip(jax.tree.leaves(trained), jax.tree.leaves(variables), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("decay_coefficients", [False, True])
def test_a_long_gradient_is_cut_to_its_norm_and_then_decayed(decay_coefficients):
    """As PyTorch's clip_grad_norm_ before SGD.

    g *= min(1, c / |g|); g += wd w; v = m v + g; w -= lr v, with |g| over all parameters.
    """
    rate, m, wd, clip = 0.1, 0.9, 0.05, 1.7
    settings = Optimizer(
        "sgd",
        rate,
        m,
        nesterov=False,
        weight_decay=wd,
        clip_norm=clip,
        decay_coefficients=decay_coefficients,
    )
    trained = run(Config(optimizer=settings))

    leaves, form = jax.tree.flatten(jax.tree.map(lambda w: np.asarray(w, np.float64), VARIABLES))
    decays = [wd, wd * decay_coefficients, wd, wd]  # bank, coefficients, scale, own weights
    velocity, cut = [0.0] * 4, []
    for step in range(5):
        gradient = [np.asarray(g, np.float64) for g in jax.tree.leaves(gradients(step))]
        norm = np.sqrt(sum((g**2).sum() for g in gradient))
        cut.append(norm > clip)
        gradient = [
            g * min(1.0, clip / (norm + 1e-6)) + decay * w
            for g, decay, w in zip(gradient, decays, leaves, strict=True)
        ]
        velocity = [m * v + g for v, g in zip(velocity, gradient, strict=True)]
        leaves = [w - rate * v for w, v in zip(leaves, velocity, strict=True)]
    assert any(cut) and not all(cut)
    # PyTorch adds 1e-6 to the norm, we do not: a difference of 1e-6, and float32's.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
        trained,
        jax.tree.unflatten(form, leaves),
    )


def test_biases_and_norms_can_be_spared():
    """Rings are vectors too, but of weights; coefficients keep their own option."""
    variables = {
        "banks": {"ring": {"ring": jnp.ones(9)}},
        "params": {
            "coefficients": {"ring": {"scale": jnp.ones(3)}},
            "model": {
                "conv": {"kernel": jnp.ones((3, 3)), "bias": jnp.ones(3)},
                "scan": {"norm": {"scale": jnp.ones((5, 3))}},  # of five layers
            },
        },
    }
    zeros = jax.tree.map(jnp.zeros_like, variables)
    for coefficients in (False, True):
        settings = Optimizer(weight_decay=0.5, decay_vectors=False, decay_coefficients=coefficients)
        config = Config(optimizer=settings)
        rule = optimizer(config, learning_rate(config, 1))
        updates, _ = rule.update(zeros, rule.init(variables), variables)
        moved = jax.tree.map(lambda leaf: bool(jnp.any(leaf != 0)), updates)
        assert moved["banks"]["ring"]["ring"] and moved["params"]["model"]["conv"]["kernel"]
        assert not moved["params"]["model"]["conv"]["bias"]
        assert not moved["params"]["model"]["scan"]["norm"]["scale"]
        assert moved["params"]["coefficients"]["ring"]["scale"] == coefficients


def test_clipping_goes_with_every_rule():
    for name in ("sgd", "adam", "adamw"):
        settings = Optimizer(name, 0.1, weight_decay=0.0)
        # Adam divides by the gradient's own size: only gradients cut to different lengths show.
        cut, free = (
            run(Config(optimizer=dataclasses.replace(settings, clip_norm=c))) for c in (1.7, None)
        )
        loose = run(Config(optimizer=dataclasses.replace(settings, clip_norm=100.0)))
        jax.tree.map(np.testing.assert_array_equal, loose, free)
        assert not any(
            jax.tree.leaves(jax.tree.map(lambda a, b: bool(jnp.any(a == b)), cut, free))
        ), name


def test_the_papers_cifar_schedule_drops_at_60_120_and_160():
    rate: Any = learning_rate(Config(), steps_per_epoch=390)
    for epoch, expected in [
        (0, 0.1),
        (59, 0.1),
        (60, 0.02),
        (119, 0.02),
        (120, 0.004),
        (159, 0.004),
        (160, 0.0008),
        (199, 0.0008),
    ]:
        for step in (epoch * 390, epoch * 390 + 389):
            assert float(rate(step)) == pytest.approx(expected, rel=1e-5), epoch


def test_a_milestone_keeps_its_epoch_under_warm_up():
    config = Config(
        schedule=Schedule("step", milestones=(4,), factor=0.1, warmup_epochs=2), epochs=8
    )
    rate: Any = learning_rate(config, steps_per_epoch=10)
    trained = [float(rate(step)) for step in (0, 10, 19, 20, 39, 40)]
    np.testing.assert_allclose(trained, [0, 0.05, 0.095, 0.1, 0.1, 0.01], rtol=1e-5)


def test_cosine_ends_at_zero():
    rate: Any = learning_rate(Config(schedule=Schedule("cosine"), epochs=3), steps_per_epoch=10)
    np.testing.assert_allclose(
        [float(rate(step)) for step in (0, 15, 30)], [0.1, 0.05, 0], atol=1e-8
    )


def test_exponential_is_smooth_and_comes_to_its_factor_every_period():
    """The ring paper's: 0.1 * 0.1^(epoch / 45), at every step."""
    rate: Any = learning_rate(
        Config(schedule=Schedule("exponential", factor=0.1, period=45.0), epochs=90),
        steps_per_epoch=7,
    )
    steps = np.arange(90 * 7 + 1)
    np.testing.assert_allclose(
        [float(rate(step)) for step in steps], 0.1 * 0.1 ** (steps / 7 / 45), rtol=2e-6
    )  # float32's power
    assert float(rate(45 * 7)) == pytest.approx(0.01, rel=2e-6) and float(
        rate(90 * 7)
    ) == pytest.approx(0.001, rel=2e-6)


def test_exponential_starts_from_its_highest_value_after_warm_up():
    config = Config(
        schedule=Schedule("exponential", factor=0.5, period=2.0, warmup_epochs=3.0), epochs=9
    )
    rate: Any = learning_rate(config, steps_per_epoch=10)
    np.testing.assert_allclose(
        [float(rate(step)) for step in (0, 15, 30, 50, 70)], [0, 0.05, 0.1, 0.05, 0.025], rtol=2e-6
    )


def test_milestones_with_factors_of_their_own():
    """MobileNetV2's in the filter-basis paper: x0.1 at 150, x0.1 at 225, x0.5 at 285."""
    config = Config(
        schedule=Schedule("step", milestones=(150, 225, 285), factors=(0.1, 0.1, 0.5)), epochs=300
    )
    rate: Any = learning_rate(config, steps_per_epoch=7)
    for epoch, expected in [
        (0, 0.1),
        (149, 0.1),
        (150, 0.01),
        (224, 0.01),
        (225, 0.001),
        (284, 0.001),
        (285, 0.0005),
        (299, 0.0005),
    ]:
        for step in (epoch * 7, epoch * 7 + 6):
            assert float(rate(step)) == pytest.approx(expected, rel=1e-5), epoch
