"""The guide's configs and capture structures, what they cost, and their files."""

from .configs import CaptureConfig, LogitConfig, MLPConfig, ResidualConfig
from .cost import capture_bytes
from .files import load, save
from .structures import AttentionCapture, FullCapture, LogitCapture, MLPCapture, ResidualCapture

__all__ = [
    "AttentionCapture",
    "CaptureConfig",
    "FullCapture",
    "LogitCapture",
    "LogitConfig",
    "MLPCapture",
    "MLPConfig",
    "ResidualCapture",
    "ResidualConfig",
    "capture_bytes",
    "load",
    "save",
]
