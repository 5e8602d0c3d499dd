"""A network put into a larger one computes there what it computes alone."""

from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paramshare import Plan, Repeat, Ring, Rule, Shared, Soft, Tied, bake, share
from paramshare.transform.grafting import INEXACT, GraftError, graft

X = jax.random.normal(jax.random.key(1), (4, 6))


class Inner(nn.Module):
    """Four dense layers, a batch norm, and a classifier where it stands alone."""

    classes: int | None = 3

    @nn.compact
    def __call__(self, x, train: bool = False):
        for i in range(4):
            x = nn.relu(nn.Dense(6, use_bias=False, name=f"layer{i}")(x))
        x = nn.BatchNorm(not train, name="norm")(x)
        return x if self.classes is None else nn.Dense(self.classes, name="classifier")(x)


class Outer(nn.Module):
    """`Inner` inside, and a tower of two layers."""

    def setup(self):
        self.backbone = Inner(None)
        self.tower0, self.tower1 = nn.Dense(6), nn.Dense(6)

    def __call__(self, x, train: bool = False):
        return self.tower1(self.tower0(self.features(x, train)))

    def features(self, x, train: bool = False):
        return self.backbone(x, train)


def drawn(model, seed):
    """Random variables, without the zeros of initialization; variances are positive."""
    shapes, rng = jax.eval_shape(model.init, jax.random.key(0), X), np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(0.5 + rng.random(s.shape), s.dtype), shapes)


INSIDE = r"backbone/layer\d/kernel"
PLANS = {
    "plain": None,
    "soft": Soft(2),
    "tied": Tied(groups=(0, 1, 0, 1), scaled=True),
    "repeat": Repeat(source="layer0/kernel"),
    "large ring": Ring(200),
    "small ring": Ring(50),
}


@pytest.mark.parametrize("name", PLANS)
def test_it_computes_there_what_it_computes_alone(name):
    inner, outer, scheme = Inner(), Outer(), PLANS[name]
    towers = Rule(r"tower\d/kernel", Soft(2), bank="towers")
    plan = Plan(towers)
    if scheme is not None:
        plan = Plan(Rule(r"layer\d/kernel", scheme, bank="layers"))
        inner, plan = share(inner, plan, X), Plan(*plan.under("backbone").rules, towers)
    if name == "repeat":  # the source is named by its path
        there = Repeat(source="backbone/layer0/kernel")
        plan = Plan(Rule(INSIDE, there, bank="layers"), towers)
    outer = share(outer, plan, X)
    trained, initial = drawn(inner, 1), drawn(outer, 2)
    given = bake(inner, trained) if isinstance(inner, Shared) else trained
    grafted = graft(outer, initial, "backbone", given)
    chex.assert_trees_all_equal_shapes_and_dtypes(grafted.variables, initial)
    assert grafted.left_out == ("params/classifier/bias", "params/classifier/kernel")
    assert [bank.name for bank in grafted.banks] == ["layers"] * (scheme is not None)
    features: Any = outer.apply(grafted.variables, X, method="features")
    body: Any = Inner(None).apply({k: {**v} for k, v in given.items()}, X)
    if name == "small ring":
        assert grafted.banks[0].kernel_error > INEXACT
    else:
        assert all(bank.kernel_error < 1e-5 for bank in grafted.banks)
        np.testing.assert_allclose(features, body, rtol=1e-4, atol=1e-4)
    # What is outside has kept its variables, bit by bit.
    after, before = (v["params"]["model"] for v in (grafted.variables, initial))
    for tower in ("tower0", "tower1"):
        chex.assert_trees_all_equal(after[tower], before[tower])
    chex.assert_trees_all_equal(grafted.variables["banks"]["towers"], initial["banks"]["towers"])
    coefficients = (v["params"]["coefficients"]["towers"] for v in (grafted.variables, initial))
    chex.assert_trees_all_equal(*coefficients)


def test_into_a_plain_network():
    trained, initial = drawn(Inner(), 1), drawn(Outer(), 2)
    grafted = graft(Outer(), initial, "backbone", trained)
    for name in ("params", "batch_stats"):
        expected = {k: v for k, v in trained[name].items() if k != "classifier"}
        chex.assert_trees_all_equal(grafted.variables[name]["backbone"], expected)
    assert set(grafted.taken) == {
        "batch_stats/backbone/norm/mean",
        "batch_stats/backbone/norm/var",
        "params/backbone/norm/bias",
        "params/backbone/norm/scale",
        *(f"params/backbone/layer{i}/kernel" for i in range(4)),
    }
    chex.assert_trees_all_equal(grafted.variables["params"]["tower0"], initial["params"]["tower0"])


def test_what_does_not_fit():
    trained, initial = drawn(Inner(), 1), drawn(Outer(), 2)
    with pytest.raises(GraftError, match="no submodule 'back'; the modules are backbone, tower0"):
        graft(Outer(), initial, "back", trained)
    small = {**trained, "params": {**trained["params"], "layer1": {"kernel": jnp.ones((6, 5))}}}
    message = (
        r"params/backbone/layer1/kernel has shape \(6, 6\), but params/layer1/kernel is \(6, 5\)"
    )
    with pytest.raises(GraftError, match=message):
        graft(Outer(), initial, "backbone", small)
    with pytest.raises(GraftError, match="batch_stats/norm/mean is missing"):
        graft(Outer(), initial, "backbone", {"params": trained["params"]})
    shared = share(Inner(), Plan(Rule(r"layer\d/kernel", Soft(2))), X)
    with pytest.raises(GraftError, match=r"with banks \['shared'\]; pass the plain model's"):
        graft(Outer(), initial, "backbone", drawn(shared, 1))
