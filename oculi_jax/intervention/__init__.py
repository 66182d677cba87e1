"""Interventions: `Edit`, the primitive, and the named ones that lower to it."""

from ..edits import Edit
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
    "InterventionContext",
    "KScaler",
    "QScaler",
    "SpectraScaler",
    "Steer",
]
