"""`generate`: decoding with a key/value cache, in one compiled loop, with interventions active at every token."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from . import variants
from .capture.spec import Reading, integers, plan
from .edits import rows
from .forward import Taps, check_model, check_tokens, lower, run
from .frame import Frame, as_array, on_device
from .sampling import Sampler, sampler

if TYPE_CHECKING:
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
) -> Any:
    """Continues one prompt. Interventions act on the prompt and on every new token, as they would in `forward`.

    Decoding with the cache gives what running `forward` anew for every token would give. The prompt is run once, then each
    step runs one token; the loop ends when every row has stopped. (Rotary types that change with the length, `dynamic` and
    `longrope`, rotate all tokens for the longest text that this may become, since cached keys have to agree.)

    Interventions whose index and strength fields have one leading axis `N` are `N` variants, decoded side by side in the
    same program, all with the same `key`: they differ by the intervention alone. Positions count from the start of the
    prompt and may lie in the new tokens. An array with a token axis covers the prompt's `T` tokens and leaves later ones
    alone.

    Args:
        model: a `Llama`.
        tokens: ids `[T]`.
        max_new_tokens: `N` new tokens at most; static.
        interventions: as in `forward`.
        temperature: 0 takes the likeliest token; above 0, tokens are drawn from softmax(logits / temperature).
        top_k: draw from the k likeliest tokens; static.
        top_p: draw from the likeliest tokens that together hold this probability.
        min_p: draw from tokens at least this probable, relative to the likeliest.
        stop_tokens: an id or several, after which a row ends; the config's `eos_token_id` for None, none for `()`.
        key: a JAX random key; needed where the temperature is not 0.
        mask: bool `[T]`, True at real tokens.
        capture: as in `forward`: what to return of the intervened run.

    Returns:
        int32 `[max_new_tokens]`, the pad id after a stop; `[N, max_new_tokens]` for variants. With `capture`, that and
        a dictionary site → values over all `T + max_new_tokens` tokens, from one pass over the finished text.

    Raises:
        ValueError, TypeError: something that can be seen to be wrong, before anything runs.
    """
    config = check_model(model)
    tokens = check_tokens(tokens, config.vocab_size)
    n_tokens = tokens.shape[0]
    real = _real(mask, n_tokens)
    n_new = check_count(max_new_tokens)
    xp: Any = jnp if on_device(real) else np
    slots = xp.concatenate([real, xp.ones(n_new, bool)])
    frame = Frame(config, model.dtype, n_tokens, slots, n_tokens + n_new, absolute=True)
    n = variants.count(interventions)
    each = [interventions] if n is None else [variants.variant(interventions, i, n, frame) for i in range(n)]
    stacked, leads = variants.stack(each, [frame] * len(each))

    def repeat(x: Any) -> Any:
        return (jnp if on_device(x) else np).broadcast_to(x, (len(each), *x.shape))

    options = sampler(temperature, top_k, top_p, min_p, config.vocab_size)
    keys = None if options.greedy else repeat(check_key(key))
    readings = plan(capture, config, n_tokens + n_new)
    found, activations = decode(
        model,
        repeat(tokens),
        repeat(real),
        stacked,
        leads,
        options,
        keys,
        check_stops(stop_tokens, config),
        n_new,
        readings,
    )
    if n is None:
        found, activations = jax.tree.map(lambda x: x[0], (found, activations))
    return (found, activations) if readings else found


def _real(mask: Any, n_tokens: int) -> Any:
    if mask is None:
        return np.ones(n_tokens, bool)
    real = as_array(mask)
    if real.shape != (n_tokens,) or real.dtype != bool:
        raise ValueError(
            f"mask is {real.dtype} {list(real.shape)}, and bool [{n_tokens}] is needed: True at real tokens."
        )
    if not on_device(real) and not real.any():
        raise ValueError("mask is False everywhere: there is no real token.")
    return real


def check_count(max_new_tokens: Any) -> int:
    """How many tokens to generate, at least one."""
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int | np.integer):
        raise TypeError(f"max_new_tokens is {max_new_tokens!r}, and an integer is needed: it is a part of the program.")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, and must be at least 1.")
    return int(max_new_tokens)


def check_key(key: Any) -> Array:
    """A typed random key from one of either kind."""
    if key is None:
        raise ValueError("Drawing tokens needs chance: give key=jax.random.key(seed), or temperature=0.0 for greedy.")
    if not on_device(key):
        raise TypeError(f"key is {key!r}, and a JAX random key is needed: jax.random.key(seed).")
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        typed = key
    elif key.dtype == np.uint32 and key.ndim == 1:
        typed = jax.random.wrap_key_data(key)
    else:
        raise TypeError(f"key is an array of {key.dtype}, and a JAX random key is needed: jax.random.key(seed).")
    if typed.shape:
        raise ValueError(f"key holds {list(typed.shape)} keys, and one is needed.")
    return typed


def check_stops(stop_tokens: Any, config: Any) -> Int[np.ndarray, "N"]:
    """Ids that end a row: those given, or the config's own where none are."""
    stops = config.eos_token_id if stop_tokens is None else stop_tokens
    ids = np.array(integers(() if stops is None else stops, "stop_tokens"), np.int32)
    if stop_tokens is not None and (wrong := ids[(ids < 0) | (ids >= config.vocab_size)]).size:
        raise ValueError(
            f"stop_tokens holds {wrong.tolist()}, and this model's vocabulary has ids 0 to {config.vocab_size - 1}."
        )
    return ids


