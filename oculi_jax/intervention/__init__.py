"""Interventions: `Edit`, the primitive, the named ones that lower to it, and what one's own are declared with."""

from ..edits import Edit
from ..fields import Index, Positions, Strength, Values, field
from ..pytrees import pytree
from .context import InterventionContext
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

__all__ = [
    "Ablation",
    "ActivationPatch",
    "AttentionKnockout",
    "DirectionAblation",
    "Edit",
    "HeadAblation",
    "HeadMask",
    "Index",
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
]
