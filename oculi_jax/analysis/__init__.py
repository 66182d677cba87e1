"""What a capture or the weights say: pure functions of captures, one question a file. Nothing here runs a model."""

from .attention import AttentionAnalysis
from .attribution import AttributionMethods
from .circuits import CircuitDetection
from .composition import CompositionAnalysis
from .correlation import CorrelationAnalysis
from .effects import InterventionMetrics
from .entropy import EntropyAnalysis
from .logit_lens import LogitLensAnalysis
from .norms import NormAnalysis
from .residual import decompose_resid, stack_head_results
from .result import Result
from .stratified import StratifiedView, find_extreme_heads

__all__ = [
    "AttentionAnalysis",
    "AttributionMethods",
    "CircuitDetection",
    "CompositionAnalysis",
    "CorrelationAnalysis",
    "EntropyAnalysis",
    "InterventionMetrics",
    "LogitLensAnalysis",
    "NormAnalysis",
    "Result",
    "StratifiedView",
    "decompose_resid",
    "find_extreme_heads",
    "stack_head_results",
]
