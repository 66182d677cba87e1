"""Slices and means of heads by layer and depth, and the effects of interventions: against loops and closed forms."""

from __future__ import annotations

import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from oculi_jax import AttentionCapture, CaptureConfig
from oculi_jax.analysis.attention import AttentionAnalysis
from oculi_jax.analysis.effects import InterventionMetrics, best_index
from oculi_jax.analysis.entropy import EntropyAnalysis
from oculi_jax.analysis.stratified import StratifiedView, extreme_heads, find_extreme_heads
from oculi_jax.models.llama import LlamaAttentionAdapter

from ..tiny import prompt
from ..tolerances import ROUTES
from .captures import LAYERS, N, loops, made, near, other

# Strata.


def test_slices_name_true_layers(tiny: LlamaAttentionAdapter) -> None:
    some = tiny.capture(prompt(N), CaptureConfig(layers=LAYERS))
    view, values = StratifiedView(some), np.asarray(EntropyAnalysis.token_entropy(some))
    near(view.by_layer(values, 2), values[0], 0)
    near(view.by_head(values, 3), values[:, 3], 0)
    near(view.by_layer_head(values, 0, 1), values[1, 1], 0)
    near(view.by_layer(some.patterns, 0), some.patterns[1], 0)
    near(view.by_token(values), values[:, :, -1], 0)
    near(view.by_token(some.keys, 1), some.keys[:, :, 1], 0)
    with pytest.raises(ValueError, match="Layer 1 was not captured"):
        view.by_layer(values, 1)
    with pytest.raises(ValueError, match="at least 3"):
        view.early_layers(values)


def test_means_leave_padding_out(plain: AttentionCapture, padded: AttentionCapture) -> None:
    h = np.asarray(EntropyAnalysis.token_entropy(plain), np.float64)
    view, values = StratifiedView(padded), EntropyAnalysis.token_entropy(padded)
    near(view.mean_by_layer(values), h.mean((1, 2)))
    near(view.mean_by_head(values), h.mean((0, 2)))
    near(view.mean_by_layer_head(values), h.mean(2))
    near(view.mean_by_layer(EntropyAnalysis.mean_entropy(padded)), h.mean((1, 2)))
    near(view.mean_by_layer(AttentionAnalysis.effective_span(padded)), loops(plain)["effective_span"].mean((1, 2)))


def test_thirds_are_all_layers_by_depth() -> None:
    layers = (9, 0, 5, 3, 7, 1, 8)
    capture = made(np.tile(np.eye(2), (7, 1, 1, 1)), captured_layers=layers)
    view, values = StratifiedView(capture), np.array(layers, np.float32)[:, None]
    thirds = [np.ravel(part(values)).tolist() for part in (view.early_layers, view.middle_layers, view.late_layers)]
    assert thirds == [[0, 1, 3], [5, 7], [8, 9]]


def test_extreme_heads() -> None:
    values = np.array([[0.5, np.nan, -3.0], [2.0, 0.5, 1.0]])
    assert find_extreme_heads(values, 3, layers=(7, 4)) == [
        {"layer": 4, "head": 0, "value": 2.0},
        {"layer": 4, "head": 2, "value": 1.0},
        {"layer": 7, "head": 0, "value": 0.5},
    ]
    assert [(x["layer"], x["head"]) for x in find_extreme_heads(values, 99, largest=False)] == [
        (0, 2), (0, 0), (1, 1), (1, 2), (1, 0)
    ]  # fmt: skip
    batch = jnp.asarray(np.stack([values, -values]), jnp.float32)
    found, rows, heads = jax.jit(jax.vmap(lambda v: extreme_heads(v, 2)))(batch)
    assert found.tolist() == [[2, 1], [3, -0.5]] and rows.tolist() == [[1, 1], [0, 0]]
    assert heads.tolist() == [[0, 2], [2, 0]]


# Effects.


