"""Llama (Touvron et al. 2023, arXiv:2302.13971), and what is one in all but its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..decoder.family import Family

if TYPE_CHECKING:
    from ..decoder.config import DecoderConfig
    from ..decoder.fields import Reader


def biases(read: Reader, _: Mapping[str, Any]) -> dict[str, Any]:
    """`attention_bias` and `mlp_bias`: of all four projections of attention, of all three of the MLP."""
    attention = read.boolean("attention_bias")
    return dict(attention_bias=attention, output_bias=attention, mlp_bias=read.boolean("mlp_bias"))


def write_biases(config: DecoderConfig) -> dict[str, Any]:
    """As `biases` reads them."""
    return {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}


LLAMA = Family(
    model_type="llama",
    title="Llama",
    architecture="LlamaForCausalLM",
    used=frozenset({"attention_bias", "mlp_bias"}),
    read=biases,
    write=write_biases,
)
