"""The programs of one run, `run`, and of the logit lens, `lens`, on a model that torch runs; and the pass that others share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ...capture import Reading
from ...intervention.rows import Rows
from ...output import Output
from ..protocol import EXIST
from .arrays import from_numpy, to_jax
from .layers import Weights, embed, run_layers, untouched
from .layout import Layout, lay_out
from .model import TorchDecoder
from .rows import refuse_trace
from .taps import Taps, prepare

if TYPE_CHECKING:
    from ...arrays import AnyArray
    from ...rules import Rules


@dataclass
class Pass:
    """One pass of many rows.

    Attributes:
        taps: what was read, and the counts of edits.
        normalised: `[N, T, E]`, after the final norm; None where nobody needs it.
    """

    taps: Taps
    normalised: Tensor | None


def passed(
    w: Weights, tokens: np.ndarray, layout: Layout, edits: Sequence[Any], rows: Rows, readings: Sequence[Reading], *,
    to_end: bool, wanted: Sequence[str] = (),
) -> Pass:  # fmt: skip
    """Runs rows `[N, T]` of one batch, to the last layer that is needed, or the end; sites that are `wanted` exist."""
    taps = Taps(edits, rows.n_interventions, len(tokens), layout, readings, wanted)
    resid = embed(w, tokens, layout, taps)
    to_end = to_end or any(reading.site.name in ("final_scale", "final_norm") for reading in readings)
    n_layers = w.config.num_hidden_layers
    if not to_end:
        n_layers = max((max(r.layers) + 1 for r in readings if r.site.layered), default=0)
    resid = run_layers(w, resid, layout, taps, range(n_layers))
    return Pass(taps, w.normalise(resid, taps) if to_end else None)


@torch.inference_mode()
def run(
    model: TorchDecoder, tokens: AnyArray, mask: AnyArray | None, interventions: tuple[Any, ...], readings: tuple[Reading, ...], *,
    logits: str = "none", remat: bool = False, attention: str = "auto", rules: Rules | None = None, start: int = 0,
    resid: AnyArray | None = None,
) -> Output:  # fmt: skip
    """See `Programs.run`; `remat` is JAX's, and so are `rules` and `resid`, which are refused."""
    if rules is not None:
        raise TypeError(
            "rules change JAX's derivatives, and this model is run by torch, of whose derivatives nothing is asked here: load it "
            "with oculi_jax.from_pretrained(directory)."
        )
    if resid is not None:
        raise TypeError(
            "start= begins a run at a layer, for gradients that need no more, and this model is run by torch, of whose derivatives "
            "nothing is asked here: load it with oculi_jax.from_pretrained(directory)."
        )
    refuse_trace((tokens, mask, interventions))
    w, real = model.weights(), None if mask is None else np.asarray(mask)
    batch, rows = np.asarray(tokens)[None], Rows.single(interventions)
    layout = lay_out(w.config, None if real is None else real[None], batch.shape[1], w.embed.device)
    edits = prepare(w, rows, 1, 1, batch.shape[1])
    done = passed(w, batch, layout, edits, rows, readings, to_end=logits != "none", wanted=EXIST[attention])
    out = None
    if logits != "none":
        assert done.normalised is not None
        row = done.normalised[0]
        if logits == "last":
            row = row[-1 if real is None else int(np.flatnonzero(real)[-1])]
        out = to_jax(w.logits(row))
    activations = {r.site.name: to_jax(done.taps.captured[r.site.name][0]) for r in readings}
    return Output(out, activations, to_jax(done.taps.applied()[0]), None if real is None else to_jax(real))


@torch.inference_mode()
def lens(
    model: TorchDecoder, resid: AnyArray, keep: tuple[str, ...], *,
    top_k: int | None = None, tokens: AnyArray | None = None, dtype: str = "float32",
) -> dict[str, jax.Array]:  # fmt: skip
    """See `Programs.lens`."""
    refuse_trace((resid, tokens))
    w, to = model.weights(), getattr(torch, dtype)
    kept: dict[str, list[Tensor]] = {name: [] for name in keep}

    def keep_of(name: str, value: Tensor, kind: torch.dtype) -> None:
        if name in kept:
            kept[name].append(value.to("cpu", kind))

    for row in from_numpy(resid):
        normalised = w.normalise(row.to(w.embed.device), untouched)
        keep_of("normalized", normalised, normalised.dtype)
        if "chosen" in kept:
            keep_of("chosen", logits_of(w, normalised, np.asarray(tokens)), to)
        if not set(keep) - {"normalized", "chosen"}:
            continue
        logits = w.logits(normalised)
        total = torch.logsumexp(logits, dim=-1)
        keep_of("logits", logits, to)
        keep_of("log_normalizer", total, torch.float32)
        if "probabilities" in kept:
            chosen = logits[:, torch.from_numpy(np.asarray(tokens, np.int64)).to(logits.device)]
            keep_of("probabilities", torch.exp(chosen - total[:, None]), to)
        if top_k is not None:
            values, indices = torch.topk(logits, top_k)
            keep_of("top_k_logits", values, to)
            keep_of("top_k_indices", indices, torch.int32)
    return {name: to_jax(torch.stack(values)) for name, values in kept.items()}


def logits_of(w: Weights, normalised: Tensor, ids: np.ndarray) -> Tensor:
    """Logits of some tokens, `[…, N]`."""
    if (wrong := ids[(ids < 0) | (ids >= w.config.vocab_size)]).size:
        raise ValueError(
            f"Token {wrong[0]} is beyond this model's vocabulary, which has ids 0 to {w.config.vocab_size - 1}."
        )
    chosen = w.unembed[torch.from_numpy(ids.astype(np.int64)).to(w.unembed.device)]
    return w.said(F.linear(normalised.to(chosen.device).float(), chosen.float()))
