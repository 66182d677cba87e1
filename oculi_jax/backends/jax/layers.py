"""The one loop over layers: of a forward, of a sweep's variants, of decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from ...arrays import AnyArray
from ...capture import Reading, at_positions

if TYPE_CHECKING:
    from ...models.llama.model import Llama
    from .layout import Layout
    from .taps import Tap, Taps

# Keys and values of other tokens, of all layers: [L, K, P, D] each.
Past = tuple[Array, Array]


class Ran(NamedTuple):
    """What the loop leaves: the residual stream, site → what was read `[layers asked for, …]`, and on how many layers each
    intervention changed something.
    """

    resid: Float[Array, "T E"]
    captured: dict[str, Array]
    applied: Int[Array, "N"]


def run_layers(
    model: Llama,
    resid: Float[Array, "T E"],
    taps: Taps,
    readings: Sequence[Reading] = (),
    *,
    start: AnyArray | int = 0,
    stop: int | None = None,
    past: Past | None = None,
    remat: bool = False,
    settle: Callable[[Array], Array] = lambda resid: resid,
) -> Ran:
    """Runs the layers from `start` up to `stop` (None: all).

    Args:
        resid: what enters the first of them.
        readings: what to read on the way; those outside the layers are not looked at.
        start: an integer; or data, and then nothing is read, nothing counted, and there is no reverse derivative.
        past: keys and values of tokens that do not run.
        remat: run each layer again in the backward pass instead of keeping its intermediates.
        settle: called on the residual stream after each layer, to say how it is laid out over devices.
    """
    n_layers = model.config.num_hidden_layers
    stop = n_layers if stop is None else stop
    layered = [reading for reading in readings if reading.site.layered]
    layout = taps.layout

    def run_one(resid: Array, layer: Array, block: Any, past: Past | None) -> tuple[Array, dict[str, Array], Array]:
        keys, values = (None, None) if past is None else past

        def remember(k: Array, v: Array) -> tuple[Array, Array]:
            return layout.join(k, keys), layout.join(v, values)

        tap = taps.at(layer)
        rotation, allowed = layout.at(layer)
        resid = settle(block(resid, rotation, allowed, model.config, tap, remember))
        return resid, {r.site.name: read(r, tap, layout.queries) for r in layered}, tap.counts()

    one = jax.checkpoint(run_one) if remat else run_one

    def of_layer(tree: Any, layer: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf[layer], tree)

    if not isinstance(start, int):

        def step(layer: Array, resid: Array) -> Array:
            return one(resid, layer, of_layer(model.layers, layer), of_layer(past, layer))[0]

        resid = jax.lax.fori_loop(start, stop, step, resid)
        return Ran(resid, {}, jnp.zeros(taps.n_interventions, jnp.int32))

    slots = {r.site.name: _slots(r, n_layers) for r in layered}
    buffers = {r.site.name: _buffer(r, model, layout, resid.dtype) for r in (layered if start < stop else ())}

    def scanned(carry: tuple[Array, dict[str, Array], Array], xs: tuple[Array, Any]) -> tuple[Any, None]:
        resid, buffers, applied = carry
        layer, given = xs
        block, before = of_layer((model.layers, past), layer) if given is None else given
        resid, found, counts = one(resid, layer, block, before)
        buffers = {
            name: _store(buffers[name], value, slots[name], layer, bool((slots[name][start:stop] >= 0).all()))
            for name, value in found.items()
        }
        return (resid, buffers, applied + counts), None

    # The scan slices the weights where all layers run; where few do, indexing them copies no more than those few.
    given = (model.layers, past) if (start, stop) == (0, n_layers) else None
    carry: Any = resid, buffers, jnp.zeros(taps.n_interventions, jnp.int32)
    if start < stop:
        carry, _ = jax.lax.scan(scanned, carry, (jnp.arange(start, stop), given))
    return Ran(*carry)


def read(reading: Reading, tap: Tap, real: Array | None) -> Array:
    """What a reading takes of the value that a tap has seen."""
    value = tap.seen[reading.site.name]
    if reading.positions is not None:
        value = at_positions(value, reading.site.axes.index("T"), reading.positions, real)
    return value if reading.dtype is None else value.astype(reading.dtype)


def _slots(reading: Reading, n_layers: int) -> np.ndarray:
    """Where each layer's value goes in a reading's buffer, which holds the layers asked for and no others; −1: nowhere."""
    return np.array([reading.layers.index(i) if i in reading.layers else -1 for i in range(n_layers)], np.int32)


def _buffer(reading: Reading, model: Llama, layout: Layout, dtype: np.dtype) -> Array:
    own = dtype if reading.site.dtype == "model" else reading.site.dtype
    return jnp.zeros(reading.shape(model.config, layout.n_tokens, layout.n_keys), reading.dtype or own)


def _store(buffer: Array, value: Array, slots: np.ndarray, layer: Array, everywhere: bool) -> Array:
    """Writes one layer's value into its slot of a carried buffer; a layer without one leaves it as it is."""
    slot = jnp.asarray(slots)[layer]

    def write() -> Array:
        return jax.lax.dynamic_update_index_in_dim(buffer, value, slot, 0)

    # A cond rather than a select, which would hold one value more beside the buffer.
    return write() if everywhere else jax.lax.cond(slot >= 0, write, lambda: buffer)
