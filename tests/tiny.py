"""Tiny random Llamas without files: the models that the laws are tested on."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from oculi_jax.models.decoder.parameters import parameter_table
from oculi_jax.models.llama import Llama, LlamaConfig

BASE: dict[str, Any] = dict(
    model_type="llama", vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=6, hidden_act="silu", max_position_embeddings=64, rms_norm_eps=1e-5,
    rope_theta=10000.0, tie_word_embeddings=False,
)  # fmt: skip


def tiny_config(**changes: Any) -> LlamaConfig:
    return LlamaConfig.from_dict({**BASE, **changes})


def tiny_llama(seed: int = 0, dtype: Any = np.float32, **changes: Any) -> Llama:
    """A model whose every parameter is random, norms around one."""
    config = tiny_config(**changes)
    rng = np.random.default_rng(seed)
    params = {
        row.name: (rng.normal(0.0, 0.3, row.shape) + ("norm" in row.name)).astype(dtype)
        for row in parameter_table(config)
    }
    return Llama(config, jax.device_put(params))


def prompt(length: int = 11, seed: int = 0, vocab_size: int = 61) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab_size, length).astype(np.int32)


# The sites that a Llama has.
SITES = tiny_config().sites
