"""The residual stream as a sum: what the embedding, attention, the MLPs and edits of the stream itself put into it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from ..pytrees import pytree
from .inputs import at_position, check_capture, need

if TYPE_CHECKING:
    from ..adapter.structures import AnyCapture, AttentionCapture, ResidualCapture
    from ..models.decoder.model import Decoder


@pytree
class Decomposition:
    """Parts of the residual stream, float32: `embedding + Σ attn + Σ mlp + Σ edits` is the stream after the last layer.

    Attributes:
        embedding: `[T, E]`, where the stream begins.
        attn, mlp: `[L, T, E]`, what each layer's attention and MLP added.
        edits: `[L, T, E]`, jumps of the stream that no component explains: zero but for rounding unless an intervention
            set the stream itself.
    """

    embedding: Float[Array, "T E"]
    attn: Float[Array, "L T E"]
    mlp: Float[Array, "L T E"]
    edits: Float[Array, "L T E"]


def decompose_resid(residual: ResidualCapture, position: int | None = None) -> Decomposition:
    """The residual stream as the sum of what was written into it (Elhage et al. 2021, transformer-circuits.pub).

    The edit of layer l is `resid_pre(l) − resid_post(l − 1)` (the embedding before layer 0), plus
    `post_attn − pre_attn − attn_out`, plus `post_mlp − post_attn − mlp_out`. The first of these is known, and counted, only
    where the layer before was captured too.

    Args:
        residual: with all its points. Of all layers, the parts sum to the last `post_mlp`; of some, those layers' parts.
        position: one position among the real tokens, negative from the last; None for all.

    Returns:
        A `Decomposition`; with `position`, without the `T` axis.

    Raises:
        ValueError, TypeError: something was not captured, or the position is beyond the prompt.

    Examples:
        >>> parts = decompose_resid(capture.residual, position=-1)
        >>> whole = parts.embedding + parts.attn.sum(axis=0) + parts.mlp.sum(axis=0) + parts.edits.sum(axis=0)
        >>> bool(jnp.allclose(whole, capture.residual.post_mlp[-1, -1], atol=1e-3))
        True
    """
    check_capture(residual, "ResidualCapture")
    return _decompose(residual, position)


@partial(jax.jit, static_argnums=1)
def _decompose(residual: Any, position: int | None) -> Decomposition:
    middle = "pre_mlp" if residual.post_attn is None and residual.pre_mlp is not None else "post_attn"
    layered = need(residual, "ResidualCapture", "pre_attn", middle, "post_mlp", "attn_out", "mlp_out")
    embedding = need(residual, "ResidualCapture", "embedding")
    if position is not None:
        layered = tuple(at_position(residual, value, 1, position) for value in layered)
        embedding = at_position(residual, embedding, 0, position)
    pre, mid, post, attn, mlp = (value.astype(jnp.float32) for value in layered)
    embedding = embedding.astype(jnp.float32)

    layers = residual.captured_layers
    row = {-1: 0, **{layer: i for i, layer in enumerate(layers, start=1)}}  # layer → what left it; −1 is the embedding
    before = jnp.concatenate([embedding[None], post])[np.array([row.get(layer - 1, 0) for layer in layers])]
    known = np.array([layer - 1 in row for layer in layers]).reshape(-1, *(1,) * (pre.ndim - 1))
    entering = jnp.where(jnp.broadcast_to(known, pre.shape), pre - before, 0.0)
    return Decomposition(embedding, attn, mlp, entering + (mid - pre - attn) + (post - mid - mlp))


def stack_head_results(
    attention: AttentionCapture, model: Decoder, position: int | None = None
) -> Float[Array, "L H T E"] | Float[Array, "L H E"]:
    """What each head adds to the residual stream, `z_h W_O,h`; over heads, with the output bias, they sum to `attn_out`.

    Where the family normalises what attention adds, each head's part is normalised with the scale of this run, as it was.

    Of all positions this is `[L, H, T, E]`, `H` times a residual capture: give a position where one will do.

    Args:
        attention: a capture; `z` is always kept, so an ablated head adds nothing.
        model: the model that was captured.
        position: one position among the real tokens, negative from the last; None for all.

    Returns:
        float32 `[L, H, T, E]`; `[L, H, E]` at one position.

    Raises:
        ValueError, TypeError: a capture that is no AttentionCapture of this model, or a position beyond the prompt.

    Examples:
        >>> each = stack_head_results(capture.attention, model, position=-1)
        >>> each.shape, bool(jnp.allclose(each.sum(axis=1), capture.residual.attn_out[:, -1], atol=1e-3))
        ((4, 6, 192), True)
    """
    z = need(attention, "AttentionCapture", "z")
    own = written(attention, model, "attn.o", z.shape[1], z.shape[3])
    scale = own.scale
    if position is not None:
        z = at_position(attention, z, 2, position)
        scale = None if scale is None else at_position(attention, scale, 1, position)
    if scale is not None:
        z = z.astype(jnp.float32) * (scale[:, None, None] if scale.ndim == 1 else scale[:, None, :, None])
    return _head_results(z.astype(jnp.float32), own.weight, own.gain)


@jax.jit
def _head_results(
    z: Float[Array, "L H ... D"], weight: Float[Array, "L E H D"], gain: Float[Array, "L E"]
) -> Float[Array, "L H ... E"]:
    # A layer at a time, so that a float32 copy of narrower weights is never held whole.
    def layer(row: tuple[Array, Array, Array]) -> Array:
        z, weight, gain = row
        wide = weight.astype(jnp.float32) * gain[:, None, None]
        return jnp.einsum("h...d,ehd->h...e", z, wide, precision=jax.lax.Precision.HIGHEST)

    return jax.lax.map(layer, (z, weight, gain))


class Written(NamedTuple):
    """How a sublayer of the captured layers writes into the stream: it adds `(weight · x + bias) · gain · scale`.

    Attributes:
        weight: `[L, E, …]`; `bias`: `[L, E]` or None.
        gain: float32 `[L, E]`, what the family multiplies by on the way: the gain of the norm of what is added, where it has
            one, and its `residual_scale`; ones for Llama.
        scale: `[L, T]`, that norm's scale in this run, taken as it was; None without one.
    """

    weight: Float[Array, "L E ..."]
    bias: Float[Array, "L E"] | None
    gain: Float[Array, "L E"]
    scale: Float[Array, "L T"] | None


def written(capture: AnyCapture, model: Decoder, name: str, *sizes: int) -> Written:
    """How what a capture holds of each layer is added to the stream: the one place that knows a family's way there.

    Args:
        capture: whose `captured_layers` are wanted.
        model: the model that was captured.
        name: `"attn.o"` or `"mlp.down"`.
        sizes: the capture's sizes of the weight's axes after `E`.

    Raises:
        TypeError: `model` is no Llama. ValueError: it is not the one that was captured, or the scale of the norm of what is
            added was not captured.
    """
    if not hasattr(model, "layers") or not hasattr(model, "lm_head"):
        hint = " Give its .model." if hasattr(model, "model") else ""
        raise TypeError(f"The model is a {type(model).__name__}, and the Llama that was captured is needed.{hint}")
    part, linear = name.split(".")
    config, blocks = model.config, model.layers
    own = getattr(getattr(blocks, part), linear)
    weight, layers = own.weight[...], capture.captured_layers
    if max(layers) >= weight.shape[0] or tuple(weight.shape[2:]) != sizes:
        found = ", ".join(map(str, sizes))
        there = ", ".join(map(str, weight.shape[2:]))
        raise ValueError(
            f"This capture is of another model: its layers go to {max(layers)} and the inputs of {name} are [{found}], but "
            f"the model has {weight.shape[0]} layers with inputs [{there}]. Give the model that was captured."
        )
    whole = layers == tuple(range(weight.shape[0]))
    gain, scale = jnp.full(weight.shape[:2], config.residual_scale, jnp.float32), None
    if config.post_norm:
        scale = need(capture, type(capture).__name__, "post_scale").astype(jnp.float32)
        gain = gain * getattr(blocks, f"{part}_post_norm").gain(config.norm).astype(jnp.float32)
    bias = None if own.bias is None else own.bias[...]
    if not whole:
        some = np.array(layers)
        weight, bias, gain = weight[some], None if bias is None else bias[some], gain[some]
    return Written(weight, bias, gain, scale)


def pulled_back(
    own: Written, capture: AnyCapture, direction: Float[Array, "E"], position: int
) -> tuple[Float[Array, "L ..."], Float[Array, "L"]]:
    """What a unit of each input of a sublayer's projection, and what its bias, add along a direction at one position."""
    gains = own.gain * direction[None, :]
    if own.scale is not None:
        gains = gains * at_position(capture, own.scale, 1, position)[:, None]
    if own.bias is None:
        return _through(own.weight, gains), jnp.zeros(len(gains), jnp.float32)
    bias = jnp.einsum("le,le->l", own.bias.astype(jnp.float32), gains, precision=jax.lax.Precision.HIGHEST)
    return _through(own.weight, gains), bias


@jax.jit
def _through(weight: Float[Array, "L E ..."], gains: Float[Array, "L E"]) -> Float[Array, "L ..."]:
    # A layer at a time, so that no wide copy of the weight is held.
    def layer(row: tuple[Array, Array]) -> Array:
        weight, gain = row
        return jnp.tensordot(gain, weight.astype(jnp.float32), axes=1, precision=jax.lax.Precision.HIGHEST)

    return jax.lax.map(layer, (weight, gains))
