"""What each writer of a run writes, and the gradient of a metric with respect to what each reader reads.

No reader has a copy of the stream: one reverse pass gives the cotangents of the readers' projections, and each of these goes back
through its own weight and the norm before it, one layer after another.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from ..backends.jax.layers import run_layers
from ..backends.jax.layout import lay_out
from ..backends.jax.programs import measure
from ..backends.jax.taps import Taps
from ..capture import Reading
from ..models.decoder.attention import einsum
from ..models.decoder.model import Block, RMSNorm, Tap
from ..models.decoder.parts import head_writes, ungrouped
from ..sites import SITES

if TYPE_CHECKING:
    from ..buckets import Window
    from ..metrics import MetricLike
    from ..models.decoder.config import DecoderConfig
    from ..models.decoder.derivatives import Derivatives
    from ..models.decoder.model import Decoder
    from ..rules import Rules
    from .graph import Graph


def reader_sites(config: DecoderConfig) -> tuple[str, str, str, str]:
    """Where queries, keys, values and MLPs have read: the first thing that each makes of its input."""
    kind = "pre_rope" if config.qk_norm is None else "proj"
    return f"q_{kind}", f"k_{kind}", "v", "mlp_in"


def written_sites(config: DecoderConfig) -> tuple[str, ...]:
    """The sites of the layers that say what is written to the stream."""
    return ("z", "mlp_out", *(("attn_post_scale",) if config.post_norm else ()))


class Pushed:
    """A tap that adds to what another one returns, as often as heads share it, and puts another value in its place."""

    def __init__(self, tap: Tap, added: Mapping[str, Array], put: Mapping[str, tuple[Array, Array]]):
        self._tap, self._added, self._put, self.rules = tap, added, put, tap.rules

    def __call__(self, site: str, value: Array, /) -> Array:
        if site in self._put:
            share, other = self._put[site]
            value = jnp.where(share, other.astype(value.dtype), value)
        value = self._tap(site, value)
        if site not in self._added:
            return value
        added = self._added[site].astype(value.dtype)
        times = len(added) // len(value)
        return added + (value if times == 1 else jnp.repeat(value, times, axis=0))

    def touches(self, *sites: str) -> bool:
        return self._tap.touches(*sites)


def _step(block: Block, resid: Array, own: Any, *around: Any, split: bool) -> Array:
    """A layer whose taps are pushed; `split`: what is added to keys and values is of each query head's own.

    They are repeated, and not their weights, which the backward pass would keep of every layer.
    """
    rotation, sight, config, tap, remember = around
    block = grown(block, config, split and bool(own[0]), projected=True)
    return block(resid, rotation, sight, config, Pushed(tap, *own), remember)


def grown(block: Block, config: DecoderConfig, split: bool, *, projected: bool = False) -> Block:
    """The layer with keys and values of each query head's own where `split`."""
    if not split:
        return block
    attn = ungrouped(block.attn, config, projected=projected)
    return Block(block.attn_norm, attn, block.attn_post_norm, block.mlp_norm, block.mlp, block.mlp_post_norm)


def zeros_of(model: Decoder, graph: Graph, n_tokens: int) -> dict[str, Array]:
    """What is added to what readers make, to be differentiated by."""
    c = model.config.sizes
    heads = (c["L"], graph.n_heads, n_tokens, c["D"])
    few, wide = (c["L"], graph.n_shared, n_tokens, c["D"]), (c["L"], n_tokens, c["E"])
    shapes = dict(zip(reader_sites(model.config), (heads, few, few, wide), strict=True))
    return {name: jnp.zeros(shape) for name, shape in {**shapes, "final_norm": wide[1:]}.items()}


def observed(
    model: Decoder,
    graph: Graph,
    prompt: tuple[Array, Array | None],
    embed: Float[Array, "T E"] | None = None,
    put: Mapping[str, tuple[Array, Array]] | None = None,
    added: Mapping[str, Array] | None = None,
    remat: bool = False,
    rules: Rules | None = None,
) -> tuple[Float[Array, "T E"], dict[str, Array]]:
    """One run: the stream after the final norm; and what writers wrote, with where readers read: `resid_pre`, `resid_mid`, `last`.

    Args:
        prompt: its tokens and its mask.
        embed: what its embeddings are instead of its tokens' own.
        put: site → of each layer whether, and what, takes the place of what a layer writes.
        added: as `zeros_of`.
        rules: canonical ones of what is differentiated.
    """
    config, (tokens, mask) = model.config, prompt
    layout, added = lay_out(config, tokens, mask), dict(added or {})
    names = (*written_sites(config), "attn_out", "resid_pre", "resid_mid")
    taps = Taps(layout, [], 0, frozenset(names), rules)
    outside = taps.at(None)
    resid = model.embed_tokens(layout.tokens, outside) if embed is None else embed
    readings = [Reading(SITES[name], tuple(range(config.num_hidden_layers)), None, None) for name in names]
    end = added.pop("final_norm", None)
    step = partial(_step, split=not graph.grouped)
    given: Any = (added, dict(put or {}))
    ran = run_layers(model, resid, taps, readings, step=step, given=given, remat=remat)
    normalised = model.normalise(ran.resid, outside)
    normalised = normalised if end is None else normalised + end.astype(normalised.dtype)
    return normalised, {**ran.captured, "embed": resid, "last": ran.resid}


