"""What queries and keys do to an attention pattern, exactly: where the softmax is saturated it has no gradient.

AtP*'s correction, Kramár et al. (2024), arXiv:2403.00745, section 3.1.1: only what comes after the pattern is a tangent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from ..models.decoder.attention import masked_softmax, scores_of

if TYPE_CHECKING:
    from ..models.decoder.config import DecoderConfig


def corrected(
    config: DecoderConfig,
    sites: dict[str, Array],
    slope: Float[Array, "L H T S"],
    differs: Bool[Array, "T"],
    base: int,
    names: tuple[str, ...],
) -> dict[str, Array]:
    """The values of `q` `[L, H, T]` and of `k` `[L, K, T]`, those of them that are named.

    Args:
        config: the model's.
        sites: `q`, `k` and `allowed` of the clean and the corrupted run, `[2, L, …]`.
        slope: of the metric, by the pattern.
        differs: at which tokens the two runs do.
        base: which of the runs has that slope, and is patched with the other.
        names: of sites.
    """
    sign = 1 if base else -1  # from the corrupted run to the clean one

    def of_layer(q: Array, k: Array, allowed: Array, slope: Array) -> dict[str, Array]:
        def scores(q: Array, k: Array) -> Array:
            return scores_of(q, k, config.attention_scale, config.score_cap)

        (q, other_q), (k, other_k), may = (q[base], q[1 - base]), (k[base], k[1 - base]), allowed[base]
        before = scores(q, k)
        queries = by_queries(before, scores(other_q, k), may, slope)
        keys = by_keys(before, scores(q, other_k), may, slope).reshape(len(k), -1, k.shape[1]).sum(1)
        return {"q": queries, "k": keys}

    found = jax.vmap(of_layer, (1, 1, 1, 0))(sites["q"], sites["k"], sites["allowed"], slope)
    return {name: jnp.where(differs, sign * x, 0.0) for name, x in found.items() if name in names}


def by_queries(
    scores: Float[Array, "H T S"],
    other: Float[Array, "H T S"],
    allowed: Bool[Array, "H T S"],
    slope: Float[Array, "H T S"],
) -> Float[Array, "H T"]:
    """Σ_s (p'_s − p_s) · ∂ metric / ∂ p_s of each query, p' of the other scores."""
    change = masked_softmax(other, allowed) - masked_softmax(scores, allowed)
    return jnp.sum(change * slope, axis=-1)


def by_keys(
    scores: Float[Array, "H T S"],
    other: Float[Array, "H T S"],
    allowed: Bool[Array, "H T S"],
    slope: Float[Array, "H T S"],
) -> Float[Array, "H S"]:
    """What each key does over all queries, when its own score alone is the other one.

    With δ = s'_j − s_j a key's share of a query goes from p_j to p'_j = p_j e^δ / (1 − p_j + p_j e^δ), and the other keys divide
    what is left as they did: (p'_j − p_j) (g_j − Σ_{i≠j} p_i g_i / (1 − p_j)), g the slope. p_j is a sigmoid of its log-odds,
    which have all their digits where it has none left.
    """
    pattern = masked_softmax(scores, allowed)
    largest = jax.nn.one_hot(jnp.argmax(pattern, axis=-1), scores.shape[-1], dtype=bool)
    # 1 − p_j has digits but where the key has most; there it is summed from the others.
    rest = masked_softmax(scores, allowed & ~largest)
    left = jnp.where(largest, 1, 1 - pattern)
    others = jnp.where(largest, _sum(rest * slope), (_sum(pattern * slope) - pattern * slope) / left)
    odds = scores - jnp.where(largest, _log_sum(scores, allowed & ~largest), _log_sum(scores, allowed) + jnp.log(left))
    step = jnp.where(allowed, other - scores, 0)
    moved = jax.nn.sigmoid(odds + step) - jax.nn.sigmoid(odds)
    return jnp.sum(jnp.where(allowed, moved * (slope - others), 0), axis=-2)


def _sum(x: Float[Array, "H T S"]) -> Float[Array, "H T 1"]:
    return jnp.sum(x, axis=-1, keepdims=True)


def _log_sum(scores: Float[Array, "H T S"], allowed: Bool[Array, "H T S"]) -> Float[Array, "H T 1"]:
    """log Σ e^s over what is allowed; −∞ over nothing."""
    top = jnp.max(jnp.where(allowed, scores, jnp.finfo(scores.dtype).min), axis=-1, keepdims=True)
    return top + jnp.log(_sum(jnp.where(allowed, jnp.exp(jnp.where(allowed, scores - top, 0)), 0)))
