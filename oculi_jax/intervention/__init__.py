"""Interventions: `Edit`, the primitive, the named ones that lower to it, and what one's own are declared with."""

from ..pytrees import pytree
from .context import InterventionContext
from .each import PerLayer, PerPrompt
from .edit import Edit, site_shaped
from .fields import Basis, Strength, Table, Values, Vector, field
from .indices import Head, Index, Last, Layer, Positions
from .named import (
    Ablation,
    ActivationPatch,
    AttentionKnockout,
    Blend,
    DirectionAblation,
    Freeze,
    HeadAblation,
    KScaler,
    QScaler,
    SpectraScaler,
    Steer,
)
from .protocol import Intervention
from .rank_one import RankOne
from .subspace import Subspace

__all__ = [
    "Ablation",
    "ActivationPatch",
    "AttentionKnockout",
    "Basis",
    "Blend",
    "DirectionAblation",
    "Edit",
    "Freeze",
    "Head",
    "HeadAblation",
    "Index",
    "Intervention",
    "InterventionContext",
    "KScaler",
    "Last",
    "Layer",
    "PerLayer",
    "PerPrompt",
    "Positions",
    "QScaler",
    "RankOne",
    "SpectraScaler",
    "Steer",
    "Strength",
    "Subspace",
    "Table",
    "Values",
    "Vector",
    "field",
    "pytree",
    "site_shaped",
]
