"""Training with banks divided over devices: the same numbers, in 1/D of the memory."""

import collections
import dataclasses
import functools
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paramshare import FilterBasis, Plan, Rule, Site, Soft, Tied, share
from paramshare.measure.cost import cost
from paramshare.partitioning import is_box
from paramshare.schemes.interface import Weights
from paramshare.schemes.sliced import Sliced
from paramshare.training.checkpoint import Checkpoints
from paramshare.training.config import ConfigError, Optimizer, Penalty, differences
from paramshare.training.loop import fit_together
from paramshare.training.run import prepare
from paramshare.training.slices import is_sliced
from paramshare.training.step import make_train_step


@pytest.fixture(scope="module")
def both(make_network):
    """`Small`, its last three kernels from two banks of two schemes."""
    basis = Rule("conv3/kernel", FilterBasis(6, 2), bank="basis")
    plan = Plan(Rule("conv[12]/kernel", Soft(2)), basis)
    return share(make_network(plain=True), plan, np.zeros((1, 8, 8, 1), np.float32))


@pytest.fixture(scope="module")
def trained(config, digits, both):
    """A function: run, losses of four steps, last metrics and last state on the devices."""

    @functools.cache
    def train(count, **changes):
        settings = dataclasses.replace(config, **changes)
        run = prepare(settings, model=both, data=digits, devices=jax.devices()[:count])
        step = run.devices.map(
            make_train_step(run, 0), donate=True, divided=run.divided(run.shapes)
        )
        state, losses = run.place(run.init()), []
        for number in range(4):
            size = settings.batch_size
            batch = digits.train.take(np.arange(size) + size * number).arrays
            state, metrics = step(state, None, run.devices.cut(batch))
            losses.append(float(metrics["loss"]))
        return run, losses, jax.device_get(metrics), state

    return train


