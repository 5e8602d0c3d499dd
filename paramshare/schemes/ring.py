"""Recurrent parameter generators: all kernels out of one ring of numbers, of any size."""

import dataclasses
import itertools
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from paramshare.schemes.initial import Fan, check_variance, standard_deviation
from paramshare.schemes.interface import SchemeError, Site, bank_dtype, check_arrays, check_count, check_sites
from paramshare.schemes.permutation import Permutation, derive, mix, permute, signs

Mode = Literal["ring", "global", "tile", "hash"]
SIGMA = (2 / 4608) ** 0.5  # of the fresh ring: the reference's, He-normal for a 3x3 kernel of 512 outputs


@dataclasses.dataclass(frozen=True)
class Ring:
    r"""Kernels generated from one ring of N numbers.

    .. math:: K_i = s_i R_i W

    W is trained; R_i, which picks slots of the ring and flips signs, is a fixed pseudo-random function of the seed, the site's path and
    shape, and N, and stored nowhere; s_i = std_i / sigma gives every kernel the standard deviation of its layer's own initialiser,
    std_i = sqrt(scale / fan), whatever N is. N is any positive integer: kernels of T numbers in all use each slot T div N times or once
    more, and from N = T on this is the unshared network.

    Modes: how R_i picks.

    * "ring": site i takes the next n_i slots, around and around the ring, in an order of its own. No slot twice in a kernel
      while n_i <= N.
    * "global": the ring, T div N times and T mod N slots more, in one random order over all sites. Slots may repeat in a kernel.
    * "tile": every site reads on from slot 0, in order, without signs: plain reuse, for comparison.
    * "hash": every number of every kernel takes a slot at random: uneven use. For comparison (HashedNets), and for sites that are added
      later: no other site moves. Its gradient is a scatter-add, whose order of additions a GPU does not fix; the other modes have none.

    A ring saves storage, optimizer state and gradient traffic, no arithmetic: every kernel is still made and used at full size.
    Gradients are for reverse mode (`jax.grad`); modes "ring" and "global" have no forward mode (`jax.jvp`).

    Args:
      size: N, at least 1.
      mode: see above.
      seed: of the maps; a trained ring is worthless under another one.
      block: neighbours that stay together when "ring" or "global" permute; larger ones gather faster, and share more coarsely.
      scale: of every kernel's initial variance, `scale / fan`: 2 is He's, 1 LeCun's (Flax's default).
      fan: "fan_out" (the reference's) or "fan_in".

    Raises:
      SchemeError: if a number or a name is none of these.

    Example:
      >>> import jax
      >>> from paramshare import Ring, Site
      >>> sites = (Site("conv1/kernel", (3, 3, 8, 8)), Site("conv2/kernel", (3, 3, 8, 16)))
      >>> scheme = Ring(size=500)
      >>> bank, coefficients = scheme.init(jax.random.key(0), sites)
      >>> bank["ring"].shape, coefficients
      ((500,), {})
      >>> [kernel.shape for kernel in scheme.expand(bank, coefficients, sites)]
      [(3, 3, 8, 8), (3, 3, 8, 16)]

    References:
      Wang et al., Recurrent Parameter Generators, arXiv:2107.07110; Compact and Optimal Deep Learning with Recurrent Parameter
      Generators, WACV 2023. Mode "hash": Chen et al., Compressing Neural Networks with the Hashing Trick, ICML 2015.
    """

    size: int
    mode: Mode = "ring"
    seed: int = 0
    block: int = 1
    scale: float = 2.0
    fan: Fan = "fan_out"

    def __post_init__(self):
        object.__setattr__(self, "size", check_count("Ring", "size", self.size, 1))
        object.__setattr__(self, "block", check_count("Ring", "block", self.block, 1))
        object.__setattr__(self, "seed", check_count("Ring", "seed", self.seed, 0))
        if self.mode not in get_args(Mode):
            raise SchemeError(f"Ring(mode={self.mode!r}): the modes are {', '.join(map(repr, get_args(Mode)))}")
        check_variance("Ring", self.scale, self.fan)
        if self.block > 1 and self.mode in ("tile", "hash"):
            raise SchemeError(f"Ring(block={self.block}) goes with mode 'ring' or 'global'; mode {self.mode!r} permutes nothing")
        if self.size >= 2**31:
            raise SchemeError(f"Ring(size={self.size}): a ring has less than 2^31 numbers")

    def check(self, sites: tuple[Site, ...]) -> None:
        """Raises `SchemeError` unless there are sites, with less than 2^31 numbers together. Their shapes may differ."""
        check_sites(sites, self)
        total = sum(site.size for site in sites)
        if total >= 2**31:
            raise SchemeError(f"{self} would make {total:,} numbers; a ring serves less than 2^31: give each stage a ring of its own")

    def init(self, key: jax.Array, sites: tuple[Site, ...]) -> tuple[dict[str, jax.Array], dict]:
        """Draws `{"ring": (N,)}` from N(0, sigma^2), sigma^2 = 2 / 4608; there are no coefficients."""
        self.check(sites)
        return {"ring": SIGMA * jax.random.normal(key, (self.size,), bank_dtype(sites))}, {}

    def expand(self, bank: dict[str, jax.Array], coefficients: dict, sites: tuple[Site, ...]) -> tuple[jax.Array, ...]:
        """The kernels; `SchemeError` if the ring is not of shape (N,)."""
        check_arrays(self, "a bank", bank, {"ring": (self.size,)})
        picked = self._pick(bank["ring"], sites)
        scaled = []
        for site, values, scale in zip(sites, picked, self._scales(sites), strict=True):
            factor = jnp.asarray(scale, values.dtype)
            if self.mode != "tile":
                factor = jnp.where(signs(site.size, self._key(site, "signs")), -factor, factor)
            scaled.append((factor * values).reshape(site.shape).astype(site.dtype))
        return tuple(scaled)

    def from_dense(self, kernels: tuple[jax.Array, ...], sites: tuple[Site, ...]) -> tuple[dict[str, jax.Array], dict]:
        """The ring whose kernels are nearest to the given ones, in the sum of squares.

        Every slot is a weighted mean of what it stands for, W = sum_i s_i R_i^T K_i / sum_i s_i^2 |R_i|^T 1; exact from N = T on, where the
        mode uses no slot twice ("ring", "global"). Slots that no site uses are zero.

        Args:
          kernels: arrays, in the order of the sites.
          sites: the bank's sites.

        Raises:
          SchemeError: if the kernels do not have the sites' shapes.
        """
        self.check(sites)
        check_arrays(self, "kernels", tuple(kernels), tuple(site.shape for site in sites))
        dtype = bank_dtype(sites)
        wide = tuple(dataclasses.replace(site, dtype=jnp.dtype(dtype).name) for site in sites)
        fresh = jnp.zeros((self.size,), dtype)
        (sums_N,) = jax.vjp(lambda ring: self.expand({"ring": ring}, {}, wide), fresh)[1](tuple(jnp.asarray(k, dtype) for k in kernels))
        squares = tuple(jnp.full((site.size,), scale**2, dtype) for site, scale in zip(sites, self._scales(sites), strict=True))
        (weights_N,) = jax.vjp(lambda ring: self._pick(ring, sites), fresh)[1](squares)
        return {"ring": sums_N / jnp.where(weights_N == 0, 1, weights_N)}, {}

    def _scales(self, sites: tuple[Site, ...]) -> list[float]:
        return [standard_deviation(site, self.scale, self.fan) / SIGMA for site in sites]

    def _key(self, site: Site | None, what: str) -> int:
        return derive(self.seed, self.size, what, *([site, *site.shape] if site else []))

    def _pick(self, ring_N: jax.Array, sites: tuple[Site, ...]) -> tuple[jax.Array, ...]:
        """The slots' values for every site, (n_i,) each, before signs and scale: linear in the ring."""
        sizes = [site.size for site in sites]
        if self.mode == "tile":
            return tuple(_around(ring_N, size) for size in sizes)
        if self.mode == "hash":
            slots = [mix(mix(jax.lax.iota(jnp.uint32, site.size)) ^ jnp.uint32(self._key(site, "slots"))) for site in sites]
            return tuple(jnp.take(ring_N, (slot % jnp.uint32(self.size)).astype(jnp.int32), mode="clip") for slot in slots)
        total = sum(sizes)
        if self.mode == "global":
            laps, rest = divmod(total, self.size)
            last = jnp.asarray(permute(ring_N, Permutation(self.size, self._key(None, "rest"))))[:rest]
            pool = jnp.concatenate([_around(ring_N, laps * self.size), last])
            return _cut(self._shuffle(pool, self._key(None, "pool")), sizes)
        # A lap is the ring itself, so that T numbers in ring order are its laps end to end, and each site's share a piece of them.
        pieces = _cut(_around(ring_N, total), sizes)
        return tuple(self._shuffle(piece, self._key(site, "order")) for piece, site in zip(pieces, sites, strict=True))

    def _shuffle(self, values: jax.Array, key: int) -> jax.Array:
        blocks = values.size // self.block
        return permute(values, Permutation(blocks, key), self.block) if blocks else values


def _around(ring_N: jax.Array, size: int) -> jax.Array:
    """The first `size` numbers of the ring repeated without end. Its gradient sums the laps: no scatter."""
    laps = -(-size // ring_N.size)
    return jnp.broadcast_to(ring_N, (laps, ring_N.size)).reshape(-1)[:size]


def _cut(values: jax.Array, sizes: list[int]) -> tuple[jax.Array, ...]:
    """Consecutive pieces of those sizes."""
    ends = list(itertools.accumulate(sizes))
    return tuple(values[end - size : end] for size, end in zip(sizes, ends, strict=True))
