"""What single rows of attention patterns look like: their largest weight, how many keys hold them, where they point."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from .entropy import EntropyAnalysis
from .inputs import at_position, need
from .statistics import real_tokens

if TYPE_CHECKING:
    from ..adapter.structures import AttentionCapture

_ROUNDING = 1e-6  # of a float32 sum of weights: falling this much short of a threshold is reaching it


class AttentionAnalysis:
    """Properties of each token's attention, `[L, H, T]`; 0 on padding.

    Raises:
        TypeError, ValueError: another capture, a batch (map over it with `jax.vmap`), or patterns not captured.

    Examples:
        >>> int(AttentionAnalysis.effective_span(capture.attention)[2, 0, -1])  # one key: Italy
        1
    """

    @staticmethod
    def max_weight(capture: AttentionCapture) -> Float[Array, "L H T"]:
        """The largest weight that a token gives to any key, 0…1.

        Examples:
            >>> round(float(AttentionAnalysis.max_weight(capture.attention)[2, 4, -1]), 2)
            0.93
        """
        return jnp.max(_patterns(capture), axis=-1)

    @staticmethod
    def effective_span(capture: AttentionCapture, threshold: float = 0.9) -> Int[Array, "L H T"]:
        """The smallest number of keys, heaviest first, that hold `threshold` of a token's attention.

        Args:
            capture: an `AttentionCapture` with patterns.
            threshold: a fraction of the row's sum, above 0 and at most 1. A shortfall of 1e-6, which is rounding, counts
                as reaching it; where weights fall just that much short, another processor may find a key more or fewer.

        Returns:
            int32 `[L, H, T]`, from 1 to the number of keys; 0 on padding and where every key is knocked out.

        Raises:
            ValueError: a threshold that is no such fraction.

        Examples:
            >>> AttentionAnalysis.effective_span(capture.attention)[2, :, -1].tolist()  # of the last token, by head
            [1, 3, 1, 1, 1, 1]
        """
        if not isinstance(threshold, jax.Array) and not 0 < threshold <= 1:
            raise ValueError(f"threshold is {threshold!r}, and must be a fraction above 0 and at most 1, such as 0.9.")
        return _span(_patterns(capture), jnp.asarray(threshold, jnp.float32))

    @staticmethod
    def attention_to_position(capture: AttentionCapture, position: int) -> Float[Array, "L H T"]:
        """The weight that each token gives to one key, such as the first (`0`).

        Args:
            capture: an `AttentionCapture` with patterns.
            position: the key, counting real tokens; negative from the last.

        Returns:
            `[L, H, T]`; 0 for tokens before that key.

        Raises:
            ValueError: the prompt is shorter. Where only the device can know, NaN.

        Examples:
            >>> round(float(AttentionAnalysis.attention_to_position(capture.attention, 0)[2, 4, -1]), 2)
            0.93
        """
        return at_position(capture, _patterns(capture), 3, position)

    @staticmethod
    def attention_entropy_ratio(capture: AttentionCapture) -> Float[Array, "L H T"]:
        """Entropy over the largest that it could be: H / ln n, where n real tokens stand at or before the token, or in its window.

        Returns:
            `[L, H, T]`, from 0 (one key) to 1 (all keys equally); 0 at the first token, which has one key only, and on
            padding.

        Examples:
            >>> round(float(AttentionAnalysis.attention_entropy_ratio(capture.attention)[2, 1, -1]), 2)
            0.61
        """
        entropy = EntropyAnalysis.token_entropy(capture)
        n_keys = jnp.cumsum(real_tokens(capture))[None, :]
        if capture.windows:
            sizes = [n_keys if window is None else jnp.minimum(n_keys, window) for window in capture.windows]
            n_keys = jnp.concatenate(sizes)
        n_keys = n_keys[:, None, :].astype(jnp.float32)
        ratio = entropy / jnp.log(jnp.maximum(n_keys, 2.0))
        return jnp.where(n_keys > 1, jnp.minimum(ratio, 1.0), 0.0)


def _patterns(capture: AttentionCapture) -> Array:
    patterns = jnp.asarray(need(capture, "AttentionCapture", "patterns"), jnp.float32)
    return jnp.where(real_tokens(capture)[None, None, :, None], patterns, 0.0)


@partial(jax.jit, inline=True)
def _span(patterns: Float[Array, "L H T S"], threshold: Float[Array, ""]) -> Int[Array, "L H T"]:
    held = jnp.cumsum(jnp.sort(patterns, axis=-1, descending=True), axis=-1)
    total = held[..., -1:]
    short = held < total * (threshold - _ROUNDING)
    return jnp.where(total[..., 0] > 0, jnp.sum(short, axis=-1) + 1, 0).astype(jnp.int32)
