"""`generate`: decoding with a key/value cache, in one compiled loop, with interventions active at every token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from .arrays import listing, on_device
from .capture import Reading, integers, readings_of
from .forward import Taps, check_mask, check_tokens, find_model, lower, program, run
from .intervention.canonical import family, sweep_axes
from .intervention.edit import cut_rows
from .intervention.frame import Frame
from .intervention.protocol import as_list
from .intervention.rows import along_rows, stack_rows
from .sampling import Sampler, sampler

if TYPE_CHECKING:
    from .models.llama.config import LlamaConfig
    from .models.llama.model import Llama

# Keys and values of every slot of every row, [B, L, K, S, D] each.
Cache = tuple[Array, Array]


def generate(
    model: Llama,
    tokens: Any,
    max_new_tokens: int,
    interventions: Any = (),
    *,
    temperature: Any = 0.0,
    top_k: int | None = None,
    top_p: Any = None,
    min_p: Any = None,
    stop_tokens: Any = None,
    key: Array | None = None,
    mask: Any = None,
    capture: Any = (),
    allow_longer: bool = False,
) -> Any:
    """Continues one prompt. Interventions act on the prompt and on every new token, as they would in `forward`.

    Decoding with the cache gives what running `forward` anew for every token would give. The prompt is run once, then each
    step runs one token; the loop ends when every row has stopped. (Past the original context of rotary types that change with
    the length, `dynamic` and `longrope`, every key turns with every token, and each step runs the whole text.)

    Interventions whose index and strength fields have one leading axis `N` are `N` variants, decoded side by side in the
    same program, all with the same `key`: they differ by the intervention alone. Positions count from the start of the
    prompt and may lie in the new tokens. An array with a token axis covers the prompt's `T` tokens and leaves later ones
    alone.

    Args:
        model: a `Llama`.
        tokens: ids `[T]`.
        max_new_tokens: how many new tokens at most; static.
        interventions: as in `forward`.
        temperature: 0 takes the likeliest token; above 0, tokens are drawn from softmax(logits / temperature).
        top_k: draw from the k likeliest tokens; static.
        top_p: draw from the likeliest tokens that together hold this probability.
        min_p: draw from tokens at least this probable, relative to the likeliest.
        stop_tokens: an id or several, after which a row ends; the config's `eos_token_id` for None, none for `()`.
        key: a JAX random key; needed where the temperature is not 0.
        mask: bool `[T]`, True at real tokens.
        capture: as in `forward`: what to return of the intervened run.
        allow_longer: go beyond the length that the model was made for.

    Returns:
        int32 `[max_new_tokens]`, the pad id after a stop, −1 where the logits are NaN; `[N, max_new_tokens]` for variants.
        With `capture`, that and a dictionary site → values over all `T + max_new_tokens` tokens, from one pass over the
        finished text, in which what follows a stop is padding.

    Raises:
        ValueError, TypeError: something that can be seen to be wrong, before anything runs.
    """
    model = find_model(model)
    config = model.config
    tokens = check_tokens(tokens, config.vocab_size)
    n_tokens, n_new = tokens.shape[0], check_count(max_new_tokens)
    mask = check_mask(mask, n_tokens)
    real = np.ones(n_tokens, bool) if mask is None else mask
    check_length(config, n_tokens if on_device(real) else int(real.sum()), n_new, allow_longer)
    options, stops = sampler(temperature, top_k, top_p, min_p, config.vocab_size), check_stops(stop_tokens, config)
    written = write(model, tokens[None], real[None], n_tokens, interventions, n_new, options, stops, key, capture)
    found, activations = written.tokens, written.activations
    if not written.variants:
        found, activations = jax.tree.map(lambda x: x[0], (found, activations))
    return (found, activations) if activations else found


@dataclass(frozen=True)
class Written:
    """What `write` returns: new ids `[B, N]`, which of them precede a row's end, what was captured, and whether the rows are
    variants of one prompt.
    """

    tokens: Int[Array, "B N"]
    alive: Bool[Array, "B N"]
    activations: Mapping[str, Array]
    variants: bool


def write(
    model: Llama,
    tokens: Any,
    real: Any,
    n_covered: int,
    interventions: Any,
    n_new: int,
    options: Sampler,
    stops: Int[np.ndarray, "M"],
    key: Any,
    capture: Any,
) -> Written:
    """Continues prompts `[B, T]`, or one prompt under variants of its interventions; their arrays cover `n_covered` tokens."""
    config = model.config
    n_slots = tokens.shape[1] + n_new
    axes = sweep_axes(as_list(interventions))
    if len(axes) > 1:
        raise ValueError(
            f"These interventions have axes {listing(axes)}; variants that are decoded lie along one axis [N]."
        )
    n = axes[0] if axes else None
    if n is not None and len(tokens) > 1:
        raise ValueError(
            f"{len(tokens)} prompts and {n} variants of an intervention were given; give one prompt, or scalars."
        )
    n_rows = len(tokens) if n is None else n
    tokens, real = ((jnp if on_device(x) else np).broadcast_to(x, (n_rows, x.shape[1])) for x in (tokens, real))
    xp: Any = jnp if on_device(real) else np
    slots = xp.concatenate([real, xp.ones((n_rows, n_new), bool)], axis=1)
    frames = [Frame(config, model.dtype, n_covered, row, n_slots, absolute=True) for row in slots]
    if n is None:
        stacked, leads, _ = stack_rows([interventions] * n_rows, frames)
    else:
        found_family = family(interventions, frames[0])
        stacked, leads = found_family.interventions, found_family.leads
    keys = None
    if not options.greedy:
        # Prompts of a batch draw apart; variants of one draw alike, so that they differ by the intervention alone.
        one = check_key(key)
        keys = jax.random.split(one, n_rows) if n is None and n_rows > 1 else jnp.broadcast_to(one, n_rows)
    shortest = n_slots if on_device(real) else int(slots.sum(axis=1).min())
    readings = readings_of(capture, config, shortest)
    found, alive, activations = program(model, decode)(
        model, tokens, real, np.int32(n_covered), stacked, leads, options, keys, stops, n_new, readings
    )
    return Written(found, alive, activations, n is not None)


def check_length(config: LlamaConfig, n_tokens: int, n_new: int, allow_longer: bool) -> None:
    """ValueError for a text beyond what the model was made for."""
    if not allow_longer and config.limit is not None and n_tokens + n_new > config.limit:
        raise ValueError(
            f"The prompt has {n_tokens} tokens and {n_new} are to be generated, and this model was made for at most "
            f"{config.limit} (max_position_embeddings). Shorten it, or pass allow_longer=True to see what it does beyond."
        )


def check_count(max_new_tokens: Any) -> int:
    """How many tokens to generate, at least one."""
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int | np.integer):
        raise TypeError(f"max_new_tokens is {max_new_tokens!r}, and an integer is needed: it is a part of the program.")
    if not 1 <= max_new_tokens < 2**24:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, and must be at least 1, and less than {2**24}.")
    return int(max_new_tokens)


def check_key(key: Any) -> Array:
    """A typed random key from one of either kind."""
    if key is None:
        raise ValueError("Drawing tokens needs chance: give key=jax.random.key(seed), or temperature=0.0 for greedy.")
    if not on_device(key):
        raise TypeError(f"key is {key!r}, and a JAX random key is needed: jax.random.key(seed).")
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        typed = key
    elif key.dtype == np.uint32 and key.shape == jax.eval_shape(jax.random.PRNGKey, 0).shape:
        typed = jax.random.wrap_key_data(key)
    else:
        raise TypeError(f"key is an array of {key.dtype}, and a JAX random key is needed: jax.random.key(seed).")
    if typed.shape:
        raise ValueError(f"key holds {list(typed.shape)} keys, and one is needed.")
    return typed


def check_stops(stop_tokens: Any, config: Any) -> Int[np.ndarray, "N"]:
    """Ids that end a row: those given, or the config's own where none are."""
    stops = config.eos_token_id if stop_tokens is None else stop_tokens
    ids = integers(() if stops is None else stops, "stop_tokens")
    if stop_tokens is not None and (wrong := [i for i in ids if not 0 <= i < config.vocab_size]):
        raise ValueError(
            f"stop_tokens holds {wrong}, and this model's vocabulary has ids 0 to {config.vocab_size - 1}."
        )
    return np.array(ids, np.int32)


