"""The step: the same on any number of devices, through pmap and shard_map; it moves what is trainable and no more."""

import dataclasses
import functools
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from paramshare import FilterBasis, Plan, Rule, count, orthogonality, share
from paramshare.training.config import Penalty
from paramshare.training.data.task import cross_entropy
from paramshare.training.devices import Devices
from paramshare.training.run import prepare
from paramshare.training.step import flow, make_train_step


def batches(data, size, steps):
    for i in range(steps):
        part = slice(i * size, (i + 1) * size)
        yield {"image": data.train.image[part], "label": data.train.label[part]}


def stepper(config, data, devices, model):
    run = prepare(config, model=model, data=data, devices=devices)
    options: Any = {"seed": config.seed, "penalty": config.penalty, "gradient_flow": config.gradient_flow}
    step = make_train_step(run.model, run.optimizer, config.augment, data.mean, data.std, **options)
    return run, run.devices.map(step), run.devices.replicate(jax.jit(run.init)())


def losses(config, data, devices, model, steps=4):
    run, step, state = stepper(config, data, devices, model)
    found = []
    for batch in batches(data, config.batch_size, steps):
        state, metrics = step(state, None, run.devices.cut(batch))
        found.append(float(metrics["loss"]))
    return found, state


@pytest.fixture(scope="module")
def factored(make_network):
    """`Small`, its last three kernels of 6 shared filters and 2 of their own; in two banks."""
    rules = [Rule(pattern, FilterBasis(6, 2), bank=bank) for pattern, bank in [("conv[12]/kernel", "first"), ("conv3/kernel", "second")]]
    return share(make_network(plain=True), Plan(*rules), jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32))


@pytest.fixture(scope="module")
def reference(config, digits, network):
    """Four steps on one device."""
    return losses(config, digits, jax.devices()[:1], network)


@pytest.mark.parametrize("mapping", ["pmap", "shard_map"])
def test_four_devices_give_the_losses_of_one(config, digits, network, reference, mapping):
    expected, state = reference
    found, spread = losses(dataclasses.replace(config, mapping=mapping), digits, jax.devices()[:4], network)
    # Sums over a batch are taken in another order: a few units in the last place, which updates carry on and enlarge.
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    np.testing.assert_allclose(found, expected, rtol=5e-5)
    chex.assert_trees_all_close(jax.device_get(spread.variables), jax.device_get(state.variables), rtol=1e-2, atol=2e-4)


def test_without_synchronised_statistics_devices_differ(config, digits, make_network, reference):
    expected, _ = reference
    found, _ = losses(config, digits, jax.devices()[:4], make_network(axis_name=None), steps=1)
    assert abs(found[0] - expected[0]) > 1e-4


def all_reduced(text):
    """How many numbers each all-reduce of a compiled program moves."""
    sizes = []
    for line in text.splitlines():
        if re.search(r"= .* all-reduce(-start)?\(", line):
            result = line.split("=", 1)[1].split(" all-reduce")[0]
            shapes = re.findall(r"(?:f32|bf16|s32|pred|u32)\[([\d,]*)\]", result)
            sizes += [int(np.prod([int(n) for n in shape.split(",") if n])) for shape in shapes]
    return sizes


@pytest.mark.parametrize("mapping", ["pmap", "shard_map"])
@pytest.mark.parametrize("kind", ["shared", "plain", "measured"])
def test_exactly_the_trainable_numbers_travel(digits, config, make_network, factored, mapping, kind):
    model, config = make_network(kind == "plain", axis_name=None), dataclasses.replace(config, mapping=mapping)
    if kind == "measured":  # a penalty, and what is measured of the gradient: all of it is on every device already
        model = factored.clone(model=factored.model.clone(axis_name=None))
        config = dataclasses.replace(config, penalty=Penalty(10.0, unique=True), gradient_flow=True)
    run, step, state = stepper(config, digits, jax.devices()[:4], model)
    batch = run.devices.cut(next(batches(digits, config.batch_size, 1)))
    text = step.lower(state, None, batch).compile().as_text()
    statistics = sum(leaf.size for leaf in jax.tree.leaves(state.collections))
    loss_and_accuracy = 2
    assert sum(all_reduced(text)) == count(state.variables)["trainable"] + statistics + loss_and_accuracy


