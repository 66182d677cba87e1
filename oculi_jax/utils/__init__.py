"""Devices and tokens: `get_default_device`, `get_device_info`, `is_mps_available`, `recommend_device_for_model`; `to_single_token`,
`str_tokens`, `first_difference`.
"""

from .devices import get_default_device, get_device_info, is_mps_available, recommend_device_for_model
from .tokens import first_difference, str_tokens, to_single_token

__all__ = [
    "first_difference",
    "get_default_device",
    "get_device_info",
    "is_mps_available",
    "recommend_device_for_model",
    "str_tokens",
    "to_single_token",
]
