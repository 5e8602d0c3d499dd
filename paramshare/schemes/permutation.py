"""Pseudo-random permutations and signs, computed on the fly and never stored.

Only integer arithmetic: the same on every host, device and library version, since checkpoints do
not contain them.
"""

import dataclasses
import functools
import hashlib
import math

import jax
import jax.numpy as jnp

from paramshare.ops import computed_first

ROUNDS = 6


def derive(*parts: object) -> int:
    """A 32-bit key, a pure function of the parts' text."""
    return int.from_bytes(
        hashlib.sha256("\0".join(map(str, parts)).encode()).digest()[:4], "little"
    )


def mix(x: jax.Array) -> jax.Array:
    """A bijection of 32-bit words; each output bit depends on all input bits.

    MurmurHash3's finaliser (Appleby, public domain).
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def signs(size: int, key: int) -> jax.Array:
    """(size,) bool, each True (minus) with probability one half."""
    return (mix(jax.lax.iota(jnp.uint32, size) ^ jnp.uint32(key)) & 1).astype(bool)


@dataclasses.dataclass(frozen=True)
class Permutation:
    """A pseudo-random bijection of 0 .. size - 1.

    A Feistel network over Z_a x Z_b with a b >= size and both sides near its square root (Black &
    Rogaway, Ciphers with arbitrary finite domains, CT-RSA 2002). Each of six rounds adds a hash of
    one side to the other. Where a b > size, values outside are sent through again until they fall
    inside ("cycle walking"). Subtracting undoes a round, so the inverse costs the same.

    Attributes:
      size: 1 or more, below 2^31.
      key: any 32-bit integer.
      inverse: whether this is the inverse of the permutation of that key.

    Example:
      >>> from paramshare.schemes.permutation import Permutation
      >>> forth, back = Permutation(10, key=3), Permutation(10, key=3, inverse=True)
      >>> sorted(forth().tolist())
      [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
      >>> forth()[back()].tolist()
      [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """

    size: int
    key: int
    inverse: bool = False

    def __call__(self) -> jax.Array:
        """The image of each place: (size,) int32."""
        return self._walk(computed_first(self._grid()))

    # Both are traced once for each permutation, however many programs they are part of.
    @functools.partial(jax.jit, static_argnums=0, inline=True)
    def _grid(self) -> jax.Array:
        """(a, b) int32, without cycle walking."""
        a, b = _sides(self.size)
        # A flat grid would be fused into the rounds, which then divide to find their place.
        return self._rounds(
            jax.lax.broadcasted_iota(jnp.uint32, (a, 1), 0),
            jax.lax.broadcasted_iota(jnp.uint32, (1, b), 1),
        ).astype(jnp.int32)

    @functools.partial(jax.jit, static_argnums=0, inline=True)
    def _walk(self, grid: jax.Array) -> jax.Array:
        index = grid.reshape(-1)[: self.size]
        if grid.size > self.size:
            outside = jax.lax.iota(jnp.int32, grid.size - self.size) + self.size
            places = dataclasses.replace(self, inverse=not self.inverse)._again(outside)
            # A cycle of places that are all outside would never end; nothing leads into it.
            inside = jax.lax.while_loop(
                lambda x: jnp.any(x >= self.size),
                lambda x: jnp.where(x >= self.size, self._again(x), x),
                jnp.where(places < self.size, outside, 0),
            )
            index = index.at[places].set(inside, mode="drop", unique_indices=True)
        return index

    def _again(self, index: jax.Array) -> jax.Array:
        """The images of these places on the grid, without cycle walking."""
        x, b = index.astype(jnp.uint32), jnp.uint32(_sides(self.size)[1])
        return self._rounds(x // b, x % b).astype(jnp.int32)

    def _rounds(self, left: jax.Array, right: jax.Array) -> jax.Array:
        a, b = (jnp.uint32(side) for side in _sides(self.size))
        for number in reversed(range(ROUNDS)) if self.inverse else range(ROUNDS):
            key = jnp.uint32(derive(self.key, number))
            if number % 2:
                right = self._add(right, mix(left ^ key) % b, b)
            else:
                left = self._add(left, mix(right ^ key) % a, a)
        return left * b + right

    def _add(self, x: jax.Array, y: jax.Array, modulus: jax.Array) -> jax.Array:
        total = x + (modulus - y if self.inverse else y)
        return jnp.where(total >= modulus, total - modulus, total)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def permute(x_N: jax.Array, permutation: Permutation, block: int = 1) -> jax.Array:
    """x[permutation()], in blocks of `block` neighbours; a last, incomplete block stays in place.

    The gradient is a gather by the inverse permutation. Without a scatter-add it has the same bits
    every time, on GPUs too.

    Args:
      x_N: a vector; N div block must be the permutation's size.
      permutation: the permutation of the blocks.
      block: entries in a block.
    """
    whole = permutation.size * block
    blocks = x_N[:whole].reshape(-1, block)
    moved = jnp.take(blocks, permutation(), axis=0, mode="clip").reshape(-1)
    return moved if whole == x_N.size else jnp.concatenate([moved, x_N[whole:]])


def _permute_forward(x_N, permutation, block):
    return permute(x_N, permutation, block), None


def _permute_backward(permutation, block, _, gradient_N):
    return (
        permute(
            gradient_N, dataclasses.replace(permutation, inverse=not permutation.inverse), block
        ),
    )


permute.defvjp(_permute_forward, _permute_backward)


@functools.cache
def _sides(size: int) -> tuple[int, int]:
    """Two numbers near the square root whose product is `size`, or else little more."""
    root = math.isqrt(size)
    # A side of 2 or 3 would keep too many neighbours together.
    for a in range(root, max(root // 4, 3), -1):
        if size % a == 0:
            return a, size // a
    a = root if root * root == size else root + 1
    return a, -(-size // a)