@partial(jax.jit, static_argnums=(5, 9, 10), inline=True)
def decode(
    model: Llama,
    tokens: Int[Array, "B T"],
    real: Bool[Array, "B T"],
    n_covered: Int[Array, ""],
    interventions: tuple[Any, ...],
    leads: tuple[bool, ...],
    options: Sampler,
    keys: Array | None,
    stops: Int[Array, "M"],
    n_new: int,
    readings: tuple[Reading, ...],
) -> tuple[Int[Array, "B N"], Bool[Array, "B N"], Mapping[str, Array]]:
    """The program behind `write`; everything checked and canonical.

    Args:
        leads: for each leaf of `interventions`, whether it leads with the rows.
        keys: a typed key for each row, or None where decoding is greedy.
    """
    config = model.config
    n_rows, n_tokens = tokens.shape
    n_slots = n_tokens + n_new
    sizes = {**config.sizes, "T": n_slots, "S": n_slots}
    slots = jnp.concatenate([real, jnp.ones((n_rows, n_new), bool)], axis=1)

    def advance(slot: Any) -> Any:
        def one(interventions: Any, tokens: Array, real: Array, *cache: Array) -> tuple[Array, Cache]:
            return _advance(model, tokens, slot, real, cache, lower(interventions, sizes, n_covered), sizes)

        return along_rows(one, interventions, leads)

    def put(whole: Array, step: Any, new: Array, done: Array) -> tuple[Array, Array]:
        new = jnp.where(done, config.pad_id, new)
        whole = jax.lax.dynamic_update_slice_in_dim(whole, new[:, None], n_tokens + step, 1)
        return whole, done | _among(new, stops)

    # Rotary types that change with the length past some point turn every key anew there: no cache can hold them.
    cached = config.steady_length is None or n_slots <= config.steady_length
    whole = jnp.concatenate([tokens, jnp.full((n_rows, n_new), config.pad_id, jnp.int32)], axis=1)
    with jax.named_scope("prefill"):
        logits, cache = advance(0)(tokens, slots if cached else jnp.pad(real, [(0, 0), (0, n_new)]))
        cache = tuple(jnp.pad(x, [(0, 0)] * 3 + [(0, n_new), (0, 0)]) for x in cache) if cached else ()
    whole, done = put(whole, 0, choose(options, keys, 0, logits), jnp.zeros(n_rows, bool))

    def unfinished(state: Any) -> Array:
        step, *_, done = state
        return (step < n_new) & ~jnp.all(done)

    def body(state: Any) -> Any:
        step, whole, cache, done = state
        slot = n_tokens + step - 1
        if cached:
            logits, added = advance(slot)(jax.lax.dynamic_slice_in_dim(whole, slot, 1, 1), slots, *cache)
            # Outside the map over rows and the scan over layers, where it is done in place.
            cache = tuple(jax.lax.dynamic_update_slice_in_dim(x, y, slot, 3) for x, y in zip(cache, added, strict=True))
        else:
            logits, _ = advance(0)(whole, slots & (jnp.arange(n_slots) <= slot)[None, :])
        whole, done = put(whole, step, choose(options, keys, step, logits), done)
        return step + 1, whole, cache, done

    with jax.named_scope("decode"):
        _, whole, *_ = jax.lax.while_loop(unfinished, body, (jnp.int32(1), whole, cache, done))
    out = whole[:, n_tokens:]
    ends = _among(out, stops).astype(jnp.int32)
    alive = jnp.cumsum(ends, axis=1) - ends == 0
    if not readings:
        return out, alive, {}

    def reread(interventions: Any, tokens: Array, real: Array) -> Mapping[str, Array]:
        return run(model, tokens, real, interventions, readings, n_covered=n_covered).activations

    written = jnp.concatenate([real, alive], axis=1)
    return out, alive, along_rows(reread, interventions, leads)(whole, written)


