"""A decoder: a causal transformer that predicts the next token, in the form of today."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from paramshare.models.layers import ModelError
from paramshare.models.transformer import (
    MLP,
    Attention,
    Block,
    apply_blocks,
    check_transformer,
    head_count,
)


class Decoder(nn.Module):
    r"""A causal transformer: pre-norm, RMSNorm, rotary embedding, SwiGLU, no biases.

    Kernels start LeCun-normal; those that write into the residual stream (`out`, `down`) are
    divided by sqrt(2 depth), as in GPT-2. Embedded tokens start at variance 1.

    Parameters are at `embed`, `block1/norm1`, `block1/attention/query/kernel` (D, H, K),
    `.../key` and `.../value` (D, G, K), `.../out` (H, K, D), `block1/norm2`, `block1/mlp/gate`,
    `block1/mlp/up`, `block1/mlp/down`, ..., `norm`, `head`. One bank can serve all blocks:
    `Rule(r"block\d+/attention/query/kernel", Soft(templates=k))`.

    Decoding: `model.apply(variables, tokens, decode=True, mutable=["cache"])` returns the logits
    and a cache, to be passed on with the variables. Each call takes the next tokens, one or more.
    The cache holds `length` tokens; logits of calls that exceed it are NaN.

    Attributes:
      depth: number of blocks.
      width: features of a token, D.
      heads: of the attention, H; None for one for each 64 features.
      kv_heads: heads of keys and values, G; None for H. Fewer make grouped queries.
      mlp_width: features inside the MLPs; None for 8/3 of the width, rounded up to a multiple of
        16, so that the three kernels are about as large as two of 4 times the width.
      vocabulary: number of different tokens.
      length: tokens that the cache holds. Without a cache, sequences can have any length.
      dropout: fraction of features dropped in training.
      tied: use the embedding as the head.
      scan: stack the parameters of all blocks under `blocks`; see `apply_blocks`.
      dtype: compute dtype; the parameters and the logits stay float32.

    Raises:
      ModelError: when called, if the attributes or the tokens are not legal.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from paramshare.models import Decoder
      >>> model, tokens = Decoder(depth=2, width=64, vocabulary=65), jnp.zeros((1, 8), jnp.int32)
      >>> variables = model.init(jax.random.key(0), tokens)
      >>> model.apply(variables, tokens).shape
      (1, 8, 65)
      >>> logits, cache = model.apply(variables, tokens[:, :3], decode=True, mutable=["cache"])
      >>> logits, cache = model.apply(
      ...     variables | cache, tokens[:, 3:4], decode=True, mutable=["cache"]
      ... )
      >>> logits.shape, int(cache["cache"]["position"])
      ((1, 1, 65), 4)

    References:
      Vaswani et al., NeurIPS 2017; Touvron et al., LLaMA, arXiv:2302.13971, for this form.
    """

    depth: int = 6
    width: int = 128
    heads: int | None = None
    kv_heads: int | None = None
    mlp_width: int | None = None
    vocabulary: int = 256
    length: int = 256
    dropout: float = 0.0
    tied: bool = False
    scan: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, tokens_BxT: jax.Array, train: bool = False, decode: bool = False
    ) -> jax.Array:
        heads = head_count(self.heads, self.width)
        kv_heads = heads if self.kv_heads is None else self.kv_heads
        inner = -(-self.width * 8 // 48) * 16 if self.mlp_width is None else self.mlp_width
        sizes = {"depth": self.depth, "width": self.width, "mlp_width": inner}
        sizes |= {"vocabulary": self.vocabulary, "length": self.length}
        check_transformer("decoder", sizes, heads, kv_heads, self.dropout)
        if (self.width // heads) % 2:
            raise ModelError(
                f"heads={heads} of a decoder of width {self.width} have {self.width // heads} "
                "features, which the rotary embedding turns in pairs; choose an even number"
            )
        self._check_tokens(tokens_BxT, decode)
        start = self._start(tokens_BxT.shape[1], decode)
        embed = nn.Embed(
            self.vocabulary,
            self.width,
            dtype=self.dtype,
            embedding_init=nn.initializers.normal(self.width**-0.5),
            name="embed",
        )
        drop = nn.Dropout(self.dropout, deterministic=not train)
        x_BxTxD = drop(embed(tokens_BxT) * self.width**0.5)
        norm = functools.partial(nn.RMSNorm, dtype=self.dtype)
        options = {
            "bias": False,
            "dtype": self.dtype,
            "kernel_init": nn.initializers.lecun_normal(),
            "out_init": nn.initializers.variance_scaling(
                1 / (2 * self.depth), "fan_in", "truncated_normal"
            ),
        }
        attention = functools.partial(
            Attention, heads, kv_heads, self.length, causal=True, rotary=True, **options
        )
        mlp = functools.partial(MLP, inner, gated=True, **options)
        block = functools.partial(Block, attention, mlp, norm, self.dropout)
        x_BxTxD = apply_blocks(block, self.depth, self.scan, x_BxTxD, start, train, decode)
        x_BxTxD = norm(name="norm")(x_BxTxD)
        if self.tied:
            logits_BxTxV = embed.attend(x_BxTxD)
        else:
            head = nn.Dense(self.vocabulary, use_bias=False, dtype=self.dtype, name="head")
            logits_BxTxV = head(x_BxTxD)
        logits_BxTxV = logits_BxTxV.astype(jnp.float32)
        if not decode:
            return logits_BxTxV
        # An array cannot grow, and errors cannot be raised under `jax.jit`.
        fits = start + tokens_BxT.shape[1] <= self.length
        return jnp.where(fits, logits_BxTxV, jnp.nan)

    def _start(self, count: int, decode: bool) -> jax.Array:
        """The position of the first token; moves that of the cache on by `count`."""
        if not decode:
            return jnp.zeros((), jnp.int32)
        position = self.variable("cache", "position", jnp.zeros, (), jnp.int32)
        start = position.value
        if not self.is_initializing():
            position.value = start + count
        return start

    def _check_tokens(self, tokens_BxT: jax.Array, decode: bool) -> None:
        shape, dtype = tokens_BxT.shape, tokens_BxT.dtype
        if len(shape) != 2 or 0 in shape[1:] or not jnp.issubdtype(dtype, jnp.integer):
            raise ModelError(
                f"tokens must be integers of shape (batch, length); got {dtype} {shape}"
            )
        if decode and shape[1] > self.length:
            raise ModelError(
                f"{shape[1]} tokens are more than the cache of this decoder holds, "
                f"{self.length}; pass the last ones only, or build it with a larger length"
            )
        if decode and not self.is_mutable_collection("cache"):
            raise ModelError(
                'decode=True stores keys and values; call apply(..., mutable=["cache"]) and pass '
                "the cache that it returns to the next call"
            )
