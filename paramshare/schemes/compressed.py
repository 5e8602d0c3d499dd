"""Banks whose parameters are rounded to a few levels, while they are trained in floating point."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from paramshare.schemes.interface import (
    Filters,
    SchemeError,
    Site,
    Weights,
    check_choice,
    check_count,
)
from paramshare.schemes.wrapper import Wrapper

Method = Literal["uniform", "kmeans"]
LEVELS = "levels"  # the entry of the coefficients that holds the grid of every array of a bank
CANDIDATES = 64  # steps that are tried for a uniform grid


@dataclasses.dataclass(frozen=True)
class Compressed(Wrapper):
    r"""A scheme whose bank is quantised to 2^bits levels before kernels are made from it.

    .. math:: q(w) = \ell_{\arg\min_k |w - \ell_k|}, \quad q(0) = 0

    The bank holds the float parameters, which are trained: a straight-through estimator (Bengio et
    al. 2013) takes the gradient at q(w) as that at w. A parameter that is exactly 0 counts as
    pruned: it stays out of the levels, and its gradient is 0. Each array of the bank has levels of
    its own, a trainable entry of the coefficients:

    * "uniform": the edge e of the outermost cells, and the levels |e| ((2 k + 1) / 2^bits - 1),
      symmetric around 0. The edge is trained and not the step between levels: optimizers such as
      Adam change all numbers at one rate, which for a step would be 2^(bits - 1) times too fast.
    * "kmeans": a codebook of 2^bits levels.

    The gradient of the levels is such that under SGD they follow the parameters that are rounded to
    them: a codebook entry moves by the mean of the gradients, as Lloyd's algorithm would move it,
    and the edge by their least-squares fit. Rounding compares and looks up, and adds nothing: q(w)
    has the same bits in every program, on every machine.

    `paramshare.transform.compress` makes such a network from a trained one. qwix, JAX's library for
    quantisation, rounds the operands of convolutions and matrix products. Here these are the
    generated kernels, not the bank that is stored; and it has no codebooks. So this file has an
    estimator of its own.

    Args:
      scheme: the scheme of the bank.
      bits: 2 to 8.
      method: the levels, as above. At initialization, both start from a uniform grid.

    Raises:
      SchemeError: if an argument is invalid.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from paramshare import Ring, Site
      >>> from paramshare.schemes import Compressed
      >>> sites = (Site("a/kernel", (8, 8), std=0.3), Site("b/kernel", (8, 16), std=0.2))
      >>> scheme = Compressed(Ring(size=100), bits=2)
      >>> weights = scheme.init(jax.random.key(0), sites)
      >>> len(jnp.unique(scheme.rounded(weights).bank["ring"]))
      4
      >>> [kernel.shape for kernel in scheme.expand(weights, sites)]
      [(8, 8), (8, 16)]

    References:
      Han et al., Deep Compression, ICLR 2016, arXiv:1510.00149: codebooks by k-means.
      Bengio et al., Estimating or Propagating Gradients Through Stochastic Neurons,
      arXiv:1308.3432. Esser et al., Learned Step Size Quantization, ICLR 2020, arXiv:1902.08153:
      steps that are trained.
    """

    bits: int
    method: Method = "kmeans"

    def __post_init__(self):
        super().__post_init__()
        check_choice("Compressed", "method", self.method, Method)
        object.__setattr__(self, "bits", check_count("Compressed", "bits", self.bits, 2))
        if self.bits > 8:
            raise SchemeError(f"Compressed(bits={self.bits}): bits must be from 2 to 8")
        if isinstance(self.scheme, Compressed):
            raise SchemeError(f"{self.scheme} is quantised already; quantise its scheme instead")

    def rounded(self, weights: Weights) -> Weights:
        """The arrays of the wrapped scheme: the bank is quantised, the levels are left out."""
        bank = jax.tree.map(
            functools.partial(round_to_levels, self.method, self.bits),
            weights.bank,
            weights.coefficients[LEVELS],
        )
        others = {key: leaf for key, leaf in weights.coefficients.items() if key != LEVELS}
        return weights._replace(bank=bank, coefficients=others)

    def with_levels(self, weights: Weights, levels: Any) -> Weights:
        """Arrays of the wrapped scheme, with the levels of every array of the bank.

        Args:
          weights: arrays of the wrapped scheme.
          levels: a tree like the bank; () for the edge of a uniform grid, or (2^bits,).
        """
        return weights._replace(coefficients=weights.coefficients | {LEVELS: levels})

    def uniform_levels(self, bank: Any) -> Any:
        """The levels of a uniform grid for every array of a bank, in the method's form."""
        edges = jax.tree.map(lambda leaf: best_edge(leaf, self.bits), bank)
        if self.method == "uniform":
            return edges
        return jax.tree.map(lambda edge: uniform_grid(edge, self.bits)[0], edges)

    def filters(self, weights: Weights, sites: tuple[Site, ...]) -> Filters | None:
        """The wrapped scheme's, of the quantised bank."""
        return self.scheme.filters(self.rounded(weights), sites)

    def mixing(self, weights: Weights, sites: tuple[Site, ...]) -> jax.Array | None:
        """The wrapped scheme's."""
        return self.scheme.mixing(self.rounded(weights), sites)

    def combine(self, bank: Any, rows_GxN: jax.Array, site: Site) -> jax.Array:
        """The wrapped scheme's, of a bank that `rounded` gives."""
        return self.scheme.combine(bank, rows_GxN, site)

    def groups_of(self, sites: tuple[Site, ...]) -> tuple[int, ...] | None:
        """The wrapped scheme's."""
        return self.scheme.groups_of(sites)

    def _check(self, sites: tuple[Site, ...]) -> None:
        super()._check(sites)
        if LEVELS in {site.key for site in sites}:
            raise SchemeError(f"{self}: no site may have the name {LEVELS!r}; rename the parameter")

    def _init(self, key: jax.Array, sites: tuple[Site, ...]) -> Weights:
        weights = self.scheme.init(key, sites)
        return self.with_levels(weights, self.uniform_levels(weights.bank))

    def _expand(self, weights: Weights, sites: tuple[Site, ...]) -> tuple[jax.Array, ...]:
        return self.scheme._expand(self.rounded(weights), sites)

    def _from_dense(self, kernels: tuple[jax.Array, ...], sites: tuple[Site, ...]) -> Weights:
        """The wrapped scheme's arrays, with uniform levels."""
        weights = self.scheme.from_dense(kernels, sites)
        return self.with_levels(weights, self.uniform_levels(weights.bank))


