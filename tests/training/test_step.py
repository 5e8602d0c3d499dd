"""The step: the same on any number of devices and mappings; it communicates only parameters."""

import dataclasses
import functools
import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from paramshare import FilterBasis, Plan, Rule, count, orthogonality, share
from paramshare.training.config import ConfigError, Penalty
from paramshare.training.devices import Devices
from paramshare.training.run import check_batch, prepare
from paramshare.training.step import flow, make_train_step


def batches(data, size, steps):
    for i in range(steps):
        yield data.train.take(np.arange(i * size, (i + 1) * size)).arrays


@pytest.fixture(scope="module")
def stepper(digits):
    """A function that gives (run, mapped step, initial state); equal calls share one program."""

    @functools.cache
    def make(config, devices, model):
        run = prepare(config, model=model, data=digits, devices=jax.devices()[:devices])
        step = run.devices.map(make_train_step(run, config.seed))
        return run, step, run.devices.place(run.init())

    yield make
    make.cache_clear()


@pytest.fixture(scope="module")
def losses(stepper, digits):
    """A function that gives the losses of a few steps, and the last state."""

    def measure(config, devices, model, steps=4):
        run, step, state = stepper(config, devices, model)
        values = []
        for batch in batches(digits, config.batch_size, steps):
            state, metrics = step(state, None, run.devices.cut(batch))
            values.append(float(metrics["loss"]))
        return values, state

    return measure


@pytest.fixture(scope="module")
def factored(make_network):
    """`Small`, its last three kernels from 6 shared and 2 own filters each, in two banks."""
    rules = [
        Rule(pattern, FilterBasis(6, 2), bank=bank)
        for pattern, bank in [("conv[12]/kernel", "first"), ("conv3/kernel", "second")]
    ]
    return share(
        make_network(plain=True, axis_name=None),
        Plan(*rules),
        jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32),
    )


@pytest.fixture(scope="module")
def reference(config, network, losses):
    """Four steps on one device."""
    return losses(config, 1, network)


@pytest.mark.parametrize("mapping", ["pmap", "shard_map"])
def test_four_devices_give_the_losses_of_one(config, network, reference, losses, mapping):
    expected, state = reference
    actual, spread = losses(dataclasses.replace(config, mapping=mapping), 4, network)
    # Sums over a batch run in another order: the last places differ, and updates amplify that.
    np.testing.assert_allclose(actual[0], expected[0], rtol=1e-6)
    np.testing.assert_allclose(actual, expected, rtol=5e-5)
    chex.assert_trees_all_close(
        jax.device_get(spread.variables), jax.device_get(state.variables), rtol=1e-2, atol=2e-4
    )


def test_without_synchronised_statistics_devices_differ(config, make_network, reference, losses):
    actual, _ = losses(config, 4, make_network(axis_name=None), steps=1)
    assert abs(actual[0] - reference[0][0]) > 1e-4


def all_reduced(text):
    """How many elements each all-reduce of a compiled program moves."""
    sizes = []
    for line in text.splitlines():
        if re.search(r"= .* all-reduce(-start)?\(", line):
            result = line.split("=", 1)[1].split(" all-reduce")[0]
            shapes = re.findall(r"(?:f32|bf16|s32|pred|u32)\[([\d,]*)\]", result)
            sizes += [int(np.prod([int(n) for n in shape.split(",") if n])) for shape in shapes]
    return sizes


@pytest.mark.parametrize(
    ("mapping", "penalised"), [("pmap", False), ("shard_map", False), ("pmap", True)]
)
def test_exactly_the_trainable_parameters_are_communicated(
    digits, config, make_network, factored, stepper, mapping, penalised
):
    model, config = make_network(axis_name=None), dataclasses.replace(config, mapping=mapping)
    if penalised:  # what is measured of parameters and gradient is on every device already
        model = factored
        config = dataclasses.replace(config, penalty=Penalty(10.0, unique=True), gradient_flow=True)
    run, step, state = stepper(config, 4, model)
    batch = run.devices.cut(next(batches(digits, config.batch_size, 1)))
    text = step.lower(state, None, batch).compile().as_text()
    assert "all-gather" not in text
    statistics = sum(leaf.size for leaf in jax.tree.leaves(state.collections))
    metrics = 3  # the loss, and numerator and denominator of the accuracy
    assert sum(all_reduced(text)) == count(state.variables)["trainable"] + statistics + metrics


