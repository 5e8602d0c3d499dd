"""Costs against counts by hand."""

import functools
import json
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

import paramshare
from paramshare import Plan, Rule, Soft, Tied
from paramshare.measure.cost import Cost, cost
from paramshare.measure.multiply_adds import multiply_adds


class Small(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), padding=1, use_bias=False, name="conv1")(x)
        x = nn.Conv(4, (3, 3), padding=1, use_bias=False, name="conv2")(x)
        x = nn.Conv(6, (3, 3), 2, padding=1, feature_group_count=2, name="grouped")(x)
        return nn.Dense(5, name="dense")(x.reshape(len(x), -1))


def test_a_small_network_by_hand():
    c = cost(Small(), (8, 8, 4))
    assert [(x.path, x.weights, x.private, x.bank, x.multiply_adds) for x in c.layers] == [
        ("conv1", 9 * 4 * 4, 9 * 4 * 4, "", 64 * 9 * 4 * 4),
        ("conv2", 9 * 4 * 4, 9 * 4 * 4, "", 64 * 9 * 4 * 4),
        ("grouped", 9 * 2 * 6 + 6, 9 * 2 * 6 + 6, "", 16 * 9 * 2 * 6),
        ("dense", 4 * 4 * 6 * 5 + 5, 4 * 4 * 6 * 5 + 5, "", 4 * 4 * 6 * 5),
    ]
    assert c.plain == c.counts["trainable"] == 2 * 144 + 114 + 485
    assert c.use == 2 * 9216 + 1728 + 480
    assert c.generation == 0
    assert c.bytes == 4 * c.plain


def test_sharing_adds_one_matrix_product():
    model = paramshare.share(
        Small(),
        Plan(Rule(r"conv\d/kernel", Soft(3, initial="paper"), bank="b")),
        jnp.ones((1, 8, 8, 4)),
    )
    c, plain = cost(model, (8, 8, 4)), cost(Small(), (8, 8, 4))
    assert (c.use, c.plain) == (plain.use, plain.plain)
    assert c.generation == 2 * 3 * 144  # (L, k) @ (k, P)
    assert [(x.private, x.bank) for x in c.layers[:3]] == [(0, "b"), (0, "b"), (114, "")]
    assert [x.multiply_adds for x in c.layers] == [x.multiply_adds for x in plain.layers]
    assert c.counts == {
        "banks": 3 * 144,
        "coefficients": 6,
        "private": 114 + 485,
        "trainable": 3 * 144 + 6 + 114 + 485,
    }
    assert c.bytes == 4 * c.counts["trainable"]


@pytest.mark.parametrize("remat", [False, True])
def test_loops_count_once_per_iteration(remat):
    class Step(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Dense(8, name="dense")(x), None

    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, x):
            step = nn.remat(Step) if remat else Step
            x = (nn.remat(nn.Dense) if remat else nn.Dense)(8, name="first")(x)
            return nn.scan(step, {"params": 0}, split_rngs={"params": True}, length=5)(
                name="layers"
            )(x, None)[0]

    c = cost(Scanned(), (8,))
    assert c.use == 6 * 64
    assert [(x.path, x.weights, x.multiply_adds) for x in c.layers] == [
        ("first", 72, 64),
        ("layers/dense", 5 * 72, 5 * 64),
    ]


def test_batched_products_and_nested_loops():
    a, b = (
        jax.ShapeDtypeStruct((7, 2, 3), jnp.float32),
        jax.ShapeDtypeStruct((7, 3, 5), jnp.float32),
    )
    assert multiply_adds(lambda a, b: a @ b, a, b) == {"": 7 * 2 * 3 * 5}

    def loop(x, w):
        outer = lambda x, _: jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=3)  # noqa: E731
        return jax.lax.scan(lambda x, _: (outer(x, None)[0], None), x, None, length=4)[0]

    square = jax.ShapeDtypeStruct((6, 6), jnp.float32)
    assert multiply_adds(jax.jit(loop), square, square) == {"": 12 * 6**3}


def bottleneck_by_hand(
    blocks: tuple[int, ...], width: int, size: int, classes: int
) -> tuple[int, int]:
    """(trainable parameters, multiply-adds) of a bottleneck network, layer by layer."""
    numbers, work = [0], [0]

    def conv(kernel: int, a: int, b: int, side: int) -> None:
        numbers.append(kernel * kernel * a * b + 2 * b)  # and its batch norm
        work.append(kernel * kernel * a * b * side * side)

    side = size // 2
    conv(7, 3, 64, side)
    side //= 2
    a = 64
    for stage, n in enumerate(blocks):
        inner, out = width * 64 * 2**stage, 256 * 2**stage
        for block in range(n):
            before, side = side, side // 2 if block == 0 and stage else side
            conv(1, a, inner, before)
            conv(3, inner, inner, side)  # which strides
            conv(1, inner, out, side)
            if block == 0:
                conv(1, a, out, side)
            a = out
    return sum(numbers) + a * classes + classes, sum(work) + a * classes


@functools.cache
def swrn_16_1_1() -> Cost:
    return cost(paramshare.create_model("swrn-16-1-1"), (32, 32, 3))


