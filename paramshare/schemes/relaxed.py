"""Relaxed sharing: what a scheme shares, plus a low-rank difference for each site."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from paramshare.schemes.compressed import Compressed
from paramshare.schemes.initial import orthogonal
from paramshare.schemes.interface import (
    Filters,
    SchemeError,
    Site,
    Weights,
    bank_dtype,
    check_count,
    check_flag,
)
from paramshare.schemes.wrapper import Wrapper

ROUNDS = 10  # of alternating between the shared part and the differences, in `from_dense`


@dataclasses.dataclass(frozen=True)
class Relaxed(Wrapper):
    r"""A scheme whose kernels each have a private difference of low rank.

    .. math:: W_l = B_l \operatorname{diag}(s_l) + U_l V_l

    B_l is what the wrapped scheme makes, as a (fan_in, outputs) matrix, U_l is (fan_in, r) and V_l
    (r, outputs), with r the smallest of `rank`, fan_in and the outputs. Rank 0 is the wrapped
    scheme; at full rank a dense network converts without error. With `scale`, each output of a site
    has a scale s_l, (outputs,), that starts at 1; without, s_l = 1. Trainable parameters: those of
    the wrapped scheme, r (fan_in + outputs) a site, and with `scale` the outputs. A shift for each
    layer is the layer's bias: leave biases out of the rules.

    Factors are private and decay; scales are coefficients and do not.

    Initialization. Kernels start as the wrapped scheme starts them: V_l = 0, and U_l has
    orthonormal columns.

    From dense kernels. The wrapped scheme is fitted first, and U_l V_l is the truncated singular
    value decomposition of what it leaves (Bae et al.). Then both are fitted again, in turn, each to
    what the other leaves. This never increases the squared error if the wrapped scheme's fit is the
    nearest, as it is for all schemes but `Repeat`.

    Args:
      scheme: makes the shared part, such as Tied().
      rank: r, 0 or more.
      scale: whether each output of a site has a scale.

    Raises:
      SchemeError: if an argument is invalid.

    Example:
      >>> import jax
      >>> from paramshare import Relaxed, Site, Tied
      >>> sites = tuple(Site(f"block{i}/kernel", (16, 32), std=0.1) for i in range(4))
      >>> scheme = Relaxed(Tied(), rank=2)
      >>> weights = scheme.init(jax.random.key(0), sites)
      >>> {name: factor.shape for name, factor in weights.own["block3.kernel"].items()}
      {'left': (16, 2), 'right': (2, 32)}
      >>> kernels = scheme.expand(weights, sites)
      >>> bool((kernels[0] == kernels[3]).all())  # until it is trained
      True

    References:
      Bae et al., Relaxed Recursive Transformers: Effective Parameter Sharing with Layer-wise LoRA,
      ICLR 2025, arXiv:2410.20672.
    """

    rank: int
    scale: bool = False

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.scheme, Compressed):
            raise SchemeError(
                f"Relaxed({self.scheme}): quantise the relaxed scheme instead, as "
                "Compressed(Relaxed(...))"
            )
        object.__setattr__(self, "rank", check_count("Relaxed", "rank", self.rank, 0))
        check_flag("Relaxed", "scale", self.scale)

    def shared(self, weights: Weights) -> Weights:
        """The arrays of the wrapped scheme."""
        coefficients, own = weights.coefficients, weights.own
        if self.scale:
            coefficients = _inner(coefficients)
        return Weights(weights.bank, coefficients, _inner(own) if self.rank else own)

    def filters(self, weights: Weights, sites: tuple[Site, ...]) -> Filters | None:
        """The wrapped scheme's, without the differences."""
        return self.scheme.filters(self.shared(weights), sites)

    def groups_of(self, sites: tuple[Site, ...]) -> tuple[int, ...] | None:
        """The wrapped scheme's where there are no differences, else None."""
        return None if self.rank or self.scale else self.scheme.groups_of(sites)

    def mixing(self, weights: Weights, sites: tuple[Site, ...]) -> jax.Array | None:
        """The wrapped scheme's where there are no differences, else None."""
        plain = not (self.rank or self.scale)
        return self.scheme.mixing(self.shared(weights), sites) if plain else None

    def combine(self, bank: Any, rows_GxN: jax.Array, site: Site) -> jax.Array:
        """The wrapped scheme's where there are no differences, else the rows as kernels."""
        if self.rank or self.scale:
            return super().combine(bank, rows_GxN, site)
        return self.scheme.combine(bank, rows_GxN, site)

    def _init(self, key: jax.Array, sites: tuple[Site, ...]) -> Weights:
        dtype = bank_dtype(sites)

        def start(number: int, P: int, N: int) -> dict[str, jax.Array]:
            rank = min(self.rank, P, N)
            left_PxR = orthogonal(jax.random.fold_in(key, number), P, rank, dtype)
            return {"left": left_PxR, "right": jnp.zeros((rank, N), dtype)}

        pairs = enumerate(sites) if self.rank else ()
        factors = {site.key: start(number, *_sides(site)) for number, site in pairs}
        scales = {site.key: jnp.ones(_sides(site)[1], dtype) for site in sites}
        return self._weights(self.scheme._init(key, sites), factors, scales)

    def _expand(self, weights: Weights, sites: tuple[Site, ...]) -> tuple[jax.Array, ...]:
        kernels = self.scheme._expand(self.shared(weights), sites)
        matrices = []
        for site, kernel in zip(sites, kernels, strict=True):
            matrix_PxN = _matrix(site, kernel)
            if self.scale:
                matrix_PxN = matrix_PxN * weights.coefficients[site.key]["scale"][None]
            if self.rank:
                matrix_PxN = matrix_PxN + _product(weights.own[site.key])
            matrices.append(matrix_PxN)
        return tuple(s.from_matrix(matrix) for s, matrix in zip(sites, matrices, strict=True))

    def _from_dense(self, kernels: tuple[jax.Array, ...], sites: tuple[Site, ...]) -> Weights:
        targets = [_matrix(site, kernel) for site, kernel in zip(sites, kernels, strict=True)]
        first = self.scheme._from_dense(kernels, sites)

        def fitted(differences: list[jax.Array], shared: Weights | None) -> tuple[Any, ...]:
            """The shared part, scales and factors, each fitted to what the others leave."""
            wanted = [t - d for t, d in zip(targets, differences, strict=True)]
            if shared is None:
                left = tuple(s.from_matrix(m) for s, m in zip(sites, wanted, strict=True))
                shared = self.scheme._from_dense(left, sites)
            made = self.scheme._expand(shared, sites)
            bases = [_matrix(site, kernel) for site, kernel in zip(sites, made, strict=True)]
            scales = [
                _scale(b, w) if self.scale else jnp.ones(b.shape[1], b.dtype)
                for b, w in zip(bases, wanted, strict=True)
            ]
            left = [t - b * s[None] for t, b, s in zip(targets, bases, scales, strict=True)]
            return shared, scales, [_factors(matrix, self.rank) for matrix in left]

        def again(_: int, state: tuple[Any, ...]) -> tuple[Any, ...]:
            shared, _, factors = state
            # With scales, refitting the shared part alone might increase the error.
            return fitted(list(map(_product, factors)), shared if self.scale else None)

        state = fitted([jnp.zeros_like(target) for target in targets], first)
        if self.rank:
            state = jax.lax.fori_loop(1, ROUNDS, again, state)
        shared, scales, factors = state
        keys = [site.key for site in sites]
        return self._weights(
            shared, dict(zip(keys, factors, strict=True)), dict(zip(keys, scales, strict=True))
        )

    def _weights(
        self, shared: Weights, factors: dict[str, Any], scales: dict[str, jax.Array]
    ) -> Weights:
        """The arrays of the wrapped scheme, with factors and scales where there are some."""
        coefficients, own = shared.coefficients, shared.own
        if self.scale:
            coefficients = _joined(coefficients, {key: {"scale": s} for key, s in scales.items()})
        return Weights(shared.bank, coefficients, _joined(own, factors) if self.rank else own)


