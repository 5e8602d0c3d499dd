"""Sharing schemes: frozen dataclasses that make the kernels of several layers from few arrays."""

from paramshare.schemes.basis import FilterBasis
from paramshare.schemes.compressed import Compressed
from paramshare.schemes.cosines import cosines
from paramshare.schemes.interface import Filters, Scheme, SchemeError, Site, Weights
from paramshare.schemes.relaxed import Relaxed
from paramshare.schemes.repetition import Repeat
from paramshare.schemes.ring import Ring
from paramshare.schemes.sliced import Sliced
from paramshare.schemes.soft import Soft
from paramshare.schemes.steerable import Steerable
from paramshare.schemes.tied import Tied
from paramshare.schemes.transposed import Transposed
from paramshare.schemes.wrapper import Wrapper

__all__ = [
    "Compressed",
    "FilterBasis",
    "Filters",
    "Relaxed",
    "Repeat",
    "Ring",
    "Scheme",
    "SchemeError",
    "Site",
    "Sliced",
    "Soft",
    "Steerable",
    "Tied",
    "Transposed",
    "Weights",
    "Wrapper",
    "cosines",
]