@partial(jax.jit, static_argnums=(4, 8, 9, 10), inline=True)
def decode(
    model: Llama,
    tokens: Int[Array, "B T"],
    real: Bool[Array, "B T"],
    interventions: tuple[Any, ...],
    leads: tuple[bool, ...],
    options: Sampler,
    keys: Array | None,
    stops: Int[Array, "M"],
    n_new: int,
    readings: tuple[Reading, ...],
    n_covered: int | None = None,
) -> tuple[Int[Array, "B N"], Mapping[str, Array]]:
    """The program behind `generate`, for rows of prompts or of variants; everything checked and canonical.

    Args:
        interventions: in canonical form, of a frame with room for `n_new` tokens more.
        leads: for each leaf of `interventions`, whether it leads with the rows.
        keys: a typed key for each row, or None where decoding is greedy.
        n_covered: how many tokens the interventions' arrays cover, where that is not `T`.
    """
    config = model.config
    n_rows, n_tokens = tokens.shape
    covered = n_tokens if n_covered is None else n_covered
    n_slots = n_tokens + n_new
    sizes = {**config.sizes, "T": n_slots, "S": n_slots}
    real = jnp.concatenate([real, jnp.ones((n_rows, n_new), bool)], axis=1)

    def advance(slot: Any) -> Any:
        def one(interventions: Any, tokens: Array, real: Array, *cache: Array) -> tuple[Array, Cache]:
            return _advance(model, tokens, slot, real, cache, lower(interventions, sizes, covered), sizes)

        return variants.along_rows(one, interventions, leads)

    def choose(step: Any, logits: Float[Array, "B V"]) -> Int[Array, "B"]:
        if keys is None:
            return jax.vmap(lambda row: options.choose(row, None))(logits)
        return jax.vmap(lambda row, key: options.choose(row, jax.random.fold_in(key, step)))(logits, keys)

    def put(out: Array, step: Any, new: Array, done: Array) -> tuple[Array, Array, Array]:
        new = jnp.where(done, config.pad_id, new)
        out = jax.lax.dynamic_update_slice_in_dim(out, new[:, None], step, 1)
        return out, new, done | jnp.any(new[:, None] == stops[None, :], axis=1)

    with jax.named_scope("prefill"):
        logits, new = advance(0)(tokens, real)
        cache = tuple(jnp.pad(x, [(0, 0)] * 3 + [(0, n_new), (0, 0)]) for x in new)
    out = jnp.full((n_rows, n_new), config.pad_id, jnp.int32)
    out, new, done = put(out, 0, choose(0, logits), jnp.zeros(n_rows, bool))

    def unfinished(state: Any) -> Array:
        step, *_, done = state
        return (step < n_new) & ~jnp.all(done)

    def body(state: Any) -> Any:
        step, out, new, cache, done = state
        slot = n_tokens + step - 1
        logits, added = advance(slot)(new[:, None], real, *cache)
        # Outside the map over rows and the scan over layers, where it is done in place.
        cache = tuple(jax.lax.dynamic_update_slice_in_dim(x, y, slot, 3) for x, y in zip(cache, added, strict=True))
        out, new, done = put(out, step, choose(step, logits), done)
        return step + 1, out, new, cache, done

    with jax.named_scope("decode"):
        _, out, *_ = jax.lax.while_loop(unfinished, body, (jnp.int32(1), out, new, cache, done))
    if not readings:
        return out, {}

    def reread(interventions: Any, tokens: Array, real: Array) -> Mapping[str, Array]:
        return run(model, tokens, real, interventions, readings, "none", False, covered).activations

    whole = jnp.concatenate([tokens, out], axis=1)
    return out, variants.along_rows(reread, interventions, leads)(whole, real)


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

    Returns:
        The logits after the last real one, and the tokens' keys and values, `[L, K, T, D]` each.
    """
    config = model.config
    n_tokens, n_slots = tokens.shape[0], real.shape[0]
    ranks = jnp.maximum(jnp.cumsum(real) - 1, 0)
    slots = slot + jnp.arange(n_tokens)
    mine = jax.lax.dynamic_slice_in_dim(real, slot, n_tokens)
    # Frequencies of rotary types that depend on the length are those of the longest text that this may become: keys are
    # kept rotated, and all have to agree.
    rotation = model.rotation(jax.lax.dynamic_slice_in_dim(ranks, slot, n_tokens), jnp.sum(real))
    written = real & (jnp.arange(n_slots) < slot + n_tokens)
    allowed = (jnp.arange(n_slots)[None, :] <= slots[:, None]) & real[None, :] & mine[:, None]
    cut = [(number, rows(edit, slot, n_tokens, sizes)) for number, edit in edits]

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
