"""`Taps`: what is edited and read at the sites of a run, as the tap of each layer."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from jax import Array
from jaxtyping import Int

from ...arrays import AnyArray
from ...intervention.edit import Edit, apply_edit, cut_rows, lower

if TYPE_CHECKING:
    from ...models.llama.config import LlamaConfig
    from .layout import Layout


@dataclass(frozen=True)
class Taps:
    """The edits of a run, numbered by their interventions, and the sites that are read.

    Attributes:
        layout: of the tokens that run, which the edits are cut to.
        n_interventions: how many there are.
    """

    layout: Layout
    edits: list[tuple[int, Edit]]
    n_interventions: int
    wanted: frozenset[str]

    @classmethod
    def of(
        cls,
        interventions: tuple[Any, ...],
        config: LlamaConfig,
        layout: Layout,
        wanted: Collection[str] = (),
        n_covered: AnyArray | int | None = None,
    ) -> Taps:
        """The taps of canonical interventions, whose arrays cover `n_covered` tokens (None: all)."""
        sizes = {**config.sizes, "T": layout.n_keys, "S": layout.n_keys}
        edits = lower(interventions, sizes, n_covered, config.sites)
        if not layout.is_whole:
            edits = [(number, cut_rows(edit, layout.first, layout.n_tokens, sizes)) for number, edit in edits]
        return cls(layout, edits, len(interventions), frozenset(wanted))

    def at(self, layer: Int[Array, ""] | None) -> Tap:
        """The tap of one layer; of what lies outside of them for None."""
        return Tap(self, layer)


class Tap:
    """The tap of one layer while it is traced: edits what is to be edited, remembers what is to be read.

    Attributes:
        seen: site → value, of the sites that are read.
    """

    def __init__(self, taps: Taps, layer: Array | None):
        self._taps, self._layer = taps, layer
        self._changed: dict[int, Array] = {}
        self.seen: dict[str, Array] = {}

    def touches(self, *sites: str) -> bool:
        """Whether anybody edits or reads one of these: known before anything runs, and of all layers together."""
        return any(edit.site in sites for _, edit in self._taps.edits) or not self._taps.wanted.isdisjoint(sites)

    def __call__(self, site: str, value: Array) -> Array:
        layout = self._taps.layout
        for number, edit in self._taps.edits:
            if edit.site == site:
                before, value = value, apply_edit(edit, value, self._layer, layout.queries, layout.keys)
                self._changed[number] = self._changed.get(number, jnp.zeros((), bool)) | jnp.any(value != before)
        if site in self._taps.wanted:
            self.seen[site] = value
        return value

    def counts(self) -> Int[Array, "N"]:
        """1 for each intervention that changed an element here, else 0."""
        none = jnp.zeros((), bool)
        changed = [self._changed.get(number, none) for number in range(self._taps.n_interventions)]
        return jnp.stack(changed).astype(jnp.int32) if changed else jnp.zeros(0, jnp.int32)
