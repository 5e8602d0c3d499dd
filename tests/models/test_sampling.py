"""Sampling with a cache: equal to whole forward passes, below and beyond the length; draws."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paramshare
from paramshare import ModelError
from paramshare.models import Decoder, ViT, sample

LENGTH = 8
MODEL: Any = Decoder(depth=1, width=16, heads=2, vocabulary=11, length=LENGTH)
PROMPT = jnp.array([[1, 2, 3], [9, 8, 7]], jnp.int32)
# Larger than at the start, so that the next token depends on many earlier ones.
VARIABLES = jax.jit(lambda: jax.tree.map(lambda x: 4 * x, MODEL.init(jax.random.key(0), PROMPT)))()
KEY = jax.random.key(0)


WHOLE = jax.jit(lambda tokens: MODEL.apply(VARIABLES, tokens))


def greedy(prompt: jax.Array, count: int) -> np.ndarray:
    """Without a cache: all tokens that the network may see pass through it for each new one."""
    tokens, seen = np.asarray(prompt), min(prompt.shape[1], LENGTH)
    for _ in range(count):
        padded = np.pad(tokens[:, -seen:], ((0, 0), (0, LENGTH - seen)))  # no token sees later ones
        logits = WHOLE(jnp.asarray(padded))[:, seen - 1]
        tokens = np.concatenate([tokens, np.argmax(logits, -1)[:, None].astype(np.int32)], 1)
        seen = LENGTH // 2 if seen == LENGTH else seen + 1
    return tokens[:, prompt.shape[1] :]


@pytest.mark.parametrize("start", [1, 8])
def test_greedy_sampling_equals_whole_forward_passes_also_beyond_the_length(start):
    prompt = jnp.tile(PROMPT, (1, 3))[:, :start]
    tokens = sample(MODEL, VARIABLES, prompt, 19, KEY, temperature=0)
    assert np.array_equal(tokens, greedy(prompt, 19))
    assert len(np.unique(tokens)) > 1


def test_a_cache_among_the_variables_is_not_used():
    _, cache = MODEL.apply(VARIABLES, PROMPT, decode=True, mutable=["cache"])
    tokens = sample(MODEL, {**VARIABLES, **cache}, PROMPT, 6, KEY, temperature=0)
    assert np.array_equal(tokens, sample(MODEL, VARIABLES, PROMPT, 6, KEY, temperature=0))


def test_a_shared_decoder_samples_as_its_dense_form():
    shared = paramshare.create_model("decoder-1-4-tied", 11, (LENGTH,))
    assert isinstance(shared, paramshare.Shared)
    variables = jax.jit(shared.init)(jax.random.key(3), PROMPT)
    expected = sample(shared.model, shared.expand(variables), PROMPT, 9, KEY, temperature=0)
    assert np.array_equal(sample(shared, variables, PROMPT, 9, KEY, temperature=0), expected)


def test_draws_follow_the_distribution():
    """The first token of many draws: frequencies are the softmax of the logits."""
    prompt, count = jnp.tile(PROMPT[:1], (4000, 1)), 4000
    logits = np.asarray(MODEL.apply(VARIABLES, PROMPT[:1])[0, -1], np.float64)
    for temperature, top_k in ((1.0, 0), (0.5, 3)):
        tokens = sample(MODEL, VARIABLES, prompt, 1, KEY, temperature=temperature, top_k=top_k)
        weights = np.exp(logits / temperature)
        weights[np.argsort(logits)[: len(logits) - top_k if top_k else 0]] = 0
        expected = weights / weights.sum()
        frequencies = np.bincount(np.asarray(tokens[:, 0]), minlength=11) / count
        # Four standard deviations of a frequency.
        assert np.all(np.abs(frequencies - expected) <= 4 * np.sqrt(expected / count))


def test_the_seed_decides():
    a, b, c = (sample(MODEL, VARIABLES, PROMPT, 6, jax.random.key(seed)) for seed in (1, 1, 2))
    assert np.array_equal(a, b) and not np.array_equal(a, c)


@pytest.mark.parametrize(
    ("model", "prompt", "options", "message"),
    [
        (ViT(), PROMPT, {}, "ViT has no attribute length"),
        (MODEL, PROMPT[:, :0], {}, r"prompt has shape \(2, 0\)"),
        (MODEL, PROMPT[0], {}, r"prompt has shape \(3,\)"),
        (MODEL, PROMPT, {"temperature": -1.0}, "temperature=-1.0"),
        (MODEL, PROMPT, {"temperature": float("nan")}, "temperature=nan"),
        (MODEL, PROMPT, {"top_k": -1}, "top_k=-1"),
        (MODEL, PROMPT, {"count": 0}, "count=0"),
    ],
)
def test_errors(model, prompt, options, message):
    with pytest.raises(ModelError, match=message):
        sample(model, VARIABLES, prompt, options.pop("count", 3), KEY, **options)
