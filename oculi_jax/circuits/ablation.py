"""What takes the place of what a circuit leaves out: another run's writes, their means, zeros, or values."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..arrays import as_array, listing
from ..backends.jax.compiled import compiled
from ..backends.jax.layout import lay_out
from ..backends.jax.programs import passed
from ..backends.jax.taps import Taps
from ..capture import Reading
from ..pytrees import pytree, static
from ..sites import SITES
from ..traced import mapped
from .pairs import Batch, Pairs

if TYPE_CHECKING:
    from ..models.decoder.config import DecoderConfig
    from ..models.decoder.model import Decoder

NAMES = ("corrupted", "mean", "mean-positional", "zero")
SCALE = "attn_post_scale"
_KEPT_BYTES = 1 << 28  # of activations that are held while they are added up


@pytree
class Ablated:
    """Values of sites, the same for all prompts: with all layers, and an axis of tokens of 1 or more.

    Attributes:
        values: site → array.
        by_rank: whether that axis counts real tokens, and not columns; static.
    """

    values: dict[str, Any]
    by_rank: bool = static()


def sites_of(config: DecoderConfig, kind: str) -> tuple[str, ...]:
    """Where a circuit of that kind puts something else in: where writers write, or neurons are."""
    return ("act",) if kind == "neurons" else ("embed", "z", "mlp_out")


def _axis(site: str) -> int:
    """The axis of tokens of a capture in all layers."""
    return int(SITES[site].layered) + SITES[site].axes.index("T")


def seen(model: Decoder, kind: str, tokens: Array, mask: Array | None) -> dict[str, Array]:
    """What a run writes: captures of `sites_of`, and the scale of the norm of what attention adds where edges need it."""
    config = model.config
    scale = (SCALE,) if kind == "edges" and config.post_norm else ()
    every = tuple(range(config.num_hidden_layers))
    names = (*sites_of(config, kind), *scale)
    readings = [Reading(SITES[name], every if SITES[name].layered else (), None, None) for name in names]
    taps = Taps.of((), config, lay_out(config, tokens, mask), names)
    return passed(model, taps, readings, to_end=False).activations


def ablated(
    model: Decoder,
    kind: str,
    prompt: tuple[Array, Array | None],
    spoilt: tuple[Array, Array | None],
    other: Ablated | None,
    first: Array | None,
) -> dict[str, Array]:
    """Site → what takes the place of it in a run of `prompt`: what the run of `spoilt` has, or `other`.

    Args:
        first: the column at which the tokens of `prompt` begin; None for 0.
    """
    if other is None:
        return seen(model, kind, *spoilt)
    tokens, mask = prompt
    places = jnp.arange(len(tokens)) + (0 if first is None else first)
    if other.by_rank:
        places = jnp.arange(len(tokens)) if mask is None else jnp.cumsum(mask) - 1
    found = {}
    for site, value in other.values.items():
        axis = _axis(site)
        taken = jnp.take(jnp.asarray(value), jnp.clip(places, 0, value.shape[axis] - 1), axis=axis)
        found[site] = taken.astype(np.float32 if site == SCALE else model.dtype)
    return found


def ablation_of(model: Decoder, pairs: Pairs, kind: str, ablation: str | Mapping[str, Any] | Ablated) -> Ablated | None:
    """What was asked for, checked, or is that already, of other pairs perhaps; None for the corrupted run."""
    config = model.config
    if isinstance(ablation, Ablated):
        return ablation
    if isinstance(ablation, Mapping):
        return _values(config, kind, ablation, pairs.clean.shape[1])
    if ablation not in NAMES:
        raise ValueError(
            f"ablation is {ablation!r}, and must be {', '.join(map(repr, NAMES))} or values: site → array."
        )
    if ablation == "corrupted":
        return None
    if ablation == "zero":
        sizes = {**config.sizes, "T": 1}
        shapes = {site: (*("L" * SITES[site].layered), *SITES[site].axes) for site in sites_of(config, kind)}
        return Ablated({site: np.zeros([sizes[x] for x in axes], model.dtype) for site, axes in shapes.items()}, False)
    return _mean(model, pairs, kind, ablation == "mean-positional")


def _values(config: DecoderConfig, kind: str, given: Mapping[str, Any], n_tokens: int) -> Ablated:
    wanted = sites_of(config, kind)
    if set(given) != set(wanted):
        raise ValueError(f"ablation has {', '.join(given) or 'nothing'}, and needs {', '.join(wanted)} for {kind}.")
    found = {}
    for site in wanted:
        array, axis = as_array(given[site]), _axis(site)
        sizes = {**config.sizes, "T": n_tokens}
        whole = tuple(sizes[x] for x in (*("L" * SITES[site].layered), *SITES[site].axes))
        short = (*whole[:axis], *whole[axis + 1 :])
        if array.shape not in (whole, short):
            raise ValueError(
                f"ablation[{site!r}] has shape {listing(array.shape)}, and {listing(short)} is needed, or {listing(whole)} for "
                "each token its own."
            )
        found[site] = array if array.shape == whole else jnp.expand_dims(array, axis)
    return Ablated(found, False)


def _mean(model: Decoder, pairs: Pairs, kind: str, positional: bool) -> Ablated:
    """Means over the real tokens of all corrupted prompts.

    Where what attention adds is normalised, a head writes its `z` times a scale: the mean is of that product, kept as the mean
    scale and what it must be multiplied by.
    """
    n_columns = pairs.clean.shape[1]
    size = partial(bytes_of_writes, model, kind)
    total: Any = None
    for chunk in pairs.calls(model, size, _KEPT_BYTES):
        added = _sums(model, pairs.of_call(chunk), kind=kind, n_places=n_columns if positional else 1)
        total = added if total is None else jax.tree.map(jnp.add, total, added)
    sums, counts = total
    means = {}
    for site, value in sums.items():
        shape = [1] * value.ndim
        shape[_axis(site)] = -1
        means[site] = value / jnp.maximum(counts, 1).reshape(shape)
    if SCALE in means:
        means["z"] = means["z"] / jnp.where(means[SCALE] == 0, 1, means[SCALE])[:, None, :, None]
    return Ablated(means, True)


def bytes_of_writes(model: Decoder, kind: str, n_tokens: int) -> int:
    """What a prompt's writes take up, in float32."""
    c = model.config.sizes
    per_token = c["L"] * c["F"] if kind == "neurons" else c["L"] * (c["H"] * c["D"] + c["E"])
    return 4 * n_tokens * per_token


