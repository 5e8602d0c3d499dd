"""A state of every scheme is restored bit for bit, trains on as before, and stores no maps."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from paramshare import FilterBasis, Plan, Repeat, Ring, Rule, Shared, share
from paramshare.parameters import example_input
from paramshare.training.checkpoint import CheckpointError, Checkpoints
from paramshare.training.state import State, init_state

IMAGE = example_input((8, 8, 1))
SCHEMES = {
    "ring": Ring(300),
    "basis": FilterBasis(6, 2),
    "width": Repeat(base=(3, 3, 2, 3)),
    "depth": Repeat(source="conv1/kernel"),
}


class Net(nn.Module):
    """A stem, and three 3x3 convolutions of one shape, with batch norm."""

    @nn.compact
    def __call__(self, x, train=False):
        for i in range(4):
            x = nn.Conv(8, (3, 3), use_bias=False, name=f"conv{i}")(x)
            x = nn.relu(nn.BatchNorm(not train, momentum=0.9, name=f"bn{i}")(x))
        return nn.Dense(10, name="classifier")(x.mean((1, 2)))


def network(name: str, seed: int = 0) -> Shared:
    scheme: Any = Ring(300, seed=seed) if name == "ring" else SCHEMES[name]
    return share(
        Net(),
        Plan(Rule("conv[1-3]/kernel", scheme)),
        IMAGE,
    )


OPTIMIZER = optax.sgd(0.1, 0.9)


def stepped(model: Shared):
    """The state after one step, and the step."""
    x, label = jax.random.normal(jax.random.key(1), (16, *IMAGE.shape[1:])), jnp.arange(16) % 10

    @jax.jit
    def step(state: State) -> State:
        def loss(trainable):
            logits, collections = model.apply(
                {**trainable, **state.collections}, x, train=True, mutable=list(state.collections)
            )
            return optax.softmax_cross_entropy_with_integer_labels(
                logits, label
            ).mean(), collections

        gradient, collections = jax.grad(loss, has_aux=True)(state.trainable)
        updates, optimizer = OPTIMIZER.update(gradient, state.optimizer, state.trainable)
        return State(
            state.step + 1,
            optax.apply_updates(state.trainable, updates),  # pyright: ignore[reportArgumentType]
            dict(collections),
            optimizer,
            state.failed,
        )

    return step(jax.jit(lambda: init_state(model, OPTIMIZER, IMAGE, 0))()), step


def bits(tree: Any) -> list[tuple[str, np.dtype, tuple[int, ...], bytes]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [
        (jax.tree_util.keystr(path), leaf.dtype, np.shape(leaf), np.asarray(leaf).tobytes())
        for path, leaf in leaves
    ]


@pytest.mark.parametrize("name", SCHEMES)
def test_a_restored_state_is_the_saved_one_and_trains_on_like_it(tmp_path, name):
    model = network(name)
    state, step = stepped(model)
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(1, state, {})
    # Shapes only, as another process has them.
    like = jax.eval_shape(lambda: init_state(network(name), OPTIMIZER, IMAGE, 0))
    with Checkpoints(tmp_path / "c") as checkpoints:
        restored, _ = checkpoints.restore(like)
    assert bits(restored) == bits(state)
    assert bits(step(restored)) == bits(step(state))


@pytest.mark.parametrize("name", SCHEMES)
def test_a_state_holds_no_maps(name):
    """Float32 arrays only, with as many entries as the layout says."""
    model = network(name)
    state = jax.eval_shape(lambda: init_state(model, OPTIMIZER, IMAGE, 0))
    leaves = jax.tree.leaves((state.trainable, state.collections, state.optimizer))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}
    assert sum(leaf.size for leaf in jax.tree.leaves(state.trainable)) == model.layout.trainable
    # Momentum, and mean and variance of four batch norms.
    assert sum(leaf.size for leaf in leaves) == 2 * model.layout.trainable + 4 * 2 * 8


def test_a_checkpoint_of_another_size_of_ring_is_refused(tmp_path):
    state = jax.jit(lambda: init_state(network("ring"), OPTIMIZER, IMAGE, 0))()
    larger = share(
        Net(),
        Plan(Rule("conv[1-3]/kernel", Ring(301))),
        IMAGE,
    )
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(1, state, {})
        with pytest.raises(CheckpointError):
            checkpoints.restore(jax.eval_shape(lambda: init_state(larger, OPTIMIZER, IMAGE, 0)))


def test_the_seed_is_not_in_the_checkpoint(tmp_path):
    """A plan with another seed restores the same ring and expands it to other kernels."""
    state = jax.jit(lambda: init_state(network("ring"), OPTIMIZER, IMAGE, 0))()
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(1, state, {})
        restored, _ = checkpoints.restore(
            jax.eval_shape(lambda: init_state(network("ring", seed=1), OPTIMIZER, IMAGE, 0))
        )
    same, other = (
        network("ring", seed).expand(restored.variables)["params"]["conv2"]["kernel"]
        for seed in (0, 1)
    )
    np.testing.assert_array_equal(
        same, network("ring").expand(state.variables)["params"]["conv2"]["kernel"]
    )
    assert abs(np.corrcoef(np.ravel(same), np.ravel(other))[0, 1]) < 5 / np.sqrt(300)