def test_the_step_is_traced_once(digits, config, network):
    run = prepare(config, model=network, data=digits, devices=jax.devices()[:2])
    step = make_train_step(run.model, run.optimizer, config.augment, digits.mean, digits.std)
    mapped = run.devices.map(chex.assert_max_traces(step, n=1))
    state = run.devices.replicate(jax.jit(run.init)())
    for batch in batches(digits, config.batch_size, 3):
        state, _ = mapped(state, None, run.devices.cut(batch))
    assert int(state.step) == 3


def test_a_loss_that_is_not_finite_changes_nothing_ever_after(digits, config, network):
    run, step, state = stepper(config, digits, jax.devices()[:2], network)
    first, second = batches(digits, config.batch_size, 2)
    state, metrics = step(state, None, run.devices.cut(first))
    assert bool(metrics["finite"])
    classifier = state.trainable["params"]["model"]["classifier"]
    broken = jax.tree.map(lambda x: x, state)
    broken.trainable["params"]["model"]["classifier"] = classifier | {"bias": classifier["bias"].at[0].set(jnp.inf)}
    before = jax.device_get(broken)
    after, metrics = step(run.devices.replicate(before), None, run.devices.cut(second))
    assert not bool(metrics["finite"]) and bool(after.failed)
    chex.assert_trees_all_equal(jax.device_get(after.variables), before.variables)
    assert int(after.step) == int(before.step)
    # Mended or not, a state that has failed is not trained on: later steps were already under way with it.
    mended = after.replace(trainable=jax.device_get(state.trainable))
    still, _ = step(run.devices.replicate(mended), None, run.devices.cut(second))
    chex.assert_trees_all_equal(jax.device_get(still.trainable), jax.device_get(state.trainable))


@functools.cache
def recorded(config, data, model, devices):
    """The averaged gradient of a step, and what the step measures; nothing is updated."""
    run = prepare(config, model=model, data=data, devices=jax.devices()[:devices])
    recorder = optax.GradientTransformation(
        lambda params: optax.tree.zeros_like(params), lambda updates, state, params=None: (state, updates)
    )
    run = dataclasses.replace(run, optimizer=recorder)
    options: Any = {"seed": config.seed, "penalty": config.penalty, "gradient_flow": config.gradient_flow}
    step = run.devices.map(make_train_step(run.model, recorder, config.augment, data.mean, data.std, **options))
    state = jax.jit(run.init)()
    # Fresh filters are orthonormal: a penalty would have nothing to say.
    before = run.devices.replicate(state.replace(trainable=jax.tree.map(lambda x: 1.3 * x, state.trainable)))
    after, metrics = step(before, None, run.devices.cut(next(batches(data, config.batch_size, 1))))
    return jax.device_get((before.trainable, after.optimizer, metrics))


MEASURED = pytest.mark.parametrize(
    ("penalty", "devices"), [(Penalty(10.0), 1), (Penalty(3.0, ("first", "sec.*"), unique=True), 4)], ids=["one", "two"]
)


@MEASURED
def test_a_penalty_adds_its_own_gradient_and_nothing_else(digits, config, factored, penalty, devices):
    _, without, plain = recorded(config, digits, factored, devices)
    config = dataclasses.replace(config, penalty=penalty, gradient_flow=True)
    trainable, gradient, metrics = recorded(config, digits, factored, devices)

    def alone(trainable):
        return orthogonality(trainable, *penalty.pools, unique=penalty.unique)

    expected = jax.tree.map(lambda g: penalty.orthogonality * g, jax.grad(alone)(trainable))
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected)) > 0.1
    # One rounding of a sum with the loss's gradient (below 1), and XLA fuses the two programs otherwise.
    chex.assert_trees_all_close(jax.tree.map(jnp.subtract, gradient, without), expected, rtol=1e-5, atol=2e-6)
    # The loss told is the cross entropy; the penalty is told before it is weighed, and only where there is one.
    np.testing.assert_allclose(metrics["loss"], plain["loss"], rtol=1e-6)
    np.testing.assert_allclose(metrics["orthogonality"], alone(trainable), rtol=1e-5)
    assert set(plain) == {"loss", "accuracy", "finite"}


