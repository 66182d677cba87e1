"""Circuits: paths between what writes to the residual stream and what reads it, and edges, scored, cut out and judged."""

from . import plans  # noqa: F401  registers what plans these
from .circuit import Circuit
from .curve import MIB_SIZES, Curve, faithfulness
from .edges import edge_attribution
from .graph import Graph
from .paths import PathEffects, direct_effect, indirect_effect, path_patching, total_effect
from .running import run_circuit
from .scores import Scores
from .searching import acdc, minimal
from .verification import verify

__all__ = [
    "MIB_SIZES",
    "Circuit",
    "Curve",
    "Graph",
    "PathEffects",
    "Scores",
    "acdc",
    "direct_effect",
    "edge_attribution",
    "faithfulness",
    "indirect_effect",
    "minimal",
    "path_patching",
    "run_circuit",
    "total_effect",
    "verify",
]