def cotangents(
    model: Decoder,
    graph: Graph,
    prompt: tuple[Array, Array | None],
    metric: MetricLike,
    window: Window | None,
    remat: bool,
    embed: Float[Array, "T E"] | None = None,
    put: Mapping[str, tuple[Array, Array]] | None = None,
    rules: Rules | None = None,
) -> tuple[dict[str, Array], dict[str, Array]]:
    """The gradient with respect to `zeros_of`, and what `observed` saw."""

    def value(added: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        normalised, seen = observed(model, graph, prompt, embed, put, added, remat, rules)
        found = measure(model, normalised, prompt[1], metric, window)
        if jax.tree.structure(found) != jax.tree.structure(0) or found.shape != ():
            raise TypeError("The metric must give one floating-point number, which has a gradient.")
        if not jnp.issubdtype(found.dtype, jnp.floating):
            raise TypeError(f"The metric gives a number of dtype {found.dtype}, which has no gradient.")
        return found, seen

    return jax.grad(value, has_aux=True)(zeros_of(model, graph, prompt[0].shape[0]))


def pulled(
    block: Block,
    config: DecoderConfig,
    rules: Derivatives,
    slopes: Mapping[str, Array],
    before: Array,
    between: Array,
    split: bool,
) -> Float[Array, "R T E"]:
    """The gradient with respect to what each reader of a layer reads: queries, keys, values, the MLP.

    Args:
        rules: of this layer.
        slopes: of each of `reader_sites`.
        before, between: `resid_pre` and `resid_mid` there.
    """
    attn = grown(block, config, split).attn
    back = [
        einsum("htd,hde->hte", _kept(rules, site, slopes[site]).astype(weight.dtype), weight, dtype=jnp.float32)
        for site, weight in zip(reader_sites(config), (x.weight[...] for x in (attn.q, attn.k, attn.v)), strict=False)
    ]
    first = through_norm("attn", block.attn_norm, config, rules, before, jnp.concatenate(back))
    second = through_norm("mlp", block.mlp_norm, config, rules, between, slopes["mlp_in"][None])
    return jnp.concatenate([first, second])


def _kept(rules: Derivatives, site: str, slope: Array) -> Array:
    """What rules leave of a gradient at a site with heads, keys and values repeated or not."""
    if site not in rules.stop:
        return slope
    each = 1 - rules.stop[site]
    return slope * jnp.repeat(each, len(slope) // len(each))[:, None, None].astype(slope.dtype)


def through_norm(
    name: str,
    norm: RMSNorm | None,
    config: DecoderConfig,
    rules: Derivatives,
    x: Float[Array, "T E"],
    slopes: Float[Array, "R T E"],
) -> Float[Array, "R T E"]:
    """What a gradient with respect to what a reader is given is with respect to the stream `x`, through its norm, whose scale is
    live but for what rules stop of it.
    """
    x = x.astype(slopes.dtype)
    wide = jax.tree.map(lambda weight: weight.astype(slopes.dtype), norm)

    def given(x: Array) -> Array:
        if wide is not None:
            x = wide(x, rules.at(f"{name}_scale", wide.scale(x, config.rms_norm_eps)), config.norm)
        return rules.at("final_norm" if name == "final" else f"{name}_in", x)

    _, pull = jax.vjp(given, x)
    return jax.vmap(lambda slope: pull(slope)[0])(slopes)


def differences(
    model: Decoder, one: Mapping[str, Array], other: Mapping[str, Array], where: Array
) -> Float[Array, "N T E"]:
    """What each writer wrote in one run less in the other, at the tokens of `where`."""

    def layer(xs: tuple[Block, Any, Any]) -> Float[Array, "R T E"]:
        block, *runs = xs
        heads = [head_writes(block, run["z"], model.config, run.get("attn_post_scale")) for run in runs]
        mlps = [run["mlp_out"][None] for run in runs]
        return jnp.concatenate([_less(*heads), _less(*mlps)])

    own = [{name: run[name] for name in written_sites(model.config)} for run in (one, other)]
    found = jax.lax.map(layer, (model.layers, *own))
    whole = jnp.concatenate([_less(one["embed"], other["embed"])[None], found.reshape(-1, *found.shape[2:])])
    return jnp.where(where[None, :, None], whole, jnp.zeros((), whole.dtype))


def _less(x: Array, y: Array) -> Array:
    """In float32 or wider."""
    wide = np.promote_types(x.dtype, np.float32)
    return x.astype(wide) - y.astype(wide)


def spans_of(n_layers: int, most: int = 4) -> list[tuple[int, int]]:
    """Layers in a few runs of neighbours, so that writers that stand behind all of a run need not be looked at."""
    n = max(1, min(most, n_layers // 3))
    ends = np.linspace(0, n_layers, n + 1).astype(int)
    return list(zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True))
