"""Which devices there are, which of them a model is best run on, in words."""

from __future__ import annotations

import importlib.util
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import jax
import numpy as np
from jaxlib.version import __version__ as jaxlib_version

if TYPE_CHECKING:
    import torch

# What the weights may take of what is free; the rest is for activations and captures.
_SHARE = 0.8


# What JAX calls GPUs, and how programs that run layers are compiled there: a product with a weight that a scan slices out of
# a stacked array reads it where it lies, where XLA's own way (Triton's products) copies it first. Twice as fast with few tokens,
# and compiled in a fraction of the time, since nothing is tuned.
GPUS = ("gpu", "cuda", "rocm")
GPU_OPTIONS: dict[str, str | bool] = {"xla_gpu_enable_triton_gemm": False}
# jaxlib 0.10.2 fuses products with what follows them on a CPU, and so computes some programs wrongly, without a word
# (jax-ml/jax#39103; neither 0.10.1 nor 0.11.0 does). Where products stay by themselves all is right, and as fast.
# Programs that run a model alone have no such product, and keep the fusions: sums of norms are nearer to float64 with them.
ALONE: dict[str, str | bool] = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}
CPU_OPTIONS = ALONE if jaxlib_version == "0.10.2" else {}


def flags(options: dict[str, str | bool]) -> str:
    """Options as a process is given them in `XLA_FLAGS`."""
    return " ".join(
        f"--{name}={value if isinstance(value, str) else str(value).lower()}" for name, value in options.items()
    )


class JaxDevice(Protocol):
    """A `jax.Device`, for which JAX has no type that can be checked."""

    @property
    def platform(self) -> str: ...
    @property
    def device_kind(self) -> str: ...


# A device, or the name of a platform; those of torch for its own models.
DeviceLike: TypeAlias = "str | JaxDevice | torch.device"


def get_default_device() -> Any:
    """The device for a model: an accelerator that JAX has; else the Apple GPU, which torch reaches; else JAX's CPU.

    Returns:
        A `jax.Device`; for the Apple GPU `torch.device("mps")`, which `from_pretrained(…, backend="torch", device=…)`
        takes.

    Examples:
        >>> str(get_default_device()) == get_device_info()["device"]
        True
    """
    device = jax.local_devices()[0]
    return _torch_devices().find_device("mps") if device.platform == "cpu" and is_mps_available() else device


def find_device(device: DeviceLike | None = None) -> Any:
    """A `jax.Device` from a device, a platform's name (`"cpu"`, `"gpu"`, `"cuda"`, `"tpu"`), or None for JAX's first."""
    if device is None:
        return jax.local_devices()[0]
    if isinstance(device, jax.Device):
        return device
    try:
        return jax.local_devices(backend=str(device))[0]
    except RuntimeError:
        here = sorted({str(found.platform) for found in jax.devices()} | {"cpu"})
        hint = " Apple GPUs are served by torch: give backend='torch' as well." if str(device) == "mps" else ""
        raise ValueError(f"device is {device!r}, and JAX has {', '.join(here)} here.{hint}") from None


def get_device_info() -> dict[str, Any]:
    """What this machine computes on, and with which versions.

    Returns:
        `device`, `platform` and `kind` of the default device and how many of it there are (`device_count`); `memory_bytes` in
        all and `free_bytes`, of the host where the device has none of its own, None where that cannot be known;
        `mps_available`; the versions of `python`, `jax` and `torch` (None where it is not installed); and
        `mps_high_watermark_ratio`, what PYTORCH_MPS_HIGH_WATERMARK_RATIO is set to: torch allocates on an Apple GPU at most
        this many times the memory that Metal recommends, 1.7 times where it is unset, and without limit for 0, when a Mac that
        runs out of memory swaps or stops instead of raising an error.

    Examples:
        >>> get_device_info()["jax"] == jax.__version__
        True
    """
    device = get_default_device()
    of_jax = isinstance(device, jax.Device)
    return {
        "device": str(device),
        "platform": device.platform if of_jax else device.type,
        "kind": device.device_kind if of_jax else f"Apple {platform.machine()}",
        "device_count": jax.local_device_count() if of_jax else 1,
        "memory_bytes": memory(device)[0],
        "free_bytes": memory(device)[1],
        "mps_available": is_mps_available(),
        "mps_high_watermark_ratio": os.environ.get("PYTORCH_MPS_HIGH_WATERMARK_RATIO"),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "torch": _version("torch"),
    }


def is_mps_available() -> bool:
    """Whether there is an Apple GPU that torch can compute on: Apple silicon, torch installed, macOS new enough for it.

    Examples:
        >>> is_mps_available() == get_device_info()["mps_available"]
        True
    """
    apple = sys.platform == "darwin" and platform.machine() == "arm64"
    return apple and has_torch() and "mps" in _torch_devices().there()


def has_torch() -> bool:
    """Whether torch is installed."""
    return importlib.util.find_spec("torch") is not None


