"""Banks under `params`, for loops that keep this collection alone; scopes with integer names."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import paramshare
from paramshare import Plan, PlanError, Rule, Soft, Tied
from paramshare.measure.cost import cost
from paramshare.transform.compress import finalise, prune, quantise

KEY, X = jax.random.key(0), jnp.linspace(-1, 1, 16).reshape(2, 8)


class Net(nn.Module):
    """Four layers of one shape, a norm with statistics, and a head."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        for i in range(4):
            x = nn.relu(nn.Dense(8, name=f"layer{i}")(x))
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        return nn.Dense(3, name="head")(x)


PLAN = Plan(Rule(r"layer\d/kernel", Soft(2)))


def pair(plan: Plan = PLAN) -> Any:
    """The same network with the banks in either collection."""
    collections: Any = ("banks", "params")
    return tuple(paramshare.share(Net(), plan, X, collection=c) for c in collections)


def moved(variables: Any) -> dict[str, Any]:
    """The variables with the banks under `params`."""
    rest = {name: value for name, value in variables.items() if name != "banks"}
    return {**rest, "params": {**rest["params"], "banks": variables["banks"]}}


def assert_equal(actual: Any, expected: Any):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    assert jax.tree.all(jax.tree.map(np.array_equal, actual, expected))


def test_the_same_network_with_the_banks_in_another_place():
    usual, within = pair()
    variables, inner = usual.init(KEY, X), within.init(KEY, X)
    assert_equal(inner, moved(variables))
    np.testing.assert_array_equal(within.apply(inner, X), usual.apply(variables, X))
    assert_equal(within.expand(inner), usual.expand(variables))
    assert paramshare.count(inner) == paramshare.count(variables)
    mask = paramshare.decay_mask(variables)
    assert paramshare.decay_mask(inner) == {"params": {**mask["params"], "banks": mask["banks"]}}
    assert_equal(within.stored(variables), inner)
    assert_equal(usual.stored(inner), dict(variables))
    alone = within.init(KEY, X, mutable=["params", "batch_stats"])
    assert_equal(alone, inner)


def test_a_loop_that_keeps_params_alone():
    """Train as most Flax loops do; the usual form trains alike."""
    usual, within = pair()
    optimizer = optax.sgd(0.1, momentum=0.9)

    def trained(model: Any, weights: Any, others: Any) -> Any:
        def loss(weights):
            return jnp.sum(model.apply({**weights, **others}, X) ** 2)

        state = optimizer.init(weights)
        for _ in range(3):
            gradient = jax.grad(loss)(weights)
            change, state = optimizer.update(gradient, state)
            weights = optax.apply_updates(weights, change)
        return weights

    inner, variables = within.init(KEY, X), usual.init(KEY, X)
    statistics = {"batch_stats": inner["batch_stats"]}
    params = trained(within, {"params": inner["params"]}, statistics)
    weights = {name: variables[name] for name in ("banks", "params")}
    expected = moved(trained(usual, weights, statistics))
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert not np.allclose(params["params"]["banks"]["shared"]["templates"][0, 0], 0)


def test_params_alone_are_counted_and_masked():
    """As the loop holds them that keeps this collection."""
    _, within = pair()
    params = within.init(KEY, X)["params"]
    whole = {"params": params}
    assert paramshare.count(params) == paramshare.count(whole)
    assert paramshare.count(params)["coefficients"] == 4 * 2
    assert_equal(paramshare.decay_mask(params), paramshare.decay_mask(whole)["params"])


def test_what_reads_and_changes_networks_keeps_the_banks_where_they_are():
    usual, within = pair()
    variables, inner = usual.init(KEY, X), within.init(KEY, X)
    for name in ("similarity", "bake", "recurrence"):
        function = getattr(paramshare, name)
        assert_equal(function(within, inner), function(usual, variables))
    dense = paramshare.bake(usual, variables)
    assert_equal(
        paramshare.convert(within, dense).variables,
        moved(paramshare.convert(usual, dense).variables),
    )
    with pytest.raises(
        paramshare.ConversionError, match=r"with banks \['shared'\]; pass the plain"
    ):
        paramshare.convert(within, inner)
    folded = [
        paramshare.fold(m, v, threshold=1e-6) for m, v in ((usual, variables), (within, inner))
    ]
    assert folded[1].shared.collection == "params"
    assert_equal(folded[1].variables, moved(folded[0].variables))
    np.testing.assert_allclose(
        folded[1].shared.apply(folded[1].variables, X),
        folded[0].shared.apply(folded[0].variables, X),
    )
    assert_equal(prune(within, inner, 0.5), moved(prune(usual, variables, 0.5)))
    small, packed = quantise(within, inner, bits=4)
    _, expected = quantise(usual, variables, bits=4)
    assert_equal(packed, moved(expected))
    assert_equal(finalise(small, packed)[1], moved(finalise(*quantise(usual, variables, 4))[1]))
    assert cost(within, X).counts == cost(usual, X).counts
    assert cost(within, X, devices=2).divided == cost(usual, X, devices=2).divided


def test_nested_and_scanned_networks_need_no_banks_collection():
    plan = Plan(Rule(r"h./kernel", Soft(2)))
    cell = nn.LSTMCell(8)
    carry = cell.initialize_carry(KEY, (2, 8))
    shared: Any = paramshare.share(cell, plan, carry, X, collection="params")
    rnn: Any = nn.RNN(shared)
    x = jnp.ones((2, 5, 8))
    variables = rnn.init(KEY, x)
    assert list(variables) == ["params"] and rnn.apply(variables, x).shape == (2, 5, 8)
    counts = paramshare.count(variables)
    assert (counts["banks"], counts["coefficients"]) == (2 * 64, 4 * 2)
    mask = paramshare.decay_mask(variables)["params"]["cell"]
    assert not any(jax.tree.leaves(mask["coefficients"])) and all(jax.tree.leaves(mask["banks"]))


def test_other_collections_are_refused():
    with pytest.raises(PlanError, match="collection='weights'; it must be"):
        paramshare.share(Net(), PLAN, X, collection="weights")  # pyright: ignore[reportArgumentType]


class Blocks(nnx.Module):
    """As NNX models hold their layers."""

    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.List([nnx.Linear(8, 8, use_bias=False, rngs=rngs) for _ in range(3)])
        self.out = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return self.out(x)


@pytest.mark.parametrize("scheme", [Tied(), Soft(3)], ids=str)
def test_scopes_with_integer_names(scheme):
    """All parameters of `layers` are shared: nothing is left that would tell the kind of name."""
    model: Any = nnx.bridge.to_linen(Blocks)
    shared: Any = paramshare.share(model, Plan(Rule(r"layers/\d/kernel", scheme)), X)
    variables = shared.init(KEY, X)
    assert "layers" not in variables["params"]["model"]
    dense = shared.expand(variables)
    assert jax.tree.structure(dense["params"]) == jax.tree.structure(model.init(KEY, X)["params"])
    np.testing.assert_allclose(
        shared.apply(variables, X), model.apply(dense, X), rtol=1e-5, atol=1e-6
    )
    converted = paramshare.convert(shared, dense).variables
    np.testing.assert_allclose(
        shared.apply(converted, X), shared.apply(variables, X), rtol=1e-4, atol=1e-5
    )
    assert paramshare.similarity(shared, variables)["shared"].shape == (3, 3)
