"""Which devices there are, in words."""

from __future__ import annotations

import importlib.util
import platform
import sys
from typing import Any

import jax


def get_default_device() -> Any:
    """The device that arrays go to: an accelerator where JAX has one, else the CPU."""
    return jax.local_devices()[0]


def find_device(device: Any = None) -> Any:
    """A `jax.Device` from a device, a platform's name (`"cpu"`, `"gpu"`, `"cuda"`, `"tpu"`), or None for the default."""
    if device is None:
        return get_default_device()
    if isinstance(device, jax.Device):
        return device
    try:
        return jax.local_devices(backend=str(device))[0]
    except RuntimeError:
        here = sorted({str(found.platform) for found in jax.devices()} | {"cpu"})
        hint = " Apple GPUs are served by torch, not by JAX." if str(device) == "mps" else ""
        raise ValueError(f"device is {device!r}, and JAX has {', '.join(here)} here.{hint}") from None


def get_device_info() -> dict[str, Any]:
    """What this machine computes on: default device, platform, number of devices, memory in bytes where known."""
    device = get_default_device()
    try:
        memory = device.memory_stats() or {}
    except (RuntimeError, NotImplementedError):
        memory = {}
    return {
        "device": str(device),
        "platform": device.platform,
        "kind": device.device_kind,
        "device_count": jax.local_device_count(),
        "memory_bytes": memory.get("bytes_limit"),
        "mps_available": is_mps_available(),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def is_mps_available() -> bool:
    """Whether this is an Apple-silicon Mac with torch installed, which is how Apple GPUs are reached."""
    apple = sys.platform == "darwin" and platform.machine() == "arm64"
    return apple and importlib.util.find_spec("torch") is not None