@compiled("kind", "n_places", alone=True)
def _sums(model: Decoder, batch: Batch, *, kind: str, n_places: int) -> tuple[dict[str, Array], Array]:
    """Sums over the real tokens of the corrupted prompts, at each of `n_places` positions or in all; and how many they are."""

    def one(tokens: Any, mask: Array | None, count: Any) -> tuple[dict[str, Array], Array]:
        found = seen(model, kind, tokens, mask)
        real = jnp.full(len(tokens), count) if mask is None else jnp.where(mask, count, 0.0)
        rank = jnp.arange(len(tokens)) if mask is None else jnp.cumsum(mask) - 1
        places = jnp.clip(rank, 0, n_places - 1)
        if SCALE in found:
            found = {**found, "z": found["z"] * found[SCALE].astype(found["z"].dtype)[:, None, :, None]}

        def added(site: str, value: Array) -> Array:
            rows = jnp.moveaxis(value.astype(np.promote_types(value.dtype, np.float32)), _axis(site), 0)
            rows = rows * real.reshape(-1, *(1,) * (rows.ndim - 1)).astype(rows.dtype)
            summed = jnp.zeros((n_places, *rows.shape[1:]), rows.dtype).at[places].add(rows)
            return jnp.moveaxis(summed, 0, _axis(site))

        sums = {site: added(site, value) for site, value in found.items()}
        return sums, jnp.zeros(n_places).at[places].add(real)

    given = (batch.corrupted, batch.corrupted_mask, batch.count)
    axes = tuple(None if x is None else 0 for x in given)
    found = mapped(one, len(batch.corrupted), axes)(*(None if x is None else jnp.asarray(x) for x in given))
    return jax.tree.map(lambda x: x.sum(axis=0), found)
