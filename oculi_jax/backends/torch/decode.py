"""The program of `generate` on a model that torch runs: the cache is filled in place."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ...capture import Reading
from ...decoding.sampling import Sampler, choose
from ...intervention.rows import Rows
from ..protocol import Written
from .arrays import to_jax
from .layers import embed, run_layers
from .layout import lay_out
from .model import TorchDecoder
from .programs import passed
from .rows import refuse_trace
from .taps import Taps, prepare

if TYPE_CHECKING:
    from jax import Array

    from ...arrays import AnyArray


@torch.inference_mode()
def decode_rows(
    model: TorchDecoder, tokens: AnyArray, real: AnyArray, rows: Rows, *, size: int, n_covered: AnyArray | int, sampler: Sampler,
    keys: Array | None, stops: AnyArray, n_new: int, readings: tuple[Reading, ...],
) -> Written:  # fmt: skip
    """See `Programs.decode_rows`; each token is chosen by the JAX program's own code."""
    refuse_trace((tokens, real, rows, keys))
    w, config, tokens, real = model.weights(), model.config, np.asarray(tokens), np.asarray(real)
    (n_prompts, n_tokens), n_slots = tokens.shape, tokens.shape[1] + n_new
    n_rows = n_prompts * size
    edits = prepare(w, rows, n_prompts, size, n_slots, int(n_covered))
    slots = np.repeat(np.concatenate([real, np.ones((n_prompts, n_new), bool)], axis=1), size, axis=0)
    whole = np.repeat(np.pad(tokens, [(0, 0), (0, n_new)], constant_values=config.pad_id), size, axis=0)
    cached, cache = config.steady_length is None or n_slots <= config.steady_length, list[tuple[Tensor, Tensor]]()

    def advance(first: int, end: int) -> Tensor:
        """The logits `[N, V]` after slots `first` to `end`, those before them being in the cache."""
        layout = lay_out(config, slots, end, w.embed.device, first)
        taps = Taps(edits, rows.n_interventions, n_rows, layout)

        def remember(layer: int, *new: Tensor) -> tuple[Tensor, Tensor]:
            if len(cache) == layer:
                kept = [x.new_zeros(n_rows, x.shape[1], n_slots, x.shape[3]) for x in new]
                cache.append((kept[0], kept[1]))
            for buffer, x in zip(cache[layer], new, strict=True):
                buffer[:, :, first:end] = x
            past, values = cache[layer]
            return past[:, :, :end], values[:, :, :end]

        resid = embed(w, whole[:, first:end], layout, taps)
        resid = run_layers(w, resid, layout, taps, range(len(w.layers)), remember if cached else None)
        normalised = w.normalise(resid, taps)
        last = [int(np.flatnonzero(row[first:end])[-1]) for row in slots]
        every = torch.arange(n_rows, device=normalised.device)
        return w.logits(normalised[every, torch.tensor(last, device=normalised.device)])

    done = np.zeros(n_rows, bool)
    for step in range(n_new):
        end = n_tokens + step
        logits = to_jax(advance(end - 1 if step and cached else 0, end)).reshape(n_prompts, size, -1)
        chosen = np.asarray(choose(sampler, keys, np.int32(step), logits)).reshape(-1)
        new = np.where(done, config.pad_id, chosen)
        whole[:, end] = new
        done |= np.isin(new, stops)
        if done.all():
            break
    ended = np.isin(whole[:, n_tokens:], stops)
    alive = np.cumsum(ended, axis=1) - ended == 0
    seen: dict[str, Tensor] = {}
    if readings:
        finished = np.concatenate([np.repeat(real, size, axis=0), alive], axis=1)
        layout = lay_out(config, finished, n_slots, w.embed.device)
        seen = passed(w, whole, layout, edits, rows, readings, to_end=False).taps.captured
    activations = {name: to_jax(value.unflatten(0, (-1, size))) for name, value in seen.items()}
    found, alive = (x.reshape(n_prompts, size, n_new) for x in (whole[:, n_tokens:], alive))
    return Written(to_jax(found.copy()), to_jax(alive), activations)
