"""Llama: its config, the network, checkpoints; and, since the guide imports it from here, the adapter over it."""

from typing import TYPE_CHECKING, Any

from ..decoder.attention import expand_kv
from ..decoder.config import DecoderConfig as LlamaConfig
from ..decoder.rope_config import RopeConfig
from .model import Llama

if TYPE_CHECKING:
    from ...adapter.adapter import LlamaAttentionAdapter

__all__ = ["Llama", "LlamaAttentionAdapter", "LlamaConfig", "RopeConfig", "expand_kv"]


def __getattr__(name: str) -> Any:
    if name == "LlamaAttentionAdapter":  # which stands above the model, and is not imported with it
        from ...adapter.adapter import LlamaAttentionAdapter

        return LlamaAttentionAdapter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
