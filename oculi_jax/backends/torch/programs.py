"""The programs of `forward`, `lens`, `generate` and the adapter on a model that torch runs, by their names and signatures there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ...adapter.parts import Wanted, merged
from ...capture import Reading, readings_of
from ...generate import choose
from ...output import Output
from ...replay import Rows
from ...sampling import Sampler
from ..rows import along, refuse_trace, single
from .arrays import from_numpy, to_jax
from .model import TorchLlama
from .network import Weights, blocks, embed, lay_out, untouched
from .taps import Taps, at_positions, n_interventions, prepare


@dataclass
class Run:
    """One pass of many rows.

    Attributes:
        resid: what leaves the last layer that ran, `[N, T, E]`.
        normalised: after the final norm, or None where that was not asked for.
    """

    taps: Taps
    resid: Tensor
    normalised: Tensor | None


def run_rows(
    w: Weights, tokens: np.ndarray, real: np.ndarray | None, rows: Rows, readings: Sequence[Reading], *,
    size: int = 1, to_end: bool = True, n_covered: int | None = None, n_slots: int | None = None,
) -> Run:  # fmt: skip
    """Runs prompts `[C, T]`, each under `size` variants, as rows of one batch; to the last layer that is needed, or the end."""
    n_prompts, n_tokens = tokens.shape
    layout = lay_out(w.config, _repeated(real, size), n_tokens, w.embed.device)
    edits, n_rows = (
        prepare(w, rows, n_prompts, size, n_tokens if n_slots is None else n_slots, n_covered),
        n_prompts * size,
    )
    taps = Taps(edits, n_interventions(rows), n_rows, layout, readings)
    resid = embed(w, np.repeat(tokens, size, axis=0), layout, taps)
    n_layers = w.config.num_hidden_layers
    if not to_end:
        n_layers = max((max(r.layers) + 1 for r in readings if r.site.layered), default=0)
    resid = blocks(w, resid, layout, taps, range(n_layers))
    return Run(taps, resid, w.normalise(resid, taps) if to_end else None)


def _repeated(x: Any, size: int) -> Any:
    return None if x is None else np.repeat(np.asarray(x), size, axis=0)


@torch.inference_mode()
def run(
    model: TorchLlama, tokens: Any, mask: Any, interventions: tuple[Any, ...], readings: tuple[Reading, ...],
    logits: str = "none", remat: bool = False, n_covered: int | None = None,
) -> Output:  # fmt: skip
    """As `forward.run`; `remat` is JAX's."""
    refuse_trace((tokens, mask, interventions))
    w, real = model.weights(), None if mask is None else np.asarray(mask)
    to_end = logits != "none" or any(r.site.name in ("final_scale", "final_norm") for r in readings)
    batch = None if real is None else real[None]
    done = run_rows(
        w, np.asarray(tokens)[None], batch, single(interventions), readings, to_end=to_end, n_covered=n_covered
    )
    out = None
    if logits != "none":
        assert done.normalised is not None
        row = done.normalised[0]
        if logits == "last":
            row = row[-1 if real is None else int(np.flatnonzero(real)[-1])]
        out = to_jax(w.logits(row))
    activations = {r.site.name: to_jax(done.taps.captured[r.site.name][0]) for r in readings}
    return Output(out, activations, to_jax(done.taps.applied()[0]), None if mask is None else to_jax(real))


@torch.inference_mode()
def run_lens(model: TorchLlama, resid: Any, top_k: int | None, tokens: Any) -> Any:
    """As `lens.run_lens`."""
    refuse_trace((resid, tokens))
    w = model.weights()
    x = from_numpy(resid).to(w.embed.device)
    lead = x.shape[:-1]
    if top_k is not None:
        rows = x.reshape(-1, lead[-1] if lead else 1, x.shape[-1])
        found = lens_layers(w, rows, top_k, None)
        return tuple(to_jax(found[name].reshape(*lead, top_k)) for name in ("top_k_logits", "top_k_indices"))
    normalised = w.normalise(x, untouched)
    return to_jax(w.logits(normalised) if tokens is None else logits_of(w, normalised, np.asarray(tokens)))


def logits_of(w: Weights, normalised: Tensor, ids: np.ndarray) -> Tensor:
    """Logits of some tokens, `[…, N]`."""
    if (wrong := ids[(ids < 0) | (ids >= w.config.vocab_size)]).size:
        raise ValueError(
            f"Token {wrong[0]} is beyond this model's vocabulary, which has ids 0 to {w.config.vocab_size - 1}."
        )
    chosen = w.unembed[torch.from_numpy(ids.astype(np.int64)).to(w.unembed.device)]
    return F.linear(normalised.to(chosen.device).float(), chosen.float())


def lens_layers(
    w: Weights, resid: Tensor, top_k: int | None, ids: np.ndarray | None, dtype: str = "float32"
) -> dict[str, Tensor]:
    """As `lens.lens_layers`, on the host."""
    kept: dict[str, list[Tensor]] = {}

    def keep(name: str, value: Tensor, kind: torch.dtype | None = None) -> None:
        kept.setdefault(name, []).append(value.to("cpu", kind or value.dtype))

    to = getattr(torch, dtype)
    for row in resid:
        normalised = w.normalise(row, untouched)
        logits = w.logits(normalised)
        total = torch.logsumexp(logits, dim=-1)
        keep("normalized", normalised)
        keep("log_normalizer", total)
        if ids is not None:
            chosen = logits[:, torch.from_numpy(np.asarray(ids, np.int64)).to(logits.device)]
            keep("probabilities", torch.exp(chosen - total[:, None]), to)
        if top_k is None:
            keep("logits", logits, to)
        else:
            values, indices = torch.topk(logits, top_k)
            keep("top_k_logits", values, to)
            keep("top_k_indices", indices, torch.int32)
    return {name: torch.stack(values) for name, values in kept.items()}


