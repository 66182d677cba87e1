"""Devices and tokens: `get_default_device`, `get_device_info`, `is_mps_available`, `to_single_token`, `str_tokens`,
`first_difference`.
"""

from .devices import get_default_device, get_device_info, is_mps_available
from .tokens import first_difference, str_tokens, to_single_token

__all__ = [
    "first_difference",
    "get_default_device",
    "get_device_info",
    "is_mps_available",
    "str_tokens",
    "to_single_token",
]
