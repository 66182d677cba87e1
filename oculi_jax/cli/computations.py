"""What a job computes: its function of a batch, what that gives, and what it costs.

Imported in the functions that need it, since it imports JAX.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

import oculi_jax

from ..capture import CaptureSpec, readings_of
from ..causal import activation_patching, attribution_patching
from ..circuits import Circuit, faithfulness
from ..data.jobs import captured, mapped
from ..intervention import Ablation, HeadAblation
from ..metrics import log_probability, logit_difference
from ..sites import SITES
from .interventions import chosen
from .jobfile import Attribute, Capture, Curve, JobFile, Measured, Patch, Sweep

if TYPE_CHECKING:
    from ..data.batches import Batch
    from ..data.dataset import Dataset
    from ..data.running import Function, Job
    from ..metrics import Metric
    from ..models.decoder.config import DecoderConfig
    from ..models.decoder.model import Decoder
    from ..sweeps.planning import Plan

# A batch's number of rows, and its length → what it costs.
Planned = Callable[[int, int], "Plan"]


@dataclass(frozen=True, eq=False)
class Work:
    """A job, and what it costs.

    Attributes:
        plan: of a batch `[B, T]`.
        per_row, per_token: bytes that are written for each.
    """

    job: Job
    plan: Planned
    per_row: int
    per_token: int

    def bytes(self, n_rows: int, n_tokens: int) -> int:
        """What some rows take in files, their ids and where each begins included."""
        return n_rows * (self.per_row + 8) + n_tokens * (self.per_token + 4)


def work_of(asked: JobFile, rows: Dataset, model: Decoder) -> Work:
    """What a file asks for; ValueError or TypeError where the model cannot have it."""
    what, to, chunk_size = asked.what, asked.store.directory, asked.store.chunk_size
    if isinstance(what, Capture):
        spec = _specs(what)
        edits = chosen(asked.model.source, what.intervene)
        job = captured(model, rows, spec, to, interventions=edits, chunk_size=chunk_size)
        return Work(job, _plain_runs(model), *_bytes_of_capture(model, spec))
    made = _made(what, model)
    about = {asked.kind: {**dataclasses.asdict(what), **made.about}}
    job = mapped(model, rows, made.fn, to, tokens=made.tokens, chunk_size=chunk_size, about=about)
    sizes = [
        [4 * math.prod(shape) for name, shape in made.gives.items() if (name in made.tokens) == by] for by in (0, 1)
    ]
    return Work(job, made.plan, *map(sum, sizes))


@dataclass(frozen=True, eq=False)
class _Made:
    """A computation.

    Attributes:
        fn: of a model and a batch. What it closes over is in the record of the job: `about`, and the table itself.
        plan: of a batch.
        gives: name → the shape of what it keeps for a row, or for a token; float32.
        tokens: name → the axis of tokens behind that of rows, of what is kept for each token.
        about: what the table does not say.
    """

    fn: Function
    plan: Planned
    gives: Mapping[str, tuple[int, ...]]
    tokens: Mapping[str, int] = dataclasses.field(default_factory=dict)
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def _made(what: Measured, model: Any) -> _Made:
    if isinstance(what, Sweep):
        return _sweep(what, model)
    if isinstance(what, Patch):
        return _patch(what, model)
    if isinstance(what, Attribute):
        return _attribute(what, model)
    assert isinstance(what, Curve)
    return _curve(what, model)


def _metric(what: Measured, batch: Batch) -> Metric:
    if what.against is None:
        return log_probability(batch[what.target])
    return logit_difference(batch[what.target], batch[what.against])


def _like(what: Measured, n: int, length: int) -> tuple[np.ndarray, np.ndarray, Metric]:
    """Prompts of a batch's shape, for plans: ids, mask and metric."""
    ids = np.zeros(n, np.int32)
    metric = log_probability(ids) if what.against is None else logit_difference(ids, ids + 1)
    return np.zeros((n, length), np.int32), np.ones((n, length), bool), metric


def _sweep(what: Sweep, model: Any) -> _Made:
    family, shape = _family(what, model.config)

    def swept(model: Any, batch: Batch) -> dict[str, Any]:
        metric = _metric(what, batch)
        plain = np.asarray(oculi_jax.sweep(model, batch.tokens, (), metric, mask=batch.mask, progress=False))
        without = np.asarray(oculi_jax.sweep(model, batch.tokens, family, metric, mask=batch.mask, progress=False))
        return {"plain": plain, "change": without - plain.reshape(-1, *[1] * len(shape))}

    def planned(n: int, length: int) -> Plan:
        tokens, mask, metric = _like(what, n, length)
        return oculi_jax.plan(model, tokens, family, metric, mask=mask)

    return _Made(swept, planned, {"plain": (), "change": shape})


