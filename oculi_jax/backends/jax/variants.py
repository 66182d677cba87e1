"""The programs of sweeps and patching: prompts × variants of their interventions, whole or from a base run on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from ...arrays import AnyArray
from ...buckets import Window
from ...capture import Reading, slots_at
from ...intervention.rows import Rows
from ...metrics import Metric
from ...pytrees import pytree
from ...sites import SITES
from ..protocol import Seen
from .compiled import compiled
from .layers import run_layers
from .layout import lay_out
from .programs import judge, measure, passed
from .taps import Taps

if TYPE_CHECKING:
    from ...metrics import MetricLike
    from ...models.decoder.model import Decoder

Settle = Callable[[Array], Array]


@pytree
class Base:
    """What runs leave for others that agree with them up to some layer, or up to some token.

    Attributes:
        resid: the residual stream entering each of the `J` − 1 layers, and, last, leaving the last one.
        keys, values: None where every variant runs all tokens.
    """

    resid: Float[Array, "C J T E"]
    keys: Float[Array, "C L K T D"] | None
    values: Float[Array, "C L K T D"] | None


@compiled("keys")
def run_base(
    model: Decoder,
    tokens: Int[AnyArray, "C T"],
    mask: Bool[AnyArray, "C T"] | None,
    rows: Rows,
    *,
    keys: bool,
    window: Window | None = None,
) -> Base:
    """See `Programs.run_base`."""
    layers = tuple(range(model.config.num_hidden_layers))
    sites = ("resid_post", "k", "v") if keys else ("resid_post",)
    readings = (Reading(SITES["embed"], (), None, None), *(Reading(SITES[name], layers, None, None) for name in sites))

    def one(interventions: tuple[Any, ...], prompt: Any) -> tuple[Array, Array | None, Array | None]:
        tokens, mask, window = prompt
        taps = _taps(model, interventions, tokens, mask, window, readings)
        found = passed(model, taps, readings, to_end=False).activations
        resid = jnp.concatenate([found["embed"][None], found["resid_post"]])
        return resid, found.get("k"), found.get("v")

    axes = (0, None if mask is None else 0, None if window is None else 0)
    return Base(*jax.tree.map(lambda leaf: leaf[:, 0], rows.map(one, 1)((tokens, mask, window), axes)))


@compiled("size", "metric_by_prompt", "readings", "first", "shared", "mesh")
def run_variants(
    model: Decoder,
    tokens: Int[AnyArray, "C T"],
    mask: Bool[AnyArray, "C T"] | None,
    rows: Rows,
    *,
    size: int = 1,
    metric: MetricLike | None = None,
    metric_by_prompt: tuple[bool, ...] = (),
    readings: tuple[Reading, ...] = (),
    window: Window | None = None,
    base: Base | None = None,
    which: Int[AnyArray, "C"] | None = None,
    start: Int[AnyArray, ""] | int = 0,
    first: int = 0,
    shared: bool = False,
    mesh: jax.sharding.Mesh | None = None,
) -> Seen:
    """See `Programs.run_variants`."""

    def settle(resid: Array) -> Array:
        whole = None if mesh is None else jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        return resid if whole is None else jax.lax.with_sharding_constraint(resid, whole)

    def one(interventions: tuple[Any, ...], prompt: Any, beginning: _Before | None = None) -> Seen:
        tokens, mask, metric, window, number = prompt
        taps = _taps(model, interventions, tokens, mask, window, readings)
        slots = there = None
        if isinstance(metric, Metric) and not readings and taps.can_be_cut:
            slots, there = slots_at(metric.positions, mask, tokens.shape[0])
        if base is None:
            done = passed(model, taps, readings, to_end=metric is not None, rows=slots, settle=settle)
            normalised, found = done.normalised, done.activations
        else:
            resumed = _Resumed(model, interventions, window, start, settle)
            before = _before(base, number, first) if beginning is None else beginning
            resid = resumed.stream(base.resid[number, start, first:], tokens, mask, before, slots)
            outside = taps if slots is None else taps.of_rows(slots)
            normalised, found = model.normalise(resid, outside.at(None)), {}
        if normalised is None or metric is None:
            return Seen(None, found)
        if there is None:
            return Seen(measure(model, normalised, mask, metric, window), found)
        return Seen(judge(model, jnp.where(there[:, None], normalised, jnp.nan), metric), found)

    def common(interventions: tuple[Any, ...]) -> _Before:
        assert base is not None and which is not None
        own = Window(0, None, tokens.shape[1]) if window is None else jax.tree.map(lambda x: x[0], window)
        resumed = _Resumed(model, interventions, own, start, settle)
        number, prompt = jnp.asarray(which)[0], jnp.asarray(tokens)[0, :first]
        return resumed.beginning(base.resid[number, start, :first], prompt, _before(base, number, first))

    spread = None if mesh is None else "data"
    metric_axes = jax.tree.unflatten(jax.tree.structure(metric), [0 if lead else None for lead in metric_by_prompt])
    axes = (0, None if mask is None else 0, metric_axes, *(None if x is None else 0 for x in (window, which)))
    beginnings = (rows.map_variants(common, size, spread),) if shared else ()
    return rows.map(one, size, spread)((tokens, mask, metric, window, which), axes, *beginnings, alike=shared)


class _Before(NamedTuple):
    """What the tokens that do not run have left: their stream after the last layer, and their keys and values."""

    resid: Float[Array, "P E"]
    keys: Float[Array, "L K P D"] | None
    values: Float[Array, "L K P D"] | None


def _before(base: Base, number: Array, first: int) -> _Before:
    """What one prompt's first tokens left in the base run."""
    keys, values = (None if x is None else x[number, :, :, :first] for x in (base.keys, base.values))
    return _Before(base.resid[number, -1, :first], keys, values)


