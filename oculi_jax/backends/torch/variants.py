"""The programs of sweeps and patching on a model that torch runs: prompts × variants as the rows of one batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import torch
from torch import Tensor

from ...buckets import Window
from ...capture import Reading
from ...intervention.rows import Rows
from ...metrics import Metric
from ...sites import SITES
from ..protocol import Seen
from .arrays import to_jax
from .layers import Weights, run_layers
from .layout import lay_out
from .model import TorchDecoder
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
def run_base(
    model: TorchDecoder,
    tokens: AnyArray,
    mask: AnyArray | None,
    rows: Rows,
    *,
    keys: bool,
    window: Window | None = None,
) -> Base:
    """See `Programs.run_base`."""
    w, layers, tokens = model.weights(), tuple(range(model.config.num_hidden_layers)), np.asarray(tokens)
    sites = ("resid_post", "k", "v") if keys else ("resid_post",)
    readings = [Reading(SITES["embed"], (), None, None), *(Reading(SITES[name], layers, None, None) for name in sites)]
    layout = lay_out(w.config, None if mask is None else np.asarray(mask), tokens.shape[1], w.embed.device)
    edits = prepare(w, rows, len(tokens), 1, tokens.shape[1], window=window)
    found = passed(w, tokens, layout, edits, rows, readings, to_end=False).taps.captured
    resid = torch.cat([found["embed"][:, None], found["resid_post"]], dim=1)
    kept: list[Any] = [None if x is None else x.to(w.embed.device) for x in (resid, found.get("k"), found.get("v"))]
    return Base(*kept)


@torch.inference_mode()
def run_variants(
    model: TorchDecoder, tokens: AnyArray, mask: AnyArray | None, rows: Rows, *,
    size: int = 1, metric: MetricLike | None = None, metric_by_prompt: tuple[bool, ...] = (), readings: tuple[Reading, ...] = (),
    window: Window | None = None, base: Base | None = None, which: AnyArray | None = None, start: AnyArray | int = 0,
    first: int = 0, shared: bool = False, mesh: object = None,
) -> Seen:  # fmt: skip
    """See `Programs.run_variants`; a mesh is JAX's."""
    refuse_trace((tokens, mask, rows, metric))
    w, tokens = model.weights(), np.asarray(tokens)
    n_prompts, n_tokens = tokens.shape
    real = None if mask is None else np.repeat(np.asarray(mask), size, axis=0)
    edits = prepare(w, rows, n_prompts, size, n_tokens, window=window)
    whole = lay_out(w.config, real, n_tokens, w.embed.device)
    found: dict[str, Tensor] = {}
    if base is None:
        done = passed(w, np.repeat(tokens, size, axis=0), whole, edits, rows, readings, to_end=metric is not None)
        normalised, found = done.normalised, done.taps.captured
    else:
        assert which is not None
        numbers = torch.from_numpy(np.repeat(np.asarray(which, np.int64), size)).to(base.resid.device)
        before = _Before(base.resid[numbers, -1, :first], base, numbers)
        if shared:
            before = _beginning(w, base, int(numbers[0]), rows, size, int(start), n_prompts, first, window, n_tokens)
        layout = lay_out(w.config, real, n_tokens, w.embed.device, first)
        taps, outside = (Taps(edits, rows.n_interventions, n_prompts * size, each) for each in (layout, whole))
        resid, layers = base.resid[numbers, int(start), first:], range(int(start), len(w.layers))
        resid = run_layers(w, resid, layout, taps, layers, before.remember if first else None)
        if first:
            resid = torch.cat([before.resid.to(resid.device), resid], dim=1)
        normalised = w.normalise(resid, outside)
    value = None
    if metric is not None:
        assert normalised is not None
        value = _measure(w, normalised, real, metric, metric_by_prompt, size, window)
    return Seen(value, {name: to_jax(x.unflatten(0, (n_prompts, size))) for name, x in found.items()})


@dataclass(frozen=True)
class _Before:
    """What the tokens that do not run have left in each row: as in the base run of a prompt, or, from `start` on, their own.

    Attributes:
        resid: `[N, P, E]`, after the last layer.
        base, numbers: whose keys and values they have, and of which prompt, `[N]`.
        own: keys and values `[N, K, P, D]` of the layers from `start` on.
    """

    resid: Tensor
    base: Base
    numbers: Tensor
    start: int = 0
    own: tuple[tuple[Tensor, Tensor], ...] = ()

    def remember(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        first = self.resid.shape[1]
        if self.own:
            past: Any = self.own[layer - self.start]
        else:
            assert self.base.keys is not None and self.base.values is not None
            past = (x[self.numbers, layer, :, :first] for x in (self.base.keys, self.base.values))
        keys, values = (torch.cat([old.to(x.device), x], dim=2) for old, x in zip(past, (k, v), strict=True))
        return keys, values


def _beginning(
    w: Weights, base: Base, number: int, rows: Rows, size: int, start: int, n_prompts: int, first: int,
    window: Window | None, n_tokens: int,
) -> _Before:  # fmt: skip
    """What the tokens that all prompts begin with leave in each variant, which runs them once."""
    begins = np.zeros(1, np.int32) if window is None else np.asarray(window.first)[:1]
    own = Window(begins, None, n_tokens if window is None else window.n_columns)
    edits = prepare(w, rows, 1, size, first, window=own)
    layout = lay_out(w.config, None, first, w.embed.device)
    kept: list[tuple[Tensor, Tensor]] = []

    def keep(_: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        kept.append((k, v))
        return k, v

    resid = base.resid[number, start, :first].expand(size, -1, -1)
    taps = Taps(edits, rows.n_interventions, size, layout)
    resid = run_layers(w, resid, layout, taps, range(start, len(w.layers)), keep)
    of_all = tuple((k.repeat(n_prompts, 1, 1, 1), v.repeat(n_prompts, 1, 1, 1)) for k, v in kept)
    numbers = torch.full((n_prompts * size,), number)
    return _Before(resid.repeat(n_prompts, 1, 1), base, numbers, start, of_all)


def _measure(
    w: Weights,
    normalised: Tensor,
    real: np.ndarray | None,
    metric: Any,
    by_prompt: tuple[bool, ...],
    size: int,
    window: Window | None,
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
    metric, mask = jax.tree.map(np.asarray, metric), None if real is None else real[::size]
    return judged(metric, logits, mask, by_prompt, None if isinstance(metric, Metric) else window)
