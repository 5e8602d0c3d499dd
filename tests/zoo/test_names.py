"""Named networks: the papers' counts to the last number, names that are none, and what `list_models` lists."""

import itertools
import random
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paramshare
from paramshare import ModelError, Shared
from paramshare.zoo import default_input_shape

# Spec of soft sharing: the exact trainable counts of its reference code.
PUBLISHED = {
    ("wrn-28-10", 10): 36_479_194,
    ("swrn-28-10-1", 10): 12_287_212,
    ("swrn-28-10-2", 10): 17_125_630,
    ("swrn-28-10-4", 10): 26_802_466,
    ("swrn-28-10-6", 10): 36_479_302,
    ("swrn-28-14-2", 10): 33_537_790,
    ("swrn-28-18-2", 10): 55_414_014,
    ("swrn-40-8-8", 10): 29_555_402,
    ("wrn-16-1", 10): 175_066,
    ("swrn-16-1-1", 10): 126_688,
    ("swrn-28-10-2", 100): 17_183_320,
    ("wrn-50-2", 1000): 68_883_240,
    ("swrn-50-2-1", 1000): 39_703_372,
    ("swrn-50-2-2", 1000): 57_807_728,
    ("swrn-50-2-3", 1000): 62_067_592,
    ("swrn-50-2-5", 1000): 68_883_366,
    ("swrn-50-2-9", 1000): 68_883_366,  # k is capped at L
}


def count(name: str, classes: int, **options) -> int:
    model = paramshare.create_model(name, classes, **options)
    x = jax.ShapeDtypeStruct((1, *options.get("input_shape", default_input_shape(name))), jnp.float32)
    return paramshare.count(jax.eval_shape(lambda x: model.init(jax.random.key(0), x), x))["trainable"]


def wide(depth: int, width: float, k: int | None, classes: int, channels: int = 3) -> int:
    """The closed formula: `depth` = 6 n + 4; a, b channels before and of a stage; L = 2 (n - 1) layers on k templates."""
    n = (depth - 4) // 6
    widths = [16, int(16 * width), int(32 * width), int(64 * width)]
    layers, total = 2 * (n - 1), 9 * channels * 16
    for a, b in itertools.pairwise(widths):
        shared = 9 * b * b * layers if k is None else 9 * b * b * k + k * layers
        total += 9 * a * b + 9 * b * b + (a * b if a != b else 0) + 2 * a + 2 * b + 4 * b * (n - 1) + shared
    return total + 2 * widths[3] + widths[3] * classes + classes


@pytest.mark.parametrize(("name", "classes"), PUBLISHED)
def test_published_counts(name, classes):
    assert count(name, classes) == PUBLISHED[name, classes]


@pytest.mark.parametrize("seed", range(6))
def test_the_closed_formula_for_any_legal_numbers(seed):
    draw = random.Random(seed)
    depth, width, k = 6 * draw.randint(2, 5) + 4, draw.choice([1, 2, 5, 0.5, 1.25, 2.5]), draw.randint(1, 12)
    classes, channels = draw.randint(1, 200), draw.choice([1, 3])
    shape = (draw.randint(8, 40), draw.randint(8, 40), channels)
    assert count(f"wrn-{depth}-{width}", classes, input_shape=shape) == wide(depth, width, None, classes, channels)
    assert count(f"swrn-{depth}-{width}-{k}", classes, input_shape=shape) == wide(depth, width, k, classes, channels)


def test_the_least_depth():
    assert count("wrn-10-3", 10) == wide(10, 3, None, 10)
    with pytest.raises(ModelError, match=r"swrn-10-3-1: .*the least depth is 16"):
        paramshare.create_model("swrn-10-3-1")


def test_a_stage_is_a_bank_and_first_blocks_are_their_own():
    model = paramshare.create_model("swrn-28-10-2")
    assert isinstance(model, Shared)
    assert list(model.layout) == ["stage1", "stage2", "stage3"]
    for stage in model.layout:
        where = [f"{stage}/block{block}/conv{conv}/kernel" for block in (2, 3, 4) for conv in (1, 2)]
        assert [str(site) for site in model.layout[stage].sites] == where


def test_the_bottleneck_has_three_banks_a_stage_with_templates_capped():
    model = paramshare.create_model("swrn-50-2-4")
    assert isinstance(model, Shared)
    assert {name: (bank.scheme.templates, len(bank.sites)) for name, bank in zip(model.layout, model.layout.banks, strict=True)} == {  # type: ignore[attr-defined]
        f"stage{stage}-conv{conv}": (min(4, layers), layers) for stage, layers in enumerate((2, 3, 5, 2), 1) for conv in (1, 2, 3)
    }


