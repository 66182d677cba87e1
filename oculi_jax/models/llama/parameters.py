"""The table of parameters: ours, and the tensor of a Hugging Face checkpoint that each one is.

Loading, saving, checking and sharding all read it. Axes are letters; those in one pair of parentheses are one axis in
the file (`(H D) E` is stored as `[H·D, E]` and used as `[H, D, E]`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .activations import ACTIVATION_PARAMETERS

if TYPE_CHECKING:
    from .config import LlamaConfig


@dataclass(frozen=True)
class Parameter:
    """One row.

    Attributes:
        name: its path in `Llama`; one under `layers.` is stacked on a leading `L`.
        tensor: the name in a checkpoint; `{}` stands for the layer.
        axes: letters of one layer's axes as used, without `L`.
        stored: the shape of the tensor in the file.
        shape: the shape as used, with `L` where stacked.
        groups: how many of our axes each axis of the file is.
    """

    name: str
    tensor: str
    axes: tuple[str, ...]
    stored: tuple[int, ...]
    shape: tuple[int, ...]
    groups: tuple[int, ...]

    @property
    def stacked(self) -> bool:
        return self.name.startswith("layers.")

    def tensors(self) -> list[str]:
        """The names in the checkpoint, one a layer where stacked."""
        return [self.tensor.format(layer) for layer in range(self.shape[0])] if self.stacked else [self.tensor]

    def stored_slices(self, inner: Sequence[slice]) -> tuple[slice, ...]:
        """The slices of the file's axes that hold the given slices of ours (without `L`).

        Of our axes that are one in the file, only the first is ever cut.
        """
        sizes = self.shape[1:] if self.stacked else self.shape
        slices, first = [], 0
        for length in self.groups:
            unit = math.prod(sizes[first + 1 : first + length])
            slices.append(slice(inner[first].start * unit, inner[first].stop * unit))
            first += length
        return tuple(slices)

    def split(self, mesh_size: int) -> tuple[str | None, ...]:
        """Mesh axis for each axis of `shape`: heads, neurons and vocabulary over `model` where it divides them."""
        lead: tuple[str | None, ...] = (None,) if self.stacked else ()
        sizes = self.shape[len(lead) :]
        spread: Sequence[str | None] = [
            "model" if letter in ("H", "K", "F", "V") and size % mesh_size == 0 else None
            for letter, size in zip(self.axes, sizes, strict=True)
        ]
        return (*lead, *spread)


def parameter_table(config: LlamaConfig) -> list[Parameter]:
    """Every parameter of a model with this config."""
    sizes = {**config.sizes, "1": 1}

    def row(name: str, tensor: str, axes: str) -> Parameter:
        groups = re.findall(r"\(([^)]*)\)|(\S+)", axes)
        letters = tuple(letter for group in groups for letter in (group[0] or group[1]).split())
        stored = tuple(math.prod(sizes[letter] for letter in (group[0] or group[1]).split()) for group in groups)
        lead = (sizes["L"],) if name.startswith("layers.") else ()
        shape = (*lead, *(sizes[letter] for letter in letters))
        lengths = tuple(len((group[0] or group[1]).split()) for group in groups)
        return Parameter(name, tensor, letters, stored, shape, lengths)

    layer = "model.layers.{}."
    rows = [row("embed", "model.embed_tokens.weight", "V E")]
    for name, axes in {"q": "(H D) E", "k": "(K D) E", "v": "(K D) E", "o": "E (H D)"}.items():
        rows.append(row(f"layers.attn.{name}.weight", f"{layer}self_attn.{name}_proj.weight", axes))
        if config.attention_bias:
            out = re.match(r"\([^)]*\)|\S+", axes)[0]  # type: ignore[index]
            rows.append(row(f"layers.attn.{name}.bias", f"{layer}self_attn.{name}_proj.bias", out))
    for name, axes in {"gate": "F E", "up": "F E", "down": "E F"}.items():
        rows.append(row(f"layers.mlp.{name}.weight", f"{layer}mlp.{name}_proj.weight", axes))
        if config.mlp_bias:
            rows.append(row(f"layers.mlp.{name}.bias", f"{layer}mlp.{name}_proj.bias", axes[0]))
    for name, shape in ACTIVATION_PARAMETERS.get(config.hidden_act, {}).items():
        rows.append(row(f"layers.mlp.act_fn.{name}", f"{layer}mlp.act_fn.{name}", "1" if shape else ""))
    rows.append(row("layers.attn_norm.weight", f"{layer}input_layernorm.weight", "E"))
    rows.append(row("layers.mlp_norm.weight", f"{layer}post_attention_layernorm.weight", "E"))
    rows.append(row("norm.weight", "model.norm.weight", "E"))
    if not config.tie_word_embeddings:
        rows.append(row("unembed", "lm_head.weight", "V E"))
    return rows
