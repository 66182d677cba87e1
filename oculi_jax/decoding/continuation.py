"""Prompts in, prompts with their continuations out: what `model.generate` and `adapter.generate` share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer

from ..backends import programs_of
from ..capture import readings_of
from ..prompts import is_chat, prepare
from ..utils.tokens import continuation
from .generation import check_count, write
from .options import DecodeOptions

if TYPE_CHECKING:
    from ..backends.protocol import Model
    from ..intervention.protocol import Interventions
    from ..utils.tokens import Tokenizer


class Continued(NamedTuple):
    """Prompts `[B, T]` as they ran, padded on the left where their lengths differed; new ids `[B, N]`, which of them precede
    a row's end; what was captured, over `T + N` tokens; and whether the rows are variants of one prompt.
    """

    prompts: np.ndarray
    new: np.ndarray
    alive: np.ndarray
    activations: Any
    variants: bool


def continue_ids(
    model: Model,
    ids: Any,
    max_new_tokens: int,
    ambient: tuple[Any, ...],
    interventions: Interventions,
    **options: Any,
) -> Any:
    """Ids `[T]` or `[B, T]` → ids with their continuations; with `capture`, that and what was captured."""
    _refuse_trace((model, ids))
    done = _continue(model, None, ids, max_new_tokens, both(ambient, interventions), DecodeOptions.of(options))
    found, activations = np.concatenate([done.prompts, done.new], axis=1).astype(np.int32), done.activations
    if not done.variants and not isinstance(ids[0], list | tuple) and np.ndim(ids) == 1:
        found, activations = found[0], jax.tree.map(lambda x: x[0], activations)
    return (found, activations) if activations else found


def continue_texts(
    model: Model,
    tokenizer: Tokenizer | None,
    texts: str | Sequence[str] | Sequence[Mapping[str, str]],
    max_new_tokens: int,
    interventions: Interventions,
    **options: Any,
) -> Any:
    """A text, a list of texts or a chat → the same with their continuations; with `capture`, that and what was captured."""
    done = _continue(model, tokenizer, texts, max_new_tokens, interventions, DecodeOptions.of(options))
    single = isinstance(texts, str) or is_chat(texts)
    prompts = [texts] if single else list(texts)

    each = prompts * (len(done.new) // len(prompts))
    rows = zip(each, done.new, done.alive, strict=True)
    found: Any = [_joined(tokenizer, prompt, new[alive]) for prompt, new, alive in rows]
    activations = done.activations
    if not done.variants and single:
        found, activations = found[0], jax.tree.map(lambda x: x[0], activations)
    return (found, activations) if activations else found


def _joined(tokenizer: Any, prompt: Any, new: np.ndarray) -> Any:
    """A text with what was added to it, or a chat with what the assistant says to it."""
    if isinstance(prompt, str):
        return prompt + continuation(tokenizer, prompt, new)
    return [*prompt, {"role": "assistant", "content": tokenizer.decode(new.tolist(), skip_special_tokens=True)}]


def both(ambient: tuple[Any, ...], own: Interventions) -> tuple[Any, ...]:
    """The interventions of the context and then the call's own."""
    return (*ambient, *(own if isinstance(own, list | tuple) else (own,)))


def _refuse_trace(values: Any) -> None:
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(values)):
        raise TypeError(
            "generate of a model or an adapter runs on the host, and was called inside a trace (jit, vmap, grad), where no "
            "InterventionContext reaches: use the pure oculi_jax.generate(model, tokens, max_new_tokens, interventions)."
        )


def _continue(
    model: Any,
    tokenizer: Any,
    prompt: Any,
    max_new_tokens: int,
    interventions: Any,
    options: DecodeOptions,
) -> Continued:
    """Arguments as in `oculi_jax.generate`, and prompts as an adapter takes them."""
    config, attention_mask = model.config, options.attention_mask
    n_new = check_count(max_new_tokens)
    exact = not programs_of(model).compiles_per_length
    batch = prepare(
        prompt, tokenizer, config,
        attention_mask=attention_mask, allow_longer=options.allow_longer, n_new=n_new, exact=exact,
    )  # fmt: skip
    tokens, real, n_tokens = batch.tokens, batch.mask, batch.n_tokens
    if attention_mask is None:
        # Texts or lists of unequal length: with the padding first, new tokens follow their prompts at once.
        shifts = n_tokens - real.sum(axis=1)
        tokens, real = (np.stack([np.roll(row, n) for row, n in zip(x, shifts, strict=True)]) for x in (tokens, real))
    done = write(model, tokens, real, interventions, n_new, n_tokens, options)
    _refuse_trace(done.tokens)
    activations = done.activations
    if n_tokens != tokens.shape[1]:  # the padding that near lengths share a program by stands before the new tokens
        keep = np.r_[:n_tokens, tokens.shape[1] : tokens.shape[1] + n_new]
        for reading in readings_of(options.capture, config, n_tokens + n_new) if activations else ():
            name = reading.site.name
            for axis in reading.token_axes:
                activations = {**activations, name: np.take(np.asarray(activations[name]), keep, axis=1 + axis)}
        activations = jax.device_put(activations)
    shown = np.where(real, tokens, config.pad_id) if attention_mask is None else tokens
    shown = np.broadcast_to(shown[:, :n_tokens], (len(done.tokens), n_tokens))
    return Continued(shown, np.asarray(done.tokens), np.asarray(done.alive), activations, done.variants)
