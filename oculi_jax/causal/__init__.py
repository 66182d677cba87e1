"""What happens if: one run's activations in another, and gradients that say the same to first order."""

from .attributed import AttributionResult
from .attribution import attribution_patching
from .noise import Noise
from .patching import PatchingResult, activation_patching
from .tracer import CausalTracer, TraceResult
from .verification import Verification, verify

__all__ = [
    "AttributionResult",
    "CausalTracer",
    "Noise",
    "PatchingResult",
    "TraceResult",
    "Verification",
    "activation_patching",
    "attribution_patching",
    "verify",
]
