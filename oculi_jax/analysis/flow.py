"""Where information can flow through attention: rollout, maximum flow, and attention weighted by what is moved."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from ..arrays import integer
from .inputs import need
from .residual import Written, written
from .result import Result
from .statistics import norm, real_tokens

if TYPE_CHECKING:
    from ..adapter.structures import AttentionCapture
    from ..models.decoder.model import Decoder

# Capacities are integers to scipy: a whole row is this much, half of what an int32 holds.
_UNIT = 2**30


def attention_rollout(attention: AttentionCapture, residual_weight: float = 0.5) -> Result:
    """How much of each input token is mixed into each position, were attention all that mixes them.

    `R_l = A_l R_(l−1)`, where `A_l` is the mean pattern over heads with the identity mixed in for the residual stream,
    `w I + (1 − w) mean_h pattern`, its rows normalised. Abnar and Zuidema (2020), arXiv:2005.00928, section 3. MLPs, norms
    and the size of what heads move are left out: a picture of connectivity, not of effect.

    Args:
        attention: patterns of consecutive layers.
        residual_weight: w, from 0 to 1; the paper's is a half.

    Returns:
        `.values` `[L, T, S]`: after each layer, the shares of position s (at the input of the first captured layer) in
        position t. Rows of real tokens sum to 1, those of padding are zero.

    Raises:
        ValueError: layers that do not follow one another, or a weight beyond 0…1.

    Examples:
        >>> round(float(AttributionMethods.attention_rollout(capture.attention).values[-1, -1, 0]), 2)
        0.53
    """
    patterns = _consecutive(attention)
    if not isinstance(residual_weight, jax.Array) and not 0 <= residual_weight <= 1:
        raise ValueError(f"residual_weight is {residual_weight!r}, and must be from 0 to 1.")
    values = _rollout(patterns, real_tokens(attention), jnp.asarray(residual_weight, jnp.float32))
    return Result(values, "attention_rollout", layers=attention.captured_layers)


def attention_flow(attention: AttentionCapture, position: int = -1) -> Result:
    """The most that could flow from each input token to one position of the output. Host function; needs scipy.

    Layers of tokens are a network of pipes; from s to t at layer l passes at most `A_l[t, s]`, the matrix of
    `attention_rollout` with a weight of a half, and a token passes on no more than it receives. For each input token the
    maximum flow to the output position is found on its own, so that the values need not sum to 1. Abnar and Zuidema
    (2020), arXiv:2005.00928, section 3. Solved exactly, on capacities rounded to 2⁻³⁰.

    Args:
        attention: patterns of consecutive layers.
        position: of the output, among the real tokens, negative from the last.

    Returns:
        `.values` NumPy float32 `[T]`, each from 0 to 1, zero at padding; inputs are those of the first captured layer.

    Raises:
        ValueError, TypeError: layers that do not follow one another, or a position beyond the prompt.

    Examples:
        >>> round(float(AttributionMethods.attention_flow(capture.attention).values[4]), 2)  # from Italy
        0.53
    """
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import maximum_flow

    patterns = _consecutive(attention)
    real = np.asarray(real_tokens(attention))
    n_real = int(real.sum())
    position = integer(position, "position")
    if not -n_real <= position < n_real:
        raise ValueError(
            f"position is {position}, but the prompt has {n_real} tokens: positions are 0 to {n_real - 1}, or −1 to "
            f"−{n_real} from the end."
        )
    mixed = np.asarray(_mixed(patterns, jnp.float32(0.5)), np.float64)[:, real][:, :, real]
    capacity = np.rint(mixed * _UNIT).astype(np.int32)
    layer, query, key = np.nonzero(capacity)
    n_nodes = (mixed.shape[0] + 1) * n_real
    # Node l·T + t is token t before layer l. Pipes lead backwards, from the output to the inputs.
    edges = (capacity[layer, query, key], ((layer + 1) * n_real + query, layer * n_real + key))
    network = csr_matrix(edges, shape=(n_nodes, n_nodes))
    output = n_nodes - n_real + position % n_real
    values = np.zeros(real.shape, np.float32)
    values[real] = [maximum_flow(network, output, token).flow_value / _UNIT for token in range(n_real)]
    return Result(values, "attention_flow")


def value_weighted_attention(attention: AttentionCapture, model: Decoder | None = None) -> Result:
    """Attention weighted by the length of what it moves: `pattern[t, s] · ‖v_s W_O,h‖`.

    The length of head h's message from s to t, Kobayashi et al. (2020), arXiv:2004.10102: a head may look hard at a token
    and take nothing from it. Where the family normalises what attention adds, messages are as long as they are after that norm,
    its scale at t taken as it was.

    Args:
        attention: with patterns and values.
        model: the model that was captured; where None, the plain `‖v_s‖` stands for the message.

    Returns:
        `.values` `[L, H, T, S]`, in units of the residual stream (of values, without a model); zero on padding.

    Raises:
        ValueError, TypeError: patterns or values were not captured, or not from this model.

    Examples:
        >>> int(AttributionMethods.value_weighted_attention(capture.attention, model).values[2, 0, -1].argmax())
        4
    """
    patterns, values = need(attention, "AttentionCapture", "patterns", "values")
    own = None
    if model is not None:
        own = written(attention, model, "attn.o", attention.n_heads, attention.head_dim)
    return Result(_weighted(patterns, values, own), "value_weighted_attention", layers=attention.captured_layers)


def _consecutive(attention: Any) -> Float[Array, "L H T S"]:
    patterns = need(attention, "AttentionCapture", "patterns")
    layers = attention.captured_layers
    if layers != tuple(range(layers[0], layers[0] + len(layers))):
        raise ValueError(
            f"Flow passes through every layer in turn, and this capture has layers {', '.join(map(str, layers))}: capture "
            "with CaptureConfig(layers=None), or a range of layers in ascending order."
        )
    return patterns


@jax.jit
def _mixed(patterns: Float[Array, "L H T S"], residual_weight: Float[Array, ""]) -> Float[Array, "L T S"]:
    """`w I + (1 − w) mean_h pattern`, rows normalised; a row with nothing in it stays zero."""
    identity = jnp.eye(patterns.shape[-1], dtype=jnp.float32)
    mixed = residual_weight * identity[None] + (1.0 - residual_weight) * patterns.astype(jnp.float32).mean(axis=1)
    total = mixed.sum(axis=-1, keepdims=True)
    return mixed / jnp.where(total == 0.0, 1.0, total)


@jax.jit
def _rollout(patterns: Array, real: Array, residual_weight: Array) -> Float[Array, "L T S"]:
    def layer(rolled: Array, mixed: Array) -> tuple[Array, Array]:
        rolled = jnp.matmul(mixed, rolled, precision=jax.lax.Precision.HIGHEST)
        return rolled, rolled

    start = jnp.diag(real.astype(jnp.float32))  # nothing comes in at padding, so nothing is ever there
    return jax.lax.scan(layer, start, _mixed(patterns, residual_weight))[1]


@jax.jit
def _weighted(
    patterns: Float[Array, "L H T S"], values: Float[Array, "L K S D"], own: Written | None
) -> Float[Array, "L H T S"]:
    n_layers, n_heads = patterns.shape[:2]
    group = n_heads // values.shape[1]
    values = values.astype(jnp.float32)
    if own is None:
        # The norms are repeated for the heads of a group, not the values.
        norms = jnp.repeat(norm(values), group, axis=1)
    else:

        def message_norms(index: Array) -> Float[Array, "S"]:
            layer, head = index // n_heads, index % n_heads
            through = own.weight[layer, :, head].astype(jnp.float32) * own.gain[layer][:, None]
            value = values[layer, head // group]
            return norm(jnp.einsum("sd,ed->se", value, through, precision=jax.lax.Precision.HIGHEST))

        # A head at a time: the messages of all would be [L, H, S, E].
        norms = jax.lax.map(message_norms, jnp.arange(n_layers * n_heads)).reshape(n_layers, n_heads, -1)
    patterns = patterns.astype(jnp.float32)
    if own is not None and own.scale is not None:
        patterns = patterns * own.scale[:, None, :, None]
    return patterns * norms[:, :, None, :]
