"""Cross-layer parameter sharing for JAX and Flax."""

from paramshare.analysis.batch_statistics import StatisticsError, reestimate
from paramshare.analysis.conversion import ConversionError, bake, convert
from paramshare.analysis.factorise import factorise
from paramshare.analysis.folding import FoldError, fold
from paramshare.analysis.loop_plan import LoopError
from paramshare.analysis.looping import loop, unloop
from paramshare.analysis.similarity import similarity
from paramshare.layout import Layout, PlanError
from paramshare.models import ModelError
from paramshare.penalties import PenaltyError, orthogonality, recurrence
from paramshare.plan import Plan, Rule
from paramshare.schemes import FilterBasis, Repeat, Ring, SchemeError, Site, Soft, Tied
from paramshare.shared import Shared, count, decay_mask, share
from paramshare.zoo import create_model, list_models

__all__ = [
    "ConversionError",
    "FilterBasis",
    "FoldError",
    "Layout",
    "LoopError",
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
    "StatisticsError",
    "Tied",
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
    "unloop",
]
