"""Recorded snapshots are what `similarity` gives; damaged lines are skipped."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paramshare import FilterBasis, Plan, Ring, Rule, Shared, Soft, share, similarity
from paramshare.measure.snapshots import make_snapshot, near_pairs, snapshots, spread

X = jnp.zeros((1, 8))
WIDTHS = (8, 8, 8, 6, 6, 6)  # five kernels of three shapes


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i, width in enumerate(WIDTHS):
            x = nn.Dense(width, name=f"layer{i}")(x)
        return x


def network(*rules: Rule) -> Shared:
    return share(Net(), Plan(*rules), X)


def initial(shared: Shared) -> dict[str, Any]:
    """Banks and the sites' coefficients alone: snapshots read nothing else."""
    banks, params = jax.jit(shared.layout.init)(jax.random.key(0))
    return {"banks": banks, "params": params}


def take(shared: Shared, variables: Any) -> dict[str, Any]:
    snapshot = make_snapshot(shared)
    assert snapshot
    return snapshot(variables)


@pytest.mark.parametrize(
    "rules",
    [
        (
            Rule("layer[0-2]/kernel", Soft(2, initial="paper"), bank="wide"),
            Rule("layer[45]/kernel", Soft(2, initial="paper"), bank="narrow"),
        ),
        (Rule("layer[0-5]/kernel", Ring(100, initial="paper"), bank="ring"),),
        (
            Rule("layer[0-2]/kernel", FilterBasis(6, 2, initial="paper"), bank="wide"),
            Rule("layer[45]/kernel", FilterBasis(5, 1, initial="paper"), bank="narrow"),
        ),
    ],
    ids=["soft", "ring", "basis"],
)
def test_a_snapshot_is_the_similarity_to_four_decimals(rules):
    shared = network(*rules)
    variables = initial(shared)
    snapshot, matrices = take(shared, variables), similarity(shared, variables)
    assert list(snapshot) == list(matrices) and len(snapshot) == 2
    for name, matrix in matrices.items():
        assert snapshot[name] == np.round(np.asarray(matrix, np.float64), 4).tolist()


def test_banks_of_one_layer_are_left_out():
    one = Rule("layer0/kernel", Soft(1, initial="paper"), bank="one")
    shared = network(one, Rule(r"layer[12]/kernel", Soft(1, initial="paper"), bank="two"))
    assert list(take(shared, initial(shared))) == ["two"]
    assert make_snapshot(network(one)) is None and make_snapshot(Net()) is None


def test_a_snapshot_compiles_once(caplog):
    shared = network(Rule("layer[0-2]/kernel", Soft(1, initial="paper"), bank="b"))
    variables = initial(shared)
    snapshot: Any = make_snapshot(shared)
    snapshot(variables)
    variables = jax.tree.map(lambda x: x + 0, variables)
    with jax.log_compiles():
        matrices = snapshot(variables)
    assert "Compiling" not in caplog.text
    assert matrices["b"] == [[1] * 3] * 3  # one template: all layers are equal up to a scale


def line(epoch: Any = 1, matrices: Any = None, **more) -> dict:
    return {
        "kind": "similarity",
        "step": 5,
        "epoch": epoch,
        "matrices": {"b": [[1, 0.5], [0.5, 1]]} if matrices is None else matrices,
        **more,
    }


@pytest.mark.parametrize(
    "damaged",
    [
        line(kind="epoch"),
        line(matrices={}),
        line(matrices=[[1]]),
        line(matrices={"b": 3}),
        line(matrices={"b": []}),
        line(matrices={"b": [[1, 0.5]]}),
        line(matrices={"b": [[1, 0.5], [0.5]]}),
        line(matrices={"b": [[1, "x"], [0.5, 1]]}),
        {"kind": "similarity", "step": 3},
    ],
)
def test_damaged_lines_are_skipped(damaged):
    valid = snapshots([{"kind": "train"}, line(0), damaged, line(2)])
    assert [(snapshot.epoch, snapshot.step) for snapshot in valid] == [(0, 5), (2, 5)]


def test_near_pairs_counts_a_pair_once():
    matrix = np.eye(4)
    matrix[0, 1] = matrix[1, 0] = 0.9
    matrix[2, 3] = matrix[3, 2] = 1 - 1e-7  # 1 in float32
    assert [near_pairs(matrix, t) for t in (0.1, 0.9, 0.95, 1.0)] == [2, 2, 1, 1]
    assert near_pairs(np.ones((5, 5)), 1.0) == 10
    assert near_pairs(np.eye(1), 0.1) == near_pairs(np.full((2, 2), np.nan), 0.1) == 0


@pytest.mark.parametrize(("size", "most"), [(1, 6), (6, 6), (7, 6), (200, 6), (61, 60)])
def test_spread_keeps_the_ends_and_the_order(size, most):
    items = spread(list(range(size)), most)
    assert len(items) == min(size, most)
    assert items == sorted(set(items))
    assert (items[0], items[-1]) == (0, size - 1)
