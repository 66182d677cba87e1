"""Mistral (Jiang et al. 2023, arXiv:2310.06825): a Llama whose layers all have a window, or none of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..decoder.family import SLIDING, Family, kinds_of, window_of

if TYPE_CHECKING:
    from ..decoder.fields import Reader


def _read(read: Reader, common: Mapping[str, Any]) -> dict[str, Any]:
    window, n_layers = read.optional("sliding_window"), common["num_hidden_layers"]
    return {"layer_kinds": kinds_of([SLIDING] * n_layers, window, common["rope"], common["rope"])}


MISTRAL = Family(
    model_type="mistral",
    title="Mistral",
    architecture="MistralForCausalLM",
    used=frozenset({"sliding_window"}),
    defaults={"sliding_window": 4096, "num_key_value_heads": 8, "bos_token_id": 1, "eos_token_id": 2},
    read=_read,
    write=lambda config: {"sliding_window": window_of(config)},
)
