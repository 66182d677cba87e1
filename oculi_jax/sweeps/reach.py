"""What variants of interventions may change, and so where each of them can start from a run that they share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Int

from ..intervention.edit import Edit, is_per_layer, is_site_shaped, lower, shaped_leaves, token_axes
from ..intervention.rows import Rows
from ..prompts import bucket
from ..sites import SITES

if TYPE_CHECKING:
    from ..arrays import AnyArray
    from ..buckets import Bucket
    from ..models.decoder.config import DecoderConfig
    from .running import Prepared


@dataclass(frozen=True, eq=False)
class Reach:
    """What variants may change first, in a bucket's prompts.

    Attributes:
        layers: the first layer of each, −1 for the embedding, `L` for what changes none.
        tokens: the first column of the bucket that each changes.
        common: how many first tokens are the same in all prompts of the set, so that a variant may run them once for all.
    """

    layers: Int[np.ndarray, "N"]
    tokens: Int[np.ndarray, "N"]
    common: int = 0


def reaches_of(prepared: Prepared, buckets: Sequence[Bucket]) -> Iterator[Reach]:
    """What the variants of a sweep may change first, in each bucket."""
    model, tokens, mask = prepared.model, prepared.tokens, prepared.mask
    found = first_touched(prepared.varying, tokens, mask, prepared.size, model.config)
    layers, columns = map(np.asarray, found)
    common = 0 if prepared.needs.later else _common(prepared)
    for own in buckets:
        first = columns[own.prompts] - own.first[:, None]
        first = np.zeros_like(first) if prepared.needs.later else np.maximum(first, 0)
        yield Reach(layers[own.prompts].min(axis=0), first.min(axis=0), common)


def _common(prepared: Prepared) -> int:
    """How many tokens all prompts begin with that every intervention finds alike."""
    tokens, mask, config = prepared.tokens, prepared.mask, prepared.model.config
    if len(tokens) == 1 or any(prepared.rows.by_prompt) or not isinstance(tokens, np.ndarray):
        return 0
    n_columns = tokens.shape[1]
    steady = config.steady_length is None or bucket(n_columns) <= config.steady_length
    real = np.ones(tokens.shape, bool) if mask is None else np.asarray(mask)
    first = real.argmax(axis=1)
    if not steady or (prepared.needs.places and (first != first[0]).any()):
        return 0
    columns = first[:, None] + np.arange(n_columns - first.max())
    aligned, there = (np.take_along_axis(x, columns, axis=1) for x in (tokens, real))
    same = (aligned == aligned[:1]).all(axis=0) & there.all(axis=0)
    return int(same.cumprod().sum())


@partial(jax.jit, static_argnames=("size", "config"))
def first_touched(
    rows: Rows, tokens: Int[Array, "C T"], mask: Bool[Array, "C T"] | None, size: int, config: DecoderConfig
) -> tuple[Int[Array, "C N"], Int[Array, "C N"]]:
    """The first layer (−1: the embedding) and the first column that each of `size` variants may change in each prompt.

    For what changes nothing they are the number of layers and the number of columns.
    """
    n_layers, n_tokens = config.num_hidden_layers, tokens.shape[1]
    sizes = {**config.sizes, "T": n_tokens, "S": n_tokens}

    def one(interventions: tuple[Any, ...], prompt: Any) -> tuple[Array, Array]:
        _, real = prompt
        first_layer, first_token = jnp.int32(n_layers), jnp.int32(n_tokens)
        for _, edit in lower(interventions, sizes):
            touched = _touched(edit, n_layers, n_tokens)
            touched = touched if real is None else touched & real[None, :]
            layers, tokens = touched.any(axis=1), touched.any(axis=0)
            layer = jnp.argmax(layers).astype(jnp.int32)
            if not SITES[edit.site].layered:
                layer = jnp.int32(-1 if edit.site == "embed" else n_layers)
            here = tokens.any()
            first_layer = jnp.minimum(first_layer, jnp.where(here, layer, n_layers))
            first_token = jnp.minimum(first_token, jnp.where(here, jnp.argmax(tokens).astype(jnp.int32), n_tokens))
        return first_layer, first_token

    return rows.map(one, size)((tokens, mask), (0, None if mask is None else 0))


def _touched(edit: Edit, n_layers: int, n_tokens: int) -> Bool[Array, "L T"]:
    """In which layers, at which tokens, an edit may change something; in all layers for a site outside of them."""
    axes = edit.axes
    mask = jnp.asarray(edit.mask.x if is_per_layer(edit.mask) else edit.mask)
    lead = mask.shape[:1] if is_per_layer(edit.mask) else (1,)
    inner = mask.shape[1:] if is_per_layer(edit.mask) else mask.shape
    mask = mask.reshape(*lead, *(1,) * (len(axes) - len(inner)), *inner)
    mask = mask.any(axis=tuple(1 + axis for axis, letter in enumerate(axes) if letter != "T"))
    layers = jnp.ones(n_layers, bool)
    if edit.layer is not None:
        given = jnp.asarray(edit.layer)
        layers = given if given.dtype == bool else jnp.arange(n_layers) == given
    return jnp.broadcast_to(mask, (n_layers, n_tokens)) & layers[:, None]


class Needs(NamedTuple):
    """What interventions ask of a run.

    Attributes:
        later: by what a token's values may come to depend on later tokens, in words, or an edit on how many tokens run. Then
            what precedes an edited token is not as it was.
        columns: whether an edit depends on how many columns run: by a function that is not known to treat each token by itself
            (`site_shaped`), and may do anything.
        places: whether an edit has arrays with an axis of tokens.
    """

    later: str
    columns: bool
    places: bool


def needs_of(rows: Rows, tokens: AnyArray, mask: AnyArray | None, size: int, config: DecoderConfig) -> Needs:
    """What the interventions of a sweep ask of its runs, from their shapes alone."""
    n_tokens = tokens.shape[1]
    sizes = {**config.sizes, "T": n_tokens, "S": n_tokens}
    found: list[str] = []
    columns, places = [False], [False]

    def one(interventions: tuple[Any, ...], _: Any) -> int:
        for _, edit in lower(interventions, sizes):
            may = edit.site == "allowed" and edit.value is not False
            if may or (edit.site == "pattern" and edit.op != "scale"):
                found.append(f"an edit at {edit.site!r} may let a token see later ones")
            if not is_site_shaped(edit):
                columns.append(True)
                found.append(
                    f"the function of an edit at {edit.site!r} is not marked as treating each token by itself "
                    "(oculi_jax.intervention.site_shaped)"
                )
            leaves = shaped_leaves((edit.mask, edit.value))
            shapes = [jnp.shape(x.x)[1:] if is_per_layer(x) else jnp.shape(x) for x in leaves]
            places.append(any(token_axes(edit, shape, n_tokens, "TS") for shape in shapes))
        return 0

    jax.eval_shape(lambda: rows.map(one, size)((tokens, mask), (0, None if mask is None else 0)))
    return Needs(" and ".join(dict.fromkeys(found)), any(columns), any(places))
