"""Llama: its config, the network, checkpoints."""

from .config import LlamaConfig, RopeConfig
from .model import Llama, expand_kv

__all__ = ["Llama", "LlamaConfig", "RopeConfig", "expand_kv"]
