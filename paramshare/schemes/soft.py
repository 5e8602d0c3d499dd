"""Soft parameter sharing: every kernel is a learned linear combination of shared templates."""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from paramshare.schemes.initial import model_std, orthogonal, rms_std
from paramshare.schemes.interface import (
    Initial,
    Scheme,
    Site,
    Weights,
    bank_dtype,
    check_choice,
    check_count,
)


@dataclasses.dataclass(frozen=True)
class Soft(Scheme):
    r"""Kernels as linear combinations of a bank of templates.

    .. math:: W_l = \sum_j a_{lj} T_j

    L sites of the same shape, with P entries each, share the bank `{"templates": (k, P)}`. Each
    site has k unconstrained coefficients, (k,).
    Trainable parameters: k P + k L instead of L P.

    Initialization. The coefficients of all sites form one (semi-)orthogonal (L, k) matrix. With
    initial="model", its rows are rescaled so that every kernel starts with the standard deviation
    of its site. With initial="paper", templates are He-normal, N(0, 2 / fan_in); for k < L a kernel
    then starts at sqrt(k / L) of the He scale (on average over sites).

    Args:
      templates: k, at least 1. More templates than sites are allowed but wasteful.
      initial: the initialization, as described above.

    Raises:
      SchemeError: if an argument is invalid.

    Example:
      >>> import jax
      >>> from paramshare import Site, Soft
      >>> sites = tuple(Site(f"layer{i}/kernel", (3, 3, 8, 8), std=0.1) for i in range(6))
      >>> scheme = Soft(templates=2)
      >>> weights = scheme.init(jax.random.key(0), sites)
      >>> weights.bank["templates"].shape, weights.coefficients["layer0.kernel"].shape
      ((2, 576), (2,))
      >>> [kernel.shape for kernel in scheme.expand(weights, sites)][:2]
      [(3, 3, 8, 8), (3, 3, 8, 8)]

    References:
      Savarese & Maire, Learning Implicitly Recurrent CNNs Through Parameter Sharing, ICLR 2019,
      arXiv:1902.09701
    """

    templates: int
    initial: Initial = "model"
    one_shape: ClassVar[bool] = True
    entrywise: ClassVar[bool] = True

    def __post_init__(self):
        object.__setattr__(self, "templates", check_count("Soft", "templates", self.templates, 1))
        check_choice("Soft", "initial", self.initial, Initial)

    def _init(self, key: jax.Array, sites: tuple[Site, ...]) -> Weights:
        template_key, row_key = jax.random.split(key)
        dtype = bank_dtype(sites)
        rows_LxK = orthogonal(row_key, len(sites), self.templates, dtype)
        if self.initial == "paper":
            std = jnp.sqrt(2 / sites[0].fan_in).astype(dtype)
        else:
            std = rms_std(sites)
            length_Lx1 = jnp.asarray([[model_std(site) / std] for site in sites], dtype)
            rows_LxK *= length_Lx1 / jnp.linalg.norm(rows_LxK, axis=1, keepdims=True)
        templates_KxP = std * jax.random.normal(
            template_key, (self.templates, sites[0].size), dtype
        )
        return self._weights(templates_KxP, rows_LxK, sites)

    def _expand(self, weights: Weights, sites: tuple[Site, ...]) -> tuple[jax.Array, ...]:
        kernels = mix(self.mixing(weights, sites), weights.bank["templates"])
        return tuple(kernel_P.reshape(sites[0].shape) for kernel_P in kernels)

    def expand_flat(self, weights: Weights, sites: tuple[Site, ...]) -> jax.Array:
        """(L, P): the flattened kernels."""
        return jnp.stack(mix(self.mixing(weights, sites), weights.bank["templates"]))

    def _from_dense(self, kernels: tuple[jax.Array, ...], sites: tuple[Site, ...]) -> Weights:
        """By truncated singular value decomposition of the (L, P) stack (Eckart & Young 1936).

        The squared error is the sum of the squared singular values left out, and zero for k >= L.
        The coefficients have orthonormal columns (orthonormal rows for k > L), as with
        initial="paper". The templates carry the scale.
        """
        stack_LxP = jnp.stack([kernel.reshape(-1) for kernel in kernels])
        k, (layers, size) = self.templates, stack_LxP.shape
        if k >= layers:
            # T = A^T W is exact for any A with orthonormal rows. A dense A gives every template a
            # gradient.
            rows_LxK = orthogonal(jax.random.key(0), layers, k, stack_LxP.dtype)
            templates_KxP = jnp.matmul(rows_LxK.T, stack_LxP, precision=jax.lax.Precision.HIGHEST)
            return self._weights(templates_KxP, rows_LxK, sites)
        left_LxR, singular_R, right_RxP = jnp.linalg.svd(stack_LxP, full_matrices=size < k)
        if size < k:
            # Exact. The remaining templates are zero; their coefficients are not, so they train.
            singular_R = jnp.pad(singular_R, (0, k - size))
            right_RxP = jnp.pad(right_RxP, ((0, k - size), (0, 0)))
        return self._weights(singular_R[:k, None] * right_RxP[:k], left_LxR[:, :k], sites)

    def mixing(self, weights: Weights, sites: tuple[Site, ...]) -> jax.Array:
        """(L, k): the coefficients of the sites."""
        return jnp.stack([weights.coefficients[site.key] for site in sites])

    def combine(self, bank: Any, rows_GxN: jax.Array, site: Site) -> jax.Array:
        """(G, *site.shape): linear combinations of the templates."""
        return jnp.stack(mix(rows_GxN, bank["templates"])).reshape(-1, *site.shape)

    @staticmethod
    def _weights(templates_KxP: jax.Array, rows_LxK: jax.Array, sites: tuple[Site, ...]) -> Weights:
        rows = {site.key: row for site, row in zip(sites, rows_LxK, strict=True)}
        return Weights({"templates": templates_KxP}, rows)


