"""What a model has to share, and plans without regular expressions."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paramshare
from paramshare import Plan, PlanError, Rule, Soft, Tied

X = jnp.ones((2, 8))


class Block(nn.Module):
    """A block of a transformer without its attention, of any width."""

    wide: int

    @nn.compact
    def __call__(self, x):
        h = nn.LayerNorm(name="norm")(x)
        h = nn.Dense(self.wide, name="up")(h)
        return x + nn.Dense(x.shape[-1], name="down")(nn.relu(h))


class Net(nn.Module):
    """Four blocks, the last of another width; two towers of two layers."""

    @nn.compact
    def __call__(self, x):
        for i in range(4):
            x = Block(16 if i < 3 else 12, name=f"block_{i}")(x)
        for tower in ("left", "right"):
            for i in (1, 2):
                x = nn.Dense(8, use_bias=False, name=f"{tower}{i}")(x)
        return nn.Dense(3, name="head")(x)


def test_the_table_groups_what_differs_in_numbers_only():
    groups = paramshare.sites(Net(), X).groups
    rows = {(g.pattern, g.shape): (g.owner, len(g.paths)) for g in groups}
    assert rows["block_*/up/kernel", (8, 16)] == ("Dense", 3)
    assert rows["block_3/up/kernel", (8, 12)] == ("Dense", 1)
    assert rows["block_*/norm/scale", (8,)] == ("LayerNorm", 4)
    assert rows["left*/kernel", (8, 8)] == rows["right*/kernel", (8, 8)] == ("Dense", 2)
    assert rows["head/kernel", (8, 3)] == ("Dense", 1)
    params = jax.eval_shape(Net().init, jax.random.key(0), X)["params"]
    assert sum(len(g.paths) for g in groups) == len(jax.tree.leaves(params))
    lines = str(paramshare.sites(Net(), X)).splitlines()
    assert lines[0].split() == ["parameter", "shape", "layer", "layers", "entries"]
    assert ["block_*/up/kernel", "8x16", "Dense", "3", "384"] in [line.split() for line in lines]


def test_blocks_get_a_bank_for_each_weight_that_recurs():
    plan = Plan.blocks(Net(), X, scheme=Soft(2))
    assert {rule.bank: len(rule.paths) for rule in plan.rules} == {
        "block.up.kernel": 3,
        "block.down.kernel": 3,
        "left.kernel": 2,
        "right.kernel": 2,
    }
    shared: Any = paramshare.share(Net(), plan, X)
    variables = shared.init(jax.random.key(0), X)
    dense = shared.expand(variables)
    expected: Any = Net().apply(dense, X)
    np.testing.assert_allclose(shared.apply(variables, X), expected, rtol=1e-5)
    some = Plan.blocks(Net(), X, scheme=Tied(), include=r"block_[01]/.*(scale|kernel)")
    assert {rule.bank: len(rule.paths) for rule in some.rules} == {
        "block.norm.scale": 2,
        "block.up.kernel": 2,
        "block.down.kernel": 2,
    }
    for include, message in (("nothing", "recurs over"), ("(", "not a regular expression")):
        with pytest.raises(PlanError, match=message):
            Plan.blocks(Net(), X, scheme=Tied(), include=include)


def test_banks_of_one_name_and_several_shapes_are_told_apart():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            for i, width in enumerate((8, 8, 4, 4, 4)):
                x = nn.Dense(width, name=f"layer{i}")(x)
            return x

    plan = Plan.blocks(Two(), X, scheme=Tied())
    assert list(plan.resolve(Two(), X)) == ["layer.kernel.8x8", "layer.kernel.4x4"]
    rule = Rule(r"layer\d/kernel", Tied(), bank="dense{shape}")
    layout = Plan(rule).resolve(Two(), X)
    assert {bank.name: len(bank.sites) for bank in layout.banks} == {
        "dense8x8": 2,
        "dense8x4": 1,
        "dense4x4": 2,
    }


def test_the_shape_of_stacked_layers_is_that_of_one():
    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, x):
            scan = nn.scan(
                lambda dense, x, _: (dense(x), None),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=3,
            )
            return scan(nn.Dense(8, name="dense"), x, None)[0]

    rule = Rule(r"dense/kernel", Soft(2), bank="{shape}", stack_axis=0)
    assert list(Plan(rule).resolve(Scanned(), X)) == ["8x8"]
