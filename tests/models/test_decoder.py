"""Decoders: causality, positions, grouped queries, the cache, stacked blocks, errors."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paramshare import ModelError
from paramshare.models import Decoder

TOKENS = jax.random.randint(jax.random.key(1), (2, 12), 0, 20)


@functools.cache
def build(**options: Any) -> tuple[Any, Any]:
    """A small decoder and its variables."""
    sizes: dict[str, Any] = {"depth": 2, "width": 16, "vocabulary": 20, "length": 12}
    model = Decoder(**sizes | options)
    return model, jax.jit(model.init)(jax.random.key(0), TOKENS)


def logits_of(tokens: Any = TOKENS, **options: Any) -> jax.Array:
    model, variables = build(**options)
    return jitted(model)(variables, tokens)


@functools.cache
def jitted(model: Any) -> Any:
    return jax.jit(model.apply)


def test_paths_shapes_and_size():
    _, variables = build(heads=4, kv_heads=2, mlp_width=24)
    params = variables["params"]
    assert set(params) == {"embed", "block1", "block2", "norm", "head"}
    attention, mlp = params["block2"]["attention"], params["block2"]["mlp"]
    shapes = {name: layer["kernel"].shape for name, layer in {**attention, **mlp}.items()}
    assert shapes == {
        **{"query": (16, 4, 4), "key": (16, 2, 4), "value": (16, 2, 4), "out": (4, 4, 16)},
        **{"gate": (16, 24), "up": (16, 24), "down": (24, 16)},
    }
    block = 2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 24 + 2 * 16
    assert sum(x.size for x in jax.tree.leaves(params)) == 2 * block + 16 + 2 * 20 * 16
    tied, _ = build(tied=True)
    assert "head" not in jax.eval_shape(tied.init, jax.random.key(0), TOKENS)["params"]


def test_llama_2_7b_has_its_published_size():
    model = Decoder(32, 4096, heads=32, mlp_width=11008, vocabulary=32_000)
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), tokens)
    assert sum(x.size for x in jax.tree.leaves(variables)) == 6_738_415_616


def test_no_token_sees_a_later_one():
    other = TOKENS.at[:, 7].set((TOKENS[:, 7] + 1) % 20)
    a, b = logits_of(heads=2), logits_of(other, heads=2)
    assert jnp.array_equal(a[:, :7], b[:, :7])
    assert bool(jnp.all(jnp.any(a[:, 7:] != b[:, 7:], axis=-1)))  # all later ones see it


def test_the_order_of_earlier_tokens_matters():
    """Without positions, a causal block of attention would sum over a set."""
    swapped = TOKENS.at[:, :2].set(TOKENS[:, 1::-1])
    a, b = logits_of(depth=1)[:, -1], logits_of(swapped, depth=1)[:, -1]
    assert float(jnp.max(jnp.abs(a - b))) > 1e-3


def test_grouped_queries_are_heads_with_equal_keys_and_values():
    _, variables = build(heads=4, kv_heads=2)

    def repeat(path: Any, leaf: Any) -> Any:
        names = {str(key.key) for key in path}
        return np.repeat(leaf, 2, axis=1) if names & {"key", "value"} else leaf

    repeated = jax.tree_util.tree_map_with_path(repeat, variables)
    whole: Any = Decoder(2, 16, heads=4, vocabulary=20, length=12)
    expected = logits_of(heads=4, kv_heads=2)
    np.testing.assert_allclose(jitted(whole)(repeated, TOKENS), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{"heads": 4, "kv_heads": 2}, {"scan": True}, {"tied": True}])
def test_decoding_with_a_cache_gives_the_logits_of_the_whole_sequence(options):
    """With a prompt of five tokens, and with one token at a time."""
    model, variables = build(**options)
    whole = logits_of(**options)
    step = jax.jit(lambda v, x: model.apply(v, x, decode=True, mutable=["cache"]))
    cache: Any = {}
    for sizes in ([5] + [1] * 7, [1] * 12):
        cache, parts, start = {}, [], 0
        for size in sizes:
            logits, cache = step(variables | cache, TOKENS[:, start : start + size])
            parts.append(logits)
            start += size
        np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, rtol=2e-5, atol=2e-5)
    # One more does not fit: never a number that is wrong.
    logits, _ = step(variables | cache, TOKENS[:, :1])
    assert bool(jnp.all(jnp.isnan(logits)))


def test_an_initial_cache_is_empty():
    model, _ = build()
    initial: Any = jax.jit(lambda: model.init(jax.random.key(0), TOKENS, decode=True))()
    assert int(initial["cache"]["position"]) == 0
    assert not jnp.any(initial["cache"]["block1"]["attention"]["keys"])
    logits, _ = jax.jit(lambda v: model.apply(v, TOKENS, decode=True, mutable=["cache"]))(initial)
    whole = jitted(model)({"params": initial["params"]}, TOKENS)
    np.testing.assert_allclose(logits, whole, rtol=2e-5, atol=2e-5)


def test_stacked_blocks_compute_the_same():
    plain, variables = build(depth=3)
    stacked: Any = Decoder(3, 16, vocabulary=20, length=12, scan=True)
    params = variables["params"]
    loop = {name: value for name, value in params.items() if not name.startswith("block")}
    blocks = [params[f"block{i}"] for i in (1, 2, 3)]
    loop["blocks"] = jax.tree.map(lambda *leaves: np.stack(leaves), *blocks)
    outputs = jitted(stacked)({"params": loop}, TOKENS)
    np.testing.assert_allclose(outputs, jitted(plain)(variables, TOKENS), atol=2e-6)


def test_bfloat16_computes_and_float32_stays():
    with jax.numpy_dtype_promotion("standard"):  # for Flax's norms
        logits = logits_of(dtype=jnp.bfloat16)
        _, variables = build(dtype=jnp.bfloat16)
    assert logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(logits, logits_of(), atol=0.15)


@pytest.mark.parametrize(
    ("options", "call", "message"),
    [
        ({"heads": 3}, {}, "heads=3 must divide the width of a decoder, 16"),
        ({"heads": 4, "kv_heads": 3}, {}, "kv_heads=3 must divide the heads of a decoder, 4"),
        ({"heads": 16}, {}, "heads=16 of a decoder of width 16 have 1 features"),
        ({"vocabulary": 0}, {}, "vocabulary=0"),
        ({"length": 11}, {"decode": True}, "12 tokens are more than the cache .* 11"),
        ({}, {"tokens": TOKENS.astype(jnp.float32)}, "must be integers .* got float32"),
        ({}, {"tokens": TOKENS[0]}, r"of shape \(batch, length\); got int32 \(12,\)"),
    ],
)
def test_errors(options, call, message):
    sizes: dict[str, Any] = {"depth": 1, "width": 16, "vocabulary": 20}
    model = Decoder(**sizes | options)
    tokens = call.pop("tokens", TOKENS)
    with pytest.raises(ModelError, match=message):
        jax.eval_shape(lambda: model.init(jax.random.key(0), tokens, **call))


def test_a_cache_that_cannot_be_stored_is_an_error():
    model, variables = build()
    with pytest.raises(ModelError, match="mutable"):
        model.apply(variables, TOKENS, decode=True)