@torch.inference_mode()
def captured(
    model: TorchLlama, tokens: Any, mask: Any, interventions: tuple[Any, ...], ids: Any, tuned_lens: Any,
    leads: tuple[bool, ...], wanted: Wanted, top_k: int | None, dtype: Any,
) -> dict[str, dict[str, jax.Array]]:  # fmt: skip
    """As `adapter.captured`."""
    refuse_trace((tokens, interventions))
    w, alone = model.weights(), tokens.ndim == 1
    rows = single(interventions) if alone else along(interventions, leads)
    batch, real = np.atleast_2d(np.asarray(tokens)), np.atleast_2d(np.asarray(mask))
    specs = merged(wanted)
    readings = readings_of(specs, model.config, batch.shape[1])
    to_end = any(r.site.name in ("final_scale", "final_norm") for r in readings)
    found = run_rows(w, batch, real, rows, readings, to_end=to_end).taps.captured
    full = {spec.sites: (spec, reading) for spec, reading in zip(specs, readings, strict=True)}

    def part(reading: Reading) -> Tensor:
        value, (spec, whole) = found[reading.site.name], full[reading.site.name]
        if reading.layers != whole.layers:
            value = value[:, [whole.layers.index(layer) for layer in reading.layers]]
        if reading.positions is not None and spec.positions is None:
            value = at_positions(
                value, 1 + reading.site.layered + reading.site.axes.index("T"), reading.positions, real
            )
        return value if reading.dtype is None else value.to(getattr(torch, reading.dtype))

    parts = {name: {r.site.name: part(r) for r in own} for name, own in wanted}
    if "logits" in parts:
        resid = parts["logits"]["resid_post"]
        if tuned_lens is not None:
            layers = dict(wanted)["logits"][0].layers
            resid = torch.stack([from_numpy(tuned_lens.translate(to_jax(row), layers)) for row in resid])
        each = [lens_layers(w, row.to(w.embed.device), top_k, ids, dtype) for row in resid]
        parts["logits"] = {name: torch.stack([one[name] for one in each]) for name in each[0]}
    return {name: {site: to_jax(x[0] if alone else x) for site, x in values.items()} for name, values in parts.items()}


@torch.inference_mode()
def decode(
    model: TorchLlama, tokens: Any, real: Any, n_covered: Any, interventions: tuple[Any, ...], leads: tuple[bool, ...],
    options: Sampler, keys: Any, stops: Any, n_new: int, readings: tuple[Reading, ...],
) -> tuple[jax.Array, jax.Array, Mapping[str, jax.Array]]:  # fmt: skip
    """As `generate.decode`: the cache is filled in place, and each token is chosen by the JAX programs' own code."""
    refuse_trace((tokens, real, interventions, keys))
    w, config, tokens, real = model.weights(), model.config, np.asarray(tokens), np.asarray(real)
    n_rows, n_tokens = tokens.shape
    n_slots = n_tokens + n_new
    rows = along(interventions, leads)
    edits = prepare(w, rows, n_rows, 1, n_slots, int(n_covered))
    slots = np.concatenate([real, np.ones((n_rows, n_new), bool)], axis=1)
    whole = np.concatenate([tokens, np.full((n_rows, n_new), config.pad_id, np.int32)], axis=1)
    cached = config.steady_length is None or n_slots <= config.steady_length
    cache: list[tuple[Tensor, Tensor]] = []

    def advance(first: int, end: int) -> Tensor:
        """The logits `[N, V]` after slots `first` to `end`, those before them being in the cache."""
        layout = lay_out(config, slots, end, w.embed.device, first)
        taps = Taps(edits, n_interventions(rows), n_rows, layout)

        def remember(layer: int, *new: Tensor) -> tuple[Tensor, Tensor]:
            if len(cache) == layer:
                kept = [x.new_zeros(n_rows, x.shape[1], n_slots, x.shape[3]) for x in new]
                cache.append((kept[0], kept[1]))
            for buffer, x in zip(cache[layer], new, strict=True):
                buffer[:, :, first:end] = x
            past, values = cache[layer]
            return past[:, :, :end], values[:, :, :end]

        resid = embed(w, whole[:, first:end], layout, taps)
        resid = blocks(w, resid, layout, taps, range(len(w.layers)), remember if cached else None)
        normalised = w.normalise(resid, taps)
        last = [int(np.flatnonzero(row[first:end])[-1]) for row in slots]
        return w.logits(
            normalised[torch.arange(n_rows, device=normalised.device), torch.tensor(last, device=normalised.device)]
        )

    done = np.zeros(n_rows, bool)
    for step in range(n_new):
        end = n_tokens + step
        logits = to_jax(advance(end - 1 if step and cached else 0, end))
        new = np.where(done, config.pad_id, np.asarray(choose(options, keys, np.int32(step), logits)))
        whole[:, end] = new
        done |= np.isin(new, stops)
        if done.all():
            break
    out = whole[:, n_tokens:]
    ends = np.isin(out, stops)
    alive = np.cumsum(ends, axis=1) - ends == 0
    activations = {}
    if readings:
        written = np.concatenate([real, alive], axis=1)
        kept = run_rows(w, whole, written, rows, readings, n_covered=int(n_covered)).taps.captured
        activations = {name: to_jax(value) for name, value in kept.items()}
    return to_jax(out), to_jax(alive), activations
