"""The contract on torch: a model whose weights torch holds, on any of its devices (`cpu`, `cuda`, `mps`).

Nothing of a Hugging Face module is called or changed: its weights are read, at each call, where they lie. What is checked, made
canonical, lowered to edits, judged and chosen from logits is the JAX programs' own code. Here are the network, the few operations
of edits, and the five programs.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from ...utils.devices import memory, timed_products
from .decode import decode_rows
from .model import TorchDecoder
from .programs import lens, run
from .variants import run_base, run_variants

__all__ = [
    "TorchDecoder",
    "compiles_per_length",
    "decode_rows",
    "lens",
    "rate",
    "room",
    "run",
    "run_base",
    "run_variants",
    "spread",
    "traceable",
]

compiles_per_length = False
traceable = False


def room(model: TorchDecoder) -> tuple[str, int]:
    """The platform that a model runs on, and how many bytes are free there."""
    free = memory(model.device)[1]
    return model.device.type, 4 << 30 if free is None else free


def spread(model: TorchDecoder) -> tuple[int, int]:
    """How many copies of a model there are, and over how many devices each is cut: torch has it on one."""
    return 1, 1


def rate(model: TorchDecoder) -> float:
    """What a matrix product of the model's dtype does on its device, in operations a second; measured once in a process."""
    return _rate(model.device, model.dtype)


@lru_cache
def _rate(device: torch.device, dtype: np.dtype) -> float:
    size = 768 if device.type == "cpu" else 4096
    x = torch.ones(size, size, dtype=getattr(torch, dtype.name), device=device)
    return timed_products(lambda: (x @ x)[0, 0].item(), size)  # an item waits for it
