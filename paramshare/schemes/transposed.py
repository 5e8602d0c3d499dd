"""Sharing between a weight and the transpose of another one, such as embedding and head."""

import dataclasses
import re

import jax

from paramshare.schemes.interface import (
    Filters,
    SchemeError,
    Site,
    Weights,
    path_order,
)
from paramshare.schemes.wrapper import Wrapper


@dataclasses.dataclass(frozen=True)
class Transposed(Wrapper):
    r"""A scheme for weights of which some are transposed.

    .. math:: W_l = M_l^T \text{ for transposed sites}, \quad W_l = M_l \text{ for others}

    M_l is what the wrapped scheme makes. It sees every site as a matrix (*receptive, inputs,
    outputs), with inputs and outputs exchanged for transposed sites. So `Transposed(Tied())` gives
    an embedding (V, D) and an output layer (D, V) one table (Press & Wolf), and
    `Transposed(Tied(scaled=True))` gives each of the two a scale.

    Args:
      scheme: makes the matrices.
      transposed: a regular expression; sites whose whole path it matches are transposed. None
        transposes the sites whose matrix is as wide as the first one's (in the order of paths) is
        high, and the other way round; square ones need the expression.

    Raises:
      SchemeError: if an argument is invalid; when shared, if the matrices are square and
        `transposed` is None, or if no site is transposed.

    Example:
      >>> import jax
      >>> from paramshare import Site, Tied, Transposed
      >>> sites = Site("embed/embedding", (65, 16), std=0.1), Site("head/kernel", (16, 65), std=0.1)
      >>> scheme = Transposed(Tied())
      >>> weights = scheme.init(jax.random.key(0), sites)
      >>> embedding, head = scheme.expand(weights, sites)
      >>> bool((embedding == head.T).all())
      True

    References:
      Press & Wolf, Using the Output Embedding to Improve Language Models, EACL 2017,
      arXiv:1608.05859.
    """

    transposed: str | None = None

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.transposed, str | None):
            raise SchemeError(
                f"{self}: transposed must be a regular expression, got {self.transposed!r}"
            )
        try:
            re.compile(self.transposed or "")
        except re.error as error:
            raise SchemeError(f"{self}: transposed is not a regular expression: {error}") from None

    def seen(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        """The sites as the wrapped scheme sees them: matrices, with transposed ones turned."""
        turned = self._turned(sites)

        def matrix(site: Site) -> Site:
            *receptive, inputs, outputs = site.matrix_shape
            sides = (outputs, inputs) if site in turned else (inputs, outputs)
            return dataclasses.replace(
                site, shape=(*receptive, *sides), in_axes=None, out_axes=None
            )

        return tuple(matrix(site) for site in sites)

    def check_initializer(self, sites: tuple[Site, ...]) -> None:
        """Raises `SchemeError` if the wrapped scheme cannot start from the sites' initializers."""
        self.scheme.check_initializer(self.seen(sites))

    def filters(self, weights: Weights, sites: tuple[Site, ...]) -> Filters | None:
        """The wrapped scheme's."""
        return self.scheme.filters(weights, self.seen(sites))

    def _turned(self, sites: tuple[Site, ...]) -> frozenset[Site]:
        if self.transposed is not None:
            pattern = re.compile(self.transposed)
            return frozenset(site for site in sites if pattern.fullmatch(site.path))
        first = sites[path_order(sites)[0]].matrix_shape
        reverse = (*first[:-2], first[-1], first[-2])
        return frozenset(site for site in sites if site.matrix_shape == reverse != first)

    def _check(self, sites: tuple[Site, ...]) -> None:
        vectors = [site for site in sites if len(site.shape) < 2]
        if vectors:
            raise SchemeError(f"{self}: {vectors[0]} is a vector, of shape {vectors[0].shape}")
        if not self._turned(sites):
            names = ", ".join(f"{site} {site.matrix_shape}" for site in sites)
            raise SchemeError(
                f"{self}: none of the sites is transposed: {names}; pass a regular expression of "
                'the paths to transpose, such as transposed=r"head/.*"'
            )
        self.scheme.check(self.seen(sites))

    def _init(self, key: jax.Array, sites: tuple[Site, ...]) -> Weights:
        return self.scheme._init(key, self.seen(sites))

    def _expand(self, weights: Weights, sites: tuple[Site, ...]) -> tuple[jax.Array, ...]:
        turned = self._turned(sites)
        matrices = self.scheme._expand(weights, self.seen(sites))
        return tuple(
            site.from_matrix(matrix.mT if site in turned else matrix)
            for site, matrix in zip(sites, matrices, strict=True)
        )

    def _from_dense(self, kernels: tuple[jax.Array, ...], sites: tuple[Site, ...]) -> Weights:
        turned = self._turned(sites)
        matrices = [site.to_matrix(kernel) for site, kernel in zip(sites, kernels, strict=True)]
        return self.scheme._from_dense(
            tuple(m.mT if s in turned else m for s, m in zip(sites, matrices, strict=True)),
            self.seen(sites),
        )
