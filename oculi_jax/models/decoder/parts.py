"""A layer seen head by head: attention with keys and values of each head's own, and what each head adds to the stream."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from .attention import einsum
from .model import Attention, Block, Linear, RMSNorm

if TYPE_CHECKING:
    from .config import DecoderConfig
    from .model import Decoder


def ungrouped(attn: Attention, config: DecoderConfig, *, projected: bool = False) -> Attention:
    """The same attention with `K` = `H`: the weights of keys and values as often as query heads share them.

    `projected`: of what comes after the projections alone, where these are repeated themselves.
    """
    times = config.num_attention_heads // config.num_key_value_heads
    if times == 1:
        return attn

    def repeat(x: Array) -> Array:
        return jnp.repeat(x, times, axis=0)

    def linear(own: Linear) -> Linear:
        return Linear(repeat(own.weight[...]), None if own.bias is None else repeat(own.bias[...]))

    norm = attn.k_norm
    if norm is not None and norm.weight[...].ndim == 2:
        norm = RMSNorm(repeat(norm.weight[...]))
    k, v = (attn.k, attn.v) if projected else (linear(attn.k), linear(attn.v))
    return Attention(attn.q, k, v, attn.o, attn.q_norm, norm)


def without_groups(model: Decoder) -> Decoder:
    """The same function in which every query head has keys and values of its own; all other parameters are the model's arrays."""
    config = model.config
    if config.num_attention_heads == config.num_key_value_heads:
        return model
    made = jax.tree.map(lambda x: x, model)  # an object of its own
    made.config = replace(config, num_key_value_heads=config.num_attention_heads)
    made.layers.attn = jax.vmap(lambda attn: ungrouped(attn, config))(model.layers.attn)
    return made


def head_writes(
    block: Block, z: Float[Array, "H T D"], config: DecoderConfig, scale: Float[Array, "T"] | None = None
) -> Float[Array, "H T E"]:
    """What each head adds to the stream: their sum is `attn_out`. An output bias is shared equally.

    Args:
        scale: of the norm of what attention adds, where the family has one; None for that of these heads together.
    """
    writes = einsum("htd,ehd->hte", z, block.attn.o.weight[...])
    if block.attn.o.bias is not None:
        writes = writes + block.attn.o.bias[...][None, None, :] / z.shape[0]
    if (norm := block.attn_post_norm) is not None:
        found = norm.scale(jnp.sum(writes, axis=0), config.rms_norm_eps) if scale is None else scale
        writes = norm(writes, jnp.broadcast_to(found, writes.shape[:-1]), config.norm)
    if config.residual_scale != 1:
        writes = (writes.astype(jnp.float32) * config.residual_scale).astype(writes.dtype)
    return writes
