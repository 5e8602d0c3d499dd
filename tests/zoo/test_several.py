"""Networks for several tasks: what they compute, and which banks they draw on."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paramshare.models import Heads, ModelError, ResNet
from paramshare.zoo import create_model, options_of

TASKS = {"turn": 1, "digit": 10}
IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 16, 3)), jnp.float32)
RING = 2000


def trainable(name, **tasks):
    return create_model(name, tasks or TASKS, (16, 16, 3)).layout.trainable


def test_heads_divide_the_outputs_of_one_network():
    model = create_model("heads-resnet8", TASKS, (16, 16, 3))
    plain = create_model("resnet8", 11, (16, 16, 3))
    variables = model.init(jax.random.key(0), IMAGES)
    outputs: Any = model.apply(variables, IMAGES)
    inner = {name: tree["network"] for name, tree in variables.items()}
    whole: Any = plain.apply(inner, IMAGES)
    np.testing.assert_array_equal(outputs["digit"], whole[:, :10])  # by name, not as given
    np.testing.assert_array_equal(outputs["turn"], whole[:, 10:])


@pytest.mark.slow
def test_each_task_has_its_own_network_on_the_same_ring():
    model = create_model(f"networks-resnet8-rpg-{RING}", TASKS, (16, 16, 3))
    variables = model.init(jax.random.key(0), IMAGES)
    assert [bank.name for bank in model.layout.banks] == ["ring"]
    outputs: Any = model.apply(variables, IMAGES)
    dense = model.expand(variables)
    for task, size in TASKS.items():
        alone = create_model("resnet8", size, (16, 16, 3))
        inner = {name: tree[task] for name, tree in dense.items()}
        expected: Any = alone.apply(inner, IMAGES)
        np.testing.assert_allclose(outputs[task], expected, rtol=1e-5, atol=1e-6)
    kernels = [dense["params"][t]["stage1"]["block1"]["conv1"]["kernel"] for t in TASKS]
    assert not np.array_equal(*kernels)  # other places of the ring
    one = create_model(f"resnet8-rpg-{RING}", 1, (16, 16, 3)).layout
    private = one.trainable - RING
    classifier = 64 + 1
    assert model.layout.trainable == RING + 2 * (private - classifier) + 11 * classifier


def test_networks_apart_have_a_ring_each():
    layout = create_model(f"networks-resnet8-rpg-{RING}-apart", TASKS, (16, 16, 3)).layout
    assert [bank.name for bank in layout.banks] == ["digit.ring", "turn.ring"]
    assert layout.trainable == trainable(f"networks-resnet8-rpg-{RING}") + RING
    for bank in layout.banks:
        assert all(site.path.startswith(f"{bank.name.split('.')[0]}/") for site in bank.sites)


def test_other_schemes_share_over_the_tasks_too():
    layout = create_model("networks-swrn-16-1-2", TASKS, (16, 16, 3)).layout
    plain = create_model("swrn-16-1-2", 10, (16, 16, 3)).layout
    assert [bank.name for bank in layout.banks] == [bank.name for bank in plain.banks]
    assert all(
        len(bank.sites) == 2 * len(one.sites)
        for bank, one in zip(layout.banks, plain.banks, strict=True)
    )


@pytest.mark.parametrize(
    ("name", "outputs", "message"),
    [
        ("heads-resnet8", 10, "number of outputs of each task"),
        ("heads-resnet8", {}, "number of outputs of each task"),
        ("networks-resnet8", {"digit": 0}, "at least 1 and at most 1,000,000,000 for each task"),
        ("networks-resnet8-apart", TASKS, "leave out -apart"),
        ("resnet8", TASKS, "must be an integer"),
        ("heads-resnet9", TASKS, "nearest are 8 and 14"),
        ("heads-vgg5", TASKS, "unknown model"),
    ],
)
def test_networks_that_do_not_exist(name, outputs, message):
    with pytest.raises(ModelError, match=message):
        create_model(name, outputs, (16, 16, 3))


def test_heads_that_do_not_fit_their_network():
    model = Heads(ResNet((1,), (4,), 5, stem="cifar"), (("digit", 3),))
    with pytest.raises(ModelError, match=r"5 outputs; the heads \{'digit': 3\} need 3"):
        jax.eval_shape(lambda: model.init(jax.random.key(0), IMAGES))


def test_the_stem_follows_the_classifier_and_the_images():
    large = create_model("heads-resnet18", TASKS)
    small = create_model("heads-resnet18", TASKS, (32, 32, 3))
    assert (large.network.stem, small.network.stem) == ("imagenet", "cifar")
    assert options_of("heads-resnet18-rpg")[-1] == "ring_size"
