"""`Taps`: what is edited and read at the sites of a run, as the tap of each layer."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from jax import Array
from jaxtyping import Int

from ...arrays import AnyArray
from ...intervention.edit import Edit, apply_edit, cut, is_site_shaped, lower
from ...models.decoder.derivatives import Derivatives
from ...rules import of_layer

if TYPE_CHECKING:
    from ...buckets import Window
    from ...models.decoder.config import DecoderConfig
    from ...rules import Rules
    from .layout import Layout


@dataclass(frozen=True)
class Taps:
    """The edits of a run, numbered by their interventions, and the sites that are read.

    Attributes:
        layout: of the tokens that run, which the edits are cut to.
        n_interventions: how many there are.
        rules: canonical ones of what is differentiated.
    """

    layout: Layout
    edits: list[tuple[int, Edit]]
    n_interventions: int
    wanted: frozenset[str]
    rules: Rules | None = None

    @classmethod
    def of(
        cls,
        interventions: tuple[Any, ...],
        config: DecoderConfig,
        layout: Layout,
        wanted: Collection[str] = (),
        n_covered: AnyArray | int | None = None,
        window: Window | None = None,
        rules: Rules | None = None,
    ) -> Taps:
        """The taps of canonical interventions, whose arrays cover `n_covered` tokens (None: all), or those that have a window."""
        run = {**config.sizes, "T": layout.n_keys, "S": layout.n_keys}
        given = run if window is None else {**run, "T": window.n_columns, "S": window.n_columns}
        edits = lower(interventions, given, n_covered, config.sites)
        if window is not None:
            edits = [
                (number, cut(edit, window.first + jnp.arange(layout.n_keys), given, "TS")) for number, edit in edits
            ]
        if not layout.is_whole:
            edits = [(number, cut(edit, (layout.first, layout.n_tokens), run)) for number, edit in edits]
        return cls(layout, edits, len(interventions), frozenset(wanted), rules)

    @property
    def can_be_cut(self) -> bool:
        """Whether every edit treats each token by itself, so that it can be cut to any."""
        return all(is_site_shaped(edit) for _, edit in self.edits)

    def of_rows(self, rows: Int[Array, "R"]) -> Taps:
        """The taps of some of the tokens that run, for what comes after the keys and values of all."""
        sizes = {"T": self.layout.n_tokens}
        edits = [(number, cut(edit, rows, sizes)) for number, edit in self.edits]
        return replace(self, layout=self.layout.of_rows(rows), edits=edits)

    def at(self, layer: Int[Array, ""] | None) -> Tap:
        """The tap of one layer; of what lies outside of them for None."""
        return Tap(self, layer)


class Tap:
    """The tap of one layer while it is traced: edits what is to be edited, remembers what is to be read.

    Attributes:
        seen: site → value, of the sites that are read.
        rules: how the layer is differentiated.
    """

    def __init__(self, taps: Taps, layer: Array | None):
        self._taps, self._layer = taps, layer
        self.rules = Derivatives() if taps.rules is None else of_layer(taps.rules, layer)
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
        value = self.rules.at(site, value)
        if site in self._taps.wanted:
            self.seen[site] = value
        return value

    def counts(self) -> Int[Array, "N"]:
        """1 for each intervention that changed an element here, else 0."""
        none = jnp.zeros((), bool)
        changed = [self._changed.get(number, none) for number in range(self._taps.n_interventions)]
        return jnp.stack(changed).astype(jnp.int32) if changed else jnp.zeros(0, jnp.int32)
