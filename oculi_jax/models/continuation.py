"""Prompts in, prompts with their continuations out: what `model.generate` and `adapter.generate` share."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from .. import variants
from ..capture.spec import plan
from ..frame import Frame
from ..generate import check_count, check_key, check_stops, decode
from ..prompts import prepare
from ..sampling import sampler


def continue_ids(
    model: Any, ids: Any, max_new_tokens: int, ambient: tuple[Any, ...], interventions: Any, **options: Any
) -> Any:
    """Ids `[T]` or `[B, T]` → ids with their continuations; with `capture`, that and what was captured."""
    _refuse_trace((model, ids))
    shown, new, activations = continue_prompts(
        model, None, ids, max_new_tokens, both(ambient, interventions), **options
    )
    found = np.concatenate([shown, new], axis=1).astype(np.int32)
    if len(found) == 1 and not isinstance(ids[0], list | tuple) and np.ndim(ids) == 1:
        found, activations = found[0], jax.tree.map(lambda x: x[0], activations)
    return (found, activations) if options.get("capture") else found


def continue_texts(
    model: Any, tokenizer: Any, texts: Any, max_new_tokens: int, interventions: Any, **options: Any
) -> Any:
    """A text or a list of texts → the same with their continuations; with `capture`, that and what was captured."""
    shown, new, activations = continue_prompts(model, tokenizer, texts, max_new_tokens, interventions, **options)
    n_texts = 1 if isinstance(texts, str) else len(texts)
    prompts = [texts] * len(new) if isinstance(texts, str) else list(texts) * (len(new) // n_texts)

    def continuation(prompt: str, before: np.ndarray, after: np.ndarray) -> str:
        # What decoding the whole gives beyond decoding the prompt: some tokenizers drop the first space of a text.
        whole = tokenizer.decode([*before, *after], skip_special_tokens=True)
        return prompt + whole[len(tokenizer.decode(list(before), skip_special_tokens=True)) :]

    found: Any = [continuation(*row) for row in zip(prompts, shown.tolist(), new.tolist(), strict=True)]
    if isinstance(texts, str) and len(found) == 1:
        found, activations = found[0], jax.tree.map(lambda x: x[0], activations)
    return (found, activations) if options.get("capture") else found


def _refuse_trace(values: Any) -> None:
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(values)):
        raise TypeError(
            "generate of a model or an adapter runs on the host, and was called inside a trace (jit, vmap, grad), where no "
            "InterventionContext reaches: use the pure oculi_jax.generate(model, tokens, max_new_tokens, interventions)."
        )


def both(ambient: tuple[Any, ...], own: Any) -> tuple[Any, ...]:
    """The interventions of the context and then the call's own."""
    return (*ambient, *(own if isinstance(own, list | tuple) else (own,)))


def continue_prompts(
    model: Any,
    tokenizer: Any,
    prompt: Any,
    max_new_tokens: int,
    interventions: Any,
    *,
    temperature: Any = 0.0,
    top_k: int | None = None,
    top_p: Any = None,
    min_p: Any = None,
    stop_tokens: Any = None,
    key: Array | None = None,
    attention_mask: Any = None,
    allow_longer: bool = False,
    capture: Any = (),
) -> tuple[np.ndarray, np.ndarray, Any]:
    """Continues a prompt, a batch of prompts, or one prompt under `N` variants of its interventions.

    Args: as in `oculi_jax.generate`, and as an adapter takes prompts.

    Returns:
        ids `[B, T]` of the prompts, padded on the left where lists or texts had unequal lengths; new ids `[B, N]`; and
        what was captured. `B` is the number of prompts or of variants.
    """
    config = model.config
    n_new = check_count(max_new_tokens)
    batch = prepare(prompt, tokenizer, config, attention_mask=attention_mask, allow_longer=allow_longer, n_new=n_new)
    tokens, real = batch.tokens, batch.mask
    shown = tokens[:, : batch.n_tokens]
    if attention_mask is None and not real[:, : batch.n_tokens].all():
        # Texts or lists of unequal length: new tokens follow their prompts at once where the padding comes first.
        lengths = real.sum(axis=1)
        shown = np.stack(
            [np.r_[np.full(batch.n_tokens - n, config.pad_id), row[:n]] for row, n in zip(shown, lengths, strict=True)]
        )

    def frame(row: np.ndarray) -> Frame:
        slots = np.concatenate([row, np.ones(n_new, bool)])
        return Frame(config, model.dtype, batch.n_tokens, slots, len(slots), absolute=True)

    n = variants.count(interventions)
    if n is not None and len(tokens) > 1:
        raise ValueError(
            f"{len(tokens)} prompts and {n} variants of an intervention were given; give one prompt, or scalars."
        )
    if n is not None:
        shown, tokens, real = (np.repeat(x, n, axis=0) for x in (shown, tokens, real))
        each = [variants.variant(interventions, i, n, frame(real[i])) for i in range(n)]
    else:
        each = [interventions] * len(tokens)
    stacked, leads = variants.stack(each, [frame(row) for row in real])
    options = sampler(temperature, top_k, top_p, min_p, config.vocab_size)
    keys = None
    if not options.greedy:
        # Prompts of a batch draw apart; variants of one prompt draw alike, so that they differ by the intervention alone.
        one = check_key(key)
        keys = (
            jax.random.split(one, len(tokens)) if n is None and len(tokens) > 1 else jnp.broadcast_to(one, len(tokens))
        )
    readings = plan(capture, config, int(real.sum(axis=1).min()) + n_new)
    stops = check_stops(stop_tokens, config)
    found, activations = decode(
        model, tokens, real, stacked, leads, options, keys, stops, n_new, readings, variants.covered(stacked, batch)
    )
    _refuse_trace(found)
    if (
        batch.n_tokens != batch.tokens.shape[1]
    ):  # the padding that the batch was given here stands before the new tokens
        keep = np.r_[: batch.n_tokens, batch.tokens.shape[1] : batch.tokens.shape[1] + n_new]
        for reading in readings:
            for axis in reading.token_axes:
                name = reading.site.name
                activations = {**activations, name: np.take(np.asarray(activations[name]), keep, axis=1 + axis)}
    return shown, np.asarray(found), jax.device_put(activations)
