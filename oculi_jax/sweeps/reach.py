"""What variants of interventions may change, and so where each of them can start from a run that they share."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Int

from ..intervention.edit import Edit, is_per_layer, is_site_shaped, lower
from ..intervention.rows import Rows
from ..sites import SITES

if TYPE_CHECKING:
    from ..arrays import AnyArray
    from ..models.llama.config import LlamaConfig


@partial(jax.jit, static_argnames=("size", "config"))
def first_touched(
    rows: Rows, tokens: Int[Array, "C T"], mask: Bool[Array, "C T"] | None, size: int, config: LlamaConfig
) -> tuple[Int[Array, "N"], Int[Array, "N"]]:
    """The first layer (−1: the embedding) and the first token that each of `size` variants may change, on any prompt.

    For what changes nothing they are the number of layers and the number of tokens.
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

    reached = rows.map(one, size)((tokens, mask), (0, None if mask is None else 0))
    return jax.tree.map(lambda x: x.min(axis=0), reached)


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


def what_needs_all_tokens(rows: Rows, tokens: AnyArray, mask: AnyArray | None, size: int, config: LlamaConfig) -> str:
    """By what a token's values may come to depend on later tokens, or an edit on how many tokens run; "" by nothing.

    Then what precedes an edited token is not as it was: an edit may let a query see later keys, and a function that is not
    known to treat each token by itself (`site_shaped`) may do anything.
    """
    n_tokens = tokens.shape[1]
    sizes = {**config.sizes, "T": n_tokens, "S": n_tokens}
    found: list[str] = []

    def one(interventions: tuple[Any, ...], _: Any) -> int:
        for _, edit in lower(interventions, sizes):
            may = edit.site == "allowed" and edit.value is not False
            if may or (edit.site == "pattern" and edit.op != "scale"):
                found.append(f"an edit at {edit.site!r} may let a token see later ones")
            if not is_site_shaped(edit):
                found.append(
                    f"the function of an edit at {edit.site!r} is not marked as treating each token by itself "
                    "(oculi_jax.intervention.site_shaped)"
                )
        return 0

    jax.eval_shape(lambda: rows.map(one, size)((tokens, mask), (0, None if mask is None else 0)))
    return " and ".join(dict.fromkeys(found))