@pytest.mark.parametrize("name", paramshare.list_models())
def test_every_listed_name_builds(name):
    shape, cells = default_input_shape(name), "pathnet" in name  # which gives a number a cell, whatever the classes
    model = paramshare.create_model(name, num_classes=None if cells else 7)
    x = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
    logits, variables = jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x), x)
    assert (logits.shape, logits.dtype) == ((2, *shape[:2]) if cells else (2, 7), jnp.float32)
    promises = re.search(r"^s|-s\d+u|-shared|-rpg|^rep-|-repeat|-loop-", name) and "-s0u" not in name
    assert set(variables) == ({"params", "batch_stats", "banks"} if promises else {"params", "batch_stats"})


def test_shared_and_plain_networks_compute_the_same_function():
    shared, plain = paramshare.create_model("swrn-16-0.125-1"), paramshare.create_model("wrn-16-0.125")
    assert isinstance(shared, Shared)
    assert plain == shared.model
    x = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    shapes = jax.eval_shape(lambda x: shared.init(jax.random.key(0), x), x)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: jnp.asarray(np.abs(rng.normal(size=leaf.shape)) / np.sqrt(leaf.size), leaf.dtype), shapes)
    chain = jax.jit(lambda v: plain.apply(shared.expand(v), x))(variables)
    # Float32 rounding of a dozen layers: the same sums, fused in other ways.
    assert jnp.allclose(jax.jit(shared.apply)(variables, x), chain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        ("swrn-50-2-?", ["swrn-50-2-1", "swrn-50-2-2", "swrn-50-2-3"]),
        ("wrn-*-2", ["wrn-101-2", "wrn-16-2", "wrn-50-2"]),
        ("wrn-28-1[0-9]", ["wrn-28-10"]),
        ("nothing*", []),
        ("", []),
    ],
)
def test_patterns(pattern, wanted):
    assert paramshare.list_models(pattern) == wanted


def test_all_names_are_listed_once_in_order():
    names = paramshare.list_models()
    assert names == sorted(set(names))
    assert {name for name, _ in PUBLISHED if name.count("-") == 2 and name.startswith("w")} <= set(names)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("wrm-28-10", "unknown model 'wrm-28-10'; nearest: .*wrn-28-10"),
        ("xyz", "unknown model 'xyz'"),
        ("", "unknown model ''"),
        ("wrn-28", r"malformed model name 'wrn-28'; names are of the form wrn-\{depth\}-\{width\}, such as wrn-16-1"),
        ("wrn-28-10-", "malformed"),
        ("wrn-28-10-2", "malformed"),
        ("swrn-28-10", "malformed.*swrn-{depth}-{width}-{templates}, such as swrn-16-1-1"),
        ("swrn-28-10-1.5", "malformed"),
        ("wrn--28-10", "malformed"),
        ("wrn-28-10\n", "malformed"),
        ("wrn-२८-10", "malformed|unknown"),
        ("wrn-27-10", r"wrn-27-10: .*depth 6 n \+ 4.*got 27, nearest are 22 and 28"),
        ("wrn-28-0", "wrn-28-0: a widening factor is positive"),
        ("wrn-28-1.03", "wrn-28-1.03: a widening factor .* multiple of 1/16; got 1.03"),
        ("wrn-50-0", "wrn-50-0: a widening factor"),
        ("swrn-28-10-0", r"swrn-28-10-0: Soft\(templates=0\).*1 or more"),
    ],
)
def test_names_that_are_none(name, said):
    with pytest.raises(ModelError, match=said) as caught:
        paramshare.create_model(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_classes": 0}, "num_classes=0"),
        ({"input_shape": (32, 32)}, r"input_shape=\(32, 32\)"),
        ({"input_shape": (32, 0, 3)}, r"input_shape=\(32, 0, 3\)"),
        ({"colour": "red"}, "swrn-16-1-1 has no option 'colour'; its options are dtype, axis_name"),
    ],
)
def test_options_that_cannot_be(options, said):
    with pytest.raises(ModelError, match=said):
        paramshare.create_model("swrn-16-1-1", **options)


def test_options_reach_the_model():
    with jax.numpy_dtype_promotion("standard"):  # Flax's BatchNorm subtracts float32 means from float16 images
        model = paramshare.create_model("swrn-16-1-1", dtype=jnp.float16, axis_name="device")
    assert isinstance(model, Shared)
    inner: nn.Module = model.model
    assert (inner.dtype, inner.axis_name, inner.num_classes) == (jnp.float16, "device", 10)  # type: ignore[attr-defined]
    assert default_input_shape("wrn-50-2") == (224, 224, 3)
    assert paramshare.create_model("wrn-50-2").num_classes == 1000  # type: ignore[attr-defined]
