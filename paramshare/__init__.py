"""Cross-layer parameter sharing for JAX and Flax."""

from paramshare.analysis.similarity import similarity
from paramshare.layout import Layout, PlanError
from paramshare.models import ModelError
from paramshare.plan import Plan, Rule
from paramshare.schemes import SchemeError, Site, Soft
from paramshare.shared import Shared, count, decay_mask, share
from paramshare.zoo import create_model, list_models

__all__ = [
    "Layout",
    "ModelError",
    "Plan",
    "PlanError",
    "Rule",
    "SchemeError",
    "Shared",
    "Site",
    "Soft",
    "count",
    "create_model",
    "decay_mask",
    "list_models",
    "share",
    "similarity",
]