@MEASURED
def test_gradient_flow_is_that_of_the_averaged_gradient_of_each_bank(digits, config, factored, penalty, devices):
    config = dataclasses.replace(config, penalty=penalty, gradient_flow=True)
    _, gradient, metrics = recorded(config, digits, factored, devices)
    wanted = {}
    for bank, leaves in gradient["banks"].items():
        size = np.abs(np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(leaves)]))
        wanted |= {f"gradient_mean/{bank}": size.mean(dtype=np.float64), f"gradient_max/{bank}": size.max()}
    assert set(metrics) == {"loss", "accuracy", "finite", "orthogonality", *wanted} and len(wanted) == 4
    for name, value in wanted.items():
        assert float(metrics[name]) == pytest.approx(float(value), rel=1e-5) and value > 0


def test_gradient_flow_goes_over_all_numbers_of_a_bank_wherever_it_is():
    pair = {"left": jnp.array([1.0, -2.0]), "right": jnp.array([[3.0], [-6.0]])}
    found = flow({"params": {}, "banks": {"encoder": {"a": pair, "b": {"ring": jnp.array([0.5])}}, "c": {"kernel": jnp.array([-4.0])}}})
    assert {name: float(value) for name, value in found.items()} == {
        "gradient_mean/encoder/a": 3.0,
        "gradient_max/encoder/a": 6.0,
        "gradient_mean/encoder/b": 0.5,
        "gradient_max/encoder/b": 0.5,
        "gradient_mean/c": 4.0,
        "gradient_max/c": 4.0,
    }
    assert flow({"params": {"kernel": jnp.ones(2)}}) == {}


def test_images_on_the_device_give_the_same_step(digits, config, network):
    run, step, state = stepper(config, digits, jax.devices()[:2], network)
    index = np.arange(180, 244, dtype=np.int32)
    resident = run.devices.replicate({"image": digits.train.image, "label": digits.train.label})
    _, by_index = step(state, resident, run.devices.cut({"index": index}))
    _, by_image = step(state, None, run.devices.cut({"image": digits.train.image[index], "label": digits.train.label[index]}))
    chex.assert_trees_all_equal(jax.device_get(by_index), jax.device_get(by_image))


def test_randomness_is_a_function_of_seed_and_step(digits, config, network):
    run, step, state = stepper(config, digits, jax.devices()[:1], network)
    batch = run.devices.cut(next(batches(digits, config.batch_size, 1)))
    loss = [float(step(s, None, batch)[1]["loss"]) for s in (state, state, state.replace(step=state.step + 1))]
    assert loss[0] == loss[1] != loss[2]


def test_bfloat16_computes_near_float32_and_keeps_float32_parameters(digits, config, make_network, reference):
    found, state = losses(config, digits, jax.devices()[:1], make_network(dtype=jnp.bfloat16), steps=1)
    np.testing.assert_allclose(found[0], reference[0][0], rtol=2e-2)  # bfloat16 keeps 8 bits
    assert found[0] != reference[0][0]
    assert {leaf.dtype for leaf in jax.tree.leaves(state.trainable)} == {jnp.dtype("float32")}


def test_label_smoothing_is_that_of_optax():
    key = jax.random.key(0)
    logits = 3 * jax.random.normal(key, (16, 7))
    label = jax.random.randint(key, (16,), 0, 7)
    for smoothing in (0.0, 0.1, 0.5):
        expected = optax.softmax_cross_entropy(logits, optax.smooth_labels(jax.nn.one_hot(label, 7), smoothing))
        np.testing.assert_allclose(cross_entropy(logits, label, smoothing), expected, rtol=1e-5)


def test_devices_say_which_batch_sizes_divide():
    with pytest.raises(ValueError, match=r"batch_size 66 .* 4 devices; try 64 or 68"):
        Devices(devices=jax.devices()[:4]).check_batch(66)
