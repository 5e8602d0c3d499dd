"""What a model has to share, and plans without regular expressions."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paramshare
from paramshare import Plan, PlanError, Relaxed, Ring, Rule, Soft, Tied

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
    for include, message in (
        ("nothing", "of Net matches"),
        ("head/.*", "recurs over"),
        ("(", "not a regular expression"),
    ):
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


def test_layers_are_named_as_peft_does():
    class Attention(nn.Module):
        @nn.compact
        def __call__(self, x):
            for i in range(3):
                x = x + nn.MultiHeadDotProductAttention(2, name=f"attention_{i}")(x)
                x = nn.Conv(8, (3,), name=f"conv_{i}")(x)
            return x

    def banks(**options: Any) -> dict[str, int]:
        plan = Plan.blocks(Attention(), X[None], scheme=Tied(), **options)
        return {rule.bank: len(rule.paths) for rule in plan.rules}

    attention = ("query", "key", "value", "out")
    linear = {f"attention.{name}.kernel": 3 for name in attention}
    assert banks(target_modules="all-linear") == linear
    assert banks() == linear | {"conv.kernel": 3}
    assert banks(target_modules=["query", "value"]) == {
        f"attention.{name}.kernel": 3 for name in ("query", "value")
    }
    assert banks(target_modules=r"attention_[01]/.*") == dict.fromkeys(linear, 2)
    for options, message in (
        ({"target_modules": ["q_proj"]}, "matches include=None, target_modules=..q_proj"),
        ({"target_modules": "("}, "target_modules='.' is not a regular expression"),
        ({"target_modules": "x", "include": "y"}, "pass one of them"),
    ):
        with pytest.raises(PlanError, match=message):
            banks(**options)


def test_a_ring_fills_a_budget_to_the_number():
    plan = Plan.budget(Net(), X, trainable=500, scheme=Ring)
    shared = paramshare.share(Net(), plan, X)
    assert shared.layout.trainable == 500 and list(shared.layout) == ["shared"]
    assert str(plan).splitlines()[2].split() == [
        "shared",
        f"Ring(size={shared.layout['shared'].trainable[0]})",
        "13",
    ]


@pytest.mark.parametrize(
    ("scheme", "smallest"), [(Soft, 800), (lambda rank: Relaxed(Tied(), rank), 1000)]
)
def test_a_budget_is_filled_as_far_as_whole_sizes_go(scheme, smallest):
    def layout(trainable: int) -> Any:
        return Plan.budget(Net(), X, trainable=trainable, scheme=scheme).resolve(Net(), X)

    totals = []
    for trainable in range(smallest, 1399, 50):
        filled = layout(trainable)
        assert filled.trainable <= trainable
        for bank in filled.banks:  # one more of any bank does not fit, or is more than dense
            size = next(iter(vars(bank.scheme).values())) if scheme is Soft else bank.scheme.rank
            one = sum(dataclasses.replace(bank, scheme=scheme(size + 1)).trainable)
            grown = filled.trainable - sum(bank.trainable) + one
            assert grown > trainable or one > bank.dense or one == sum(bank.trainable)
        totals.append(filled.trainable)
    assert totals == sorted(totals) and len(set(totals)) > 2


@pytest.mark.parametrize(
    ("trainable", "message"),
    [
        (10_000, "the plain model has .* parameters; leave it unshared"),
        (
            100,
            r"with Soft\(templates=1\) the model has .* of them not shared; give a larger number",
        ),
    ],
)
def test_budgets_that_cannot_be_met(trainable, message):
    with pytest.raises(PlanError, match=message):
        Plan.budget(Net(), X, trainable=trainable, scheme=Soft)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": Ring(5), "trainable": 500}, r"scheme=Ring\(size=5\); pass what makes a scheme"),
        ({"scheme": Ring, "trainable": 500.5}, "must be a whole number of parameters"),
    ],
)
def test_wrong_arguments_of_a_budget(options, message):
    with pytest.raises(PlanError, match=message):
        Plan.budget(Net(), X, **options)
