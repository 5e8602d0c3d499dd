"""Sampling from decoders, with a cache of keys and values."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from paramshare.models.layers import ModelError


def sample(
    model: nn.Module,
    variables: Any,
    prompt_BxT: jax.Array,
    count: int,
    key: jax.Array,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
) -> jax.Array:
    """Tokens that continue a prompt, drawn one after the other in one compiled loop.

    The network sees at most the last `model.length` tokens. When its cache is full, it is filled
    again with the last half of them, as if the sequence began there.

    Args:
      model: a `Decoder`, or a `Shared` of one.
      variables: its variables.
      prompt_BxT: the tokens to continue, at least one; of more than `model.length`, the last ones.
      count: number of tokens to draw.
      key: PRNG key; without effect at temperature 0.
      temperature: divides the logits; 0 always takes the likeliest token.
      top_k: draw from this many of the likeliest tokens; 0 for all.

    Returns:
      (B, count) int32.

    Raises:
      ModelError: if the model is no decoder, or an argument is out of range.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from paramshare.models import Decoder, sample
      >>> model, prompt = Decoder(depth=1, width=16, vocabulary=9), jnp.array([[1, 2, 3]])
      >>> variables = model.init(jax.random.key(0), prompt)
      >>> sample(model, variables, prompt, 5, jax.random.key(1)).shape
      (1, 5)
    """
    length = getattr(model, "length", None)
    if not isinstance(length, int):
        raise ModelError(
            f"{type(model).__name__} has no attribute length, so it is no decoder with a cache; "
            "pass a Decoder, or a Shared of one"
        )
    if prompt_BxT.ndim != 2 or not prompt_BxT.shape[1]:
        raise ModelError(
            f"the prompt has shape {prompt_BxT.shape}; it must be (batch, tokens), with at least "
            "one token"
        )
    if not 0 <= temperature < math.inf:
        raise ModelError(f"temperature={temperature}; it must be 0 or a positive number")
    for name, value, least in (("count", count, 1), ("top_k", top_k, 0)):
        if type(value) is not int or value < least:
            raise ModelError(f"{name}={value}; it must be an integer of at least {least}")
    prompt_BxT = jnp.asarray(prompt_BxT, jnp.int32)[:, -length:]
    variables = {name: tree for name, tree in variables.items() if name != "cache"}
    return _sample(model, length, count, float(temperature), top_k, variables, prompt_BxT, key)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _sample(
    model: nn.Module,
    length: int,
    count: int,
    temperature: float,
    top_k: int,
    variables: Any,
    prompt_BxT: jax.Array,
    key: jax.Array,
) -> jax.Array:
    kept = max(1, length // 2)

    def decode(cache: Any, tokens_BxT: jax.Array) -> tuple[jax.Array, Any]:
        logits_BxTxV, cache = model.apply(
            {**variables, **cache}, tokens_BxT, decode=True, mutable=["cache"]
        )
        return logits_BxTxV[:, -1], dict(cache)

    def step(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        logits_BxV, cache, used, recent_BxK = carry
        token_B = _draw(logits_BxV, key, temperature, top_k)
        recent_BxK = jnp.concatenate([recent_BxK[:, 1:], token_B[:, None]], axis=1)
        full = used == length
        logits_BxV, cache = jax.lax.cond(
            full, lambda: decode({}, recent_BxK), lambda: decode(cache, token_B[:, None])
        )
        used = jnp.where(full, kept, used + 1)
        return (logits_BxV, cache, used, recent_BxK), token_B

    logits_BxV, cache = decode({}, prompt_BxT)
    used = jnp.asarray(prompt_BxT.shape[1], jnp.int32)
    missing = max(0, kept - prompt_BxT.shape[1])  # filled up by the time they are used
    recent_BxK = jnp.pad(prompt_BxT, ((0, 0), (missing, 0)))[:, -kept:]
    start = logits_BxV, cache, used, recent_BxK
    return jax.lax.scan(step, start, jax.random.split(key, count))[1].T


def _draw(logits_BxV: jax.Array, key: jax.Array, temperature: float, top_k: int) -> jax.Array:
    """(B,) int32: a token for each row of logits."""
    if temperature == 0:
        return jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
    if 0 < top_k < logits_BxV.shape[-1]:
        least_Bx1 = jax.lax.top_k(logits_BxV, top_k)[0][:, -1:]
        logits_BxV = jnp.where(logits_BxV < least_Bx1, -jnp.inf, logits_BxV)
    return jax.random.categorical(key, logits_BxV / temperature).astype(jnp.int32)
