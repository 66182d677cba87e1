"""Lengths of queries, keys and values."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from .inputs import need
from .statistics import norm, real_tokens

if TYPE_CHECKING:
    from ..adapter.structures import AttentionCapture


class NormAnalysis:
    """L2 norms, ‖x‖ = √(Σ_d x_d²), in float32; 0 on padding.

    The rotary embedding rotates, so norms of queries and keys are the same before and after it.

    Raises:
        TypeError, ValueError: another capture, a batch (map over it with `jax.vmap`), or vectors not captured.

    Examples:
        >>> norms = NormAnalysis.q_norms(capture.attention)
        >>> np.allclose(norms, np.linalg.norm(capture.attention.queries, axis=-1), rtol=1e-4)
        True
    """

    @staticmethod
    def q_norms(capture: AttentionCapture) -> Float[Array, "L H T"]:
        """Norms of the queries, `[L, H, T]`.

        Examples:
            >>> NormAnalysis.q_norms(capture.attention).shape
            (4, 6, 6)
        """
        return _norms(capture, "queries")

    @staticmethod
    def k_norms(capture: AttentionCapture) -> Float[Array, "L K T"]:
        """Norms of the keys, `[L, K, T]`: one for each key/value head.

        Examples:
            >>> NormAnalysis.k_norms(capture.attention).shape
            (4, 2, 6)
        """
        return _norms(capture, "keys")

    @staticmethod
    def v_norms(capture: AttentionCapture) -> Float[Array, "L K T"]:
        """Norms of the values, `[L, K, T]`: one for each key/value head.

        Examples:
            >>> NormAnalysis.v_norms(capture.attention).shape
            (4, 2, 6)
        """
        return _norms(capture, "values")

    @staticmethod
    def q_norms_normalized(capture: AttentionCapture) -> Float[Array, "L H T"]:
        """‖q‖ / √D, the norm mean square of a query's entries, `[L, H, T]`: comparable between models whose D differs.

        Examples:
            >>> ratio = NormAnalysis.q_norms(capture.attention) / NormAnalysis.q_norms_normalized(capture.attention)
            >>> round(float(ratio[0, 0, 0] ** 2))  # D
            32
        """
        return NormAnalysis.q_norms(capture) * capture.head_dim**-0.5


def _norms(capture: AttentionCapture, field: str) -> Array:
    x = jnp.asarray(need(capture, "AttentionCapture", field), jnp.float32)
    return jnp.where(real_tokens(capture)[None, None, :], norm(x), 0.0)
