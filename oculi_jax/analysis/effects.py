"""How large the effect of an intervention is: changes of entropy, standardised differences, accuracies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jaxtyping import Bool, Float

from .entropy import EntropyAnalysis, check_same_heads
from .inputs import check_head, check_same_prompt, row_of
from .statistics import centred, count, real_tokens

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from ..adapter.structures import AttentionCapture


class InterventionMetrics:
    """Effects of an intervention. The baseline always comes first; above 0 says that the intervention raised the value,
    except in `head_importance`, which is what removing a head costs.

    Examples:
        >>> InterventionMetrics.head_importance(3.0, [[1.0, 3.0]]).tolist()
        [[2.0, 0.0]]
    """

    @staticmethod
    def delta_entropy(baseline: AttentionCapture, intervened: AttentionCapture) -> Float[Array, "L H T"]:
        """Change of attention entropy at each token of one prompt.

        `EntropyAnalysis.delta_entropy(intervened, baseline)` is its mean over real tokens.

        Args:
            baseline: an `AttentionCapture` with patterns, without the intervention.
            intervened: the same prompt's, under the intervention.

        Returns:
            `[L, H, T]` in nats; 0 on padding.

        Raises:
            ValueError: the captures' layers or lengths differ.

        Examples:
            >>> with intervention.InterventionContext(adapter, QScaler(2, 0, 0.0)):
            ...     even = adapter.capture(text)
            >>> InterventionMetrics.delta_entropy(capture.attention, even).shape
            (4, 6, 6)
        """
        _check_same_prompt(baseline, intervened)
        return EntropyAnalysis.token_entropy(intervened) - EntropyAnalysis.token_entropy(baseline)

    @staticmethod
    def delta_entropy_at_head(
        baseline: AttentionCapture, intervened: AttentionCapture, layer: int, head: int
    ) -> Float[Array, "T"]:
        """`delta_entropy` of one head, `[T]` in nats; `layer` is the true number. ValueError for one that was not captured.

        Examples:
            >>> with intervention.InterventionContext(adapter, QScaler(2, 0, 0.0)):
            ...     even = adapter.capture(text)  # ln 6 at the last token, where nearly all was on one key
            >>> round(float(InterventionMetrics.delta_entropy_at_head(capture.attention, even, 2, 0)[-1]), 2)
            1.79
        """
        delta = InterventionMetrics.delta_entropy(baseline, intervened)
        return delta[row_of(baseline, layer), check_head(baseline, head)]

    @staticmethod
    def effect_size(baseline: ArrayLike, intervened: ArrayLike, paired: bool = False) -> Float[Array, "..."]:
        """Cohen's d (J. Cohen 1988, Statistical Power Analysis, 2nd ed., section 2.2), along the last axis.

            d  = (mean(y) − mean(x)) / √((Σ(x − x̄)² + Σ(y − ȳ)²) / (n + m − 2))
            dz = mean(y − x) / √(Σ(y − x − mean(y − x))² / (n − 1))      paired, section 2.3.5

        Args:
            baseline: x, samples `[..., N]`.
            intervened: y, samples `[..., M]`, with M = N where paired.
            paired: sample i of both is of one item (token, prompt), so that what varies between items drops out.

        Returns:
            `[...]`; NaN where nothing varies or there are too few samples.

        Raises:
            ValueError: shapes that do not fit.

        Examples:
            >>> round(float(InterventionMetrics.effect_size([1.0, 2.0, 3.0], [3.0, 4.0, 5.0])), 2)
            2.0
        """
        x, y = (jnp.asarray(side, jnp.float32) for side in (baseline, intervened))
        if x.ndim == 0 or (x.shape != y.shape if paired else x.shape[:-1] != y.shape[:-1] or y.ndim == 0):
            raise ValueError(
                f"baseline has shape {list(x.shape)} and intervened {list(y.shape)}; they must be the same"
                f"{'' if paired else ' but for the last axis'}, which has the samples."
            )
        return _cohen(x, y, jnp.ones(x.shape, bool), jnp.ones(y.shape, bool), paired)

    @staticmethod
    def effect_size_entropy(
        baseline: AttentionCapture, intervened: AttentionCapture, paired: bool = False, ignore_first: int = 0
    ) -> Float[Array, "L H"]:
        """Cohen's d of the real tokens' entropies, `[L, H]`: `effect_size` with tokens as samples.

        Unpaired, the captures may be of different prompts; paired, they are of one. Raises what `delta_entropy` does.

        Examples:
            >>> InterventionMetrics.effect_size_entropy(capture.attention, adapter.capture("The capital of France is")).shape
            (4, 6)
        """
        (_check_same_prompt if paired else check_same_heads)(baseline, intervened)
        x, y = EntropyAnalysis.token_entropy(baseline), EntropyAnalysis.token_entropy(intervened)
        x_real, y_real = real_tokens(baseline, ignore_first), real_tokens(intervened, ignore_first)
        return _cohen(x, y, jnp.broadcast_to(x_real, x.shape), jnp.broadcast_to(y_real, y.shape), paired)

    @staticmethod
    def head_importance(baseline: ArrayLike, ablated: ArrayLike) -> Float[Array, "L H"]:
        """What a metric loses with each head: baseline − ablated, as in Michel et al. (2019), arXiv:1905.10650.

        Args:
            baseline: the metric of the intact model, one number (or `[...]`, where `ablated` is `[L, H, ...]`).
            ablated: `[L, H]`, the metric with each head ablated, as a sweep over heads gives it.

        Returns:
            `[L, H]`, in the metric's units; above 0 where the head helps.

        Raises:
            TypeError: captures, which say how attention moved and not what it was good for. ValueError: shapes that do not fit.

        Examples:
            >>> InterventionMetrics.head_importance(0.75, [[0.5, 0.75], [1.0, 0.25]]).tolist()
            [[0.25, 0.0], [-0.25, 0.5]]
        """
        for side in (baseline, ablated):
            if hasattr(side, "captured_layers"):
                raise TypeError(
                    "head_importance takes values of a metric, one number intact and [L, H] ablated, and was given a "
                    f"{type(side).__name__}. For how attention itself moved there is delta_entropy."
                )
        x, y = (jnp.asarray(side, jnp.float32) for side in (baseline, ablated))
        if y.ndim < 2 or x.shape != y.shape[2:]:
            raise ValueError(
                f"baseline has shape {list(x.shape)} and ablated {list(y.shape)}; one number and [L, H] are needed."
            )
        return jnp.broadcast_to(x, y.shape) - y

    @staticmethod
    def accuracy_delta(baseline_correct: ArrayLike, intervened_correct: ArrayLike) -> dict[str, Array]:
        """The difference of two accuracies on the same items.

        Args:
            baseline_correct: bool or 0/1 `[..., N]`, whether each item was right without the intervention.
            intervened_correct: the same items with it.

        Returns:
            `baseline_acc`, `intervention_acc`, `delta` (the second minus the first) and its `standard_error`,
            √(b + c − (b − c)²/N) / N with b and c items gone wrong and come right (Agresti, Categorical Data Analysis,
            on the comparison of dependent proportions), each `[...]`.

        Raises:
            ValueError: different shapes, or no items.

        Examples:
            >>> float(InterventionMetrics.accuracy_delta([1, 1, 0, 1], [1, 0, 0, 1])["delta"])
            -0.25
        """
        x, y = (jnp.asarray(side, jnp.float32) for side in (baseline_correct, intervened_correct))
        if x.ndim == 0 or x.shape != y.shape or x.shape[-1] == 0:
            raise ValueError(
                f"baseline_correct has shape {list(x.shape)} and intervened_correct {list(y.shape)}; both must be "
                "[..., N] with the same items, at least one."
            )
        n = x.shape[-1]
        delta, off = centred(y - x, jnp.ones(x.shape, bool))
        error = jnp.sqrt(jnp.sum(off * off, axis=-1)) / n
        return {"baseline_acc": x.mean(-1), "intervention_acc": y.mean(-1), "delta": delta, "standard_error": error}

    @staticmethod
    def best_alpha(alphas: Sequence[float], scores: Sequence[float]) -> dict[str, float]:
        """The strength with the highest score. Host function; `best_index` is the array function beneath it.

        Args:
            alphas: strengths `[N]` that were tried.
            scores: `[N]`, the score of each; NaN for none.

        Returns:
            `{"alpha", "score"}`; of equal scores the one whose alpha is closest to 1, which changes least. Scores that only
            rounding sets apart are not equal, and another processor may choose another of them.

        Raises:
            ValueError: lengths that differ, or no score.

        Examples:
            >>> InterventionMetrics.best_alpha([0.5, 1.0, 1.5], [0.7, 0.9, 0.9])
            {'alpha': 1.0, 'score': 0.9}
        """
        if np.ndim(alphas) != 1 or np.shape(alphas) != np.shape(scores):
            raise ValueError(
                f"alphas has shape {list(np.shape(alphas))} and scores {list(np.shape(scores))}; both must be [N]."
            )
        if np.isnan(np.asarray(scores, float)).all():
            raise ValueError("There is no score to choose by: scores is empty or NaN throughout.")
        best = int(best_index(alphas, scores))
        return {"alpha": float(alphas[best]), "score": float(scores[best])}


def best_index(alphas: ArrayLike, scores: ArrayLike) -> Array:
    """Where along the last axis the highest score is; of equal ones where alpha `[N]` is closest to 1, then the first."""
    scores = jnp.asarray(scores, jnp.float32)
    alphas = jnp.broadcast_to(jnp.asarray(alphas, jnp.float32), scores.shape)
    scores = jnp.where(jnp.isnan(scores), -jnp.inf, scores)
    best = scores == jnp.max(scores, axis=-1, keepdims=True)
    return jnp.argmin(jnp.where(best, jnp.abs(alphas - 1.0), jnp.inf), axis=-1)


def _cohen(
    x: Float[Array, "... N"],
    y: Float[Array, "... M"],
    x_real: Bool[Array, "... N"],
    y_real: Bool[Array, "... M"],
    paired: bool,
) -> Float[Array, "..."]:
    if paired:
        real = x_real & y_real
        mean, off = centred(y - x, real)
        squares, freedom = jnp.sum(off * off, axis=-1), count(real) - 1
    else:
        (x_mean, x_off), (y_mean, y_off) = centred(x, x_real), centred(y, y_real)
        mean = y_mean - x_mean
        squares = jnp.sum(x_off * x_off, axis=-1) + jnp.sum(y_off * y_off, axis=-1)
        freedom = count(x_real) + count(y_real) - 2
    defined = (squares != 0) & (freedom > 0)
    deviation = jnp.sqrt(jnp.where(defined, squares, 1.0) / jnp.where(defined, freedom, 1.0))
    return jnp.where(defined, mean / deviation, jnp.nan)


def _check_same_prompt(baseline: AttentionCapture, intervened: AttentionCapture) -> None:
    check_same_heads(baseline, intervened)
    check_same_prompt(baseline, intervened)
    masks = baseline.mask, intervened.mask
    seen = not any(isinstance(mask, Tracer | None) for mask in masks)
    if baseline.n_tokens != intervened.n_tokens or (
        seen and not np.array_equal(np.asarray(masks[0]), np.asarray(masks[1]))
    ):
        raise ValueError(
            f"The captures have {baseline.n_tokens} and {intervened.n_tokens} tokens, or are padded differently; capture one "
            "prompt with and without the intervention."
        )
