"""`ungrouped`: a model in which every query head has keys and values of its own, equal to those that it shared."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax.numpy as jnp

from ..models.decoder.checkpoint import named_parameters

if TYPE_CHECKING:
    from ..models.decoder.model import Decoder


def ungrouped(model: Decoder) -> Decoder:
    """The same function with K = H: the rows of each key/value head stand there once for each query head that reads it.

    All other parameters are the model's own arrays. A norm over all heads of a token's keys has the same scale, since each
    occurs equally often.
    """
    config = model.config
    share = config.num_attention_heads // config.num_key_value_heads
    if share == 1:
        return model
    own = {"layers.attn.k.weight", "layers.attn.v.weight", "layers.attn.k.bias", "layers.attn.v.bias"}
    if config.qk_norm == "token":
        own.add("layers.attn.k_norm.weight")
    params = named_parameters(model)
    params |= {name: jnp.repeat(params[name], share, axis=1) for name in own & set(params)}
    return type(model)(dataclasses.replace(config, num_key_value_heads=config.num_attention_heads), params)