@partial(jax.jit, inline=True)
def choose(options: Sampler, keys: Array | None, step: Any, logits: Float[Array, "B V"]) -> Int[Array, "B"]:
    """The next token of each row, from its key at this step."""
    if keys is None:
        return jax.vmap(lambda row: options.choose(row, None))(logits)
    return jax.vmap(lambda row, key: options.choose(row, jax.random.fold_in(key, step)))(logits, keys)


def _among(ids: Int[Array, "..."], stops: Int[Array, "M"]) -> Bool[Array, "..."]:
    return jnp.any(ids[..., None] == stops.reshape(*(1,) * ids.ndim, -1), axis=-1)


def _advance(
    model: Llama,
    tokens: Int[Array, "T"],
    slot: Any,
    real: Bool[Array, "S"],
    cache: tuple[Array, ...],
    edits: list[tuple[int, Any]],
    sizes: Mapping[str, int],
) -> tuple[Float[Array, "V"], Cache]:
    """Runs the tokens of slots `slot`, `slot + 1`, … after those of the cache, or, without a cache, the first tokens.

    `real` is True at the slots that hold, or will hold, a token; a text without a cache may be shorter than that.

    Returns:
        The logits after the last real one, and the tokens' keys and values, `[L, K, T, D]` each.
    """
    config = model.config
    n_tokens, n_slots = tokens.shape[0], real.shape[0]
    ranks = jnp.maximum(jnp.cumsum(real) - 1, 0)
    slots = slot + jnp.arange(n_tokens)
    mine = jax.lax.dynamic_slice_in_dim(real, slot, n_tokens)
    rotation = model.rotation(jax.lax.dynamic_slice_in_dim(ranks, slot, n_tokens), jnp.sum(real))
    written = real & (jnp.arange(n_slots) < slot + n_tokens)
    allowed = (jnp.arange(n_slots)[None, :] <= slots[:, None]) & real[None, :] & mine[:, None]
    cut = [(number, cut_rows(edit, slot, n_tokens, sizes)) for number, edit in edits]

    def taps(layer: Array | None) -> Taps:
        return Taps(cut, set(), len(edits) and cut[-1][0] + 1, mine, layer, written)

    outside = taps(None)
    resid = model.embed_tokens(jnp.where(mine, tokens, 0), outside)

    def step(resid: Array, xs: tuple[Array, Any, tuple[Array, ...]]) -> tuple[Array, tuple[Array, Array]]:
        layer, block, past = xs
        added: list[Array] = []

        def remember(k: Array, v: Array) -> tuple[Array, Array]:
            added[:] = k, v
            if not past:
                k, v = (jnp.pad(x, [(0, 0), (0, n_slots - n_tokens), (0, 0)]) for x in (k, v))
            else:
                here = (jnp.arange(n_slots) == slot)[None, :, None]
                k, v = (jnp.where(here, x, y) for x, y in zip((k, v), past, strict=True))
            return k, v

        resid = block(resid, rotation, allowed, config, taps(layer), remember)
        return resid, (added[0], added[1])

    resid, added = jax.lax.scan(step, resid, (jnp.arange(config.num_hidden_layers), model.layers, cache))
    last = jnp.argmax(jnp.where(mine, slots, -1))
    final = jax.lax.dynamic_slice_in_dim(model.normalise(resid, outside), last, 1)
    return model.logits(final)[0], added
