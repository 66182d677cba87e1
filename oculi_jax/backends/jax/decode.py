"""The program of `generate`: prompts are run once, then token after token with a cache, in one compiled loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from ...arrays import AnyArray
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
    from ...models.decoder.model import Decoder

# Where the tokens lie in a cache of C prompts × N variants: [C, N, L, K, S, D].
_SLOTS = 4


class _Decoding(NamedTuple):
    """What every step of decoding C prompts × N variants shares; arguments as in `Programs.decode_rows`."""

    model: Decoder
    rows: Rows
    size: int
    n_covered: AnyArray | int
    sampler: Sampler
    keys: Array | None
    stops: Int[AnyArray, "M"]

    def advance(
        self, slot: Array | int, tokens: Int[Array, "C N T"], real: Bool[AnyArray, "C S"], cache: tuple[Array, ...] = ()
    ) -> tuple[Float[Array, "C N V"], tuple[Array, ...]]:
        """Runs the tokens in slots `slot`, … after those of the cache: the logits after the last, and the cache with them.

        Where there is no cache yet it holds the tokens that run.
        """
        layers = tuple(range(self.model.config.num_hidden_layers))
        sites = () if cache else ("k", "v")
        readings = tuple(Reading(SITES[name], layers, None, None) for name in sites)

        def one(interventions: Any, real: Array, tokens: Array, *cache: Array) -> tuple[Array, Any]:
            layout = lay_out(self.model.config, tokens, real, first=slot, n_keys=real.shape[0])
            taps = Taps.of(interventions, self.model.config, layout, sites, self.n_covered)
            done = passed(self.model, taps, readings, to_end=True, cache=cache or None)
            assert layout.queries is not None and done.normalised is not None
            last = jnp.argmax(jnp.where(layout.queries, jnp.arange(layout.n_tokens), -1))
            final = jax.lax.dynamic_slice_in_dim(done.normalised, last, 1)
            return self.model.logits(final)[0], done.cache or tuple(done.activations[name] for name in sites)

        return self.rows.map(one, self.size)(real, 0, tokens, *cache)

    def put(
        self, whole: Array, slot: Array | int, step: Array | int, logits: Array, done: Array
    ) -> tuple[Array, Array]:
        """The texts with the next token in a slot, and which rows are done."""
        new = jnp.where(done, self.model.config.pad_id, choose(self.sampler, self.keys, step, logits))
        return jax.lax.dynamic_update_slice_in_dim(whole, new[..., None], slot, 2), done | _among(new, self.stops)

    def read(
        self, whole: Array, real: AnyArray, alive: Array, readings: tuple[Reading, ...]
    ) -> dict[str, Float[Array, "C N ..."]]:
        """What readings find in the finished texts, in which what follows a stop is padding."""

        def one(interventions: Any, real: Array, tokens: Array, alive: Array) -> dict[str, Array]:
            layout = lay_out(self.model.config, tokens, jnp.concatenate([real, alive]))
            names = [reading.site.name for reading in readings]
            taps = Taps.of(interventions, self.model.config, layout, names, self.n_covered)
            return passed(self.model, taps, readings, to_end=False).activations

        return self.rows.map(one, self.size)(real, 0, whole, alive)


@compiled("size", "n_new", "readings")
def decode_rows(
    model: Decoder,
    tokens: Int[AnyArray, "C T"],
    real: Bool[AnyArray, "C T"],
    rows: Rows,
    *,
    size: int,
    n_covered: AnyArray | int,
    sampler: Sampler,
    keys: Array | None,
    stops: Int[AnyArray, "M"],
    n_new: int,
    readings: tuple[Reading, ...],
) -> Written:
    """See `Programs.decode_rows`."""
    config, decoding = model.config, _Decoding(model, rows, size, n_covered, sampler, keys, stops)
    n_prompts, n_tokens = tokens.shape
    n_slots = n_tokens + n_new
    slots = jnp.concatenate([real, jnp.ones((n_prompts, n_new), bool)], axis=1)
    # Rotary types that change with the length past some point turn every key anew there: no cache can hold them.
    cached = config.steady_length is None or n_slots <= config.steady_length
    whole = jnp.concatenate([tokens, jnp.full((n_prompts, n_new), config.pad_id, jnp.int32)], axis=1)
    whole = jnp.broadcast_to(whole[:, None], (n_prompts, size, n_slots))
    with jax.named_scope("prefill"):
        seen = slots if cached else jnp.pad(real, [(0, 0), (0, n_new)])
        logits, cache = decoding.advance(0, whole[..., :n_tokens], seen)
        room = [(0, n_new if axis == _SLOTS else 0) for axis in range(6)]
        cache = tuple(jnp.pad(x, room) for x in cache) if cached else ()
    whole, done = decoding.put(whole, n_tokens, 0, logits, jnp.zeros((n_prompts, size), bool))

    def unfinished(state: Any) -> Array:
        step, *_, done = state
        return (step < n_new) & ~jnp.all(done)

    def body(state: Any) -> Any:
        step, whole, cache, done = state
        slot = n_tokens + step - 1
        if cached:
            logits, cache = decoding.advance(slot, jax.lax.dynamic_slice_in_dim(whole, slot, 1, 2), slots, cache)
        else:
            logits, _ = decoding.advance(0, whole, slots & (jnp.arange(n_slots) <= slot)[None, :])
        whole, done = decoding.put(whole, slot + 1, step, logits, done)
        return step + 1, whole, cache, done

    with jax.named_scope("decode"):
        _, whole, *_ = jax.lax.while_loop(unfinished, body, (jnp.int32(1), whole, cache, done))
    new = whole[..., n_tokens:]
    ended = _among(new, stops).astype(jnp.int32)
    alive = jnp.cumsum(ended, axis=-1) - ended == 0
    return Written(new, alive, decoding.read(whole, real, alive, readings) if readings else {})


def _among(ids: Int[Array, "..."], stops: Int[AnyArray, "M"]) -> Bool[Array, "..."]:
    return jnp.any(ids[..., None] == stops.reshape(*(1,) * ids.ndim, -1), axis=-1)
