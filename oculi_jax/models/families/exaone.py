"""EXAONE 4 (arXiv:2507.11407): what a sublayer adds is normalised; beside layers with a window the others know no positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..decoder.family import FULL, SLIDING, Family, kinds_of, read_types, types_of, window_of

if TYPE_CHECKING:
    from ..decoder.config import DecoderConfig
    from ..decoder.fields import Reader

_NORMS = {"attn_post_norm": "post_attention_layernorm", "mlp_post_norm": "post_feedforward_layernorm"}
_DEFAULTS = {
    "num_key_value_heads": 32, "rms_norm_eps": 1e-5, "sliding_window": 4096, "sliding_window_pattern": 4, "bos_token_id": 0,
    "eos_token_id": 2,
}  # fmt: skip


def _read(read: Reader, common: Mapping[str, Any]) -> dict[str, Any]:
    """Where no layer_types say it, of `sliding_window_pattern` so many layers the last sees all tokens."""
    n_layers, window = common["num_hidden_layers"], read.optional("sliding_window")
    own = [FULL] * n_layers
    if window is not None and read.fields.get("layer_types") is None:  # published ones say "LLLG" beside layer_types
        every = read.integer("sliding_window_pattern") or 1
        own = [SLIDING if (i + 1) % every else FULL for i in range(n_layers)]
    rope = common["rope"]
    kinds = kinds_of(read_types(read, own, window), window, rope if window is None else None, rope)
    return {"layer_kinds": kinds, "qk_norm": "head", "pre_norm": False, "post_norm": True}


def _write(config: DecoderConfig) -> dict[str, Any]:
    """A window that no layer has still says that none turns."""
    turns = any(kind.rope is not None for kind in config.layer_kinds)
    window = window_of(config)
    return {
        "sliding_window": window if window or turns else _DEFAULTS["sliding_window"],
        "layer_types": types_of(config),
    }


EXAONE4 = Family(
    model_type="exaone4",
    title="EXAONE4",
    architecture="Exaone4ForCausalLM",
    used=frozenset({"layer_types", "sliding_window", "sliding_window_pattern"}),
    defaults=_DEFAULTS,
    read=_read,
    write=_write,
    norms=_NORMS,
)
