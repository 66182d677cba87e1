"""The programs of sweeps and patching: prompts × variants of their interventions, whole or from a base run on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from ...arrays import AnyArray
from ...capture import Reading
from ...intervention.rows import Rows
from ...pytrees import pytree
from ...sites import SITES
from ..protocol import Seen
from .compiled import compiled
from .layers import run_layers
from .layout import lay_out
from .programs import measure, passed
from .taps import Taps

if TYPE_CHECKING:
    from ...metrics import MetricLike
    from ...models.llama.model import Llama


@pytree
class Base:
    """What a run leaves for others that agree with it up to some layer, or up to some token.

    Attributes:
        resid: the residual stream entering each of the `J` − 1 layers, and, last, leaving the last one.
        keys, values: None where every variant runs all tokens.
    """

    resid: Float[Array, "J T E"]
    keys: Float[Array, "L K T D"] | None
    values: Float[Array, "L K T D"] | None


@compiled("keys")
def run_base(
    model: Llama, tokens: Int[AnyArray, "C T"], mask: Bool[AnyArray, "C T"] | None, rows: Rows, *, keys: bool
) -> Base:
    """See `Programs.run_base`; the arrays of what it returns lead with the prompts."""
    layers = tuple(range(model.config.num_hidden_layers))
    sites = ("resid_post", "k", "v") if keys else ("resid_post",)
    readings = (Reading(SITES["embed"], (), None, None), *(Reading(SITES[name], layers, None, None) for name in sites))

    def one(interventions: tuple[Any, ...], prompt: Any) -> Base:
        tokens, mask = prompt
        taps = _taps(model, interventions, tokens, mask, readings)
        found = passed(model, taps, readings, to_end=False).activations
        resid = jnp.concatenate([found["embed"][None], found["resid_post"]])
        return Base(resid, found.get("k"), found.get("v"))

    kept = rows.map(one, 1)((tokens, mask), (0, None if mask is None else 0))
    return jax.tree.map(lambda leaf: leaf[:, 0], kept)


@compiled("size", "metric_by_prompt", "readings", "n_rows", "mesh")
def run_variants(
    model: Llama,
    tokens: Int[AnyArray, "C T"],
    mask: Bool[AnyArray, "C T"] | None,
    rows: Rows,
    *,
    size: int = 1,
    metric: MetricLike | None = None,
    metric_by_prompt: tuple[bool, ...] = (),
    readings: tuple[Reading, ...] = (),
    base: Base | None = None,
    start: Int[AnyArray, ""] | int = 0,
    n_rows: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Seen:
    """See `Programs.run_variants`."""
    config = model.config
    n_tokens = tokens.shape[1]
    first = 0 if n_rows is None else n_tokens - n_rows

    def settle(resid: Array) -> Array:
        whole = None if mesh is None else jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        return resid if whole is None else jax.lax.with_sharding_constraint(resid, whole)

    def resumed(interventions: tuple[Any, ...], tokens: Array, mask: Array | None, base: Base) -> Array:
        """The stream after the final norm of a run from layer `start` on, of the last tokens alone."""
        layout = lay_out(config, tokens[first:], mask, first=first, n_keys=n_tokens)
        past = None if base.keys is None or base.values is None else (base.keys, base.values)
        taps = Taps.of(interventions, config, layout)
        resid = base.resid[start, first:]
        resid = run_layers(model, resid, taps, start=start, past=past if first else None, settle=settle).resid
        if first:
            resid = jnp.concatenate([base.resid[-1, :first], resid])
        return model.normalise(resid, _taps(model, interventions, tokens, mask, ()).at(None))

    def one(interventions: tuple[Any, ...], prompt: Any) -> Seen:
        tokens, mask, metric, base = prompt
        if base is None:
            taps = _taps(model, interventions, tokens, mask, readings)
            done = passed(model, taps, readings, to_end=metric is not None, settle=settle)
            normalised, found = done.normalised, done.activations
        else:
            normalised, found = resumed(interventions, tokens, mask, base), {}
        value = None if normalised is None or metric is None else measure(model, normalised, mask, metric)
        return Seen(value, found)

    metric_axes = jax.tree.unflatten(jax.tree.structure(metric), [0 if lead else None for lead in metric_by_prompt])
    axes = (0, None if mask is None else 0, metric_axes, None if base is None else 0)
    return rows.map(one, size, None if mesh is None else "data")((tokens, mask, metric, base), axes)


def _taps(
    model: Llama, interventions: tuple[Any, ...], tokens: Array, mask: Array | None, readings: tuple[Reading, ...]
) -> Taps:
    """The taps of a whole prompt."""
    layout = lay_out(model.config, tokens, mask)
    return Taps.of(interventions, model.config, layout, [reading.site.name for reading in readings])
