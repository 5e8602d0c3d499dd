"""Cross-layer parameter sharing for JAX and Flax."""

from paramshare.analysis.folding import FoldError, fold
from paramshare.analysis.similarity import similarity
from paramshare.layout import Layout, PlanError
from paramshare.models import ModelError
from paramshare.penalties import PenaltyError, orthogonality, recurrence
from paramshare.plan import Plan, Rule
from paramshare.schemes import FilterBasis, Repeat, Ring, SchemeError, Site, Soft, Tied
from paramshare.shared import Shared, count, decay_mask, share
from paramshare.zoo import create_model, list_models

__all__ = [
    "FilterBasis",
    "FoldError",
    "Layout",
    "ModelError",
    "PenaltyError",
    "Plan",
    "PlanError",
    "Repeat",
    "Ring",
    "Rule",
    "SchemeError",
    "Shared",
    "Site",
    "Soft",
    "Tied",
    "count",
    "create_model",
    "decay_mask",
    "fold",
    "list_models",
    "orthogonality",
    "recurrence",
    "share",
    "similarity",
]
