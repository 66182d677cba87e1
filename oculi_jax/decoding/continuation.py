"""Prompts in, prompts with their continuations out: what `model.generate` and `adapter.generate` share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer

from ..prompts import is_chat, prepare
from ..utils.tokens import continuation
from .generation import Continuations, check_count, write
from .options import DecodeOptions

if TYPE_CHECKING:
    from ..backends.protocol import Model
    from ..intervention.protocol import Interventions
    from ..utils.tokens import Tokenizer


class Continued(NamedTuple):
    """Prompts `[B, T]` as they ran, padded on the left where their lengths differed, and what `write` made of them, on the host
    but for what was captured.
    """

    prompts: np.ndarray
    written: Continuations


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
    prompts, written = _continue(
        model, None, ids, max_new_tokens, both(ambient, interventions), DecodeOptions.of(options)
    )
    new = np.asarray(written.tokens)
    whole = np.broadcast_to(prompts[:, None], (*new.shape[:2], prompts.shape[1]))
    single = not isinstance(ids[0], list | tuple) and np.ndim(ids) == 1
    found, activations = written.lead(
        single, (np.concatenate([whole, new], axis=2).astype(np.int32), written.activations)
    )
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
    _, written = _continue(model, tokenizer, texts, max_new_tokens, interventions, DecodeOptions.of(options))
    single = isinstance(texts, str) or is_chat(texts)
    prompts: Sequence[Any] = [texts] if single else texts  # type: ignore[assignment]
    new, alive = np.asarray(written.tokens), np.asarray(written.alive)
    found: Any = [
        [_joined(tokenizer, prompt, ids[kept]) for ids, kept in zip(rows, real, strict=True)]
        for prompt, rows, real in zip(prompts, new, alive, strict=True)
    ]
    found = found if written.variants else [rows[0] for rows in found]
    found, activations = found[0] if single else found, written.lead(single, written.activations)
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
    batch = prepare(
        prompt, tokenizer, config,
        attention_mask=attention_mask, allow_longer=options.allow_longer, n_new=n_new, exact=True,
    )  # fmt: skip
    tokens, real = batch.tokens, batch.mask
    if attention_mask is None:
        # Texts or lists of unequal length: with the padding first, new tokens follow their prompts at once.
        shifts = batch.n_tokens - real.sum(axis=1)
        tokens, real = (np.stack([np.roll(row, n) for row, n in zip(x, shifts, strict=True)]) for x in (tokens, real))
    written = write(model, tokens, real, interventions, n_new, options)
    _refuse_trace(written.tokens)
    return Continued(np.where(real, tokens, config.pad_id) if attention_mask is None else tokens, written)
