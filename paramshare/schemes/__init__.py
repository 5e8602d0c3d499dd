"""Sharing schemes: pure functions over arrays, and one small frozen dataclass each."""

from paramshare.schemes.interface import Bank, Coefficients, Scheme, SchemeError, Site
from paramshare.schemes.soft import Soft

__all__ = ["Bank", "Coefficients", "Scheme", "SchemeError", "Site", "Soft"]