def test_the_change_of_entropy_and_its_mean(plain: AttentionCapture, padded: AttentionCapture) -> None:
    for capture in (plain, padded):
        flat = other(capture)
        delta = InterventionMetrics.delta_entropy(capture, flat)
        near(delta, loops_entropy(flat) - loops_entropy(capture))
        assert delta.sum() > 0  # a square root flattens
        near(InterventionMetrics.delta_entropy_at_head(capture, flat, 2, 1), delta[2, 1], 0)
        near(delta[..., np.asarray(capture.mask)].mean(-1), EntropyAnalysis.delta_entropy(flat, capture))


def loops_entropy(capture: AttentionCapture) -> np.ndarray:
    return np.array([[[scipy.stats.entropy(row) if row.any() else 0.0 for row in head] for head in layer]
                     for layer in np.asarray(capture.patterns, np.float64)])  # fmt: skip


def test_effect_sizes_are_cohens() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(10, 2, (2, 9)), rng.normal(11, 3, (2, 14))
    z = x + rng.normal(1, 0.5, x.shape)
    got, paired = InterventionMetrics.effect_size(x, y), InterventionMetrics.effect_size(x, z, paired=True)
    for i in range(2):
        pooled = (8 * statistics.variance(x[i]) + 13 * statistics.variance(y[i])) / 21
        near(got[i], (y[i].mean() - x[i].mean()) / math.sqrt(pooled))
        # Student's t of two samples is d √(nm / (n + m)), and of pairs dz √n.
        near(got[i] * math.sqrt(9 * 14 / 23), scipy.stats.ttest_ind(y[i], x[i]).statistic)
        near(paired[i] * 3, scipy.stats.ttest_rel(z[i], x[i]).statistic, ROUTES)
    assert got[0] > 0
    level = np.full(3, 0.1)
    assert np.isnan(InterventionMetrics.effect_size(level, level)) and np.isnan(
        InterventionMetrics.effect_size([1.0], [2.0])
    )
    assert np.isnan(InterventionMetrics.effect_size(level, level + 1, paired=True))


def test_effect_size_of_entropy_is_that_of_real_tokens(padded: AttentionCapture) -> None:
    flat, real = other(padded), np.asarray(padded.mask)
    x, y = (np.asarray(EntropyAnalysis.token_entropy(c))[..., real] for c in (padded, flat))
    for paired in (False, True):
        got = InterventionMetrics.effect_size_entropy(padded, flat, paired)
        near(got, InterventionMetrics.effect_size(x, y, paired))


def test_accuracy_delta() -> None:
    before, after = [1, 1, 1, 0, 0, 0, 0, 0, 1, 1], [True, True, False, True, True, True, False, False, True, True]
    got = InterventionMetrics.accuracy_delta(before, after)
    assert set(got) == {"baseline_acc", "intervention_acc", "delta", "standard_error"}
    near([got["baseline_acc"], got["intervention_acc"], got["delta"]], [0.5, 0.7, 0.2])
    near(got["standard_error"], math.sqrt(1 + 3 - (1 - 3) ** 2 / 10) / 10)


def test_the_best_alpha() -> None:
    alphas = [0.0, 0.5, 1.25, 2.0, 3.0]
    assert InterventionMetrics.best_alpha(alphas, [0.1, 0.8, 0.8, 0.8, 0.2]) == {"alpha": 1.25, "score": 0.8}
    assert InterventionMetrics.best_alpha(alphas, [0.1, math.nan, 0.3, math.nan, 0.9]) == {"alpha": 3.0, "score": 0.9}
    scores = jnp.asarray([[0, 1, 0, 0, 0], [0, 0, 0, 0, 1]], jnp.float32)
    assert jax.jit(best_index)(jnp.asarray(alphas), scores).tolist() == [1, 4]


def test_head_importance_is_what_is_lost() -> None:
    near(InterventionMetrics.head_importance(2.0, [[1.5, 2.0], [3.0, 0.0]]), [[0.5, 0.0], [-1.0, 2.0]])