def bank_bytes(state, device):
    """Bytes of banks and of their optimizer state in the memory of one device."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    shards = [s for path, x in leaves if is_sliced(path) for s in x.addressable_shards]
    return sum(shard.data.nbytes for shard in shards if shard.device == device)


@pytest.mark.parametrize(
    ("count", "changes"),
    [
        (1, {}),
        (2, {"penalty": Penalty(orthogonality=1.0), "accumulate": 2}),
        (3, {"batch_size": 63, "mapping": "shard_map"}),
        (4, {"optimizer": Optimizer(clip_norm=0.02), "gradient_flow": True}),
    ],
    ids=str,
)
def test_it_trains_like_whole_banks_in_a_part_of_the_memory(trained, count, changes):
    _, expected, metrics, whole = trained(count, **changes)
    run, losses, others, state = trained(count, shard_banks=True, **changes)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    for name, value in metrics.items():
        np.testing.assert_allclose(others[name], value, rtol=1e-3, err_msg=name)
    joined = run.whole(state.variables)
    for (path, leaf), like in zip(
        jax.tree_util.tree_leaves_with_path(joined), jax.tree.leaves(whole.variables), strict=True
    ):
        np.testing.assert_allclose(leaf, like, rtol=1e-3, atol=1e-5, err_msg=str(path))
    sizes = [bank_bytes(state, device) for device in run.devices.devices]
    assert len(set(sizes)) == 1
    # 576 template entries divide by 3, the 432 of the basis by 3 and 4.
    assert sizes[0] * count == bank_bytes(whole, run.devices.devices[0])


def test_a_device_holds_and_communicates_what_the_summary_says(config, digits, both):
    """In one step, each kernel is gathered once, and its gradient is scattered once."""
    devices = 3
    config = dataclasses.replace(config, batch_size=63, shard_banks=True)
    run = prepare(config, model=both, data=digits, devices=jax.devices()[:devices])
    state, batch = run.place(run.init()), digits.train.take(np.arange(63)).arrays
    says = cost(both, (8, 8, 1), devices=devices).divided
    for part, name in ((state.trainable, "bytes"), (state.optimizer[1], "optimizer")):
        shards = [leaf.addressable_shards[1].data for leaf in jax.tree.leaves(part)]
        counters = 4 if name == "optimizer" else 0  # the schedule counts steps
        assert sum(shard.nbytes for shard in shards) == says[name] + counters
    step = run.devices.map(make_train_step(run, 0), divided=run.divided(run.shapes), donate=True)
    text = str(jax.make_jaxpr(step)(state, None, run.devices.cut(batch)))
    moved = collections.Counter()
    for shape, operation in re.findall(r":f32\[([\d,]+)\] = (all_gather|reduce_scatter)\b", text):
        moved[operation] += 4 * math.prod(map(int, shape.split(",")))
    assert moved["all_gather"] == says["all_gather"]
    assert devices * moved["reduce_scatter"] == says["reduce_scatter"]


@pytest.mark.parametrize(
    ("count", "changes"), [(1, {}), (3, {"batch_size": 63, "mapping": "shard_map"})], ids=str
)
def test_a_checkpoint_of_slices_is_one_of_whole_banks(trained, tmp_path, count, changes):
    """So a run resumes on another number of devices, and `eval` reads it on one."""
    run, _, _, state = trained(count, shard_banks=True, **changes)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(4, run.stored(state), {"epoch": 1}, wait=True)
        restored, notes = checkpoints.restore(run.shapes)
    assert notes == {"epoch": 1}
    whole = run.whole(state.variables)
    for leaf, expected in zip(
        jax.tree.leaves(restored.variables), jax.tree.leaves(whole), strict=True
    ):
        np.testing.assert_array_equal(leaf, expected)
    penalty = Penalty(orthogonality=1.0)
    other, _, _, _ = trained(2, shard_banks=True, penalty=penalty, accumulate=2)
    assert not differences(other.config, dataclasses.replace(other.config, shard_banks=False))
    again = other.whole(other.place(restored).variables)
    jax.tree.map(np.testing.assert_array_equal, again, whole)


def test_gradients_are_summed_in_float32_if_kernels_are_sent_in_bfloat16():
    """As those of whole banks are; 128 ones and a hundredth would be 129 in bfloat16."""
    site = Site("a/kernel", (4,), std=1.0)
    scheme = Soft(1)
    weights = scheme.init(jax.random.key(0), (site,))
    sliced = Sliced(scheme, "devices", 4, "bfloat16")
    sent = jnp.array([128.0, 1.0, 0.01, 0.25])

    def loss(bank, coefficients, factor):
        (kernel,) = sliced.expand(Weights(bank, coefficients), (site,))
        return (kernel * factor).sum()

    gradients = jax.pmap(jax.grad(loss), "devices", in_axes=(0, None, 0))(
        sliced.cut(weights.bank), weights.coefficients, sent
    )
    (gradient,) = jax.tree.leaves(gradients)
    ones = jax.tree.leaves(weights.coefficients)[0].ravel()[0]
    np.testing.assert_allclose(gradient.ravel(), sent.sum() * ones, rtol=1e-6)


def test_it_needs_banks_and_a_run_of_its_own(config, digits, make_network, network, tmp_path):
    divided = dataclasses.replace(config, shard_banks=True)
    with pytest.raises(ConfigError, match="shard_banks is True, but Small has no banks"):
        prepare(divided, model=make_network(plain=True), data=digits)
    seeds = [dataclasses.replace(divided, seed=seed) for seed in (0, 1)]
    runs = [prepare(each, model=network, data=digits) for each in seeds]
    with pytest.raises(ConfigError, match="banks of runs that are trained together"):
        fit_together(runs, [tmp_path / "0", tmp_path / "1"])


class Boxed(nn.Module):
    """A network whose kernels say how a mesh divides them."""

    @nn.compact
    def __call__(self, x, train=False):
        init = nn.with_partitioning(nn.initializers.he_normal(), ("data", "model"))
        x = x.reshape(len(x), -1)
        for i in range(3):
            x = nn.relu(nn.Dense(64, kernel_init=init, name=f"dense{i}")(x))
        return nn.Dense(10, kernel_init=init)(x)


def test_a_partitioned_network_is_divided_by_the_run(config, digits):
    """Boxes are taken off: the run has a mapping of its own, which needs no mesh."""
    x = np.zeros((1, 8, 8, 1), np.float32)
    shared = share(Boxed(), Plan(Rule("dense./kernel", Tied())), x)
    run = prepare(
        dataclasses.replace(config, shard_banks=True),
        model=shared,
        data=digits,
        devices=jax.devices()[:4],
    )
    state = run.place(run.init())
    assert not any(map(is_box, jax.tree.leaves(state, is_leaf=is_box)))
    assert bank_bytes(state, run.devices.devices[0]) * 4 == 2 * 4 * 64 * 64  # and its momentum
    step = run.devices.map(make_train_step(run, 0), donate=True, divided=run.divided(run.shapes))
    batch = digits.train.take(np.arange(config.batch_size)).arrays
    _, metrics = step(state, None, run.devices.cut(batch))
    assert np.isfinite(float(jax.device_get(metrics)["loss"]))
