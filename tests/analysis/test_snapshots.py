"""What is kept of similarity while training is what `similarity` says, and damage to it is passed over."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from paramshare import Plan, Ring, Rule, Soft, create_model, share, similarity
from paramshare.analysis.pictures import similarity_over_training
from paramshare.analysis.snapshots import Snapshot, make_snapshot, near_pairs, snapshots, spread
from paramshare.models import WideResNet

X = jnp.zeros((1, 8, 8, 3))


def drawn(shared) -> dict:
    """Banks and coefficients alone: nothing else is looked at."""
    banks, coefficients = shared.layout.init(jax.random.key(0))
    return {"banks": banks, "params": {"coefficients": coefficients}}


def take(shared, variables) -> dict:
    snapshot = make_snapshot(shared)
    assert snapshot
    return snapshot(variables)


@pytest.mark.parametrize("scheme", [Soft(2), Ring(600)], ids=str)
def test_it_is_the_similarity_to_four_decimals(scheme):
    shared = share(WideResNet(16, 1), Plan(Rule(r"stage[12]/block2/conv\d/kernel", scheme, bank="b") if isinstance(scheme, Ring) else
                   Rule(r"(?P<s>stage[12])/block2/conv\d/kernel", scheme, bank="{s}")), X)  # fmt: skip
    variables = drawn(shared)
    kept, whole = take(shared, variables), similarity(shared, variables)
    assert list(kept) == list(whole) and len(kept) == 2
    for name, matrix in whole.items():
        assert kept[name] == np.round(np.asarray(matrix, np.float64), 4).tolist()


def test_banks_of_one_layer_are_left_out():
    rules = [Rule("stage1/block2/conv1/kernel", Soft(1), bank="one"), Rule(r"stage2/block2/conv\d/kernel", Soft(1), bank="two")]
    shared = share(WideResNet(16, 1), Plan(*rules), X)
    assert list(take(shared, drawn(shared))) == ["two"]
    alone = share(WideResNet(16, 1), Plan(rules[0]), X)
    assert make_snapshot(alone) is None and make_snapshot(WideResNet(16, 1)) is None


def test_it_is_compiled_once(caplog):
    shared = create_model("swrn-16-1-1", input_shape=(8, 8, 3))
    variables = drawn(shared)
    snapshot: Any = make_snapshot(shared)
    snapshot(variables)
    variables = jax.tree.map(lambda x: x + 0, variables)
    with jax.log_compiles():
        found = snapshot(variables)
    assert "Compiling" not in caplog.text
    assert found["stage1"] == [[1, 1], [1, 1]]  # one template: a loop by construction


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
        line(epoch="1"),
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
def test_damaged_lines_are_passed_over(damaged):
    found = snapshots([{"kind": "train"}, line(0), damaged, line(2)])
    assert [(snapshot.epoch, snapshot.step) for snapshot in found] == [(0, 5), (2, 5)]


def test_near_pairs_counts_a_pair_once():
    matrix = np.eye(4)
    matrix[0, 1] = matrix[1, 0] = 0.9
    matrix[2, 3] = matrix[3, 2] = 1 - 1e-7  # float32's one
    assert [near_pairs(matrix, t) for t in (0.1, 0.9, 0.95, 1.0)] == [2, 2, 1, 1]
    assert near_pairs(np.ones((5, 5)), 1.0) == 10 and near_pairs(np.eye(1), 0.1) == near_pairs(np.full((2, 2), np.nan), 0.1) == 0


@pytest.mark.parametrize(("size", "most"), [(1, 6), (6, 6), (7, 6), (200, 6), (61, 60)])
def test_spread_keeps_the_ends_and_the_order(size, most):
    found = spread(list(range(size)), most)
    assert len(found) == min(size, most) and found == sorted(set(found)) and (found[0], found[-1]) == (0, size - 1)


@pytest.mark.parametrize("epochs", [1, 2, 9])
def test_the_picture_over_training(tmp_path, epochs):
    """A row a bank, at most six heat maps in it: the last epoch's colours are there; a bank that comes late leaves its first cell empty."""
    early, late = {"a": np.eye(3)}, {"a": np.full((3, 3), 1.0), "b": np.eye(4)}
    past = [Snapshot(i, i, early if i < epochs - 1 else late) for i in range(epochs)]
    similarity_over_training(past, tmp_path / "p.png", thresholds=[0.5], title="a run")
    with Image.open(tmp_path / "p.png") as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3).astype(int)
        width = image.size[0]
    for colour in ((68, 1, 84), (253, 231, 36)):
        assert np.sum(np.all(np.abs(pixels - colour) <= 1, axis=1)) > 1000
    assert width == round(120 * (1.9 * min(epochs, 6) + 4.2))
