"""Several parts of a capture out of one pass: what to ask for, and which of it is whose."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import jax
import numpy as np
from jax import Array
from jaxtyping import Bool

from ..capture import CaptureSpec, Reading, at_positions

# Part of the capture → what it reads; static.
Wanted = tuple[tuple[str, tuple[Reading, ...]], ...]


def merged(wanted: Wanted) -> tuple[CaptureSpec, ...]:
    """One spec a site: where two parts want a site differently, all that either wants."""
    found: dict[str, Reading] = {}
    for _, readings in wanted:
        for reading in readings:
            name = reading.site.name
            if name in found and found[name] != reading:
                layers = tuple(sorted({*found[name].layers, *reading.layers}))
                reading = Reading(reading.site, layers, None, None)
            found[name] = reading
    return tuple(CaptureSpec(name, r.layers or None, r.positions, r.dtype) for name, r in found.items())


def parts_of(
    activations: Mapping[str, Array], mask: Bool[Array, "*B T"], wanted: Wanted
) -> dict[str, dict[str, Array]]:
    """Part of the capture → site → what the part wants, out of what was captured for all parts."""
    names = [reading.site.name for _, readings in wanted for reading in readings]
    if len(set(names)) == len(names):  # each part has its own sites, captured as it wants them
        return {part: {r.site.name: activations[r.site.name] for r in readings} for part, readings in wanted}
    return _selected(dict(activations), mask, wanted)


@partial(jax.jit, static_argnames=("wanted",))
def _selected(
    activations: Mapping[str, Array], mask: Bool[Array, "*B T"], wanted: Wanted
) -> dict[str, dict[str, Array]]:
    full = {spec.sites: spec for spec in merged(wanted)}

    def one(activations: Mapping[str, Array], mask: Array) -> dict[str, dict[str, Array]]:
        def select(reading: Reading) -> Array:
            spec, value = full[reading.site.name], activations[reading.site.name]
            if spec.layers is not None and tuple(spec.layers) != reading.layers:
                value = value[np.array([list(spec.layers).index(layer) for layer in reading.layers])]
            if reading.positions is not None and spec.positions is None:
                value = at_positions(value, 1 + reading.site.axes.index("T"), reading.positions, mask)
            return value if reading.dtype is None else value.astype(reading.dtype)

        return {part: {r.site.name: select(r) for r in readings} for part, readings in wanted}

    return one(activations, mask) if mask.ndim == 1 else jax.vmap(one)(activations, mask)


def trim(values: dict[str, dict[str, Array]], wanted: Wanted, n_tokens: int, lead: int) -> dict[str, dict[str, Array]]:
    """Cuts padded token axes back to `n_tokens`; `lead` is 1 where a batch axis comes first."""
    out: dict[str, dict[str, Array]] = {}
    for part, readings in wanted:
        if part == "logits":  # [L, T, …], unless positions were chosen
            axes = dict.fromkeys(values[part], () if readings[0].positions is not None else (lead + 1,))
        else:
            axes = {r.site.name: tuple(lead + i for i in r.token_axes) for r in readings}
        out[part] = {name: _cut(value, axes[name], n_tokens) for name, value in values[part].items()}
    return out


def _cut(value: Array, axes: tuple[int, ...], n_tokens: int) -> Array:
    index = tuple(slice(n_tokens) if axis in axes else slice(None) for axis in range(value.ndim))
    devices = value.devices()
    if len(devices) == 1 and next(iter(devices)).platform == "cpu":
        # Through NumPy, which needs no program of its own for every length; there is nothing to transfer.
        return jax.device_put(np.asarray(value)[index], next(iter(devices)))
    return value[index]
