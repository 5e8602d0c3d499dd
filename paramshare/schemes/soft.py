"""Soft parameter sharing: every kernel is a learned linear combination of shared templates."""

import dataclasses

import jax
import jax.numpy as jnp

from paramshare.schemes.initial import orthogonal
from paramshare.schemes.interface import SchemeError, Site, bank_dtype, check_count, check_equal_shapes


@dataclasses.dataclass(frozen=True)
class Soft:
    r"""Kernels as linear combinations of a bank of templates.

    .. math:: W_l = \sum_j A_{lj} T_j

    for L sites of one shape with P numbers each. The bank is `{"templates": (k, P)}`, the coefficients are one (L, k) array,
    a row a site, unconstrained. All kernels of a bank come out of a single matmul, (L, k) @ (k, P). Trainable numbers:
    k P + k L instead of L P.

    Templates start He-normal, N(0, 2 / fan_in); coefficients start as one (semi-)orthogonal (L, k) matrix: so for k < L a kernel
    starts at sqrt(k / L) of the He scale (in the mean over sites).

    Args:
      templates: k, at least 1. More templates than sites is allowed, and wasteful.

    Raises:
      SchemeError: if `templates` is not a positive integer.

    Example:
      >>> import jax
      >>> from paramshare import Site, Soft
      >>> sites = tuple(Site(f"layer{i}/kernel", (3, 3, 8, 8)) for i in range(6))
      >>> scheme = Soft(templates=2)
      >>> bank, coefficients = scheme.init(jax.random.key(0), sites)
      >>> bank["templates"].shape, coefficients.shape
      ((2, 576), (6, 2))
      >>> [kernel.shape for kernel in scheme.expand(bank, coefficients, sites)][:2]
      [(3, 3, 8, 8), (3, 3, 8, 8)]

    References:
      Savarese & Maire, Learning Implicitly Recurrent CNNs Through Parameter Sharing, ICLR 2019, arXiv:1902.09701
    """

    templates: int

    def __post_init__(self):
        object.__setattr__(self, "templates", check_count("Soft", "templates", self.templates, 1))

    def check(self, sites: tuple[Site, ...]) -> None:
        """Raises `SchemeError` unless all sites have one shape."""
        check_equal_shapes(sites, self)

    def init(self, key: jax.Array, sites: tuple[Site, ...]) -> tuple[dict[str, jax.Array], jax.Array]:
        """Draws `{"templates": (k, P)}`, He-normal, and (L, k) orthogonal coefficients."""
        self.check(sites)
        template_key, coefficient_key = jax.random.split(key)
        dtype = bank_dtype(sites)
        templates_KxP = jax.random.normal(template_key, (self.templates, sites[0].size), dtype) * jnp.sqrt(2 / sites[0].fan_in).astype(
            dtype
        )
        return {"templates": templates_KxP}, orthogonal(coefficient_key, len(sites), self.templates, dtype)

    def expand(self, bank: dict[str, jax.Array], coefficients: jax.Array, sites: tuple[Site, ...]) -> tuple[jax.Array, ...]:
        """The L kernels, by one matmul; `SchemeError` if the arrays are not (k, P) and (L, k)."""
        found = (bank["templates"].shape, coefficients.shape)
        wanted = ((self.templates, sites[0].size), (len(sites), self.templates))
        if found != wanted:
            raise SchemeError(
                f"{self} over {len(sites)} sites of {sites[0].size} numbers wants templates and coefficients of shapes {wanted}, "
                f"got {found}; pass the variables of a model shared by this same plan"
            )
        # Full precision: TPUs and GPUs would round float32 operands of a matmul, and this one costs next to nothing.
        kernels_LxP = jnp.einsum("lk,kp->lp", coefficients, bank["templates"], precision=jax.lax.Precision.HIGHEST)
        return tuple(kernels_LxP[i].reshape(site.shape).astype(site.dtype) for i, site in enumerate(sites))

    def from_dense(self, kernels: tuple[jax.Array, ...], sites: tuple[Site, ...]) -> tuple[dict[str, jax.Array], jax.Array]:
        """The bank and coefficients whose kernels are nearest to the given ones, in the sum of squares.

        By truncated singular value decomposition of the (L, P) stack of kernels (Eckart & Young 1936): the squared error is the sum
        of the squared singular values left out, and zero from k = L on. As at initialisation, the coefficients have orthonormal
        columns (for k > L, orthonormal rows) and the templates carry the scale.

        Args:
          kernels: L arrays, in the order of the sites.
          sites: the bank's sites.

        Returns:
          `({"templates": (k, P)}, (L, k))`.

        Raises:
          SchemeError: if the kernels do not have the sites' shapes.
        """
        self.check(sites)
        if [tuple(kernel.shape) for kernel in kernels] != [site.shape for site in sites]:
            raise SchemeError(f"{self}: from_dense wants kernels of shapes {[s.shape for s in sites]}, got {[k.shape for k in kernels]}")
        dtype = bank_dtype(sites)
        stack_LxP = jnp.stack([jnp.asarray(kernel, dtype).reshape(-1) for kernel in kernels])
        if self.templates >= len(sites):
            # Any A with orthonormal rows is exact with T = A^T W, and a dense one leaves no template without a gradient.
            coefficients = orthogonal(jax.random.key(0), len(sites), self.templates, dtype)
            return {"templates": jnp.matmul(coefficients.T, stack_LxP, precision=jax.lax.Precision.HIGHEST)}, coefficients
        k, size = self.templates, stack_LxP.shape[1]
        left_LxR, singular_R, right_RxP = jnp.linalg.svd(stack_LxP, full_matrices=size < k)
        if size < k:  # kernels of fewer than k numbers: exact; the templates left over are zero, their coefficients are not, so they train
            singular_R, right_RxP = jnp.pad(singular_R, (0, k - size)), jnp.pad(right_RxP, ((0, k - size), (0, 0)))
        return {"templates": singular_R[:k, None] * right_RxP[:k]}, left_LxR[:, :k]


def cosines(rows_LxN: jax.Array) -> jax.Array:
    """|cosine| between rows, (L, L); 0 for rows of zeros.

    Has a gradient everywhere: 0 at rows of zeros, and for two rows that are orthogonal, at the kink of |.|.
    """
    # The square root's own gradient at 0 is infinite: zero rows take another path, which no gradient comes back by.
    largest_Lx1 = jax.lax.stop_gradient(jnp.max(jnp.abs(rows_LxN), axis=1, keepdims=True))  # squares could under- or overflow
    rows_LxN = rows_LxN / jnp.where(largest_Lx1 == 0, 1, largest_Lx1)
    squares_Lx1 = jnp.sum(rows_LxN**2, axis=1, keepdims=True)
    zero_Lx1 = squares_Lx1 == 0
    unit_LxN = jnp.where(zero_Lx1, 0, rows_LxN) / jnp.sqrt(jnp.where(zero_Lx1, 1, squares_Lx1))
    products_LxL = jnp.matmul(unit_LxN, unit_LxN.T, precision=jax.lax.Precision.HIGHEST)
    # JAX's own |.| has gradient 1 at 0.
    return jnp.minimum(products_LxL * jnp.sign(jax.lax.stop_gradient(products_LxL)), 1)
