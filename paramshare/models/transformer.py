"""Parts of transformers: attention with a cache, MLPs, blocks, and stacks of equal blocks."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from paramshare.models.layers import ModelError

ROTARY_BASE = 10_000.0


class Attention(nn.Module):
    """Multi-head self-attention, in which groups of heads may share keys and values.

    Kernels: `query` (D, H, K), `key` and `value` (D, G, K), `out` (H, K, D), for D features, H
    heads of K features and G heads of keys and values.

    With `decode`, keys and values are stored in the collection `cache`, and tokens also attend to
    those of earlier calls.

    Attributes:
      heads: H; divides D.
      kv_heads: G; divides H.
      length: tokens that the cache holds.
      causal: whether a token attends to itself and earlier tokens only.
      rotary: whether queries and keys are rotated by their position.
      bias: whether the four layers have biases.
      dtype: compute dtype.
      kernel_init: initialiser of query, key and value.
      out_init: initialiser of `out`.

    References:
      Vaswani et al., NeurIPS 2017, arXiv:1706.03762. Grouped queries: Ainslie et al., EMNLP 2023,
      arXiv:2305.13245.
    """

    heads: int
    kv_heads: int
    length: int = 0
    causal: bool = False
    rotary: bool = False
    bias: bool = True
    dtype: Any = jnp.float32
    kernel_init: Callable = nn.initializers.xavier_uniform()
    out_init: Callable = nn.initializers.xavier_uniform()

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array, start: jax.Array, decode: bool) -> jax.Array:
        B, T, D = x_BxTxD.shape
        G, K = self.kv_heads, D // self.heads
        layer = functools.partial(
            nn.DenseGeneral, use_bias=self.bias, dtype=self.dtype, kernel_init=self.kernel_init
        )
        query = layer((self.heads, K), name="query")(x_BxTxD)
        key = layer((G, K), name="key")(x_BxTxD)
        value = layer((G, K), name="value")(x_BxTxD)
        position_T = start + jnp.arange(T, dtype=jnp.int32)
        if self.rotary:
            query, key = rotated(query, position_T), rotated(key, position_T)
        if decode:
            shape = (B, self.length, G, K)
            cached_key = self.variable("cache", "keys", jnp.zeros, shape, self.dtype)
            cached_value = self.variable("cache", "values", jnp.zeros, shape, self.dtype)
            if not self.is_initializing():
                place = (0, start, 0, 0)
                cached_key.value = jax.lax.dynamic_update_slice(cached_key.value, key, place)
                cached_value.value = jax.lax.dynamic_update_slice(cached_value.value, value, place)
            key, value = cached_key.value, cached_value.value
        query_BxTxGxQxK = query.reshape(B, T, G, self.heads // G, K)
        scores = jnp.einsum("btgqk,bsgk->bgqts", query_BxTxGxQxK, key).astype(jnp.float32)
        scores *= K**-0.5
        if self.causal:
            visible_TxS = jnp.arange(key.shape[1])[None] <= position_T[:, None]
            scores = jnp.where(visible_TxS[None, None, None], scores, -jnp.inf)
        weights = jax.nn.softmax(scores).astype(self.dtype)
        y = jnp.einsum("bgqts,bsgk->btgqk", weights, value).reshape(B, T, self.heads, K)
        return layer(D, axis=(-2, -1), kernel_init=self.out_init, name="out")(y)


def rotated(x_BxTxHxK: jax.Array, position_T: jax.Array) -> jax.Array:
    """Features turned in pairs (i, i + K / 2) by their position: rotary embedding.

    Products of queries and keys then depend on the difference of their positions.

    References:
      Su et al., RoFormer, arXiv:2104.09864.

    Example:
      >>> x = jnp.ones((1, 1, 1, 4))
      >>> a = rotated(x, jnp.array([5])) @ rotated(x, jnp.array([2]))[0, 0].T
      >>> b = rotated(x, jnp.array([9])) @ rotated(x, jnp.array([6]))[0, 0].T
      >>> bool(jnp.allclose(a, b, rtol=1e-5))
      True
    """
    pairs = x_BxTxHxK.shape[-1] // 2
    frequency_F = ROTARY_BASE ** (-jnp.arange(pairs, dtype=jnp.float32) / pairs)
    angle_TxF = position_T.astype(jnp.float32)[:, None] * frequency_F[None]
    sin, cos = jnp.sin(angle_TxF)[None, :, None], jnp.cos(angle_TxF)[None, :, None]
    first, second = jnp.split(x_BxTxHxK.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BxTxHxK.dtype)


class MLP(nn.Module):
    """`down(gelu(up(x)))`, or with `gated`, `down(silu(gate(x)) * up(x))` (SwiGLU).

    Attributes:
      width: features inside.
      gated: whether a third layer, `gate`, gates the features.
      bias: whether the layers have biases.
      dtype: compute dtype.
      kernel_init: initialiser of `up` and `gate`.
      out_init: initialiser of `down`.

    References:
      SwiGLU: Shazeer, arXiv:2002.05202.
    """

    width: int
    gated: bool = False
    bias: bool = True
    dtype: Any = jnp.float32
    kernel_init: Callable = nn.initializers.xavier_uniform()
    out_init: Callable = nn.initializers.xavier_uniform()

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        layer = functools.partial(
            nn.Dense, use_bias=self.bias, dtype=self.dtype, kernel_init=self.kernel_init
        )
        y = layer(self.width, name="up")(x_BxTxD)
        if self.gated:
            y = nn.silu(layer(self.width, name="gate")(x_BxTxD)) * y
        else:
            y = nn.gelu(y, approximate=False)
        return layer(x_BxTxD.shape[-1], kernel_init=self.out_init, name="down")(y)


class Block(nn.Module):
    """A pre-norm transformer block: `x += attention(norm1(x))`, then `x += mlp(norm2(x))`.

    Attributes:
      build_attention: builds the attention, given its name.
      build_mlp: builds the MLP, given its name.
      build_norm: builds a norm, given its name.
      dropout: fraction of the features of both branches that are dropped in training.
    """

    build_attention: Callable[..., nn.Module]
    build_mlp: Callable[..., nn.Module]
    build_norm: Callable[..., nn.Module]
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self, x_BxTxD: jax.Array, start: jax.Array, train: bool, decode: bool
    ) -> jax.Array:
        drop = nn.Dropout(self.dropout, deterministic=not train)
        y = self.build_norm(name="norm1")(x_BxTxD)
        x_BxTxD += drop(self.build_attention(name="attention")(y, start, decode))
        y = self.build_norm(name="norm2")(x_BxTxD)
        return x_BxTxD + drop(self.build_mlp(name="mlp")(y))


def apply_blocks(
    build: Callable[..., nn.Module], depth: int, scan: bool, x_BxTxD: jax.Array, *args: Any
) -> jax.Array:
    """Applies `depth` equal blocks, inside a module's call.

    Args:
      build: builds a block, given its name.
      depth: number of blocks.
      scan: False names them `block1`, `block2`, ... True applies one block, `blocks`, whose
        parameters stack those of all layers on their first axis, in a loop: the time of compilation
        does not grow with the depth.
      x_BxTxD: the input of the first block.
      *args: further arguments of every block.
    """
    if not scan:
        for number in range(1, depth + 1):
            x_BxTxD = build(name=f"block{number}")(x_BxTxD, *args)
        return x_BxTxD

    def body(block: nn.Module, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return block(x, *args), None

    loop = nn.scan(
        body,
        variable_axes={"params": 0, "cache": 0},
        split_rngs={"params": True, "dropout": True},
        length=depth,
    )
    return loop(build(name="blocks"), x_BxTxD, None)[0]


def head_count(heads: int | None, width: int) -> int:
    """The number of heads; by default, one for each 64 features, and at least one."""
    return max(1, width // 64) if heads is None else heads


def check_transformer(
    name: str, sizes: dict[str, int], heads: int, kv_heads: int, dropout: float
) -> None:
    """`ModelError` unless sizes are integers of at least 1 and the heads divide the width.

    Args:
      name: of the network, for error messages.
      sizes: attributes by name; one is the `width`.
      heads: number of heads.
      kv_heads: heads of keys and values.
      dropout: a fraction.
    """
    for attribute, size in (sizes | {"heads": heads, "kv_heads": kv_heads}).items():
        if type(size) is not int or size < 1:
            raise ModelError(
                f"{attribute} of a {name} must be an integer of at least 1; got {attribute}={size}"
            )
    width = sizes["width"]
    if width % heads:
        raise ModelError(
            f"heads={heads} must divide the width of a {name}, {width}; choose another number"
        )
    if heads % kv_heads:
        raise ModelError(
            f"kv_heads={kv_heads} must divide the heads of a {name}, {heads}; choose another number"
        )
    if not 0 <= dropout < 1:
        raise ModelError(f"dropout={dropout}; it must be at least 0 and below 1")
