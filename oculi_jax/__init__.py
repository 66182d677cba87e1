"""Mechanistic interpretability of Llama models as transformations of one pure JAX function."""

from .adapter import (
    AttentionCapture,
    CaptureConfig,
    FullCapture,
    LogitCapture,
    LogitConfig,
    MLPCapture,
    MLPConfig,
    ResidualCapture,
    ResidualConfig,
    capture_bytes,
    load,
    save,
)
from .capture import CaptureSpec
from .embedded import embedded_model
from .forward import forward
from .generate import generate
from .lens import lens
from .output import Output
from .planner import SweepPlan
from .sites import SITES, Site, find_site
from .sweep import plan, sweep

__version__ = "0.1.0"
__all__ = [
    "SITES",
    "AttentionCapture",
    "CaptureConfig",
    "CaptureSpec",
    "FullCapture",
    "LogitCapture",
    "LogitConfig",
    "MLPCapture",
    "MLPConfig",
    "Output",
    "ResidualCapture",
    "ResidualConfig",
    "Site",
    "SweepPlan",
    "capture_bytes",
    "embedded_model",
    "find_site",
    "forward",
    "generate",
    "lens",
    "load",
    "plan",
    "save",
    "sweep",
]
