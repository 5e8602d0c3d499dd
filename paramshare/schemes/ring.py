"""Recurrent parameter generators: all kernels from one ring of parameters, of any size."""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp

from paramshare.schemes.initial import he_fan_out, model_std
from paramshare.schemes.interface import (
    Initial,
    Scheme,
    SchemeError,
    Site,
    Weights,
    bank_dtype,
    check_choice,
    check_count,
)
from paramshare.schemes.permutation import Permutation, derive, mix, permute, signs

Mode = Literal["ring", "global", "tile", "hash"]
# The standard deviation of the ring at initialization, as in the authors' code: He-normal for a
# 3x3 kernel with 512 outputs.
SIGMA = (2 / 4608) ** 0.5


@dataclasses.dataclass(frozen=True)
class Ring(Scheme):
    r"""Kernels generated from one ring of N parameters.

    .. math:: K_i = s_i R_i W

    W is trained. R_i picks slots of the ring and (except in mode "tile") flips signs. It is a fixed
    pseudo-random function of the seed, the site's path and shape, and N, and is not stored. The
    scale s_i = std_i / sigma gives every kernel the standard deviation of its layer's initializer,
    for any N; sigma is the ring's own at initialization. With initial="model", std_i is measured on
    the model's initializer; with "paper", it is He's sqrt(2 / fan_out). N is any positive integer.
    In the modes "ring" and "global", kernels of T entries in total use each slot floor(T / N) or
    ceil(T / N) times; for N >= T no slot is shared.

    The mode decides how R_i picks slots:

    * "ring": site i, of n_i entries, takes the next n_i slots in shuffled order, wrapping around
      the ring. If n_i <= N, its kernel uses no slot twice.
    * "global": T div N copies of the ring and T mod N more slots, shuffled over all sites. A kernel
      may use a slot more than once.
    * "tile": every site reads from slot 0 onwards, in order, without signs: plain reuse, for
      comparison.
    * "hash": every entry of every kernel takes a random slot, so use is uneven. For comparison
      (HashedNets), and for adding sites later: the other sites keep their slots. Its gradient is a
      scatter-add, which is nondeterministic on GPUs; the other modes add nothing by a scatter.

    A ring saves storage, optimizer state and gradient traffic, but no arithmetic: every kernel is
    still made and used at full size. The modes "ring" and "global" support reverse-mode
    differentiation (`jax.grad`) only, not `jax.jvp`.

    Args:
      size: N, at least 1.
      mode: how slots are picked.
      seed: the seed of the maps R_i; a trained ring is useless with any other seed.
      block: the number of neighbours that stay together when "ring" or "global" shuffle. Larger
        blocks make the gather faster and the sharing coarser.
      initial: the initialization, as described above. With "model", the scales are measured at
        `share`. They are never stored, so a trained ring needs the same value of `initial` and a
        model with the same initializers.

    Raises:
      SchemeError: if an argument is invalid.

    Example:
      >>> import jax
      >>> from paramshare import Ring, Site
      >>> sites = (Site("a/kernel", (8, 8), std=0.3), Site("b/kernel", (8, 16), std=0.2))
      >>> scheme = Ring(size=100)
      >>> weights = scheme.init(jax.random.key(0), sites)
      >>> weights.bank["ring"].shape, weights.coefficients
      ((100,), {})
      >>> [kernel.shape for kernel in scheme.expand(weights, sites)]
      [(8, 8), (8, 16)]

    References:
      Wang et al., Recurrent Parameter Generators, arXiv:2107.07110; Compact and Optimal Deep
      Learning with Recurrent Parameter Generators, WACV 2023. Mode "hash": Chen et al., Compressing
      Neural Networks with the Hashing Trick, ICML 2015.
    """

    size: int
    mode: Mode = "ring"
    seed: int = 0
    block: int = 1
    initial: Initial = "model"

    def __post_init__(self):
        for name, least in (("size", 1), ("block", 1), ("seed", 0)):
            object.__setattr__(self, name, check_count("Ring", name, getattr(self, name), least))
        check_choice("Ring", "mode", self.mode, Mode)
        check_choice("Ring", "initial", self.initial, Initial)
        if self.block > 1 and self.mode in ("tile", "hash"):
            raise SchemeError(
                f"Ring(block={self.block}) needs mode 'ring' or 'global'; mode {self.mode!r} does "
                "not shuffle"
            )
        if self.size >= 2**31:
            raise SchemeError(f"Ring(size={self.size}): size must be below 2^31")

    def _check(self, sites: tuple[Site, ...]) -> None:
        total = sum(site.size for site in sites)
        if total >= 2**31:
            raise SchemeError(
                f"{self} would generate {total:,} kernel entries; one ring can generate at "
                "most 2^31 - 1; give each stage its own ring"
            )

    def _init(self, key: jax.Array, sites: tuple[Site, ...]) -> Weights:
        """The ring starts as N(0, sigma^2), sigma^2 = 2 / 4608."""
        return Weights({"ring": SIGMA * jax.random.normal(key, (self.size,), bank_dtype(sites))})

    def _expand(self, weights: Weights, sites: tuple[Site, ...]) -> tuple[jax.Array, ...]:
        kernels = []
        picked, scales = self._pick(weights.bank["ring"], sites), self._scales(sites)
        for site, values, scale in zip(sites, picked, scales, strict=True):
            factor = jnp.asarray(scale, values.dtype)
            if self.mode != "tile":
                factor = jnp.where(signs(site.size, self._key(site, "signs")), -factor, factor)
            kernels.append((factor * values).reshape(site.shape))
        return tuple(kernels)

    def _from_dense(self, kernels: tuple[jax.Array, ...], sites: tuple[Site, ...]) -> Weights:
        """Every slot is a weighted mean of the entries that it serves.

        W = sum_i s_i R_i^T K_i / sum_i s_i^2 |R_i|^T 1. Exact in modes "ring" and "global" if N is
        at least the number of entries T: no slot is then used twice. Slots that no site uses are
        zero.
        """
        zeros_N = jnp.zeros((self.size,), kernels[0].dtype)
        expand = jax.vjp(lambda ring: self._expand(Weights({"ring": ring}), sites), zeros_N)[1]
        pick = jax.vjp(lambda ring: self._pick(ring, sites), zeros_N)[1]
        (sums_N,) = expand(kernels)
        squares = [scale**2 for scale in self._scales(sites)]
        (weights_N,) = pick(
            tuple(
                jnp.full((site.size,), square, zeros_N.dtype)
                for site, square in zip(sites, squares, strict=True)
            )
        )
        return Weights({"ring": sums_N / jnp.where(weights_N == 0, 1, weights_N)})

    def _scales(self, sites: tuple[Site, ...]) -> list[float]:
        self.check_initializer(sites)
        paper = self.initial == "paper"
        return [(he_fan_out(site) if paper else model_std(site)) / SIGMA for site in sites]

    def _key(self, site: Site | None, what: str) -> int:
        return derive(self.seed, self.size, what, *([site, *site.shape] if site else []))

    def _pick(self, ring_N: jax.Array, sites: tuple[Site, ...]) -> tuple[jax.Array, ...]:
        """Every site's slots, (n_i,) each, before signs and scale: linear in the ring."""
        sizes = [site.size for site in sites]
        if self.mode == "tile":
            return tuple(_around(ring_N, size) for size in sizes)
        if self.mode == "hash":
            slots = [
                mix(mix(jax.lax.iota(jnp.uint32, site.size)) ^ jnp.uint32(self._key(site, "slots")))
                for site in sites
            ]
            return tuple(
                jnp.take(ring_N, (slot % jnp.uint32(self.size)).astype(jnp.int32), mode="clip")
                for slot in slots
            )
        total = sum(sizes)
        if self.mode == "global":
            laps, remainder = divmod(total, self.size)
            last = jnp.asarray(permute(ring_N, Permutation(self.size, self._key(None, "rest"))))[
                :remainder
            ]
            pool = jnp.concatenate([_around(ring_N, laps * self.size), last])
            return tuple(jax.lax.split(self._shuffle(pool, self._key(None, "pool")), sizes))
        # Mode "ring": repeat the ring up to T entries, cut them into sites, and shuffle each site.
        pieces = jax.lax.split(_around(ring_N, total), sizes)
        return tuple(
            self._shuffle(piece, self._key(site, "order"))
            for piece, site in zip(pieces, sites, strict=True)
        )

    def _shuffle(self, values: jax.Array, key: int) -> jax.Array:
        blocks = values.size // self.block
        return permute(values, Permutation(blocks, key), self.block) if blocks else values


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _around(ring_N: jax.Array, size: int) -> jax.Array:
    """The first `size` entries of the endlessly repeated ring.

    Its derivative is a product with ones, and so is its gradient: XLA sums the first axis of
    (laps, N) slowly on CPUs, where 5 laps of 2,359,296 take 82 ms instead of 2.
    """
    laps = -(-size // ring_N.size)
    return jnp.broadcast_to(ring_N, (laps, ring_N.size)).reshape(-1)[:size]


@_around.defjvp
def _around_jvp(size, primals, tangents):
    (ring_N,), (d_ring_N,) = primals, tangents
    ones_L = jnp.ones(-(-size // ring_N.size), d_ring_N.dtype)
    laps = jnp.einsum("l,n->ln", ones_L, d_ring_N, precision="highest")
    return _around(ring_N, size), laps.reshape(-1)[:size]
