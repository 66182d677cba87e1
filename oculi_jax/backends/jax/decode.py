"""The program of `generate`: prompts are run once, then token after token with a cache, in one compiled loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Int

from ...capture import Reading
from ...decoding.sampling import Sampler, choose
from ...intervention.rows import Rows
from ...sites import SITES
from ..protocol import Written
from .compiled import compiled
from .layout import lay_out
from .programs import passed
from .taps import Taps

if TYPE_CHECKING:
    from ...models.llama.model import Llama

# Where the tokens lie in a cache of C prompts × N variants: [C, N, L, K, S, D].
_SLOTS = 4


@compiled("size", "n_new", "readings")
def decode_rows(
    model: Llama,
    tokens: Int[Array, "C T"],
    real: Bool[Array, "C T"],
    rows: Rows,
    *,
    size: int,
    n_covered: Any,
    sampler: Sampler,
    keys: Array | None,
    stops: Int[Array, "M"],
    n_new: int,
    readings: tuple[Reading, ...],
) -> Written:
    """See `Programs.decode_rows`."""
    config = model.config
    n_prompts, n_tokens = tokens.shape
    n_slots = n_tokens + n_new
    slots = jnp.concatenate([real, jnp.ones((n_prompts, n_new), bool)], axis=1)
    layers = tuple(range(config.num_hidden_layers))
    cache_readings = tuple(Reading(SITES[name], layers, None, None) for name in ("k", "v"))

    def advance(
        slot: Any, tokens: Array, real: Array, cache: tuple[Array, ...] = ()
    ) -> tuple[Array, tuple[Array, ...]]:
        """Runs the tokens [C, N, T] of slots `slot`, … after those of the cache: logits [C, N, V], and their keys and values."""

        def one(interventions: Any, real: Array, tokens: Array, *past: Array) -> tuple[Array, tuple[Array, ...]]:
            layout = lay_out(config, tokens, real, first=slot, n_keys=real.shape[0])
            taps = Taps.of(interventions, config, layout, ("k", "v"), n_covered)
            done = passed(model, taps, cache_readings, to_end=True, past=past or None)
            assert layout.queries is not None and done.normalised is not None
            last = jnp.argmax(jnp.where(layout.queries, jnp.arange(layout.n_tokens), -1))
            final = jax.lax.dynamic_slice_in_dim(done.normalised, last, 1)
            return model.logits(final)[0], (done.activations["k"], done.activations["v"])

        return rows.map(one, size)(real, 0, tokens, *cache)

    def put(whole: Array, step: Any, logits: Array, done: Array) -> tuple[Array, Array]:
        new = jnp.where(done, config.pad_id, choose(sampler, keys, step, logits))
        whole = jax.lax.dynamic_update_slice_in_dim(whole, new[..., None], n_tokens + step, 2)
        return whole, done | _among(new, stops)

    # Rotary types that change with the length past some point turn every key anew there: no cache can hold them.
    cached = config.steady_length is None or n_slots <= config.steady_length
    whole = jnp.concatenate([tokens, jnp.full((n_prompts, n_new), config.pad_id, jnp.int32)], axis=1)
    whole = jnp.broadcast_to(whole[:, None], (n_prompts, size, n_slots))
    with jax.named_scope("prefill"):
        seen = slots if cached else jnp.pad(real, [(0, 0), (0, n_new)])
        logits, cache = advance(0, whole[..., :n_tokens], seen)
        room = [(0, n_new if axis == _SLOTS else 0) for axis in range(6)]
        cache = tuple(jnp.pad(x, room) for x in cache) if cached else ()
    whole, done = put(whole, 0, logits, jnp.zeros((n_prompts, size), bool))

    def unfinished(state: Any) -> Array:
        step, *_, done = state
        return (step < n_new) & ~jnp.all(done)

    def body(state: Any) -> Any:
        step, whole, cache, done = state
        slot = n_tokens + step - 1
        if cached:
            logits, added = advance(slot, jax.lax.dynamic_slice_in_dim(whole, slot, 1, 2), slots, cache)
            # Outside the map over rows and the scan over layers, where it is done in place.
            cache = tuple(
                jax.lax.dynamic_update_slice_in_dim(x, y, slot, _SLOTS) for x, y in zip(cache, added, strict=True)
            )
        else:
            logits, _ = advance(0, whole, slots & (jnp.arange(n_slots) <= slot)[None, :])
        whole, done = put(whole, step, logits, done)
        return step + 1, whole, cache, done

    with jax.named_scope("decode"):
        _, whole, *_ = jax.lax.while_loop(unfinished, body, (jnp.int32(1), whole, cache, done))
    new = whole[..., n_tokens:]
    ended = _among(new, stops).astype(jnp.int32)
    alive = jnp.cumsum(ended, axis=-1) - ended == 0
    if not readings:
        return Written(new, alive, {})

    def reread(interventions: Any, real: Array, tokens: Array, alive: Array) -> dict[str, Array]:
        layout = lay_out(config, tokens, jnp.concatenate([real, alive]))
        names = [reading.site.name for reading in readings]
        taps = Taps.of(interventions, config, layout, names, n_covered)
        return passed(model, taps, readings, to_end=False).activations

    return Written(new, alive, rows.map(reread, size)(real, 0, whole, alive))


def _among(ids: Int[Array, "..."], stops: Int[Array, "M"]) -> Bool[Array, "..."]:
    return jnp.any(ids[..., None] == stops.reshape(*(1,) * ids.ndim, -1), axis=-1)
