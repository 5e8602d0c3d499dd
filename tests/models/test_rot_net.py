"""The network for rotated digits: its layers, its fields, and its invariance."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paramshare
from paramshare.models import ModelError, RotNet
from paramshare.schemes import Steerable

WIDTHS = (4, 4, 8, 8, 4, 8)


def invariant(order: int) -> Any:
    plan = paramshare.Plan(
        paramshare.Rule("conv1/kernel", Steerable(order, lifting=True), bank="lifting"),
        paramshare.Rule(r"conv\d/kernel", Steerable(order)),
    )
    model = RotNet(tuple(order * w // 4 for w in WIDTHS), order=order)
    return paramshare.share(model, plan, jnp.zeros((1, 28, 28, 1)))


def test_maps_have_the_sizes_of_the_papers_code():
    x = jnp.zeros((2, 29, 29, 1))
    model = RotNet(WIDTHS)
    _, state = jax.eval_shape(
        lambda: model.init_with_output(jax.random.key(0), x, capture_intermediates=True)
    )
    sizes = [state["intermediates"][f"norm{i}"]["__call__"][0].shape[1] for i in range(1, 7)]
    assert sizes == [25, 25, 12, 12, 6, 2]


@pytest.mark.parametrize("order", [4, 8])
def test_outputs_are_the_same_for_turned_images(order):
    """By quarter turns, in training too; images of 28x28 have maps of even size throughout."""
    model = invariant(order)
    x = jax.random.normal(jax.random.key(0), (3, 28, 28, 1))
    variables = jax.jit(model.init)(jax.random.key(1), x)
    for train in (False, True):

        @jax.jit
        def run(x, train=train):
            return model.apply(variables, x, train=train, mutable=["batch_stats"])[0]

        expected = run(x)
        assert float(jnp.std(expected)) > 0.01
        for quarters in (1, 2, 3):
            turned = run(jnp.rot90(x, quarters, axes=(1, 2)))
            np.testing.assert_allclose(turned, expected, atol=1e-5 * float(jnp.abs(expected).max()))


def test_max_pools_of_odd_maps_break_the_invariance():
    """As in the paper's code: images of 29x29 have maps of 25x25, which lose a row and a column."""
    model = invariant(4)
    x = jax.random.normal(jax.random.key(0), (3, 29, 29, 1))
    variables = jax.jit(model.init)(jax.random.key(1), x)
    run = jax.jit(lambda x: model.apply(variables, x))
    assert float(jnp.abs(run(jnp.rot90(x, axes=(1, 2))) - run(x)).max()) > 1e-3


def test_norms_treat_the_channels_of_a_field_alike():
    """They have one entry a field, and statistics over its channels."""
    x = jax.random.normal(jax.random.key(0), (4, 28, 28, 1))
    model = RotNet(WIDTHS, order=4)
    variables = jax.jit(model.init)(jax.random.key(1), x)
    assert {leaf.shape for leaf in jax.tree.leaves(variables["params"]["norm3"])} == {(2,)}
    _, state = jax.jit(
        lambda x: model.apply(
            variables,
            x,
            train=True,
            mutable=["batch_stats", "intermediates"],
            capture_intermediates=lambda module, _: module.name in ("conv1", "norm1"),
        )
    )(x)
    seen, stats = state["intermediates"], state["batch_stats"]["norm1"]
    before = np.asarray(seen["conv1"]["__call__"][0], np.float64)
    after = np.asarray(seen["norm1"]["__call__"][0]).reshape(before.shape)
    mean, var = before.mean(), before.var()  # one field of four channels
    np.testing.assert_allclose(after, (before - mean) / np.sqrt(var + 1e-5), atol=1e-4)
    np.testing.assert_allclose(stats["mean"], [0.1 * mean], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": (4, 4)}, "six convolutions"),
        ({"widths": (0, 4, 8, 8, 4, 8)}, "each of one channel or more"),
        ({"widths": WIDTHS, "order": 8}, "multiple of the order"),
        ({"widths": WIDTHS, "order": 0}, "multiple of the order"),
        ({"widths": WIDTHS, "order": 4, "bias": True}, "bias is True and order is 4"),
    ],
)
def test_illegal_attributes(options, message):
    with pytest.raises(ModelError, match=message):
        RotNet(**options).init(jax.random.key(0), jnp.zeros((1, 29, 29, 1)))
