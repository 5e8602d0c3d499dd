"""Cross-layer parameter sharing for JAX and Flax.

`paramshare.nnx` does for NNX modules what this module does for linen ones.
"""

import importlib
from typing import Any

from paramshare.errors import ParamshareError
from paramshare.groups import sites
from paramshare.layout import Layout, PlanError
from paramshare.measure.similarity import similarity
from paramshare.models import ModelError
from paramshare.penalties import PenaltyError, orthogonality, recurrence
from paramshare.plan import Plan
from paramshare.rule import Rule
from paramshare.schemes import (
    FilterBasis,
    Relaxed,
    Repeat,
    Ring,
    SchemeError,
    Site,
    Soft,
    Steerable,
    Tied,
    Transposed,
)
from paramshare.shared import Shared, count, decay_mask, share
from paramshare.transform.batch_statistics import StatisticsError, reestimate
from paramshare.transform.conversion import ConversionError, bake, convert
from paramshare.transform.factorise import factorise
from paramshare.transform.folding import FoldError, fold
from paramshare.transform.loop_plan import LoopError
from paramshare.transform.looping import loop, unloop
from paramshare.zoo import create_model, list_models

__version__ = "0.1.0"

__all__ = [
    "ConversionError",
    "FilterBasis",
    "FoldError",
    "Layout",
    "LoopError",
    "ModelError",
    "ParamshareError",
    "PenaltyError",
    "Plan",
    "PlanError",
    "Relaxed",
    "Repeat",
    "Ring",
    "Rule",
    "SchemeError",
    "Shared",
    "Site",
    "Soft",
    "StatisticsError",
    "Steerable",
    "Tied",
    "Transposed",
    "__version__",
    "bake",
    "convert",
    "count",
    "create_model",
    "decay_mask",
    "factorise",
    "fold",
    "list_models",
    "loop",
    "orthogonality",
    "recurrence",
    "reestimate",
    "share",
    "similarity",
    "sites",
    "unloop",
]


def __getattr__(name: str) -> Any:
    if name == "nnx":  # on demand: `flax.nnx` takes time to import
        return importlib.import_module("paramshare.nnx")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