def memory(device: JaxDevice | torch.device | None = None) -> tuple[int | None, int | None]:
    """Bytes in all and bytes free, of a device of JAX or torch; of the host for None, and for a device without its own."""
    if isinstance(device, jax.Device):
        of_jax: Any = device
        try:
            stats = of_jax.memory_stats() or {}
        except RuntimeError:
            stats = {}
        if "bytes_limit" in stats:
            return stats["bytes_limit"], stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    elif device is not None:
        found = _torch_devices().memory(device)
        if found[0] is not None:
            return found
    total, free = _pages("SC_PHYS_PAGES"), _free_on_host()
    return total, total if free is None else free  # macOS does not tell what is free


def _free_on_host() -> int | None:
    try:  # Linux counts what it could give back; elsewhere what is free must do
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return _pages("SC_AVPHYS_PAGES")


def _pages(name: str) -> int | None:
    try:
        return os.sysconf(name) * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not on every system
        return None


@dataclass(frozen=True)
class Recommendation:
    """Where a model is best run: `from_pretrained(source, dtype=r.dtype, device=r.device, backend=r.backend)`.

    Attributes:
        backend: `"jax"` or `"torch"`.
        device: a `jax.Device` or a `torch.device`.
        dtype: of the weights, `"float32"`, `"bfloat16"` or `"float16"`.
        needed_bytes: what the weights take.
        free_bytes: what is free there; None where that cannot be known.
        fits: whether the weights take at most 80 % of that, so that there is room for activations.
        reason: a sentence.
    """

    backend: str
    device: Any
    dtype: str
    needed_bytes: int
    free_bytes: int | None
    fits: bool
    reason: str

    def __str__(self) -> str:
        return self.reason


def recommend_device_for_model(model: object, dtype: str = "auto") -> Recommendation:
    """The first of these that has room: the default device in float32, then in half precision; the CPU likewise.

    Half precision is bfloat16, on Apple GPUs float16. Where nothing has room, the CPU is recommended,
    with `fits` False.

    Args:
        model: how many parameters it has; or a `Decoder`, a `DecoderConfig` or a Hugging Face model, which know that.
        dtype: `"auto"`, or the only one to consider: `"float32"`, `"bfloat16"` or `"float16"`.

    Returns:
        A `Recommendation`: `.backend`, `.device`, `.dtype`, `.needed_bytes`, `.free_bytes`, `.fits` and a `.reason` in words.

    Raises:
        TypeError, ValueError: something that does not know its number of parameters; another dtype.

    Examples:
        >>> found = recommend_device_for_model(1_800_000, dtype="float32")
        >>> found.needed_bytes, found.fits
        (7200000, True)
    """
    n_params = _count(model)
    sizes = {"float32": 4, "bfloat16": 2, "float16": 2}
    if dtype != "auto" and dtype not in sizes:
        raise ValueError(f"dtype is {dtype!r}, and must be auto, {', '.join(sizes)}.")
    default, tried = get_default_device(), []
    cpu = jax.local_devices(backend="cpu")[0]
    for device in [default] if default == cpu else [default, cpu]:
        of_jax = isinstance(device, jax.Device)
        name, free = device.platform if of_jax else device.type, memory(device)[1]
        for kind in ("float32", "float16" if name == "mps" else "bfloat16") if dtype == "auto" else (dtype,):
            needed = n_params * sizes[kind]
            fits = free is None or needed <= _SHARE * free
            room = "unknown memory" if free is None else f"{free / 1e9:.1f} GB free"
            tried.append(f"{kind} on {name} ({needed / 1e9:.1f} GB of weights, {room})")
            reason = f"{tried[-1]}" + (f", since there is no room for {'; '.join(tried[:-1])}." if tried[1:] else ".")
            if fits:
                return Recommendation(
                    "jax" if of_jax else "torch", device, kind, needed, free_bytes=free, fits=True, reason=reason
                )
    return Recommendation(
        "jax", cpu, kind, needed, free_bytes=free, fits=False, reason=f"Nowhere on this machine: {'; '.join(tried)}."
    )


def _count(model: Any) -> int:
    found = model
    if hasattr(model, "n_params"):
        found = model.n_params
    elif callable(getattr(model, "num_parameters", None)):
        found = model.num_parameters()
    if isinstance(found, (bool, np.bool_)) or not isinstance(found, (int, float, np.number)):
        raise TypeError(
            f"model is a {type(model).__name__}; "
            "give the number of parameters, a model, oculi_jax's DecoderConfig or a model of transformers."
        )
    if not math.isfinite(found) or found <= 0:
        raise ValueError(f"model is {found!r} parameters, and a positive number is needed.")
    return int(found)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _torch_devices() -> Any:
    from ..backends.torch import devices

    return devices


def timed_products(product: Callable[[], object], size: int) -> float:
    """Floating-point operations a second of a square matrix product, the median of a fifth of a second of them."""
    product()  # compiles
    times: list[float] = []
    while len(times) < 3 or (sum(times) < 0.2 and len(times) < 200):
        start = time.perf_counter()
        product()
        times.append(time.perf_counter() - start)
    return 2.0 * size**3 / statistics.median(times)
