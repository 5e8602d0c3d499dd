"""Circular harmonics on rings, sampled on the pixels of a kernel: what steerable kernels mix."""

import functools

import numpy as np

from paramshare.schemes.interface import SchemeError

Frequencies = tuple[int, ...]
WIDTH, LAST_WIDTH = 0.6, 0.4  # standard deviations of the rings, in pixels; of the outermost ring


def highest_frequencies(size: int) -> Frequencies:
    """The highest angular frequency on each ring of a kernel, as in e2cnn.

    Rings have the radii 0, 1, ..., size // 2. Higher frequencies would be aliased by the pixels.

    Example:
      >>> highest_frequencies(5), highest_frequencies(7)
      ((0, 2, 2), (0, 2, 3, 2))
    """
    last = size // 2
    outer = [2 if r == last else 2 * r - (r + 1) % 2 for r in range(1, last + 1)]
    return (0, *outer)


def harmonics(size: int, order: int, frequencies: Frequencies) -> np.ndarray:
    r"""The functions g(r) cos(m phi) and g(r) sin(m phi), turned by all angles of a cyclic group.

    g is a Gaussian around the radius of a ring; m runs from 0 to the ring's highest frequency. At
    the origin, functions with m > 0 are 0. Every function is scaled so that its sum of squares over
    the pixels is 1, on average over the turns.

    Args:
      size: side of the kernel, in pixels; odd.
      order: order of the group, N.
      frequencies: the highest frequency on each ring.

    Raises:
      SchemeError: if the size is even, or the order is not positive.

    Returns:
      (N, size, size, F) float64: turn n is by 2 pi n / N, counterclockwise where rows count
      downwards.

    Example:
      >>> basis = harmonics(5, 4, (0, 2, 2))
      >>> basis.shape
      (4, 5, 5, 11)
      >>> bool(np.allclose(basis[1], np.rot90(basis[0])))  # turned by 90 degrees
      True

    References:
      Weiler & Cesa, General E(2)-Equivariant Steerable CNNs, NeurIPS 2019, arXiv:1911.08251
    """
    if size < 1 or size % 2 == 0 or order < 1:
        raise SchemeError(
            f"harmonics(size={size}, order={order}): the size must be odd, and the order 1 or more"
        )
    return _harmonics(size, order, tuple(frequencies))


@functools.lru_cache(maxsize=64)
def _harmonics(size: int, order: int, frequencies: Frequencies) -> np.ndarray:
    place = np.arange(size, dtype=np.float64) - size // 2
    y, x = -place[:, None], place[None, :]
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    turns = 2 * np.pi * np.arange(order) / order
    functions = []
    for ring, highest in enumerate(frequencies):
        width = LAST_WIDTH if ring == len(frequencies) - 1 else WIDTH
        profile = np.exp(-0.5 * ((radius - ring) / width) ** 2)
        functions.append(np.broadcast_to(profile, (order, size, size)))
        for m in range(1, highest + 1):
            phase = m * (angle - turns[:, None, None])
            away = profile * (radius > 0)
            functions += [away * np.cos(phase), away * np.sin(phase)]
    basis = np.stack(functions, axis=-1)
    norm = np.sqrt(np.sum(basis**2, axis=(0, 1, 2)) / order)
    basis = basis / np.where(norm == 0, 1, norm)
    basis.setflags(write=False)  # the callers share it
    return basis
