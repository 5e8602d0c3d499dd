"""Sharing schemes: pure functions over arrays, and one small frozen dataclass each."""

from paramshare.schemes.basis import FilterBasis
from paramshare.schemes.interface import UNIQUE, Bank, Coefficients, Scheme, SchemeError, Site
from paramshare.schemes.repetition import Repeat
from paramshare.schemes.ring import Ring
from paramshare.schemes.soft import Soft
from paramshare.schemes.tied import Tied

__all__ = ["UNIQUE", "Bank", "Coefficients", "FilterBasis", "Repeat", "Ring", "Scheme", "SchemeError", "Site", "Soft", "Tied"]
