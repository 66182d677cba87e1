"""The table of parameters: ours, and the tensor of a Hugging Face checkpoint that each one is.

Loading, saving, checking and sharding all read it. Axes are letters; those in one pair of parentheses are one axis in
the file (`(H D) E` is stored as `[H·D, E]` and used as `[H, D, E]`).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .activations import ACTIVATION_PARAMETERS

if TYPE_CHECKING:
    from .config import DecoderConfig

# Letters of what a mesh cuts over its axis `model`, where that divides it: heads, neurons and vocabulary.
CUT = ("H", "K", "F", "V")


@dataclass(frozen=True)
class Parameter:
    """One row.

    Attributes:
        name: its path in `Decoder`; one under `layers.` is stacked on a leading `L`.
        tensor: the name in a checkpoint; `{}` stands for the layer.
        axes: letters of one layer's axes as used, without `L`.
        stored: its shape in the file.
        shape: the shape as used, with `L` where stacked.
        groups: how many of our axes each axis of the file is.
        begin: the row of the file's tensor at which it begins, and `n_rows` how many that has, where it holds others too.
    """

    name: str
    tensor: str
    axes: tuple[str, ...]
    stored: tuple[int, ...]
    shape: tuple[int, ...]
    groups: tuple[int, ...]
    begin: int = 0
    n_rows: int | None = None

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The shape of the file's tensor."""
        return self.stored if self.n_rows is None else (self.n_rows, *self.stored[1:])

    @property
    def rows(self) -> slice:
        """Which rows of the file's tensor it is; of all, where that holds nothing else."""
        return slice(None) if self.n_rows is None else slice(self.begin, self.begin + self.stored[0])

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
            begin = 0 if slices else self.begin
            slices.append(slice(begin + inner[first].start * unit, begin + inner[first].stop * unit))
            first += length
        return tuple(slices)

    def share(self, mesh_size: int) -> int:
        """How many of its numbers a device has, where `split` lays it over so many."""
        n_parts = math.prod(mesh_size for axis in self.split(mesh_size) if axis is not None)
        return math.prod(self.shape) // n_parts

    def split(self, mesh_size: int) -> tuple[str | None, ...]:
        """Mesh axis for each axis of `shape`: heads, neurons and vocabulary over `model` where it divides them."""
        lead: tuple[str | None, ...] = (None,) if self.stacked else ()
        sizes = self.shape[len(lead) :]
        spread: Sequence[str | None] = [
            "model" if letter in CUT and size % mesh_size == 0 else None
            for letter, size in zip(self.axes, sizes, strict=True)
        ]
        return (*lead, *spread)


def parameter_table(config: DecoderConfig) -> list[Parameter]:
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
        if config.output_bias if name == "o" else config.attention_bias:
            out = re.match(r"\([^)]*\)|\S+", axes)[0]  # type: ignore[index]
            rows.append(row(f"layers.attn.{name}.bias", f"{layer}self_attn.{name}_proj.bias", out))
    for name, axes in {"gate": "F E", "up": "F E", "down": "E F"}.items():
        rows.append(row(f"layers.mlp.{name}.weight", f"{layer}mlp.{name}_proj.weight", axes))
        if config.mlp_bias:
            rows.append(row(f"layers.mlp.{name}.bias", f"{layer}mlp.{name}_proj.bias", axes[0]))
    for name, shape in ACTIVATION_PARAMETERS.get(config.hidden_act, {}).items():
        rows.append(row(f"layers.mlp.act_fn.{name}", f"{layer}mlp.act_fn.{name}", "1" if shape else ""))
    for name, axes in {None: {}, "head": {"q": "D", "k": "D"}, "token": {"q": "(H D)", "k": "(K D)"}}[
        config.qk_norm
    ].items():
        rows.append(row(f"layers.attn.{name}_norm.weight", f"{layer}self_attn.{name}_norm.weight", axes))
    for name, tensor in config.family.norms.items():
        rows.append(row(f"layers.{name}.weight", f"{layer}{tensor}.weight", "E"))
    rows.append(row("norm.weight", "model.norm.weight", "E"))
    if not config.tie_word_embeddings:
        rows.append(row("unembed", "lm_head.weight", "V E"))
    return _fused(rows, config)


def _fused(rows: list[Parameter], config: DecoderConfig) -> list[Parameter]:
    """With those that a family keeps in one tensor, one after the other, at their places in it."""
    for tensor, names in config.family.fused.items():
        full = [f"layers.{name}.weight" for name in names]
        parts = {row.name: row for row in rows if row.name in full}
        n_rows, begin = sum(row.stored[0] for row in parts.values()), 0
        for name in full:
            part = dict(tensor=f"model.layers.{{}}.{tensor}.weight", begin=begin, n_rows=n_rows)
            begin += parts[name].stored[0]
            rows[rows.index(parts[name])] = dataclasses.replace(parts[name], **part)
    return rows
