"""`generate`: decoding with a key/value cache, in one compiled loop, with interventions active at every token."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Int

from ..arrays import AnyArray, integer, integers, listing, on_device, random_key, under_trace
from ..backends import find_model, programs_of
from ..capture import readings_of
from ..intervention.frame import Frame
from ..intervention.rows import Rows
from ..prompts import bucket, check_prompts
from .options import DecodeOptions
from .sampling import sampler

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from ..backends.protocol import Model
    from ..capture import CaptureLike
    from ..intervention.protocol import Interventions
    from ..models.decoder.config import DecoderConfig
    from ..models.decoder.model import Decoder

Leading = TypeVar("Leading")  # a tree of arrays that lead with [B, N]


def generate(
    model: Decoder,
    tokens: ArrayLike,
    max_new_tokens: int,
    interventions: Interventions = (),
    *,
    temperature: ArrayLike = 0.0,
    top_k: int | None = None,
    top_p: ArrayLike | None = None,
    min_p: ArrayLike | None = None,
    stop_tokens: int | Sequence[int] | None = None,
    key: Array | None = None,
    mask: ArrayLike | None = None,
    capture: CaptureLike = (),
    allow_longer: bool = False,
) -> Any:
    """Continues a prompt or several. Interventions act on the prompt and on every new token, as they would in `forward`.

    Decoding with the cache gives what running `forward` anew for every token would give. The prompt is run once, then each
    step runs one token; the loop ends when every row has stopped. (Past the original context of rotary types that change with
    the length, `dynamic` and `longrope`, every key turns with every token, and each step runs the whole text.)

    Interventions whose index and strength fields have one leading axis `N` are `N` variants, decoded side by side in the
    same program, all with the same `key`: they differ by the intervention alone. So are several prompts, each under every
    variant; a `PerPrompt` holds one entry for each. Positions count from the start of each prompt and may lie in the new
    tokens. An array with a token axis covers the prompt's `T` tokens and leaves later ones alone. Near lengths `T` share a
    program, whose padding nothing here shows.

    Args:
        model: a model of any family, or a Hugging Face one.
        tokens: ids `[T]`, or `[B, T]` for several prompts, padded to one length on either side.
        max_new_tokens: how many new tokens at most; static.
        interventions: as in `forward`.
        temperature: 0 takes the likeliest token; above 0, tokens are drawn from softmax(logits / temperature).
        top_k: draw from the k likeliest tokens; static.
        top_p: draw from the likeliest tokens that together hold this probability (Holtzman et al. 2020, arXiv:1904.09751).
        min_p: draw from tokens at least this probable, relative to the likeliest (Minh et al. 2024, arXiv:2407.01082).
        stop_tokens: an id or several, after which a row ends; the config's `eos_token_id` for None, none for `()`.
        key: a JAX random key; needed where the temperature is not 0. Of several prompts, number `b` draws with
            `jax.random.split(key, B)[b]`, whatever the others are.
        mask: bool, shaped as `tokens`, True at real tokens.
        capture: as in `forward`: what to return of the intervened run.
        allow_longer: go beyond the length that the model was made for.

    Returns:
        int32 `[max_new_tokens]`, the pad id after a stop, −1 where the logits are NaN; `[N, max_new_tokens]` for variants,
        `[B, max_new_tokens]` for several prompts, `[B, N, max_new_tokens]` for both. With `capture`, that and a dictionary
        site → values with the same axes in front, over all `T + max_new_tokens` tokens, from one pass over the finished
        text, in which what follows a stop is padding.

    Raises:
        ValueError, TypeError: something that can be seen to be wrong, before anything runs.

    Examples:
        >>> tokenizer.decode(generate(model, ids, 2).tolist())
        'Rome.'
        >>> generate(model, [ids, other], 2, Steer(2, np.ones(192), np.array([0.0, 1.0, 2.0]))).shape
        (2, 3, 2)
    """
    model = find_model(model)
    config = model.config
    tokens, mask, single = check_prompts(config, tokens, mask)
    n_tokens, n_new = tokens.shape[1], check_count(max_new_tokens)
    real = np.ones(tokens.shape, bool) if mask is None else mask
    check_length(config, n_tokens if on_device(real) else int(real.sum(axis=1).max()), n_new, allow_longer)
    options = DecodeOptions(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        stop_tokens=stop_tokens,
        key=key,
        capture=capture,
    )
    written = write(model, tokens, real, interventions, n_new, options)
    found, activations = written.lead(single, (written.tokens, written.activations))
    return (found, activations) if activations else found


@dataclass(frozen=True)
class Continuations:
    """What `write` returns of B prompts × N variants.

    Attributes:
        tokens: `[B, N, n]`, the new ids.
        alive: `[B, N, n]`, which of them precede a row's end.
        activations: site → what was captured, leading with `[B, N]`.
        variants: whether the interventions have an axis of variants.
    """

    tokens: Int[AnyArray, "B N n"]
    alive: Bool[Array, "B N n"]
    activations: Mapping[str, Array]
    variants: bool

    def lead(self, single: bool, values: Leading) -> Leading:
        """Arrays that lead with `[B, N]`, without the axes of what was not given: of a `single` prompt, of no variants."""
        place = (0 if single else slice(None), slice(None) if self.variants else 0)
        return values if place == (slice(None),) * 2 else jax.tree.map(lambda x: x[place], values)


def write(
    model: Model,
    tokens: Int[Any, "B T"],
    real: Bool[Any, "B T"],
    interventions: Interventions,
    n_new: int,
    options: DecodeOptions,
) -> Continuations:
    """Continues prompts under variants of their interventions, whose arrays cover the `T` tokens."""
    config, programs = model.config, programs_of(model)
    chosen_by = sampler(options.temperature, options.top_k, options.top_p, options.min_p, config.vocab_size)
    stops = check_stops(options.stop_tokens, config)
    n_prompts, n_tokens = tokens.shape
    if programs.compiles_per_length and not (on_device(tokens) or on_device(real)):
        # Near lengths share a program: the padding stands between the prompt and the new tokens.
        tokens, real = (np.pad(x, [(0, 0), (0, bucket(n_tokens) - n_tokens)]) for x in (tokens, real))
    n_padded = tokens.shape[1]
    xp: Any = jnp if on_device(real) else np
    slots = xp.concatenate([real, xp.ones((n_prompts, n_new), bool)], axis=1)
    frames = [Frame(config, model.dtype, n_tokens, row, len(row), absolute=True) for row in slots]
    rows, axes = Rows.of(interventions, frames)
    if len(axes) > 1:
        raise ValueError(
            f"These interventions have axes {listing(axes)}; variants that are decoded lie along one axis [N]."
        )
    size = axes[0] if axes else 1
    keys = None
    if not chosen_by.greedy:
        # Prompts draw apart; variants of one draw alike, so that they differ by the intervention alone.
        one = check_key(options.key)
        each = jax.random.split(one, n_prompts) if n_prompts > 1 else one[None]
        keys = jnp.broadcast_to(each[:, None], (n_prompts, size))
    shortest = n_padded + n_new if on_device(real) else int(slots.sum(axis=1).min())
    readings = readings_of(options.capture, config, shortest)
    written = programs.decode_rows(
        model, tokens, real, rows, size=size, n_covered=np.asarray(n_tokens, np.int32), sampler=chosen_by, keys=keys, stops=stops,
        n_new=n_new, readings=readings,
    )  # fmt: skip
    activations = written.activations
    if n_padded > n_tokens:
        keep = np.r_[:n_tokens, n_padded : n_padded + n_new]
        activations = {r.site.name: _kept(activations[r.site.name], r.token_axes, keep) for r in readings}
    return Continuations(written.tokens, written.alive, activations, bool(axes))


def _kept(value: Array, axes: Sequence[int], keep: np.ndarray) -> Array:
    """A value `[B, N, …]` at some of the tokens along each of its token axes."""
    if not axes or under_trace(value):
        return functools.reduce(lambda x, axis: jnp.take(x, keep, axis=2 + axis), axes, value)
    # Through NumPy, which needs no program of its own for every length.
    return jax.device_put(functools.reduce(lambda x, axis: x.take(keep, axis=2 + axis), axes, np.asarray(value)))


def check_length(config: DecoderConfig, n_tokens: int, n_new: int, allow_longer: bool) -> None:
    """ValueError for a text beyond what the model was made for."""
    if not allow_longer and config.limit is not None and n_tokens + n_new > config.limit:
        raise ValueError(
            f"The prompt has {n_tokens} tokens and {n_new} are to be generated, and this model was made for at most "
            f"{config.limit} (max_position_embeddings). Shorten it, or pass allow_longer=True to see what it does beyond."
        )


def check_count(max_new_tokens: int) -> int:
    """How many tokens to generate, at least one."""
    n_new = integer(max_new_tokens, "max_new_tokens", 1, note=": it is a part of the program")
    return integer(n_new, "max_new_tokens", high=2**24 - 1)


def check_key(key: Array | None) -> Array:
    """A typed random key from one of either kind."""
    if key is None:
        raise ValueError("Drawing tokens needs chance: give key=jax.random.key(seed), or temperature=0.0 for greedy.")
    return random_key(key)


def check_stops(stop_tokens: int | Sequence[int] | None, config: DecoderConfig) -> Int[np.ndarray, "N"]:
    """Ids that end a row: those given, or the config's own where none are."""
    stops = config.eos_token_id if stop_tokens is None else stop_tokens
    ids = integers(() if stops is None else stops, "stop_tokens")
    if stop_tokens is not None and (wrong := [i for i in ids if not 0 <= i < config.vocab_size]):
        raise ValueError(
            f"stop_tokens holds {wrong}, and this model's vocabulary has ids 0 to {config.vocab_size - 1}."
        )
    return np.array(ids, np.int32)