def _family(what: Sweep, config: DecoderConfig) -> tuple[Any, tuple[int, ...]]:
    """Ablations of each part, and the shape of their axes."""
    layers = np.arange(config.num_hidden_layers) if what.layers is None else np.array(what.layers)
    if what.each in ("mlp", "attention"):
        return Ablation("mlp_out" if what.each == "mlp" else "attn_out", layers), (len(layers),)
    n = config.sizes["H" if what.each == "head" else "F"]
    places = layers[:, None], np.arange(n)
    return HeadAblation(*places) if what.each == "head" else Ablation("act", *places), (len(layers), n)


def _patch(what: Patch, model: Any) -> _Made:
    by = tuple(part.strip() for part in what.by.split(","))

    def patched(model: Any, batch: Batch) -> dict[str, Any]:
        given = batch.tokens, batch[what.corrupted], _metric(what, batch), what.site, by
        found = activation_patching(model, *given, direction=what.direction, mask=batch.mask, progress=False)
        return {"patched": found.patched, "clean": found.clean, "corrupted": found.corrupted}

    def planned(n: int, length: int) -> Plan:
        tokens, mask, metric = _like(what, n, length)
        given = model, tokens, tokens, metric, what.site, by
        return oculi_jax.plan(activation_patching, *given, direction=what.direction, mask=mask)

    planned(1, 2)  # says at once what cannot be
    sizes = model.config.sizes
    shape = {"layer": sizes["L"], "head": sizes[SITES[what.site].head_axis or "H"]}
    gives = {"clean": (), "corrupted": (), "patched": tuple(shape[part] for part in by if part in shape)}
    return _Made(patched, planned, gives, {"patched": 1 + by.index("position")} if "position" in by else {})


def _attribute(what: Attribute, model: Any) -> _Made:
    def attributed(model: Any, batch: Batch) -> dict[str, Any]:
        given = batch.tokens, batch[what.corrupted], _metric(what, batch), what.sites
        found = attribution_patching(model, *given, mask=batch.mask, steps=what.steps)
        return {**found.values, "clean": found.clean, "corrupted": found.corrupted}

    def planned(n: int, length: int) -> Plan:
        tokens, mask, metric = _like(what, n, length)
        given = model, tokens, tokens, metric, what.sites
        return oculi_jax.plan(attribution_patching, *given, mask=mask, steps=what.steps)

    planned(1, 2)
    axes = {name: ("L",) * SITES[name].layered + tuple(SITES[name].axes[:-1]) for name in what.sites}
    sizes = model.config.sizes
    gives = {name: tuple(sizes[letter] for letter in of if letter != "T") for name, of in axes.items()}
    tokens = {name: 1 + of.index("T") for name, of in axes.items() if "T" in of}
    return _Made(attributed, planned, {"clean": (), "corrupted": (), **gives}, tokens)


def _curve(what: Curve, model: Any) -> _Made:
    files = [Path(name).expanduser() for name in what.circuits]
    circuits = [Circuit.load(path) for path in files]

    def judged(model: Any, batch: Batch) -> dict[str, Any]:
        found = faithfulness(
            model, circuits, batch.tokens, batch[what.corrupted], _metric(what, batch), ablation=what.ablation,
            mask=batch.mask, corrupted_mask=batch.mask_of(what.corrupted),
        )  # fmt: skip
        return {"by_prompt": found.by_prompt, "empty": found.empty, "whole": found.whole}

    def planned(n: int, length: int) -> Plan:
        tokens, mask, metric = _like(what, n, length)
        return oculi_jax.plan(faithfulness, model, circuits, tokens, tokens, metric, mask=mask, ablation=what.ablation)

    planned(1, 2)
    about = {"circuits": [hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in files]}
    return _Made(judged, planned, {"by_prompt": (len(circuits),), "empty": (), "whole": ()}, about=about)


def _specs(what: Capture) -> tuple[CaptureSpec, ...]:
    inside = tuple(name for name in what.sites if SITES[name].layered)
    outside = tuple(name for name in what.sites if name not in inside)
    found = [CaptureSpec(inside, what.layers, what.positions, what.dtype)] if inside else []
    found += [CaptureSpec(outside, None, what.positions, what.dtype)] if outside else []
    return tuple(found)


def _plain_runs(model: Any) -> Planned:
    """Of plain runs."""

    def planned(n: int, length: int) -> Plan:
        tokens, mask, metric = _like(Measured(""), n, length)
        return oculi_jax.plan(model, tokens, (), metric, mask=mask)

    return planned


def _bytes_of_capture(model: Any, spec: tuple[CaptureSpec, ...]) -> tuple[int, int]:
    """Bytes that a capture writes for each row, and for each token."""
    found = [0, 0]
    for reading in readings_of(spec, model.config, 1 << 20):
        dtype = reading.dtype or (model.dtype if reading.site.dtype == "model" else reading.site.dtype)
        by_token = reading.positions is None and "T" in reading.site.axes
        found[by_token] += jnp.dtype(dtype).itemsize * math.prod(reading.shape(model.config, 1))
    return found[0], found[1]
