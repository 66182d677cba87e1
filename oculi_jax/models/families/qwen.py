"""Qwen2 and Qwen2.5 (arXiv:2407.10671, arXiv:2412.15115); Qwen3, dense (arXiv:2505.09388)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..decoder.family import FULL, SLIDING, Family, kinds_of, read_types, types_of, window_of

if TYPE_CHECKING:
    from ..decoder.config import DecoderConfig
    from ..decoder.fields import Reader

_WINDOWS = frozenset({"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"})
_DEFAULTS = {"sliding_window": 4096, "max_window_layers": 28, "num_key_value_heads": 32}


def _kinds(read: Reader, common: Mapping[str, Any]) -> dict[str, Any]:
    """Layers from `max_window_layers` on have a window, where `use_sliding_window` is true."""
    first = read.count("max_window_layers")
    window = read.optional("sliding_window") if read.boolean("use_sliding_window") else None
    own = [SLIDING if window and i >= first else FULL for i in range(common["num_hidden_layers"])]
    types = read_types(read, own, window)
    return {"layer_kinds": kinds_of(types, window, common["rope"], common["rope"])}


def _write(config: DecoderConfig) -> dict[str, Any]:
    window, types = window_of(config), types_of(config)
    # In transformers max_window_layers counts where layer_types is not given.
    first = types.index(SLIDING) if SLIDING in types else len(types)
    return {
        "use_sliding_window": window is not None, "sliding_window": window, "max_window_layers": first, "layer_types": types,
    }  # fmt: skip


def _read_qwen3(read: Reader, common: Mapping[str, Any]) -> dict[str, Any]:
    bias = read.boolean("attention_bias")
    return {**_kinds(read, common), "qk_norm": "head", "attention_bias": bias, "output_bias": bias}


QWEN2 = Family(
    model_type="qwen2",
    title="Qwen2",
    architecture="Qwen2ForCausalLM",
    used=_WINDOWS,
    defaults=_DEFAULTS,
    read=lambda read, common: {**_kinds(read, common), "attention_bias": True},
    write=_write,
)
QWEN3 = Family(
    model_type="qwen3",
    title="Qwen3",
    architecture="Qwen3ForCausalLM",
    used=_WINDOWS | {"attention_bias"},
    defaults={**_DEFAULTS, "head_dim": 128},
    read=_read_qwen3,
    write=lambda config: {**_write(config), "attention_bias": config.attention_bias},
)
