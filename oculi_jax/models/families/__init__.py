"""The table of families: `model_type` → what that family has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..decoder.family import Family
from .exaone import EXAONE4
from .gemma import GEMMA2, GEMMA3
from .granite import GRANITE
from .llama import LLAMA
from .mistral import MISTRAL
from .olmo import OLMO2, OLMO3
from .phi import PHI3
from .qwen import QWEN2, QWEN3
from .smollm3 import SMOLLM3

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (LLAMA, QWEN2, QWEN3, MISTRAL, SMOLLM3, GRANITE, GEMMA2, GEMMA3, OLMO2, OLMO3, PHI3, EXAONE4)
}

# Models that see pictures too → the type of their text part, where that does not say it itself.
_TEXT_PARTS = {"gemma3": "gemma3_text", "mistral3": "mistral"}
# What counts of the fields around the text part, where they are given.
_AROUND = (
    "bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype", "tie_word_embeddings", "quantization_config",
)  # fmt: skip


def text_part(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of the `config.json` of a model that sees pictures too, what its text part alone would have; of others all as it is."""
    own, name = fields.get("text_config"), fields.get("model_type")
    if not isinstance(own, Mapping) or not isinstance(name, str) or name not in _TEXT_PARTS:
        return fields
    around = {field: fields[field] for field in _AROUND if fields.get(field) is not None}
    return {"model_type": _TEXT_PARTS[name], **own, **around}


def family_of(fields: Mapping[str, Any]) -> Family:
    """The family of a `config.json`; ValueError with those that load where it is of none of them."""
    name = fields.get("model_type", "llama")
    if isinstance(name, str) and name in FAMILIES:
        return FAMILIES[name]
    raise ValueError(f"this is a model of type {name!r}, and models of type {', '.join(map(repr, FAMILIES))} load.")