@jax.custom_jvp
def mix(rows_LxK: jax.Array, templates_KxP: jax.Array) -> tuple[jax.Array, ...]:
    """The rows of the matrix product, L of (P,), added up template by template.

    Every entry is summed in the same order, whichever entries are computed with it: slices of the
    templates give slices of the kernels, bit for bit. The rounding of one einsum over both axes
    depends on its shape.

    Derivatives are computed kernel by kernel. The gradient of the templates is three times as fast
    as from a stack of the kernels' gradients, which would be a copy of all.

    Args:
      rows_LxK: coefficients, (L, k).
      templates_KxP: templates, (k, P).

    Example:
      >>> (kernel,) = mix(jnp.array([[1.0, 2.0]]), jnp.array([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]]))
      >>> kernel.tolist()
      [1.0, 2.0, 3.0]
    """
    dtype = jnp.result_type(rows_LxK, templates_KxP)
    wide = dtype if dtype.itemsize >= 4 else jnp.dtype(jnp.float32)
    columns_KxL = rows_LxK.T.astype(wide)
    pairs = zip(columns_KxL, templates_KxP.astype(wide), strict=True)
    terms = (_dot(column_L, template_P, axes=0) for column_L, template_P in pairs)
    return tuple(functools.reduce(jnp.add, terms).astype(dtype))


@mix.defjvp
def _mix_jvp(primals: tuple[jax.Array, jax.Array], tangents: Any) -> tuple[Any, Any]:
    (rows_LxK, templates_KxP), (d_rows_LxK, d_templates_KxP) = primals, tangents
    d_kernels = tuple(
        _dot(d_row_K, templates_KxP, axes=1) + _dot(row_K, d_templates_KxP, axes=1)
        for row_K, d_row_K in zip(rows_LxK, d_rows_LxK, strict=True)
    )
    return mix(*primals), d_kernels


def _dot(x: jax.Array, y: jax.Array, axes: int) -> jax.Array:
    """The product, summed over the first `axes` axes of both.

    TPUs and GPUs would round float32 operands; full precision is cheap here.
    """
    dtype, summed = jnp.result_type(x, y), tuple(range(axes))
    numbers = ((summed, summed), ((), ()))
    precision = jax.lax.Precision.HIGHEST
    return jax.lax.dot_general(x.astype(dtype), y.astype(dtype), numbers, precision=precision)