class _Resumed(NamedTuple):
    """One variant's run of one prompt from a layer on."""

    model: Decoder
    interventions: tuple[Any, ...]
    window: Window | None
    start: AnyArray | int
    settle: Settle

    def stream(
        self,
        resid: Float[Array, "R E"],
        tokens: Int[Array, "T"],
        mask: Array | None,
        before: _Before,
        slots: Int[Array, "P"] | None,
    ) -> Float[Array, "_ E"]:
        """The stream after the last layer of the tokens in some slots (None: all), from that of the last `R` before `start`."""
        config, n_tokens = self.model.config, tokens.shape[0]
        first = n_tokens - resid.shape[0]
        layout = lay_out(config, tokens[first:], mask, first=first, n_keys=n_tokens)
        taps = Taps.of(self.interventions, config, layout, window=self.window)
        past = None
        if first and before.keys is not None and before.values is not None:
            past = before.keys, before.values
        rows = None if slots is None else jnp.maximum(slots - first, 0)
        ran = run_layers(self.model, resid, taps, start=self.start, past=past, rows=rows, settle=self.settle)
        if not first:
            return ran.resid
        if slots is None:
            return jnp.concatenate([before.resid, ran.resid])
        return jnp.where((slots < first)[:, None], before.resid[jnp.minimum(slots, first - 1)], ran.resid)

    def beginning(self, resid: Float[Array, "P E"], tokens: Int[Array, "P"], before: _Before) -> _Before:
        """What the tokens that all prompts begin with leave in this variant; up to its first layer, as in the base run."""
        layers = tuple(range(self.model.config.num_hidden_layers))
        readings = [Reading(SITES[name], layers, None, None) for name in ("k", "v")]
        taps = _taps(self.model, self.interventions, tokens, None, self.window, readings)
        assert before.keys is not None and before.values is not None
        kept = {"k": before.keys, "v": before.values}
        ran = run_layers(self.model, resid, taps, readings, start=self.start, before=kept, settle=self.settle)
        return _Before(ran.resid, ran.captured["k"], ran.captured["v"])


def _taps(
    model: Decoder,
    interventions: tuple[Any, ...],
    tokens: Array,
    mask: Array | None,
    window: Window | None,
    readings: Sequence[Reading] = (),
) -> Taps:
    """The taps of a whole prompt, or of a window of it."""
    layout = lay_out(model.config, tokens, mask)
    return Taps.of(interventions, model.config, layout, [reading.site.name for reading in readings], window=window)