def uniform_grid(edge: jax.Array, bits: int) -> tuple[jax.Array, jax.Array]:
    """The levels of a uniform grid, (2^bits,), and the middles between them, one fewer.

    Each is one product, so that it has the same bits in every program.

    Example:
      >>> levels, middles = uniform_grid(jnp.float32(4.0), 2)
      >>> levels.tolist(), middles.tolist()
      ([-3.0, -1.0, 1.0, 3.0], [-2.0, 0.0, 2.0])
    """
    half = 2 ** (bits - 1)
    middles = jnp.asarray(np.arange(1 - half, half) / half, edge.dtype)
    return jnp.abs(edge) * _units(bits, edge.dtype), jnp.abs(edge) * middles


def _units(bits: int, dtype: Any) -> jax.Array:
    """(2^bits,): the levels of a grid whose edge is 1."""
    half = 2 ** (bits - 1)
    return jnp.asarray((np.arange(-half, half) + 0.5) / half, dtype)


def best_edge(values: jax.Array, bits: int) -> jax.Array:
    """The edge of the uniform grid with the least squared error on the values that are not 0.

    The best of `CANDIDATES` edges, up to the largest number, and of the one that makes the largest
    number the outermost level.

    Example:
      >>> float(best_edge(jnp.array([-3.0, -1.0, 0.0, 1.0, 3.0]), 2))
      4.0
    """
    largest = jnp.max(jnp.abs(values))
    parts = np.append(np.arange(1, CANDIDATES + 1) / CANDIDATES, 1 / (1 - 0.5**bits))
    edges = largest * jnp.asarray(parts, values.dtype)

    def error(edge: jax.Array) -> jax.Array:
        return jnp.sum((round_to_levels("uniform", bits, values, edge) - values) ** 2)

    return edges[jnp.argmin(jax.lax.map(error, edges))]


def round_to_levels(method: Method, bits: int, values: jax.Array, levels: jax.Array) -> jax.Array:
    """Values rounded to the nearest level; 0 stays 0. See `Compressed` for the gradients.

    Args:
      method: "uniform" or "kmeans".
      bits: bits of a level's index.
      values: an array of any shape.
      levels: (), the edge of a uniform grid, or (2^bits,), a codebook in any order.

    Example:
      >>> edge, book = jnp.float32(4.0), jnp.array([5.0, 0.5, 0.1, -1.0])
      >>> round_to_levels("uniform", 2, jnp.array([-9.0, -0.1, 0.0, 2.5]), edge).tolist()
      [-3.0, -1.0, 0.0, 3.0]
      >>> round_to_levels("kmeans", 2, jnp.array([0.4, 0.0]), book).tolist()
      [0.5, 0.0]
    """
    return _quantise(method, bits, values, levels)  # pyright: ignore[reportReturnType]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _quantise(method: Method, bits: int, values: jax.Array, levels: jax.Array) -> jax.Array:
    return _forward(method, bits, values, levels)[0]


def _forward(
    method: Method, bits: int, values: jax.Array, levels: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    if method == "uniform":
        grid_K, middles = uniform_grid(levels, bits)
    else:
        grid_K = jnp.sort(levels)
        middles = (grid_K[1:] + grid_K[:-1]) * jnp.asarray(0.5, grid_K.dtype)
    codes = jnp.searchsorted(middles, values, method="scan_unrolled")
    rounded = jnp.take(grid_K, codes, mode="clip")
    kept = values != 0
    return jnp.where(kept, rounded, jnp.zeros_like(values)), (kept, codes, levels)


def _backward(
    method: Method, bits: int, residuals: Any, gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    kept, codes, levels = residuals
    gradient = jnp.where(kept, gradient, jnp.zeros_like(gradient))
    weight = kept.astype(gradient.dtype)
    one = jnp.ones((), gradient.dtype)
    if method == "uniform":
        units = jnp.take(_units(bits, gradient.dtype), codes, mode="clip")
        squares = jnp.sum(weight * units**2)
        sign = jnp.where(levels < 0, -one, one)  # of the number whose absolute value counts
        return gradient, sign * jnp.sum(gradient * units) / jnp.where(squares == 0, one, squares)

    def mean(code: jax.Array) -> jax.Array:
        member = (codes == code).astype(gradient.dtype) * weight
        count = jnp.sum(member)
        return jnp.sum(member * gradient) / jnp.where(count == 0, one, count)

    # Level by level: a scatter-add would be nondeterministic on GPUs.
    means_K = jax.lax.map(mean, jnp.arange(2**bits, dtype=codes.dtype))
    return gradient, jnp.zeros_like(levels).at[jnp.argsort(levels)].set(means_K)


_quantise.defvjp(_forward, _backward)
