"""The programs of `sweep` and of activation patching: variants and prompts as the rows of one batch."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import torch
from torch import Tensor

from ...capture import Reading
from ...metrics import Metric
from ...replay import Base, Rows
from ...sites import SITES
from ..rows import along, judged, refuse_trace
from .arrays import to_jax
from .model import TorchLlama
from .network import Weights, blocks, embed, lay_out
from .programs import logits_of, run_rows
from .taps import Taps, at_positions, n_interventions, prepare


@torch.inference_mode()
def run_base(model: TorchLlama, tokens: Any, mask: Any, shared: Rows, keep_keys: bool) -> Base:
    """As `replay.run_base`; its arrays are tensors."""
    w, layers = model.weights(), tuple(range(model.config.num_hidden_layers))
    sites = ("resid_post", "k", "v") if keep_keys else ("resid_post",)
    readings = [Reading(SITES["embed"], (), None, None), *(Reading(SITES[name], layers, None, None) for name in sites)]
    real = None if mask is None else np.asarray(mask)
    found = run_rows(w, np.asarray(tokens), real, shared, readings, to_end=False).taps.captured
    resid = torch.cat([found["embed"][:, None], found["resid_post"]], dim=1)
    kept: list[Any] = [None if x is None else x.to(w.embed.device) for x in (resid, found.get("k"), found.get("v"))]
    return Base(*kept)


@torch.inference_mode()
def run_group(
    model: TorchLlama, tokens: Any, mask: Any, interventions: Rows, metric: Any, metric_by_prompt: tuple[bool, ...],
    base: Any = None, start: Any = 0, *, size: int, n_rows: int, mesh: Any = None,
) -> Any:  # fmt: skip
    """As `replay.run_group`: the metric `[C, size, …]`."""
    refuse_trace((tokens, mask, interventions, metric))
    w, tokens, real = model.weights(), np.asarray(tokens), None if mask is None else np.asarray(mask)
    n_prompts, n_tokens = tokens.shape
    first, batch = n_tokens - n_rows, n_prompts * size
    edits = prepare(w, interventions, n_prompts, size, n_tokens)

    def taps(first: int) -> Taps:
        rows = None if real is None else np.repeat(real, size, axis=0)
        layout = lay_out(w.config, rows, n_tokens, w.embed.device, first)
        return Taps(edits, n_interventions(interventions), batch, layout)

    whole, tap = taps(0), taps(first)
    if base is None:
        resid = embed(w, np.repeat(tokens, size, axis=0), whole.layout, whole)
    else:
        resid = base.resid[:, int(start), first:].repeat_interleave(size, dim=0)

    def remember(layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        assert base is not None
        past = (x[:, layer, :, :first].repeat_interleave(size, dim=0).to(k.device) for x in (base.keys, base.values))
        return tuple(torch.cat([old, new], dim=2) for old, new in zip(past, (k, v), strict=True))  # type: ignore[return-value]

    resid = blocks(w, resid, tap.layout, tap, range(int(start), len(w.layers)), remember if first else None)
    if first and base is not None:
        resid = torch.cat([base.resid[:, -1, :first].repeat_interleave(size, dim=0).to(resid.device), resid], dim=1)
    return measure(w, w.normalise(resid, whole), real, metric, metric_by_prompt, size)


def measure(
    w: Weights, normalised: Tensor, real: np.ndarray | None, metric: Any, by_prompt: tuple[bool, ...], size: int
) -> Any:
    """The metric of every row, `[C, size, …]`, from the logits that it reads and no others."""
    n_prompts = len(normalised) // size
    if not isinstance(metric, Metric):
        logits = w.logits(normalised)
    else:
        rows = None if real is None else np.repeat(real, size, axis=0)
        read = at_positions(normalised, 1, metric.positions, rows)
        leaves, tree = jax.tree.flatten(metric)
        each = [
            jax.tree.unflatten(tree, [x[number] if lead else x for x, lead in zip(leaves, by_prompt, strict=True)])
            for number in range(n_prompts if any(by_prompt) else 1)
        ]
        if metric.ids is None:
            logits = w.logits(read)
        else:
            parts = zip(each, read.split(len(read) // len(each)), strict=True)
            logits = torch.cat([logits_of(w, part, np.asarray(one.ids)) for one, part in parts])
    logits = to_jax(logits.unflatten(0, (n_prompts, size)))
    metric, mask = jax.tree.map(np.asarray, metric), None if real is None else real
    return judged(metric, logits, mask, by_prompt)


@torch.inference_mode()
def observe(
    model: TorchLlama, tokens: Any, mask: Any, interventions: tuple[Any, ...], metric: Any, leads: tuple[bool, ...],
    readings: tuple[Reading, ...],
) -> tuple[jax.Array, tuple[dict[str, jax.Array], ...]]:  # fmt: skip
    """As `patching.observe`."""
    refuse_trace((tokens, mask, interventions, metric))
    w, real = model.weights(), None if mask is None else np.asarray(mask)
    done = run_rows(w, np.asarray(tokens), real, along(interventions, leads), readings)
    assert done.normalised is not None
    by_prompt = (False,) * len(jax.tree.leaves(metric))
    if isinstance(metric, Metric):
        marks = jax.tree.leaves(metric.per_prompt(), is_leaf=lambda axis: axis is None)
        by_prompt = tuple(mark == 0 for mark in marks)
    values = measure(w, done.normalised, real, metric, by_prompt, 1)
    seen = done.taps.captured
    each = tuple({r.site.name: to_jax(seen[r.site.name][row]) for r in readings} for row in range(len(tokens)))
    return jax.tree.map(lambda x: x[:, 0], values), each