def test_the_step_is_traced_once(digits, config, network):
    run = prepare(config, model=network, data=digits, devices=jax.devices()[:2])
    mapped = run.devices.map(chex.assert_max_traces(make_train_step(run, config.seed), n=1))
    state = run.devices.place(run.init())
    for batch in batches(digits, config.batch_size, 3):
        state, _ = mapped(state, None, run.devices.cut(batch))
    assert int(state.step) == 3


def test_after_a_loss_that_is_not_finite_nothing_changes(digits, config, network, stepper):
    run, step, state = stepper(config, 2, network)
    first, second = batches(digits, config.batch_size, 2)
    state, metrics = step(state, None, run.devices.cut(first))
    assert bool(metrics["finite"])
    classifier = state.trainable["params"]["model"]["classifier"]
    broken = jax.tree.map(lambda x: x, state)
    broken.trainable["params"]["model"]["classifier"] = classifier | {
        "bias": classifier["bias"].at[0].set(jnp.inf)
    }
    before = jax.device_get(broken)
    after, metrics = step(run.devices.place(before), None, run.devices.cut(second))
    assert not bool(metrics["finite"]) and bool(after.failed)
    chex.assert_trees_all_equal(jax.device_get(after.variables), before.variables)
    assert int(after.step) == int(before.step)
    # A repaired state stays failed: later steps were already queued with the broken one.
    repaired = after.replace(trainable=jax.device_get(state.trainable))
    still, _ = step(run.devices.place(repaired), None, run.devices.cut(second))
    chex.assert_trees_all_equal(jax.device_get(still.trainable), jax.device_get(state.trainable))


@pytest.fixture(scope="module")
def recorded(digits, factored):
    """A function that gives variables, their averaged gradient in a step, and the metrics."""

    @functools.cache
    def record(config, devices):
        run = prepare(config, model=factored, data=digits, devices=jax.devices()[:devices])
        recorder = optax.GradientTransformation(
            lambda params: optax.tree.zeros_like(params),
            lambda updates, state, params=None: (state, updates),
        )
        run = dataclasses.replace(run, optimizer=recorder)
        step = run.devices.map(make_train_step(run, config.seed))
        state = run.init()
        # Initial filters are orthonormal: the penalty would be zero.
        scaled = jax.tree.map(lambda x: 1.3 * x, state.trainable)
        before = run.devices.place(dataclasses.replace(state, trainable=scaled))
        batch = next(batches(digits, config.batch_size, 1))
        after, metrics = step(before, None, run.devices.cut(batch))
        return jax.device_get((before.trainable, after.optimizer, metrics))

    yield record
    record.cache_clear()


MEASURED = pytest.mark.parametrize(
    ("penalty", "devices"),
    [(Penalty(10.0), 1), (Penalty(3.0, ("first", "sec.*"), unique=True), 4)],
    ids=["one", "two"],
)


@MEASURED
def test_a_penalty_adds_its_gradient_and_nothing_else(config, factored, recorded, penalty, devices):
    _, without, plain = recorded(config, devices)
    config = dataclasses.replace(config, penalty=penalty, gradient_flow=True)
    trainable, gradient, metrics = recorded(config, devices)

    def alone(trainable):
        return orthogonality(factored, trainable, *penalty.pools, unique=penalty.unique)

    value, slope = jax.jit(jax.value_and_grad(alone))(trainable)
    expected = jax.tree.map(lambda g: penalty.orthogonality * g, slope)
    assert max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(expected)) > 0.1
    # One rounding of a sum with the loss's gradient (below 1); XLA fuses the programs differently.
    chex.assert_trees_all_close(
        jax.tree.map(np.subtract, gradient, without), expected, rtol=1e-5, atol=2e-6
    )
    # The loss is the cross entropy alone; the penalty is reported without its weight.
    np.testing.assert_allclose(metrics["loss"], plain["loss"], rtol=1e-6)
    np.testing.assert_allclose(metrics["orthogonality"], value, rtol=1e-5)
    assert set(plain) == {"loss", "accuracy", "finite"}


@MEASURED
def test_gradient_flow_is_that_of_the_averaged_gradient_of_each_bank(
    config, recorded, penalty, devices
):
    config = dataclasses.replace(config, penalty=penalty, gradient_flow=True)
    _, gradient, metrics = recorded(config, devices)
    expected = {}
    for bank, leaves in gradient["banks"].items():
        size = np.abs(np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(leaves)]))
        expected |= {
            f"gradient_mean/{bank}": size.mean(dtype=np.float64),
            f"gradient_max/{bank}": size.max(),
        }
    assert set(metrics) == {"loss", "accuracy", "finite", "orthogonality", *expected}
    assert len(expected) == 4
    for name, value in expected.items():
        assert float(metrics[name]) == pytest.approx(float(value), rel=1e-5) and value > 0


