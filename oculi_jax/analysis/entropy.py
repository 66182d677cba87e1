"""How diffuse attention is: Shannon entropy of patterns, and its statistics."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from .inputs import at_position, check_capture, need
from .statistics import centred, count, real_tokens, root

if TYPE_CHECKING:
    from ..adapter.structures import AttentionCapture


def check_same_heads(one: AttentionCapture, other: AttentionCapture) -> None:
    """Raises where two attention captures do not hold the same heads of the same layers in the same order."""
    for capture in (one, other):
        check_capture(capture, "AttentionCapture")
    if one.captured_layers != other.captured_layers:
        raise ValueError(
            f"The captures have different layers: {list(one.captured_layers)} and {list(other.captured_layers)}. "
            "Capture both with the same CaptureConfig(layers=…)."
        )
    if one.n_heads != other.n_heads:
        raise ValueError(f"The captures are of different models: {one.n_heads} and {other.n_heads} query heads.")


class EntropyAnalysis:
    """Shannon entropy of attention, H = −Σ_s p_s ln p_s (Shannon 1948), in nats.

    Low is focused, high is diffuse: 0 where one key has all the attention, ln n where n keys share it equally. The first
    token can attend only to itself, so its entropy is 0. Averages run over the real tokens; `ignore_first` leaves out that
    many of the first ones, and an average over none is NaN. All raise what `token_entropy` does.

    Examples:
        >>> EntropyAnalysis.token_entropy(capture.attention).shape
        (4, 6, 6)
    """

    @staticmethod
    def token_entropy(capture: AttentionCapture) -> Float[Array, "L H T"]:
        """Entropy of each token's attention.

        Args:
            capture: an `AttentionCapture` with patterns.

        Returns:
            `[L, H, T]` in nats, finite everywhere and 0 on padding. The gradient is finite too: a weight of 0 gets none.

        Raises:
            TypeError, ValueError: another capture, a batch (map over it with `jax.vmap`), or patterns not captured.

        Examples:
            >>> round(float(EntropyAnalysis.token_entropy(capture.attention)[2, 1, -1]), 2)
            1.09
        """
        p = jnp.asarray(need(capture, "AttentionCapture", "patterns"), jnp.float32)
        return _entropy(p, real_tokens(capture))

    @staticmethod
    def effective_rank(capture: AttentionCapture) -> Float[Array, "L H T"]:
        """The number of keys that, attended to equally, would give this entropy: exp(H), the pattern's perplexity.

        Args:
            capture: an `AttentionCapture` with patterns.

        Returns:
            `[L, H, T]`, from 1 to the number of keys; 0 on padding and where every key is knocked out.

        Examples:
            >>> round(float(EntropyAnalysis.effective_rank(capture.attention)[2, 1, -1]), 2)
            2.96
        """
        attends = jnp.any(jnp.asarray(need(capture, "AttentionCapture", "patterns")) != 0, axis=-1)
        attends = attends & real_tokens(capture)[None, None, :]
        return jnp.where(attends, jnp.exp(EntropyAnalysis.token_entropy(capture)), 0.0)

    @staticmethod
    def mean_entropy(capture: AttentionCapture, ignore_first: int = 0) -> Float[Array, "L H"]:
        """Mean entropy over the real tokens, `[L, H]` in nats.

        Examples:
            >>> round(float(EntropyAnalysis.mean_entropy(capture.attention)[0, 4]), 2)
            0.78
        """
        entropy = EntropyAnalysis.token_entropy(capture)
        return centred(entropy, real_tokens(capture, ignore_first))[0]

    @staticmethod
    def entropy_std(capture: AttentionCapture, ignore_first: int = 0) -> Float[Array, "L H"]:
        """Standard deviation of entropy over the real tokens (of a population: the divisor is their number), `[L, H]` in nats.

        Examples:
            >>> round(float(EntropyAnalysis.entropy_std(capture.attention)[2, 2]), 2)
            0.04
        """
        entropy = EntropyAnalysis.token_entropy(capture)
        real = real_tokens(capture, ignore_first)
        return root(jnp.sum(centred(entropy, real)[1] ** 2, axis=-1) / count(real))

    @staticmethod
    def delta_entropy(
        treatment: AttentionCapture, control: AttentionCapture, method: str = "mean", ignore_first: int = 0
    ) -> Float[Array, "L H"]:
        """How much more diffuse attention is on one prompt than on another: H(treatment) − H(control).

        Args:
            treatment: an `AttentionCapture` with patterns.
            control: another, of the same layers; its prompt may have another length.
            method: `"mean"`, over each capture's own real tokens, or `"final"`, at the last real token of each.
            ignore_first: how many of the first tokens a mean leaves out.

        Returns:
            `[L, H]` in nats.

        Raises:
            ValueError: different layers, or another method.

        Examples:
            >>> EntropyAnalysis.delta_entropy(adapter.capture("The capital of France is"), capture.attention).shape
            (4, 6)
        """
        if method not in ("mean", "final"):
            raise ValueError(f"method is {method!r}, and must be 'mean' or 'final'.")
        check_same_heads(treatment, control)

        def aggregate(capture: AttentionCapture) -> Array:
            if method == "mean":
                return EntropyAnalysis.mean_entropy(capture, ignore_first)
            return at_position(capture, EntropyAnalysis.token_entropy(capture), 2, -1)

        return aggregate(treatment) - aggregate(control)


@partial(jax.jit, inline=True)
def _entropy(p: Float[Array, "L H T S"], real: Bool[Array, "T"]) -> Float[Array, "L H T"]:
    # 1 stands in for 0, and for what the device may flush to 0: 1 ln 1 adds nothing and its gradient is finite.
    p = jnp.where(p < jnp.finfo(jnp.float32).tiny, 1.0, p)
    return jnp.where(real[None, None, :], jnp.sum(-p * jnp.log(p), axis=-1), 0.0)
