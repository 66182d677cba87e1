"""Hugging Face's Llama in float64 throughout: the noise floor that two float32 computations are judged against."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from tests.reference import reference_sites


class _Widened(TorchFunctionMode):
    """Inside it, what code pins to float32 (norms, softmax, rotary angles) is float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def wide(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        func = torch.Tensor.double if func is torch.Tensor.float else func
        return func(*map(wide, args), **{name: wide(value) for name, value in (kwargs or {}).items()})


def float64_sites(hf: Any, tokens: np.ndarray, mask: np.ndarray | None) -> dict[str, np.ndarray]:
    """`reference_sites` of the same weights, computed and returned in float64."""
    exact = copy.deepcopy(hf).double()
    with _Widened():
        exact.model.rotary_emb = type(hf.model.rotary_emb)(hf.config)
        return reference_sites(exact, tokens, mask)
