"""The two runs of path patching: what senders tell receivers, and what comes of it; and the plan of both."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from ..arrays import AnyArray, under_trace
from ..backends import programs_of
from ..capture import Reading
from ..causal.setting import reading_of
from ..intervention import Edit, PerPrompt
from ..intervention.frame import Frame
from ..intervention.rows import Rows
from ..sites import SITES
from ..sweeps.planning import MOST_ROWS, MOST_ROWS_ELSEWHERE, SweepPlan, after_runs
from ..sweeps.sweeping import cost_of, plan_prompts, sweep_prompts

if TYPE_CHECKING:
    from ..models.decoder.config import DecoderConfig
    from .setting import Setting

# Site → what it is captured as: what enters the first layer is the embedding.
CAPTURED = {"z": "z", "mlp_out": "mlp_out", "resid_pre": "embed"}
# So many senders run side by side at least, however many prompts there are.
FEWEST = 8


class Found(NamedTuple):
    """The metric of the patched runs, `[B]` or, of each sender alone, `[B, N_src]`; and of the two. Of one pair without `B`."""

    patched: Float[Array, "..."]
    clean: Float[Array, "..."]
    corrupted: Float[Array, "..."]


def held_sites(config: DecoderConfig, mlps: bool, norms: bool) -> tuple[str, ...]:
    """The sites that are the base run's between senders and receivers: heads, and what is frozen beside."""
    scales = tuple(name for name in config.sites if name.endswith("_scale")) if norms else ()
    return ("z", *(("mlp_out",) if mlps else ()), *scales)


def run_paths(setting: Setting, held: tuple[str, ...]) -> Found:
    """What the senders do where some sites are held to the base run."""
    readings = _readings(setting, held)  # of both runs alike, which are one program
    base_value, base = setting.base.observe(setting.model, readings)
    source_value, source = setting.source.observe(setting.model, readings)
    if setting.source.mask is not None:
        source = {site: _where_real(site, setting.source.mask, x, base[site]) for site, x in source.items()}
    names = setting.before
    if "logits" in setting.receivers:
        patched = _swept(setting, _first(setting, held, base, source, names))
    else:
        parts = [_through(setting, _first(setting, held, base, source, part)) for part in _parts(setting, names)]
        patched = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)
    if setting.each:  # beyond the receivers nothing changes
        n_after = len(setting.senders) - len(names)
        patched = patched[:, : len(names)]
        patched = jnp.concatenate([patched, jnp.repeat(base_value[:, None], n_after, axis=1)], axis=1)
    ends = (base_value, source_value) if setting.direction == "noising" else (source_value, base_value)
    return Found(*(x[0] if setting.single else x for x in (patched, *ends)))


def plan_paths(setting: Setting, held: tuple[str, ...]) -> SweepPlan:
    """What `run_paths` will run."""
    model, (n_prompts, n_tokens) = setting.model, setting.base.tokens.shape
    readings = _readings(setting, held)
    base = source = _nothing(setting, readings)
    kept = sum(2 * n_prompts * math.prod(x.shape(model.config, n_tokens)) for x in readings)
    kept *= model.dtype.itemsize
    cost = cost_of(model, n_tokens, n_prompts, setting.base.metric)
    names = setting.before
    if "logits" in setting.receivers:
        swept = _planned(setting, _first(setting, held, base, source, names), kept)
        return after_runs(swept, cost, 0, 2 * n_prompts, kept)
    parts, reads = [*_parts(setting, names)], _reads(setting)
    told = {name: x[:, None] for name, x in _nothing(setting, reads).items()}
    told = {name: x.repeat(len(parts[0]), axis=1) for name, x in told.items()}
    # Each part is planned alike: a sweep after runs up to the last layer that is read.
    one, n_layers = _planned(setting, _second(setting, told), kept), max(max(read.layers) for read in reads) + 1
    n_parts, n_runs = len(parts), len(parts) * len(parts[0]) * n_prompts
    flops = n_runs * n_layers * cost.flops_of_layer(n_tokens)
    held_there = cost.bytes_of_call(len(parts[0]) * n_prompts, n_tokens)
    swept = replace(
        one, axes=(len(names),) if setting.each else (), parts=one.parts * n_parts, n_runs=n_parts * one.n_runs + n_runs,
        flops=n_parts * one.flops + flops, naive_flops=n_parts * one.naive_flops + flops,
        layer_evaluations=n_parts * one.layer_evaluations + n_runs * n_layers, bytes=max(one.bytes, held_there),
        reading=n_parts * (one.reading + n_layers * cost.flops_of_reading),
    )  # fmt: skip
    return after_runs(swept, cost, 0, 2 * n_prompts, kept)


def _swept(setting: Setting, interventions: tuple[Any, ...], progress: bool | None = None) -> Array:
    """The metric of the base runs under interventions, `[B, N]`; `[B]` where they have no axis."""
    base = setting.base
    return sweep_prompts(setting.model, base.tokens, base.mask, interventions, base.metric, progress=progress)


def _planned(setting: Setting, interventions: tuple[Any, ...], held: int) -> SweepPlan:
    """The plan of that, where so many bytes are held."""
    base = setting.base
    return plan_prompts(setting.model, base.tokens, base.mask, interventions, base.metric, held=held)


