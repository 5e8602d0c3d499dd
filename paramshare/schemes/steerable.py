"""Steerable kernels: rotation equivariance as a linear sharing scheme with fixed templates."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from paramshare.schemes.harmonics import Frequencies, harmonics, highest_frequencies
from paramshare.schemes.initial import model_std
from paramshare.schemes.interface import (
    Initial,
    Scheme,
    SchemeError,
    Site,
    Weights,
    bank_dtype,
    check_choice,
    check_count,
    check_flag,
)


@dataclasses.dataclass(frozen=True)
class Steerable(Scheme):
    r"""Kernels that make a convolution equivariant to the rotations of the cyclic group C_N.

    .. math:: W_{g h}(x) = \sum_f c_{f, h - g} \, B_f(R_g^{-1} x)

    Channels come in fields of N, one channel for each rotation (regular representation): channel
    i N + g is rotation g of field i. A kernel from rotation h to rotation g is a linear combination
    of F fixed functions B_f, circular harmonics on rings (`paramshare.schemes.harmonics`), turned
    by g; its coefficients depend on h - g only. If an image is turned by 360/N degrees, features
    turn with it and move on by one channel in every field: exactly for N = 2 and 4, for others
    as far as pixels represent turned functions.

    This holds for convolutions of stride 1 with symmetric padding, without a bias (or with equal
    biases in a field) and without groups that split a field. A stride s keeps it only where the
    size of the padded image less that of the kernel is a multiple of s. The scheme sees the kernel
    alone and cannot check these.

    So equivariance is a sharing scheme like any other: N^2 kernels of a pair of fields share N F
    learned numbers through templates that are fixed rather than learned. A layer on its own is a
    plain convolution; norms and nonlinearities must treat the channels of a field alike, as
    `paramshare.models.RotNet` does.

    A site is a kernel (k, k, in, out) with odd k. The bank is `{site: (F, N, in / N, out / N)}`.
    With `lifting`, for the first layer, input channels do not turn (gray values, colours), and the
    bank is `{site: (F, 1, in, out / N)}`.

    Initialization: coefficients are normal, and every kernel has the standard deviation of its
    site; with initial="paper", 1 / sqrt(fan_in), as with the initializer of e2cnn.

    Args:
      order: N, at least 1.
      lifting: whether the input channels do not turn.
      frequencies: the highest angular frequency on each ring, of radii 0, 1, ..., k // 2; None for
        those of e2cnn: (0, 2, 2) for k = 5, (0, 2, 3, 2) for k = 7.
      initial: the initialization, as described above.

    Raises:
      SchemeError: if an argument is invalid.

    Example:
      >>> import jax
      >>> from paramshare import Site, Steerable
      >>> site = Site("conv2/kernel", (5, 5, 64, 96), std=0.1)  # 16 fields to 24 fields
      >>> weights = Steerable(order=4).init(jax.random.key(0), (site,))
      >>> weights.bank["conv2.kernel"].shape
      (11, 4, 16, 24)

    References:
      Weiler & Cesa, General E(2)-Equivariant Steerable CNNs, NeurIPS 2019, arXiv:1911.08251;
      Cohen & Welling, Group Equivariant Convolutional Networks, ICML 2016, arXiv:1602.07576
    """

    order: int
    lifting: bool = False
    frequencies: Frequencies | None = None
    initial: Initial = "model"

    def __post_init__(self):
        object.__setattr__(self, "order", check_count("Steerable", "order", self.order, 1))
        check_flag("Steerable", "lifting", self.lifting)
        check_choice("Steerable", "initial", self.initial, Initial)
        if self.frequencies is not None:
            given = tuple(self.frequencies) if isinstance(self.frequencies, Sequence) else ()
            if not given:
                raise SchemeError(
                    f"Steerable(frequencies={self.frequencies!r}): give one integer for each ring "
                    "of the kernel, such as (0, 2, 2), or None"
                )
            checked = tuple(check_count("Steerable", "frequencies", m, 0) for m in given)
            object.__setattr__(self, "frequencies", checked)

    def _check(self, sites: tuple[Site, ...]) -> None:
        for site in sites:
            shape = site.matrix_shape
            if len(shape) != 4 or shape[0] != shape[1] or shape[0] % 2 == 0:
                raise SchemeError(
                    f"{self}: {site} is {site.shape}; steerable kernels are square convolutions "
                    "(k, k, in, out) with odd k"
                )
            for channels, name, regular in (
                (shape[2], "input", not self.lifting),
                (shape[3], "output", True),
            ):
                if regular and channels % self.order:
                    raise SchemeError(
                        f"{self}: {site} has {channels} {name} channels; they must be fields of "
                        f"{self.order} channels"
                        + ("; pass lifting=True for the first layer" if name == "input" else "")
                    )
            rings = shape[0] // 2 + 1
            if self.frequencies is not None and len(self.frequencies) != rings:
                raise SchemeError(
                    f"{self}: {site} is {shape[0]} pixels wide and has {rings} rings; frequencies "
                    f"must have {rings} numbers"
                )
            basis = self._basis(site).reshape(-1, self._basis(site).shape[-1])
            if np.linalg.matrix_rank(basis) < basis.shape[1]:
                raise SchemeError(
                    f"{self}: pixels of {site} cannot tell so many frequencies apart; lower them, "
                    f"for example to {highest_frequencies(shape[0])}"
                )

    def _init(self, key: jax.Array, sites: tuple[Site, ...]) -> Weights:
        dtype, bank = bank_dtype(sites), {}
        for number, site in enumerate(sites):
            size, _, inputs, outputs = site.matrix_shape
            count = self._basis(site).shape[-1]
            turned = 1 if self.lifting else self.order
            std = 1 / math.sqrt(site.fan_in) if self.initial == "paper" else model_std(site)
            bank[site.key] = (
                std
                * (size / math.sqrt(count))  # F functions of norm 1 over the pixels
                * jax.random.normal(
                    jax.random.fold_in(key, number),
                    (count, turned, inputs // turned, outputs // self.order),
                    dtype,
                )
            )
        return Weights(bank)

    def _expand(self, weights: Weights, sites: tuple[Site, ...]) -> tuple[jax.Array, ...]:
        kernels = []
        for site in sites:
            coefficients_FxDxIxO = weights.bank[site.key]
            basis_GxYxXxF = jnp.asarray(self._basis(site), coefficients_FxDxIxO.dtype)
            turned = jnp.einsum(
                "gyxf,fdio->gdyxio",
                basis_GxYxXxF,
                coefficients_FxDxIxO,
                precision=jax.lax.Precision.HIGHEST,
            )
            if not self.lifting:
                turned = _skew(turned)
            matrix = jnp.transpose(turned, (2, 3, 4, 1, 5, 0)).reshape(site.matrix_shape)
            kernels.append(site.from_matrix(matrix))
        return tuple(kernels)

    def _from_dense(self, kernels: tuple[jax.Array, ...], sites: tuple[Site, ...]) -> Weights:
        """By least squares: the equivariant kernels nearest to the given ones."""
        bank = {}
        for kernel, site in zip(kernels, sites, strict=True):
            size, _, inputs, outputs = site.matrix_shape
            fields = (inputs, 1) if self.lifting else (inputs // self.order, self.order)
            split = site.to_matrix(kernel).reshape(
                size, size, *fields, outputs // self.order, self.order
            )
            turned = jnp.transpose(split, (5, 3, 0, 1, 2, 4))  # g, h, y, x, i, o
            if not self.lifting:
                g = np.arange(self.order)
                turned = turned[g[:, None], (g[:, None] + g) % self.order]  # h = g + d
            basis = self._basis(site)
            inverse = np.linalg.pinv(basis.reshape(-1, basis.shape[-1]))
            bank[site.key] = jnp.einsum(
                "fgyx,gdyxio->fdio",
                jnp.asarray(inverse.reshape(-1, self.order, size, size), kernel.dtype),
                turned,
                precision=jax.lax.Precision.HIGHEST,
            )
        return Weights(bank)

    def _basis(self, site: Site) -> np.ndarray:
        size = site.matrix_shape[0]
        return harmonics(size, self.order, self.frequencies or highest_frequencies(size))


def _skew(turned_GxDx: jax.Array) -> jax.Array:
    """Entry (g, h) is entry (g, h - g mod N) of the argument.

    By cutting the doubled rows anew, one entry shorter: its gradient is padding and addition, where
    that of a gather would be a scatter.
    """
    order, shape = turned_GxDx.shape[0], turned_GxDx.shape[2:]
    twice = jnp.concatenate([turned_GxDx, turned_GxDx], axis=1).reshape(2 * order**2, *shape)
    return twice[order:].reshape(order, 2 * order - 1, *shape)[:, :order]
