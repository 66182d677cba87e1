"""Granite, dense (IBM 2024): a Llama whose embeddings, scores, sublayers and logits are multiplied by numbers of the config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..decoder.family import Family
from .llama import biases, write_biases

if TYPE_CHECKING:
    from ..decoder.config import DecoderConfig
    from ..decoder.fields import Reader

_USED = frozenset(
    ("attention_bias", "mlp_bias", "embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
)  # fmt: skip
_SCALED = ("self_attn", "self_attn.o_proj", "mlp", "mlp.down_proj")


def _read(read: Reader, common: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **biases(read, common),
        "embed_scale": read.number("embedding_multiplier", default=1.0),
        "attention_scale": read.number("attention_multiplier", default=1.0),
        "residual_scale": read.number("residual_multiplier", default=1.0),
        "logit_scale": 1 / read.number("logits_scaling", default=1.0),
    }


def _write(config: DecoderConfig) -> dict[str, Any]:
    return {
        **write_biases(config),
        "embedding_multiplier": config.embed_scale,
        "attention_multiplier": config.attention_scale,
        "residual_multiplier": config.residual_scale,
        "logits_scaling": 1 / config.logit_scale,
    }


GRANITE = Family(
    model_type="granite",
    title="Granite",
    architecture="GraniteForCausalLM",
    used=_USED,
    defaults={"bos_token_id": 1, "eos_token_id": 2},
    read=_read,
    write=_write,
    multiplied=frozenset(("model.embed_tokens", *(f"model.layers.{{}}.{name}" for name in _SCALED))),
)
