"""Llama: its config, the network, checkpoints; and, since the guide imports it from here, the adapter over it."""

from typing import TYPE_CHECKING, Any

from .config import LlamaConfig, RopeConfig
from .model import Llama, expand_kv

if TYPE_CHECKING:
    from ...adapter.adapter import LlamaAttentionAdapter

__all__ = ["Llama", "LlamaAttentionAdapter", "LlamaConfig", "RopeConfig", "expand_kv"]


def __getattr__(name: str) -> Any:
    if name == "LlamaAttentionAdapter":  # which stands above the model, and is not imported with it
        from ...adapter.adapter import LlamaAttentionAdapter

        return LlamaAttentionAdapter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
