"""The one loop over layers: of a forward, of a sweep's variants, of decoding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from ...arrays import AnyArray, wide
from ...capture import Reading, at_positions
from ...traced import entry

if TYPE_CHECKING:
    from ...models.decoder.model import Decoder
    from .layout import Layout
    from .taps import Tap, Taps

# Keys and values of other tokens, of all layers: [L, K, P, D] each; of a cache, which all slots have a place in, [L, K, S, D].
Past = tuple[Array, Array]
# (block, what enters, what it is given, rotation, sight, config, tap, remember) → what leaves a layer.
Step = Callable[..., Any]


def _is_kept(primitive: Any, *_: Any, **__: Any) -> bool:
    """Whether a backward pass keeps what an operation made: not what only takes a part of an array, or shapes it."""
    return primitive.name not in ("dynamic_slice", "squeeze", "reshape", "transpose")


class Ran(NamedTuple):
    """What the loop leaves: the residual stream, site → what was read `[layers asked for, …]`, on how many layers each
    intervention changed something, and the cache with what ran.
    """

    resid: Float[Array, "T E"]
    captured: dict[str, Array]
    applied: Int[Array, "N"]
    cache: Past | None = None


def run_layers(
    model: Decoder,
    resid: Float[Array, "T E"],
    taps: Taps,
    readings: Sequence[Reading] = (),
    *,
    start: AnyArray | int = 0,
    stop: int | None = None,
    past: Past | None = None,
    cache: Past | None = None,
    before: Mapping[str, Array] | None = None,
    rows: Int[Array, "R"] | None = None,
    remat: bool = False,
    settle: Callable[[Array], Array] = lambda resid: resid,
    step: Step = lambda block, resid, own, *around: block(resid, *around),
    given: Mapping[str, Any] | None = None,
) -> Ran:
    """Runs the layers from `start` up to `stop` (None: all).

    Args:
        resid: what enters the first of them; of another `step`, any pytree.
        readings: what to read on the way; those outside the layers are not looked at.
        start: an integer; or data, and then nothing is counted, and there is no reverse derivative.
        past: keys and values of tokens that do not run.
        cache: the same in their slots; those of the tokens that run are written among them, in place.
        before: where `start` is data, site → what was read in all layers by a run that is as this one up to there.
        rows: which of the tokens leave the last layer: of the others it makes keys and values alone. None for all.
        remat: run each layer again in the backward pass instead of keeping its intermediates.
        settle: called on the residual stream after each layer, to say how it is laid out over devices.
        step: what a layer does with what enters it, where that is not the block itself.
        given: what a `step` is handed besides, of each layer its own: leaves that lead with the layers that run.
    """
    n_layers = model.config.num_hidden_layers
    stop = n_layers if stop is None else stop
    layered = [reading for reading in readings if reading.site.layered]
    layout = taps.layout

    def run_one(resid: Any, layer: Array, block: Any, past: Past | None, cache: Any = None, own: Any = None) -> Any:
        def write(*new: Array) -> tuple[Array, ...]:
            nonlocal cache
            cache = tuple(layout.put(x, whole, layer) for x, whole in zip(new, cache, strict=True))
            return tuple(entry(whole, layer) for whole in cache)

        rotation, sight = layout.at(layer)
        tap, remember = taps.at(layer), layout.remember(past) if cache is None else write
        resid = settle(step(block, resid, own, rotation, sight, model.config, tap, remember))
        return resid, {r.site.name: read(r, tap, layout.queries) for r in layered}, tap.counts(), cache

    one = jax.checkpoint(run_one) if remat else run_one
    # What is wanted of some tokens alone is left to `_last`.
    until = stop if rows is None else n_layers - 1

    if not isinstance(start, int):
        body = partial(_replacing, one, (model.layers, past))
        resid, found = jax.lax.fori_loop(start, until, body, (resid, dict(before or {})))
        if rows is not None:
            resid = jax.lax.cond(
                start < stop, lambda x: settle(_last(model, x, taps, past, rows)), lambda x: x[rows], resid
            )
        return Ran(resid, found, jnp.zeros(taps.n_interventions, jnp.int32))

    slots = {r.site.name: _slots(r, n_layers) for r in layered}
    buffers = {r.site.name: _buffer(r, model, layout) for r in (layered if start < stop else ())}

    def scanned(carry: tuple[Any, ...], xs: tuple[Array, Any, Any]) -> tuple[Any, None]:
        (resid, buffers, applied, cache), (layer, sliced, own) = carry, xs
        run: Step = _indexed(one, (model.layers, past)) if sliced is None else one
        resid, found, counts, cache = run(resid, layer, *(sliced or (None, None)), cache, own)
        buffers = {
            name: _store(buffers[name], value, slots[name], layer, bool((slots[name][start:until] >= 0).all()))
            for name, value in found.items()
        }
        return (resid, buffers, applied + counts, cache), None

    # The scan slices the weights where all layers run; where few do, indexing them copies no more than those few.
    sliced = (model.layers, past) if (start, until) == (0, n_layers) else None
    carry: Any = resid, buffers, jnp.zeros(taps.n_interventions, jnp.int32), cache
    if start < until:
        carry, _ = jax.lax.scan(scanned, carry, (jnp.arange(start, until), sliced, given))
    if rows is not None:
        carry = settle(_last(model, carry[0], taps, past, rows)), *carry[1:]
    return Ran(*carry)


def _replacing(one: Callable[..., Any], given: Any, layer: Array, carry: tuple[Array, dict[str, Array]]) -> Any:
    """One layer of a run that starts anywhere: what is read takes the place of what an earlier run had there."""
    resid, found, *_ = one(carry[0], layer, *_of_layer(given, layer))
    return resid, {name: _put(carry[1][name], value, layer) for name, value in found.items()}


def _indexed(one: Callable[..., Any], whole: Any) -> Callable[..., Any]:
    """`one` layer, of weights that it indexes; a backward pass does so again, since it would keep what they are of every layer."""

    @partial(jax.checkpoint, prevent_cse=False, policy=_is_kept)
    def run(resid: Any, layer: Array, _: None, __: None, cache: Any, own: Any) -> Any:
        return one(resid, layer, *_of_layer(whole, layer), cache, own)

    return run


def _of_layer(tree: Any, layer: Any) -> Any:
    return jax.tree.map(lambda leaf: entry(leaf, layer), tree)


def _last(model: Decoder, resid: Array, taps: Taps, past: Past | None, rows: Int[Array, "R"]) -> Float[Array, "R E"]:
    """The last layer for some tokens, which look at the keys and values of all."""
    layer = jnp.int32(model.config.num_hidden_layers - 1)
    block, own = _of_layer((model.layers, past), layer)
    tap, few = taps.at(layer), taps.of_rows(rows)
    joined = taps.layout.remember(own)(*block.keys(resid, taps.layout.at(layer)[0], model.config, tap))
    rotation, sight = few.layout.at(layer)
    return block(resid[rows], rotation, sight, model.config, few.at(layer), lambda *_: joined)


def _put(whole: Array, value: Array, layer: Array) -> Array:
    return jax.lax.dynamic_update_index_in_dim(whole, value, layer, 0)


def read(reading: Reading, tap: Tap, real: Array | None) -> Array:
    """What a reading takes of the value that a tap has seen."""
    value = tap.seen[reading.site.name]
    if reading.positions is not None:
        value = at_positions(value, reading.site.axes.index("T"), reading.positions, real)
    return value if reading.dtype is None else value.astype(reading.dtype)


def _slots(reading: Reading, n_layers: int) -> np.ndarray:
    """Where each layer's value goes in a reading's buffer, which holds the layers asked for and no others; −1: nowhere."""
    return np.array([reading.layers.index(i) if i in reading.layers else -1 for i in range(n_layers)], np.int32)


def _buffer(reading: Reading, model: Decoder, layout: Layout) -> Array:
    own = {"model": model.dtype, "float32": wide(model.dtype)}.get(reading.site.dtype, reading.site.dtype)
    return jnp.zeros(reading.shape(model.config, layout.n_tokens, layout.n_keys), reading.dtype or own)


def _store(buffer: Array, value: Array, slots: np.ndarray, layer: Array, everywhere: bool) -> Array:
    """Writes one layer's value into its slot of a carried buffer; a layer without one leaves it as it is."""
    slot = entry(slots, layer)

    def write() -> Array:
        return _put(buffer, value, slot)

    # A cond rather than a select, which would hold one value more beside the buffer.
    return write() if everywhere else jax.lax.cond(slot >= 0, write, lambda: buffer)
