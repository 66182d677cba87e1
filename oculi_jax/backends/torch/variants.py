"""The programs of sweeps and patching on a model that torch runs: prompts × variants as the rows of one batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import torch
from torch import Tensor

from ...capture import Reading
from ...intervention.rows import Rows
from ...metrics import Metric
from ...sites import SITES
from ..protocol import Seen
from .arrays import to_jax
from .layers import Weights, run_layers
from .layout import lay_out
from .model import TorchLlama
from .programs import logits_of, passed
from .rows import judged, refuse_trace
from .taps import Taps, at_positions, prepare

if TYPE_CHECKING:
    from ...arrays import AnyArray
    from ...metrics import MetricLike


@dataclass(frozen=True)
class Base:
    """What runs leave for others that agree with them up to some layer, or up to some token.

    Attributes:
        resid: `[C, L+1, T, E]`, the residual stream entering each layer, and, last, leaving the last one.
        keys, values: `[C, L, K, T, D]`; None where every variant runs all tokens.
    """

    resid: Tensor
    keys: Tensor | None
    values: Tensor | None


@torch.inference_mode()
def run_base(model: TorchLlama, tokens: AnyArray, mask: AnyArray | None, rows: Rows, *, keys: bool) -> Base:
    """See `Programs.run_base`."""
    w, layers, tokens = model.weights(), tuple(range(model.config.num_hidden_layers)), np.asarray(tokens)
    sites = ("resid_post", "k", "v") if keys else ("resid_post",)
    readings = [Reading(SITES["embed"], (), None, None), *(Reading(SITES[name], layers, None, None) for name in sites)]
    layout = lay_out(w.config, None if mask is None else np.asarray(mask), tokens.shape[1], w.embed.device)
    edits = prepare(w, rows, len(tokens), 1, tokens.shape[1])
    found = passed(w, tokens, layout, edits, rows, readings, to_end=False).taps.captured
    resid = torch.cat([found["embed"][:, None], found["resid_post"]], dim=1)
    kept: list[Any] = [None if x is None else x.to(w.embed.device) for x in (resid, found.get("k"), found.get("v"))]
    return Base(*kept)


@torch.inference_mode()
def run_variants(
    model: TorchLlama, tokens: AnyArray, mask: AnyArray | None, rows: Rows, *,
    size: int = 1, metric: MetricLike | None = None, metric_by_prompt: tuple[bool, ...] = (), readings: tuple[Reading, ...] = (),
    base: Base | None = None, start: AnyArray | int = 0, n_rows: int | None = None, mesh: object = None,
) -> Seen:  # fmt: skip
    """See `Programs.run_variants`; a mesh is JAX's."""
    refuse_trace((tokens, mask, rows, metric))
    w, tokens = model.weights(), np.asarray(tokens)
    n_prompts, n_tokens = tokens.shape
    real = None if mask is None else np.repeat(np.asarray(mask), size, axis=0)
    edits = prepare(w, rows, n_prompts, size, n_tokens)
    whole = lay_out(w.config, real, n_tokens, w.embed.device)
    found: dict[str, Tensor] = {}
    if base is None:
        done = passed(w, np.repeat(tokens, size, axis=0), whole, edits, rows, readings, to_end=metric is not None)
        normalised, found = done.normalised, done.taps.captured
    else:
        first = 0 if n_rows is None else n_tokens - n_rows
        layout = lay_out(w.config, real, n_tokens, w.embed.device, first)
        taps, outside = (Taps(edits, rows.n_interventions, n_prompts * size, each) for each in (layout, whole))
        resid = base.resid[:, int(start), first:].repeat_interleave(size, dim=0)

        def remember(layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            assert base is not None and base.keys is not None and base.values is not None
            past = (x[:, layer, :, :first].repeat_interleave(size, dim=0) for x in (base.keys, base.values))
            keys, values = (torch.cat([old.to(x.device), x], dim=2) for old, x in zip(past, (k, v), strict=True))
            return keys, values

        resid = run_layers(w, resid, layout, taps, range(int(start), len(w.layers)), remember if first else None)
        if first:
            before = base.resid[:, -1, :first].repeat_interleave(size, dim=0)
            resid = torch.cat([before.to(resid.device), resid], dim=1)
        normalised = w.normalise(resid, outside)
    value = None
    if metric is not None:
        assert normalised is not None
        value = _measure(w, normalised, real, metric, metric_by_prompt, size)
    return Seen(value, {name: to_jax(x.unflatten(0, (n_prompts, size))) for name, x in found.items()})


def _measure(
    w: Weights, normalised: Tensor, real: np.ndarray | None, metric: Any, by_prompt: tuple[bool, ...], size: int
) -> Any:
    """The metric of every row, `[C, size, …]`, from the logits that it reads and no others."""
    n_prompts = len(normalised) // size
    if not isinstance(metric, Metric):
        logits = w.logits(normalised)
    else:
        read = at_positions(normalised, 1, metric.positions, real)
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
    return judged(jax.tree.map(np.asarray, metric), logits, None if real is None else real[::size], by_prompt)