def _readings(setting: Setting, held: tuple[str, ...]) -> tuple[Reading, ...]:
    """What is held, and what senders write, in all layers."""
    sites = {*held, *(CAPTURED[place.site] for place in setting.senders.values())}
    return tuple(reading_of(SITES[site], setting.model.config.num_hidden_layers) for site in sorted(sites))


def _reads(setting: Setting) -> tuple[Reading, ...]:
    """What receivers read, in the layers where one does."""
    layers: dict[str, set[int]] = {}
    for place in setting.receivers.values():
        layers.setdefault(place.site, set()).add(place.layer)
    return tuple(Reading(SITES[site], tuple(sorted(found)), None, None) for site, found in layers.items())


def _nothing(setting: Setting, readings: Sequence[Reading]) -> dict[str, Any]:
    """Site → zeros for what would be captured, with axes of one after those of prompts and layers."""
    n = len(setting.base.tokens)
    return {
        x.site.name: np.zeros((n, *(len(x.layers),) * x.site.layered, *(1,) * len(x.site.axes)), np.float32)
        for x in readings
    }


def _where_real(site: str, real: AnyArray, x: Array, base: Array) -> Array:
    """What a run has at its own real tokens, and the base run at others."""
    axes = ("B", *("L" * SITES[site].layered), *SITES[site].axes)
    shape = [x.shape[i] if letter in "BT" else 1 for i, letter in enumerate(axes)]
    return jnp.where(jnp.broadcast_to(jnp.asarray(real).reshape(shape), x.shape), x, base)


def _first(
    setting: Setting, held: Sequence[str], base: Mapping[str, Any], source: Mapping[str, Any], names: Sequence[str]
) -> tuple[Edit, ...]:
    """The edits of the first run: what is held, then what senders write."""
    fixed = (Edit(site, "set", None, True, _given(base[site])) for site in held)
    return (*fixed, *_sent(setting, names, source))


def _given(x: Any) -> Any:
    """What leads with the prompts, as a field takes it."""
    return PerPrompt(x) if len(x) > 1 else x[0]


def _sent(setting: Setting, names: Sequence[str], source: Mapping[str, Any]) -> tuple[Edit, ...]:
    """What puts in the source's values of senders: of each in a variant of its own, or of all in one."""
    config = setting.model.config
    shapes = {"z": (config.num_hidden_layers, config.num_attention_heads), "mlp_out": (config.num_hidden_layers,),
              "resid_pre": ()}  # fmt: skip
    edits = []
    for site, shape in shapes.items():
        if not any(place.site == site for place in setting.senders.values()):
            continue
        chosen = np.zeros((len(names), *shape), bool)
        for number, name in enumerate(names):
            place = setting.senders[name]
            if place.site == site:
                chosen[(number, *(place.layer, *place.heads)[: len(shape)])] = True
        mask = np.asarray(chosen if setting.each else chosen.any(axis=0))
        layer = 0 if site == "resid_pre" else None
        edits.append(Edit(site, "set", layer, mask[..., None, None], _given(source[CAPTURED[site]])))
    return tuple(edits)


def _parts(setting: Setting, names: list[str]) -> Iterator[list[str]]:
    """Senders in parts that run side by side, all of one size: what is left over repeats the last one."""
    if not setting.each or under_trace((setting.model, setting.base.tokens, setting.base.metric)):
        yield names
        return
    platform, _ = programs_of(setting.model).room(setting.model)
    most = MOST_ROWS.get(platform, MOST_ROWS_ELSEWHERE) // setting.base.tokens.size
    n_parts = -(-len(names) // max(most, FEWEST))
    size = -(-len(names) // n_parts)
    for begin in range(0, len(names), size):
        some = names[begin : begin + size]
        yield some + some[-1:] * (size - len(some))


def _through(setting: Setting, edits: tuple[Edit, ...]) -> Array:
    """The metric `[B, N]` where receivers read what they are told in a run under these; `[B]` of senders together."""
    model, tokens, mask = setting.model, setting.base.tokens, setting.base.mask
    masks = [None] * len(tokens) if mask is None else mask
    rows, axes = Rows.of(edits, [Frame(model.config, model.dtype, tokens.shape[1], row) for row in masks])
    run = programs_of(model).run_variants
    told = run(model, tokens, mask, rows, size=math.prod(axes), readings=_reads(setting)).activations
    return _swept(setting, _second(setting, told), progress=False)


def _second(setting: Setting, told: Mapping[str, Any]) -> tuple[Edit, ...]:
    """The edits of the second run: receivers read what they were told, `[B, N, L of those that are read, …]`."""
    sizes, edits = setting.model.config.sizes, []
    for reading in _reads(setting):
        site = reading.site
        for i, layer in enumerate(reading.layers):
            value = told[site.name][:, :, i] if setting.each else told[site.name][:, 0, i]
            chosen: Any = np.ones((1, 1), bool)
            if site.head_axis is not None:
                own = [
                    h for p in setting.receivers.values() if (p.site, p.layer) == (site.name, layer) for h in p.heads
                ]
                n = sizes[site.head_axis]
                chosen = np.isin(np.arange(n), np.array(own) * n // sizes["H"])[:, None, None]
            edits.append(Edit(site.name, "set", layer, chosen, _given(value)))
    return tuple(edits)
