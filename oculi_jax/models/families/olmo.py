"""OLMo 2 (arXiv:2501.00656) and OLMo 3 (arXiv:2512.13961): what a sublayer adds is normalised, and what it reads is not."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..decoder.family import FULL, SLIDING, Family, kinds_of, read_types, types_of, window_of
from ..decoder.rope_config import RopeConfig, two_ropes, write_rope

if TYPE_CHECKING:
    from ..decoder.config import DecoderConfig
    from ..decoder.fields import Reader

_NORMS = {"attn_post_norm": "post_attention_layernorm", "mlp_post_norm": "post_feedforward_layernorm"}
_DEFAULTS = {"rms_norm_eps": 1e-5, "pad_token_id": 1, "eos_token_id": 50279}
_THETA = 5e5  # of OLMo 3


def _read(read: Reader, _: Mapping[str, Any]) -> dict[str, Any]:
    bias = read.boolean("attention_bias")
    return {
        "attention_bias": bias, "output_bias": bias, "norm": "wide", "qk_norm": "token", "pre_norm": False, "post_norm": True,
    }  # fmt: skip


def _read_olmo3(read: Reader, common: Mapping[str, Any]) -> dict[str, Any]:
    """Layers with a window turn as a model without scaling does."""
    n_layers, full = common["num_hidden_layers"], common["rope"]
    plain = RopeConfig(type="default", theta=full.theta)
    local = common["local_rope"] or plain
    if local != plain:
        read.problems.append(
            f"rope_parameters.sliding_attention is {dataclasses.asdict(local)}, and is implemented only as that of "
            "full_attention without its scaling"
        )
    window = read.optional("sliding_window")
    types = read_types(read, [SLIDING if (i + 1) % 4 else FULL for i in range(n_layers)], window)
    return {**_read(read, common), "layer_kinds": kinds_of(types, window, full, local)}


def _write(config: DecoderConfig) -> dict[str, Any]:
    return {"attention_bias": config.attention_bias}


def _write_olmo3(config: DecoderConfig) -> dict[str, Any]:
    ropes = {}
    if config.rope.theta != _THETA:  # transformers 5 takes rope_theta for the layers alone that see all tokens
        plain = RopeConfig(type="default", theta=config.rope.theta)
        ropes = {
            name: {**write_rope(rope), "rope_theta": rope.theta}
            for name, rope in ((FULL, config.rope), (SLIDING, plain))
        }
        ropes = {"rope_parameters": ropes, "rope_scaling": None}
    return {**_write(config), "sliding_window": window_of(config), "layer_types": types_of(config), **ropes}


OLMO2 = Family(
    model_type="olmo2",
    title="OLMo2",
    architecture="Olmo2ForCausalLM",
    used=frozenset({"attention_bias"}),
    defaults=_DEFAULTS,
    read=_read,
    write=_write,
    norms=_NORMS,
)
OLMO3 = Family(
    model_type="olmo3",
    title="OLMo3",
    architecture="Olmo3ForCausalLM",
    used=frozenset({"attention_bias", "sliding_window", "layer_types"}),
    defaults={**_DEFAULTS, "rope_theta": _THETA, "sliding_window": 4096},
    ropes=two_ropes,
    read=_read_olmo3,
    write=_write_olmo3,
    norms=_NORMS,
)
