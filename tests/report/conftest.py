"""A small network with two banks, and what a run of it could leave."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paramshare import Plan, Rule, Soft, share
from paramshare.shared import Shared
from paramshare.tasks import Measure
from paramshare.training.result import Evaluation, Result, RunFacts, Selected

SHAPE = (4,)


class Stage(nn.Module):
    """Three layers of equal shape."""

    width: int
    prefix: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for number in (1, 2, 3):
            x = nn.tanh(nn.Dense(self.width, use_bias=False, name=f"{self.prefix}{number}")(x))
        return x


class Small(nn.Module):
    """Two stages and a classifier."""

    prefix: str = "layer"  # of the layers' names

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = Stage(4, self.prefix, name="stage1")(x)
        x = Stage(6, self.prefix, name="stage2")(nn.Dense(6, name="widen")(x))
        return nn.Dense(3, name="classifier")(x)


@pytest.fixture(scope="session")
def shared() -> Shared:
    """Stage 1 mixes two templates; stage 2 has one, so that its layers differ in scale only."""
    plan = Plan(
        Rule(r"stage1/layer\d/kernel", Soft(2), bank="stage1"),
        Rule(r"stage2/layer\d/kernel", Soft(1), bank="stage2"),
    )
    return share(Small(), plan, jnp.zeros((1, *SHAPE)))


@pytest.fixture(scope="session")
def variables(shared) -> dict[str, Any]:
    """Random values, drawn by NumPy: nothing is compiled."""
    shapes = jax.eval_shape(shared.init, jax.random.key(0), jnp.zeros((1, *SHAPE)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes)


@pytest.fixture(scope="session")
def score() -> Measure:
    """A score that is not called accuracy."""
    return Measure("hits", "hit rate", "hits", fraction_of_examples=True)


@pytest.fixture(scope="session")
def facts(score) -> RunFacts:
    """Of a run of the small network."""
    return RunFacts("0123", 100, 10, 200, SHAPE, {"num_classes": 3}, "classification", score)


@pytest.fixture(scope="session")
def result(score) -> Result:
    """Of a finished run of three epochs."""
    counts = {"banks": 2, "coefficients": 3, "private": 4, "trainable": 123_456}
    last, best = (Evaluation(0.4, 200, {"hits": value}) for value in (0.8765, 0.8642))
    return Result(
        "small",
        "digits",
        counts,
        epochs=3,
        steps=60,
        score=score,
        last=last,
        selected=Selected(2, 0.5, best),
        seconds=12.0,
        images_per_second=345.6,
        devices="1 x cpu",
    )
