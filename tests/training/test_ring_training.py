"""A network on a ring, trained on real digits: it learns, its seed is its key, and a step gives the same bits every time."""

from typing import Any

import jax
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

from paramshare import Plan, Ring, Rule, Shared, share
from paramshare.models import ResNet
from paramshare.training.data import Augment
from paramshare.training.devices import Devices
from paramshare.training.state import init_state
from paramshare.training.step import make_train_step

MEAN, STD = (78.0,), (96.0,)


@pytest.fixture(scope="module")
def digits():
    found: Any = load_digits()
    return (found.images[..., None] * 15).astype(np.uint8), found.target.astype(np.int32)


def network(seed: int) -> Shared:
    model = ResNet((1, 1, 1), (8, 16, 32), num_classes=10, stem="cifar", stem_width=8)
    plan = Plan(Rule(r"stage.*/kernel", Ring(1000, seed=seed), bank="ring"))
    return share(model, plan, jax.ShapeDtypeStruct((1, 8, 8, 1), "float32"))


@pytest.fixture(scope="module")
def trained(digits):
    """(state, state after the same step taken twice from it)."""
    images, labels = digits
    model, optimizer, devices = network(seed=0), optax.sgd(0.05, 0.9), Devices("pmap", jax.devices()[:1])
    state = devices.replicate(jax.jit(lambda: init_state(model, optimizer, (8, 8, 1), 0))())
    step = devices.map(make_train_step(model, optimizer, Augment(), MEAN, STD))
    order = np.random.default_rng(0).permutation(1437)
    for at in range(0, 1437 * 3, 64):
        index = order[np.arange(at, at + 64) % 1437]
        state, metrics = step(state, None, devices.cut({"image": images[index], "label": labels[index]}))
    assert metrics["finite"]
    batch = devices.cut({"image": images[:64], "label": labels[:64]})
    return state, step(state, None, batch)[0], step(state, None, batch)[0]


def accuracy(model: Shared, variables, digits) -> float:
    images, labels = digits
    logits = jax.jit(lambda v, x: model.apply(v, x))(variables, (images[1437:].astype(np.float32) - MEAN) / np.asarray(STD, np.float32))
    return float(np.mean(np.argmax(np.asarray(logits), axis=-1) == labels[1437:]))


def test_it_learns_and_a_wrong_seed_is_worth_nothing(trained, digits):
    variables = trained[0].variables
    assert accuracy(network(seed=0), variables, digits) > 0.85
    # Chance is 10 %; of 360 digits, a constant answer gets at most 37 right. Three wrong seeds, so that luck is not enough.
    assert np.mean([accuracy(network(seed), variables, digits) for seed in (1, 2, 3)]) < 0.2


def test_the_same_step_twice_gives_the_same_bits(trained):
    _, first, second = trained
    for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