def _joined(inner: dict[str, Any], outer: dict[str, Any]) -> dict[str, Any]:
    """Entries of sites with those of the wrapped scheme under "shared", where it has some."""
    return {
        key: {**entry, **({"shared": inner[key]} if key in inner else {})}
        for key, entry in outer.items()
    }


def _inner(entries: dict[str, Any]) -> dict[str, Any]:
    return {key: entry["shared"] for key, entry in entries.items() if "shared" in entry}


def _sides(site: Site) -> tuple[int, int]:
    """fan_in and outputs."""
    return site.fan_in, site.matrix_shape[-1]


def _matrix(site: Site, kernel: jax.Array) -> jax.Array:
    """A kernel as (fan_in, outputs)."""
    return site.to_matrix(kernel).reshape(_sides(site))


def _product(factors: dict[str, jax.Array]) -> jax.Array:
    # TPUs and GPUs would round float32 operands.
    return jnp.matmul(factors["left"], factors["right"], precision=jax.lax.Precision.HIGHEST)


def _scale(base_PxN: jax.Array, wanted_PxN: jax.Array) -> jax.Array:
    """The least-squares scale of each column; 1 for columns of zeros."""
    squares_N = jnp.sum(base_PxN**2, axis=0)
    one = jnp.ones((), squares_N.dtype)
    scale_N = jnp.sum(base_PxN * wanted_PxN, axis=0) / jnp.where(squares_N == 0, one, squares_N)
    return jnp.where(squares_N == 0, one, scale_N)


def _factors(matrix_PxN: jax.Array, rank: int) -> dict[str, jax.Array]:
    """Factors of the nearest matrix of a rank (Eckart & Young 1936), equally long."""
    rank = min(rank, *matrix_PxN.shape)
    left, singular, right = jnp.linalg.svd(matrix_PxN, full_matrices=False)
    root_R = jnp.sqrt(singular[:rank])
    return {"left": left[:, :rank] * root_R[None], "right": root_R[:, None] * right[:rank]}
