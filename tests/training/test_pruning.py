"""Pruned numbers stay 0 while the rest trains, and become as many as asked, when they are due."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from paramshare.schemes import Compressed
from paramshare.shared import Shared
from paramshare.training.compression import further
from paramshare.training.config import Compression, Config, ConfigError, Model, Optimizer
from paramshare.training.optimizer import optimizer
from paramshare.training.pruning import prune_average, sparsity
from paramshare.training.run import prepare
from paramshare.transform.compress import prune

NUMBERS = np.random.default_rng(0).normal(size=1000).astype(np.float32)
VARIABLES: Any = {
    "banks": {"a": {"w": jnp.asarray(NUMBERS)}, "b": {"w": jnp.asarray(NUMBERS[:100])}},
    "params": {"coefficients": {"a": {"site": jnp.zeros(3)}}, "model": {"bias": jnp.zeros(4)}},
}


def trained(config: Config, steps: int, variables: Any = VARIABLES, of: int = 40) -> list[Any]:
    """The variables after each step; the gradient also pulls at what is 0."""
    rule = optimizer(config, optax.constant_schedule(config.optimizer.learning_rate), steps=of)
    state, results = rule.init(variables), []

    @jax.jit
    def step(number: Any, state: Any, variables: Any) -> Any:
        gradient = jax.tree.map(lambda x: jnp.cos(5 * x + number), variables)
        updates, state = rule.update(gradient, state, variables)
        return optax.apply_updates(variables, updates), state

    for number in range(steps):
        variables, state = step(jnp.float32(number), state, variables)
        results.append(jax.device_get(variables))
    return results


def zeros(variables: Any, bank: str = "a") -> np.ndarray:
    return np.asarray(variables["banks"][bank]["w"] == 0)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_what_is_zero_stays_exactly_zero(name):
    """Under momentum, decay and clipping; numbers that are 0 outside of the banks do move."""
    settings = Optimizer(name, 0.05, weight_decay=0.1, clip_norm=1.0, decay_coefficients=True)
    config = Config(optimizer=settings, compression=Compression(prune=0.3, banks=("a",)))
    values = NUMBERS.copy()
    values[np.argsort(np.abs(values))[:300]] = 0
    start = VARIABLES | {"banks": VARIABLES["banks"] | {"a": {"w": jnp.asarray(values)}}}
    for variables in trained(config, 12, start):
        assert zeros(variables).sum() == 300 and zeros(variables)[values == 0].all()
        assert not zeros(variables, "b").any()
    assert (variables["params"]["coefficients"]["a"]["site"] != 0).all()
    assert (variables["params"]["model"]["bias"] != 0).all()
    # The gradient of what is 0 is no part of the norm that is clipped.
    alone = start | {"banks": start["banks"] | {"a": {"w": jnp.asarray(values[values != 0])}}}
    kept = trained(dataclasses.replace(config, compression=Compression()), 1, alone)[0]
    last = trained(config, 1, start)[0]
    np.testing.assert_allclose(
        last["banks"]["a"]["w"][values != 0], kept["banks"]["a"]["w"], rtol=1e-5
    )


def test_pruning_at_the_first_step():
    config = Config(compression=Compression(prune=0.25))
    first, *others = trained(config, 4)
    assert zeros(first).sum() == 250 and zeros(first, "b").sum() == 25
    assert all((zeros(each) == zeros(first)).all() for each in others)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_gradual_pruning_follows_the_cubic_schedule(name):
    """Zhu & Gupta 2017, over half of the steps; what is pruned never returns."""
    settings = Optimizer(name, 0.01)
    config = Config(optimizer=settings, compression=Compression(prune=0.8, gradual=True))
    steps = trained(config, 24, of=40)
    counts = [zeros(variables).sum() for variables in steps]
    expected = [800 * (1 - (1 - t / 20) ** 3) for t in range(1, 21)] + [800] * 4
    np.testing.assert_allclose(counts, expected, atol=1.01)  # rounded down
    assert counts[19:] == [800] * 5
    for before, after in itertools.pairwise(steps):
        assert zeros(after)[zeros(before)].all()


def test_long_runs_prune_at_most_a_hundred_times():
    config = Config(compression=Compression(prune=0.5, gradual=True))
    counts = [int(zeros(variables).sum()) for variables in trained(config, 210, of=600)]
    changes = np.flatnonzero(np.diff([0, *counts]))
    assert (np.diff(changes) == 3).all() and counts[2] == int(500 * float(sparsity(3, 300)))


def test_configured_networks_are_compressed():
    model = Model("resnet8-rpg-1000")
    run = prepare(Config(model, compression=Compression(bits=3, method="uniform", prune=0.5)))
    assert isinstance(run.model, Shared)
    scheme = run.model.layout["ring"].scheme
    assert isinstance(scheme, Compressed) and (scheme.bits, scheme.method) == (3, "uniform")
    only = prepare(Config(model, compression=Compression(prune=0.5)))
    assert not isinstance(only.model.layout["ring"].scheme, Compressed)  # pyright: ignore
    assert jax.tree.structure(only.shapes.variables) != jax.tree.structure(run.shapes.variables)
    # A one-shot pruning before training and the first step agree.
    start = only.init()
    values = np.abs(np.asarray(start.variables["banks"]["ring"]["ring"]))
    pruned = prune(only.model, start.variables, 0.5)["banks"]["ring"]["ring"]  # pyright: ignore
    assert (np.asarray(pruned == 0) == (values <= np.sort(values)[499])).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"compression": Compression(gradual=True)}, "compression.prune is 0"),
        ({"compression": Compression(4, prune=0.5, gradual=True)}, "quantise the pruned run"),
        ({"compression": Compression(prune=0.5), "shard_banks": True}, "leave shard_banks out"),
        ({"compression": Compression(4, banks=("(",))}, "regular expression"),
        ({"compression": Compression(4, banks=("x",))}, "'x' matches no bank"),
        ({"compression": Compression(4), "model": Model("resnet8")}, "resnet8 shares no weights"),
    ],
    ids=str,
)
def test_bad_settings(change, message):
    config = dataclasses.replace(Config(Model("resnet8-rpg-1000")), **change)
    with pytest.raises(ConfigError, match=message):
        prepare(config)


def test_bad_values():
    every: Any = ({"bits": 1}, {"bits": 9}, {"prune": 1.0}, {"prune": -0.1}, {"method": "x"})
    for options in every:
        with pytest.raises(ConfigError, match=f"{next(iter(options))} must be"):
            Compression(**options)


def test_what_is_compressed_further():
    assert further(Compression(), Compression(4)) == Compression(4)
    pruned = Compression(prune=0.5, gradual=True)
    assert further(pruned, Compression(4)) == Compression(4, prune=0.5)
    assert further(pruned, Compression(4, prune=0.7)).prune == 0.7
    with pytest.raises(ConfigError, match="quantised to 4 bits already"):
        further(Compression(4), Compression(2))
    with pytest.raises(ConfigError, match="name the same banks"):
        further(Compression(prune=0.5, banks=("a",)), Compression(4))


def test_a_moving_average_is_zero_where_parameters_are():
    """Else what is measured of the average is not a pruned network."""
    settings = Compression(prune=0.5, banks=("a",))
    values = jnp.where(jnp.arange(1000) % 3 == 0, 0.0, NUMBERS)
    banks = {"a": {"w": values}, "b": {"w": jnp.zeros(100)}}
    average = jax.tree.map(lambda x: x + 1, {**VARIABLES, "batch_stats": {"mean": jnp.zeros(2)}})
    pruned = prune_average(settings, average, VARIABLES | {"banks": banks})
    assert ((pruned["banks"]["a"]["w"] == 0) == (values == 0)).all()
    assert (pruned["banks"]["b"]["w"] == average["banks"]["b"]["w"]).all()
    assert (pruned["batch_stats"]["mean"] == 1).all()
