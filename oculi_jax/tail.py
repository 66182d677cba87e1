"""`start` of a run: the layer that it begins at, and the residual stream that enters it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from .arrays import AnyArray, as_array, integer, listing, on_device
from .intervention.broadcast import cast_to
from .intervention.canonical import names
from .intervention.edit import lower
from .sites import SITES

if TYPE_CHECKING:
    from .capture import Reading
    from .intervention.frame import Frame


def check_start(
    start: object, frame: Frame, interventions: tuple[Any, ...], readings: Sequence[Reading]
) -> tuple[int, AnyArray]:
    """The layer and the stream `[T, E]` in the model's dtype.

    Args:
        start: as users give it.
        interventions: in canonical form.

    Raises:
        ValueError, TypeError: no such pair, a layer that the model has not, a stream of another shape; an edit or a capture of
            what does not run.
    """
    if not isinstance(start, tuple | list) or len(start) != 2:
        raise TypeError(f"start is a {type(start).__name__}, and a pair is needed: (layer, resid), with resid [T, E].")
    n_layers = frame.config.num_hidden_layers
    layer = integer(start[0], "start[0]", 0, n_layers - 1, note=": the layer, which is a part of the program")
    resid, want = as_array(start[1]), (frame.n_tokens, frame.config.hidden_size)
    if resid.shape != want:
        hint = f" Give the row of the layer, resid[{layer}]." if resid.shape == (n_layers, *want) else ""
        raise ValueError(
            f"start holds an array {listing(resid.shape)}, and resid_pre of one layer, [T, E] = {listing(want)}, is "
            f"needed.{hint}"
        )
    if not jnp.issubdtype(resid.dtype, jnp.floating):
        raise TypeError(f"start holds an array of {resid.dtype}, and a residual stream of floats is needed.")
    _refuse_earlier(layer, frame, interventions, readings)
    return layer, cast_to(resid, frame.dtype, "start[1]")


def _refuse_earlier(layer: int, frame: Frame, interventions: tuple[Any, ...], readings: Sequence[Reading]) -> None:
    """ValueError for edits and captures of what lies before a layer."""
    n_layers = frame.config.num_hidden_layers
    where = f"and the run starts at layer {layer}"
    from_there = f"layers {layer} to {n_layers - 1}" if layer < n_layers - 1 else f"layer {layer}"
    for reading in readings:
        if reading.site.name == "embed":
            raise ValueError(f"'embed' is captured, {where}: the tokens are not embedded.")
        if any(own < layer for own in reading.layers):
            raise ValueError(
                f"{reading.site.name!r} is captured at layer {min(reading.layers)}, {where}: ask for {from_there}, "
                f"CaptureSpec({reading.site.name!r}, layers=range({layer}, {n_layers}))."
            )

    def look() -> int:
        for number, edit in lower(interventions, frame.sizes, sites=frame.config.sites):
            who = names(interventions)[number]
            if edit.site == "embed":
                raise ValueError(f"{who} acts at 'embed', {where}: the tokens are not embedded.")
            if SITES[edit.site].layered and (own := _first(edit.layer)) is not None and own < layer:
                every = "every layer" if edit.layer is None else f"layer {own}"
                raise ValueError(f"{who} acts at {every}, {where}: name layers among {from_there}.")
        return 0

    jax.eval_shape(look)  # nothing is computed for it


def _first(layer: Any) -> int | None:
    """The first layer that an edit acts at; None where only the device knows."""
    if layer is None:
        return 0
    if on_device(layer):
        return None
    given = np.asarray(layer)
    return int(given.argmax() if given.dtype == bool else given)