def test_gradient_flow_covers_banks_at_any_depth():
    pair = {"left": jnp.array([1.0, -2.0]), "right": jnp.array([[3.0], [-6.0]])}
    gradient = {
        "params": {},
        "banks": {
            "encoder": {"a": pair, "b": {"ring": jnp.array([0.5])}},
            "c": {"kernel": jnp.array([-4.0])},
        },
    }
    assert {name: float(value) for name, value in flow(gradient, gradient).items()} == {
        "gradient_mean/encoder/a": 3.0,
        "gradient_max/encoder/a": 6.0,
        "gradient_mean/encoder/b": 0.5,
        "gradient_max/encoder/b": 0.5,
        "gradient_mean/c": 4.0,
        "gradient_max/c": 4.0,
    }
    plain = {"params": {"kernel": jnp.ones(2)}}
    assert flow(plain, plain) == {}


def test_a_data_set_on_the_device_gives_the_same_step(digits, config, network, stepper):
    run, step, state = stepper(config, 2, network)
    index = np.arange(180, 244, dtype=np.int32)
    resident = run.devices.place(digits.train.arrays)
    _, by_index = step(state, resident, run.devices.cut({"index": index}))
    _, by_batch = step(state, None, run.devices.cut(digits.train.take(index).arrays))
    chex.assert_trees_all_equal(jax.device_get(by_index), jax.device_get(by_batch))


def test_randomness_is_a_function_of_seed_and_step(digits, config, network, stepper):
    run, step, state = stepper(config, 1, network)
    batch = run.devices.cut(next(batches(digits, config.batch_size, 1)))
    loss = [
        float(step(s, None, batch)[1]["loss"])
        for s in (state, state, state.replace(step=state.step + 1))
    ]
    assert loss[0] == loss[1] != loss[2]
    other = run.devices.map(make_train_step(run, config.seed + 1))
    assert float(other(state, None, batch)[1]["loss"]) != loss[0]


def test_bfloat16_computes_near_float32_and_keeps_float32_parameters(
    config, make_network, reference, losses
):
    actual, state = losses(config, 1, make_network(dtype=jnp.bfloat16), steps=1)
    np.testing.assert_allclose(actual[0], reference[0][0], rtol=2e-2)  # bfloat16 has 8 bits
    assert actual[0] != reference[0][0]
    assert {leaf.dtype for leaf in jax.tree.leaves(state.trainable)} == {jnp.dtype("float32")}


class Plain(nn.Module):
    """A network whose outputs for an example depend on no other example."""

    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(10)(nn.relu(nn.Dense(16)(x.reshape(len(x), -1))))


@pytest.mark.parametrize("devices", [1, 2])
def test_accumulated_gradients_are_those_of_the_whole_batch(config, losses, devices):
    network = Plain()
    expected, whole = losses(config, devices, network)
    parts = dataclasses.replace(config, accumulate=4)
    measured, state = losses(parts, devices, network)
    np.testing.assert_allclose(measured, expected, rtol=1e-5)
    chex.assert_trees_all_close(state.trainable, whole.trainable, rtol=1e-4, atol=1e-6)


def test_batch_statistics_are_those_of_each_part(config, network, losses):
    """Of `Small`, whose batch norm sees a quarter of the batch at a time."""
    parts = dataclasses.replace(config, accumulate=4)
    measured, state = losses(parts, 1, network, steps=1)
    expected, whole = losses(config, 1, network, steps=1)
    assert measured != pytest.approx(expected, rel=1e-6)
    assert measured == pytest.approx(expected, rel=0.2)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, whole)


def test_a_batch_that_cannot_be_divided_into_parts_is_refused(config, network, digits):
    bad = dataclasses.replace(config, accumulate=5)
    with pytest.raises(ConfigError, match="accumulate is 5; it must divide the 64 examples"):
        check_batch(prepare(bad, model=network, data=digits, devices=jax.devices()[:1]))


def test_label_smoothing_reaches_the_loss(config, network, reference, losses):
    actual, _ = losses(dataclasses.replace(config, label_smoothing=0.3), 1, network, steps=1)
    assert abs(actual[0] - reference[0][0]) > 1e-3


def test_an_uneven_batch_size_is_refused_with_the_nearest_ones():
    with pytest.raises(ConfigError, match=r"batch_size is 66; .* of 4, .* such as 64 or 68"):
        Devices(devices=jax.devices()[:4]).check_batch(66)