def test_wide_resnet_50_2():
    numbers, work = bottleneck_by_hand((3, 4, 6, 3), 2, 224, 1000)
    assert (numbers, work) == (68_883_240, 11_398_021_120)  # the first as published
    c = cost(paramshare.create_model("wrn-50-2"), (224, 224, 3))
    assert (c.counts["trainable"], c.use) == (numbers, work)


def test_wide_resnet_28_10():
    """5.2 billion multiply-adds, as published (Zagoruyko & Komodakis, table 5)."""
    stages, work, side, a = ((160, 32), (320, 16), (640, 8)), 9 * 3 * 16 * 32 * 32, 32, 16
    for b, side in stages:
        work += (9 * a * b + a * b + 9 * b * b + 6 * 9 * b * b) * side * side
        a = b
    c = cost(paramshare.create_model("swrn-28-10-2"), (32, 32, 3))
    assert c.use == work + 640 * 10
    assert round(c.use / 1e9, 1) == 5.2
    assert c.generation == sum(6 * 2 * 9 * b * b for b, _ in stages)


def test_text_and_json_say_the_same():
    c = swrn_16_1_1()
    text, data = str(c), json.loads(c.as_json())
    assert data["counts"]["trainable"] == 126_688
    for number in (
        *data["counts"].values(),
        *(
            data[name]
            for name in (
                "generated",
                "plain",
                "use",
                "convolutions",
                "generation",
                "bytes",
                "optimizer",
                "all_reduce",
            )
        ),
    ):
        assert f"{number:,}" in text
    parts: dict[str, int] = {}
    for layer in data["layers"]:
        part = layer["path"].split("/")[0]
        parts[part] = parts.get(part, 0) + layer["weights"]
    for part, weights in parts.items():
        assert re.search(rf"^{part} +{weights:,} ", text, re.MULTILINE)
    assert len(text.splitlines()) == 2 + len(data["layers"]) + 3 + len(parts) + 16


def test_a_ring_against_its_generated_weights_and_the_plain_network():
    lines = str(cost(paramshare.create_model("resnet18-rpg"), (224, 224, 3))).splitlines()
    rows = {
        line.split()[0]: line.split()[1:]
        for line in lines
        if line.startswith(("banks", "private", "trainable"))
    }
    assert any(
        "of 11,157,504 generated" in line and "of 11,689,512 unshared" in line for line in lines
    )
    assert rows == {
        "banks": ["2,359,296", "21.15%", "20.18%"],  # 2,359,296 / 11,157,504 and / 11,689,512
        "private": ["532,008", "4.77%", "4.55%"],
        "trainable": ["2,891,304", "25.91%", "24.73%"],
    }


def test_bytes_of_training_are_those_of_its_arrays():
    """SWRN 16-1-1: 126,688 parameters in float32, a mean and a variance per batch-norm channel."""
    c = swrn_16_1_1()
    # bn1 and bn2 of two blocks per stage, where the first bn1 of a stage has the channels of the
    # stage before; and the last batch norm.
    channels = (16 + 3 * 16) + (16 + 3 * 32) + (32 + 3 * 64) + 64
    assert (c.bytes, c.optimizer, c.all_reduce) == (
        4 * 126_688,
        4 * 126_688,
        4 * (126_688 + 2 * channels + 2),
    )
    assert c.unshared == {
        "bytes": 4 * 175_066,
        "optimizer": 4 * 175_066,
        "all_reduce": 4 * (175_066 + 2 * channels + 2),
    }
    assert "storage 506,752 72.37%" in " ".join(str(c).split())


def test_the_state_of_another_optimizer():
    adam = cost(Small(), (8, 8, 4), optimizer=optax.adam(0.1))
    assert adam.optimizer == 2 * adam.bytes + 4  # two moments, and a count of steps


class TwoInputs(nn.Module):
    """A dense layer per input, batch statistics, dropout."""

    @nn.compact
    def __call__(self, inputs, scale, train):
        x = nn.Dense(5, name="a")(inputs["a"]) + nn.Dense(5, name="b")(inputs["b"])
        x = nn.BatchNorm(use_running_average=not train, name="bn")(scale * x)
        return nn.Dropout(0.5, deterministic=not train)(x)


@pytest.mark.parametrize("train", [False, True])
def test_any_example_inputs_and_options(train):
    """Pytrees of arrays or shapes, a whole batch, several inputs, options of the model."""
    inputs = {"a": jnp.ones((2, 3)), "b": jax.ShapeDtypeStruct((2, 7), jnp.float32)}
    c = cost(TwoInputs(), inputs, jnp.ones(()), train=train)
    assert c.use == 2 * (3 * 5 + 7 * 5)
    assert c.plain == 3 * 5 + 5 + 7 * 5 + 5 + 2 * 5
    assert c.all_reduce == c.bytes + 4 * (2 * 5 + 2)
    shared = paramshare.share(
        TwoInputs(), Plan(Rule("./bias", Tied(initial="paper"))), inputs, jnp.ones(()), train=train
    )
    sharing = cost(shared, inputs, jnp.ones(()), train=train)
    assert (sharing.use, sharing.plain) == (c.use, c.plain)
    assert sharing.counts["trainable"] == c.plain - 2 * 5 + 5
