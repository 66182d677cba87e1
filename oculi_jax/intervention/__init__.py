"""Interventions: `Edit`, the primitive, the named ones that lower to it, and what one's own are declared with."""

from ..pytrees import pytree
from .context import InterventionContext
from .edit import Edit, site_shaped
from .fields import Index, Positions, Strength, Values, field
from .named import (
    Ablation,
    ActivationPatch,
    AttentionKnockout,
    DirectionAblation,
    HeadAblation,
    HeadMask,
    KScaler,
    QScaler,
    SpectraScaler,
    Steer,
)
from .protocol import Intervention

__all__ = [
    "Ablation",
    "ActivationPatch",
    "AttentionKnockout",
    "DirectionAblation",
    "Edit",
    "HeadAblation",
    "HeadMask",
    "Index",
    "Intervention",
    "InterventionContext",
    "KScaler",
    "Positions",
    "QScaler",
    "SpectraScaler",
    "Steer",
    "Strength",
    "Values",
    "field",
    "pytree",
    "site_shaped",
]
