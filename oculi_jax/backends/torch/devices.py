"""Torch's devices: which there are, how much room they have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import torch

if TYPE_CHECKING:
    from ...utils.devices import DeviceLike


def there() -> list[str]:
    """The kinds of torch's devices on this machine, an accelerator before the CPU."""
    found = (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available()))
    return [*(name for name, on in found if on), "cpu"]


def find_device(device: DeviceLike | None = None) -> torch.device:
    """One of torch's devices, by its name or JAX's; for None a GPU, else the CPU. ValueError where it is not there."""
    name = there()[0] if device is None else str(device)
    if isinstance(device, jax.Device):
        of_jax: Any = device
        name = "cuda" if of_jax.platform == "gpu" else of_jax.platform
    try:
        found = torch.device(name)
    except (RuntimeError, TypeError):
        raise ValueError(f"device is {device!r}, which is none of torch's; it has {', '.join(there())} here.") from None
    if found.type not in there() or (found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count()):
        raise ValueError(f"device is {str(device)!r}, and torch has {', '.join(there())} here.")
    return found


def memory(device: torch.device) -> tuple[int | None, int | None]:
    """Bytes in all and bytes free on a device; None where it has no memory of its own, the host."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total, free
    if device.type == "mps":
        total = torch.mps.recommended_max_memory()
        return total, total - torch.mps.driver_allocated_memory()
    return None, None
