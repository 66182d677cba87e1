"""Devices, tokens and compiled programs: `get_default_device`, `get_device_info`, `is_mps_available`,
`recommend_device_for_model`; `to_single_token`, `str_tokens`, `first_difference`; `enable_compilation_cache`.
"""

from .cache import enable_compilation_cache
from .devices import get_default_device, get_device_info, is_mps_available, recommend_device_for_model
from .tokens import first_difference, str_tokens, to_single_token

__all__ = [
    "enable_compilation_cache",
    "first_difference",
    "get_default_device",
    "get_device_info",
    "is_mps_available",
    "recommend_device_for_model",
    "str_tokens",
    "to_single_token",
]
