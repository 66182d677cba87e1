"""Gemma 2 (arXiv:2408.00118) and the text part of Gemma 3 (arXiv:2503.19786)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..decoder.family import FULL, SLIDING, Family, kinds_of, read_types, types_of, window_of
from ..decoder.rope_config import RopeConfig, two_ropes

if TYPE_CHECKING:
    from ..decoder.config import DecoderConfig
    from ..decoder.fields import Reader

_USED = frozenset(
    (
        "hidden_activation", "query_pre_attn_scalar", "sliding_window", "layer_types", "attention_bias",
        "final_logit_softcapping",
    )
)  # fmt: skip
_INERT = {"use_bidirectional_attention": (False, None)}
_DEFAULTS = {
    "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True, "head_dim": 256, "num_attention_heads": 8,
    "num_key_value_heads": 4, "query_pre_attn_scalar": 256, "sliding_window": 4096, "rms_norm_eps": 1e-6,
    "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
_OF_2 = {
    "vocab_size": 256000, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0,
    "max_position_embeddings": 8192,
}  # fmt: skip
_OF_3 = {
    "vocab_size": 262208, "rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 6,
    "max_position_embeddings": 131072,
}  # fmt: skip
_NORMS = {
    "attn_norm": "input_layernorm", "attn_post_norm": "post_attention_layernorm", "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}  # fmt: skip


def _prepare(fields: dict[str, Any]) -> dict[str, Any]:
    """`hidden_activation` is what counts where both spellings are there."""
    own = fields.pop("hidden_activation", None)
    return fields if own is None else {**fields, "hidden_act": own}


def _read(read: Reader, common: Mapping[str, Any], every: int, local: RopeConfig) -> dict[str, Any]:
    """Of `every` so many layers the last sees all tokens; the others have a window."""
    n_layers, window = common["num_hidden_layers"], read.optional("sliding_window")
    bias = read.boolean("attention_bias")
    types = read_types(read, [SLIDING if (i + 1) % every else FULL for i in range(n_layers)], window)
    return {
        "layer_kinds": kinds_of(types, window, common["rope"], local),
        "attention_bias": bias,
        "output_bias": bias,
        "norm": "offset",
        "post_norm": True,
        "embed_scale": common["hidden_size"] ** 0.5,
        "attention_scale": read.number("query_pre_attn_scalar") ** -0.5,
        "logit_cap": read.optional_number("final_logit_softcapping"),
    }


def _read_gemma2(read: Reader, common: Mapping[str, Any]) -> dict[str, Any]:
    return {**_read(read, common, 2, common["rope"]), "score_cap": read.optional_number("attn_logit_softcapping")}


def _read_gemma3(read: Reader, common: Mapping[str, Any]) -> dict[str, Any]:
    theta = read.number("rope_local_base_freq")
    local = common["local_rope"] or RopeConfig(type="default", theta=theta)
    if local.type != "default":
        read.problems.append(
            f"rope_parameters.sliding_attention is of type {local.type!r}, and 'default' is implemented"
        )
    return {**_read(read, common, read.integer("sliding_window_pattern"), local), "qk_norm": "head"}


def _write(config: DecoderConfig) -> dict[str, Any]:
    scalar = round(config.attention_scale**-2, 6)
    return {
        "hidden_activation": config.hidden_act,
        "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,  # transformers takes integers alone
        "sliding_window": window_of(config),
        "layer_types": types_of(config),
        "attention_bias": config.attention_bias,
        "final_logit_softcapping": config.logit_cap,
    }


def _write_gemma3(config: DecoderConfig) -> dict[str, Any]:
    local = next((kind.rope for kind in config.layer_kinds if kind.window is not None), None)
    return {**_write(config), "rope_local_base_freq": 10000.0 if local is None else local.theta}


GEMMA2 = Family(
    model_type="gemma2",
    title="Gemma2",
    architecture="Gemma2ForCausalLM",
    used=_USED | {"attn_logit_softcapping"},
    inert=_INERT,
    defaults=_DEFAULTS | _OF_2,
    prepare=_prepare,
    read=_read_gemma2,
    write=lambda config: {**_write(config), "attn_logit_softcapping": config.score_cap},
    norms=_NORMS,
)
GEMMA3 = Family(
    model_type="gemma3_text",
    title="Gemma3",
    architecture="Gemma3ForCausalLM",
    used=_USED | {"rope_local_base_freq", "sliding_window_pattern"},
    # Hugging Face's network reads no cap of scores.
    inert={**_INERT, "attn_logit_softcapping": (None,), "_sliding_window_pattern": range(1 << 31)},
    defaults=_DEFAULTS | _OF_3,
    prepare=_prepare,
    ropes=two_ropes,
    read=_read_gemma3,
    write=_write_gemma3,
    norms=_NORMS,
)
