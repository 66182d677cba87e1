"""SmolLM3 (Hugging Face 2025, huggingface.co/blog/smollm3): a Llama of which every fourth layer knows no positions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..decoder.family import FULL, SLIDING, Family, kinds_of, read_types, types_of, window_of
from .llama import biases, write_biases

if TYPE_CHECKING:
    from ..decoder.config import DecoderConfig
    from ..decoder.fields import Reader

_USED = frozenset(
    (
        "no_rope_layers", "no_rope_layer_interval", "use_sliding_window", "sliding_window", "layer_types", "attention_bias",
        "mlp_bias",
    )
)  # fmt: skip
_DEFAULTS = {
    "rope_theta": 2e6, "tie_word_embeddings": True, "num_key_value_heads": 4, "no_rope_layer_interval": 4,
    "bos_token_id": 128000, "eos_token_id": 128001, "pad_token_id": 128004,
}  # fmt: skip


def _read(read: Reader, common: Mapping[str, Any]) -> dict[str, Any]:
    n_layers, every = common["num_hidden_layers"], read.integer("no_rope_layer_interval")
    turned = read.flags("no_rope_layers", [int((i + 1) % (every or 1) != 0) for i in range(n_layers)])
    window, use = read.optional("sliding_window"), read.boolean("use_sliding_window")
    types = read_types(read, [SLIDING if use and window and not turns else FULL for turns in turned], window)
    kinds = kinds_of(types, window, common["rope"], common["rope"])
    pairs = zip(kinds, turned, strict=True)
    kinds = tuple(kind if turns else dataclasses.replace(kind, rope=None) for kind, turns in pairs)
    return {**biases(read, common), "layer_kinds": kinds}


def _write(config: DecoderConfig) -> dict[str, Any]:
    window = window_of(config)
    return {
        **write_biases(config),
        "no_rope_layers": [int(kind.rope is not None) for kind in config.layer_kinds],
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "layer_types": types_of(config),
    }


SMOLLM3 = Family(
    model_type="smollm3",
    title="SmolLM3",
    architecture="SmolLM3ForCausalLM",
    used=_USED,
    inert={"max_window_layers": range(1 << 31)},
    defaults=_DEFAULTS,
    read=_read,
    write=_write,
)
