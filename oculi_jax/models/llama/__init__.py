"""Llama: its config, the network, checkpoints, and the guide's adapter over it."""

from ..adapter import LlamaAttentionAdapter
from .config import LlamaConfig, RopeConfig
from .model import Llama, expand_kv

__all__ = ["Llama", "LlamaAttentionAdapter", "LlamaConfig", "RopeConfig", "expand_kv"]
