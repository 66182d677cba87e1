"""Entropy, norms and attention, and analyses as a whole: against loops, and what changes nothing."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oculi_jax import AttentionCapture, CaptureConfig, forward
from oculi_jax.analysis.attention import AttentionAnalysis
from oculi_jax.analysis.correlation import CorrelationAnalysis
from oculi_jax.analysis.effects import InterventionMetrics
from oculi_jax.analysis.entropy import EntropyAnalysis
from oculi_jax.analysis.norms import NormAnalysis
from oculi_jax.analysis.stratified import StratifiedView, find_extreme_heads
from oculi_jax.intervention import SpectraScaler
from oculi_jax.models.llama import LlamaAttentionAdapter

from ..margins import assert_leads
from ..tiny import prompt, tiny_llama
from ..tolerances import GRADIENT, MARGIN, ROUNDING, ROUTES
from .captures import LAYERS, PAD, TOKENS, N, assert_steps_are_clear, loops, made, near, other, uniform

# Name → analysis of one capture; those of [L, H or K, T] first, then those of [L, H].
BY_TOKEN = {
    "token_entropy": EntropyAnalysis.token_entropy,
    "effective_rank": EntropyAnalysis.effective_rank,
    "q_norms": NormAnalysis.q_norms,
    "k_norms": NormAnalysis.k_norms,
    "v_norms": NormAnalysis.v_norms,
    "q_norms_normalized": NormAnalysis.q_norms_normalized,
    "max_weight": AttentionAnalysis.max_weight,
    "effective_span": AttentionAnalysis.effective_span,
    "to_first": lambda c: AttentionAnalysis.attention_to_position(c, 0),
    "to_third_from_last": lambda c: AttentionAnalysis.attention_to_position(c, -3),
    "attention_entropy_ratio": AttentionAnalysis.attention_entropy_ratio,
}
BY_HEAD = {
    "mean_entropy": EntropyAnalysis.mean_entropy,
    "mean_entropy_less_2": lambda c: EntropyAnalysis.mean_entropy(c, ignore_first=2),
    "entropy_std": EntropyAnalysis.entropy_std,
    "norm_entropy": CorrelationAnalysis.norm_entropy_correlation,
    "norm_entropy_ranks": lambda c: CorrelationAnalysis.norm_entropy_correlation(c, "spearman", ignore_first=1),
    "delta_entropy": lambda c: EntropyAnalysis.delta_entropy(c, other(c)),
    "delta_entropy_final": lambda c: EntropyAnalysis.delta_entropy(c, other(c), method="final"),
    "effect_size_entropy": lambda c: InterventionMetrics.effect_size_entropy(c, other(c), ignore_first=1),
    "effect_size_paired": lambda c: InterventionMetrics.effect_size_entropy(c, other(c), paired=True),
    "mean_by_layer_head": lambda c: StratifiedView(c).mean_by_layer_head(c.queries.sum(-1)),
    "final_token": lambda c: StratifiedView(c).by_token(c.queries)[..., 0],
}
ALL = {**BY_TOKEN, **BY_HEAD}
OF_HEADS = list(BY_HEAD)[:5]  # those that look at one capture through the library alone


@jax.jit
def everything(capture: AttentionCapture) -> dict[str, jax.Array]:
    return {name: analysis(capture) for name, analysis in ALL.items()}


@pytest.mark.numerical
def test_analyses_are_their_definitions(plain: AttentionCapture) -> None:
    want = loops(plain)
    assert set(want) == {*BY_TOKEN, *OF_HEADS}
    found = everything(plain)
    for name, value in want.items():
        got = found[name]
        assert got.shape == value.shape, name
        near(got, value, ROUNDING, name)


def test_the_guides_own_mean_gives_numbers(plain: AttentionCapture) -> None:
    near(EntropyAnalysis.token_entropy(plain).mean(axis=-1), EntropyAnalysis.mean_entropy(plain))


# Closed forms.


@pytest.mark.parametrize("n", [1, 300])
def test_uniform_attention(n: int) -> None:
    capture, keys = uniform(n), np.arange(1, n + 1)
    near(EntropyAnalysis.token_entropy(capture)[0, 0], np.log(keys))
    # Its relative error is the entropy's absolute one.
    near(EntropyAnalysis.effective_rank(capture)[0, 0], keys, ROUNDING * max(1, np.log(n)))
    near(AttentionAnalysis.attention_entropy_ratio(capture)[0, 0], keys > 1)
    assert AttentionAnalysis.attention_entropy_ratio(capture).max() <= 1
    # 0.9 n in whole numbers: 9 of 10 keys are enough, however the sum rounds.
    np.testing.assert_array_equal(AttentionAnalysis.effective_span(capture)[0, 0], -(-9 * keys // 10))
    np.testing.assert_array_equal(AttentionAnalysis.effective_span(capture, 1.0)[0, 0], keys)
    assert AttentionAnalysis.effective_span(capture).dtype == jnp.int32


def test_attention_to_one_key_and_to_none() -> None:
    capture = made(np.eye(4)[None, None])
    for analysis in (EntropyAnalysis.token_entropy, AttentionAnalysis.attention_entropy_ratio):
        values = np.asarray(analysis(capture))
        assert not values.any() and not np.signbit(values).any()
    assert (EntropyAnalysis.effective_rank(capture) == 1).all() and (
        AttentionAnalysis.effective_span(capture) == 1
    ).all()
    nothing = made(np.zeros((1, 1, 4, 4)))
    for name in ("token_entropy", "effective_rank", "max_weight", "effective_span", "attention_entropy_ratio"):
        assert not np.asarray(BY_TOKEN[name](nothing)).any(), name


def test_weights_that_the_device_may_flush_to_zero_stay_finite() -> None:
    row = np.array([1.0, 1e-38, 1e-42, 0.0], np.float32)
    capture = made(np.tile(row, (1, 1, 4, 1)))
    assert np.abs(EntropyAnalysis.token_entropy(capture)).max() < 1e-30
    slope = jax.grad(lambda p: EntropyAnalysis.mean_entropy(dataclasses.replace(capture, patterns=p)).sum())
    assert np.isfinite(slope(capture.patterns)).all()


def test_nan_is_not_hidden() -> None:
    capture = made(np.full((1, 1, 2, 2), np.nan), queries=jnp.full((1, 1, 2, 2), jnp.nan))
    assert np.isnan(EntropyAnalysis.token_entropy(capture)).all() and np.isnan(NormAnalysis.q_norms(capture)).all()


# What changes nothing: padding, the layers captured, jit, vmap, the dtype's width.


@pytest.mark.numerical
def test_padding_on_either_side_changes_nothing(plain: AttentionCapture, padded: AttentionCapture) -> None:
    want, real = everything(plain), np.asarray(padded.mask)
    # Nor does what stands there: patterns are zero on padding, unless somebody made them otherwise.
    scribbled = dataclasses.replace(padded, patterns=jnp.where(real[None, None, :, None], padded.patterns, 0.1))
    for name, got in (*everything(padded).items(), *everything(scribbled).items()):
        got = np.asarray(got)
        assert np.isfinite(got).all(), name
        if name in BY_TOKEN:
            assert not got[..., ~real].any(), name
            got = got[..., real]
        near(got, want[name], ROUTES, name)


def test_a_subset_of_layers_has_the_rows_of_the_whole(tiny: LlamaAttentionAdapter, plain: AttentionCapture) -> None:
    some, whole = everything(tiny.capture(TOKENS, CaptureConfig(layers=LAYERS))), everything(plain)
    for name, got in some.items():
        near(got, whole[name][np.array(LAYERS)], ROUNDING, name)


@pytest.mark.numerical
def test_jit_and_vmap(tiny: LlamaAttentionAdapter) -> None:
    """Of a batch, one of its rows padded, each row is that prompt by itself; and compiled or not, it is the same."""
    mask = np.stack([np.ones(N, bool), np.arange(N) >= 2])
    batch = tiny.capture(np.stack([TOKENS, prompt(N)]), attention_mask=mask)
    got = jax.vmap(everything)(batch)
    for row in range(2):
        one = jax.tree.map(lambda x, row=row: x[row], batch)
        assert_steps_are_clear(one)
        for name, value in everything(one).items():
            near(got[name][row], value, ROUNDING, name)
            if row:
                near(value, ALL[name](one), ROUNDING, name)


def test_a_bfloat16_capture_is_read_in_float32(plain: AttentionCapture) -> None:
    def cast(capture: AttentionCapture, dtype: Any) -> AttentionCapture:
        return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, capture)

    narrow = cast(plain, jnp.bfloat16)
    assert_steps_are_clear(cast(narrow, jnp.float32), MARGIN)  # one capture on both sides: only ROUNDING
    wide = everything(cast(narrow, jnp.float32))
    for name in (*BY_TOKEN, *OF_HEADS):
        got = ALL[name](narrow)
        assert got.dtype == wide[name].dtype, name
        near(got, wide[name], ROUNDING, name)


# Gradients.


def test_the_gradient_through_a_run_is_the_central_difference() -> None:
    model, tokens = tiny_llama(), prompt(N)
    shell = LlamaAttentionAdapter(model).capture(tokens)

    def measure(alpha: Any) -> jax.Array:
        run = forward(
            model, tokens, SpectraScaler(layer=0, head=1, alpha=alpha), capture=("pattern", "q"), logits="none"
        )
        capture = dataclasses.replace(shell, patterns=run.activations["pattern"], queries=run.activations["q"])
        entropy = EntropyAnalysis.mean_entropy(capture)
        return jnp.stack([
            entropy[0, 1], entropy.sum(), EntropyAnalysis.entropy_std(capture).sum(), NormAnalysis.q_norms(capture)[2].sum(),
            CorrelationAnalysis.norm_entropy_correlation(capture)[0, 1],
            InterventionMetrics.effect_size_entropy(shell, capture)[0, 1],
        ])  # fmt: skip

    step = 1e-2
    slope = jax.jit(jax.jacfwd(measure))(jnp.float32(1.3))
    difference = (measure(1.3 + step) - measure(1.3 - step)) / (2 * step)
    assert slope[0] < 0  # a sharper head is more focused
    np.testing.assert_allclose(slope, difference, rtol=GRADIENT, atol=GRADIENT * float(jnp.abs(slope).max()))


def test_gradients_are_finite_where_entropies_norms_and_spreads_are_zero(padded: AttentionCapture) -> None:
    """Padding, zero vectors, and a layer whose heads attend to the first token alone, so that their entropies are all 0."""
    real = np.asarray(padded.mask)
    to_first = np.zeros((N + PAD, N + PAD), np.float32)
    to_first[real, real.argmax()] = 1
    first = jnp.cumsum(padded.mask) <= 1
    capture = dataclasses.replace(
        padded,
        patterns=padded.patterns.at[0].set(jnp.broadcast_to(to_first, padded.patterns[0].shape)),
        queries=jnp.where(first[None, None, :, None], 0.0, padded.queries),
    )
    fields = {name: getattr(capture, name) for name in ("queries", "keys", "values", "patterns")}
    for name, slope in _slopes(fields, capture, other(capture)).items():
        assert np.isfinite(slope).all() and np.any(slope), name


@jax.jit
@jax.grad
def _slopes(fields: dict[str, jax.Array], capture: AttentionCapture, flat: AttentionCapture) -> jax.Array:
    """The gradient of every analysis's sum."""
    now = dataclasses.replace(capture, **fields)
    values = [ALL[name](now) for name in (*BY_TOKEN, *OF_HEADS) if name != "effective_span"]
    values.append(EntropyAnalysis.delta_entropy(now, flat))
    values += [InterventionMetrics.effect_size_entropy(flat, now, paired) for paired in (False, True)]
    return sum(map(jnp.nansum, values), jnp.float32(0))  # a constant's correlation is NaN


# Entropy of two captures.


def test_delta_entropy_is_of_each_captures_own_tokens(tiny: LlamaAttentionAdapter, plain: AttentionCapture) -> None:
    short = tiny.capture(prompt(6, seed=2))
    h, g = (np.asarray(EntropyAnalysis.token_entropy(c), np.float64) for c in (plain, short))
    near(EntropyAnalysis.delta_entropy(plain, short), h.mean(-1) - g.mean(-1))
    near(EntropyAnalysis.delta_entropy(plain, short, "final"), h[..., -1] - g[..., -1])
    near(EntropyAnalysis.delta_entropy(plain, short, ignore_first=2), h[..., 2:].mean(-1) - g[..., 2:].mean(-1))


# Errors.


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda c: EntropyAnalysis.token_entropy(c.tokens), "takes an AttentionCapture"),
        (lambda c: EntropyAnalysis.token_entropy(dataclasses.replace(c, patterns=None)), "capture_patterns=True"),
        (lambda c: NormAnalysis.v_norms(dataclasses.replace(c, values=None)), "capture_values=True"),
        (lambda c: NormAnalysis.q_norms(jax.tree.map(lambda x: x[None], c)), "is a batch"),
        (lambda c: EntropyAnalysis.mean_entropy(c, ignore_first=N), "ignore_first is 11, and must be 0 to 10"),
        (lambda c: EntropyAnalysis.delta_entropy(c, c, "median"), "'mean' or 'final'"),
        (lambda c: EntropyAnalysis.delta_entropy(c, dataclasses.replace(c, captured_layers=(4, 1, 2))), "different layers"),
        (lambda c: AttentionAnalysis.effective_span(c, 90), "fraction"),
        (lambda c: AttentionAnalysis.attention_to_position(c, N), "0 to 10"),
        (lambda c: CorrelationAnalysis.pearson([1.0, 2.0], [1.0]), "must be the same"),
        (lambda c: CorrelationAnalysis.spearman_with_pvalue([1.0], [1.0]), "at least 2 samples"),
        (lambda c: CorrelationAnalysis.pearson([1.0, 2.0], [1.0, 2.0], axis=1), "axis is 1"),
        (lambda c: CorrelationAnalysis.norm_entropy_correlation(c, "kendall"), "'pearson' or 'spearman'"),
        (lambda c: CorrelationAnalysis.norm_entropy_correlation(c, ignore_first=N - 1), "at least 2 tokens"),
        (lambda c: StratifiedView(c).by_head(c.keys, 2), "0 to 1"),
        (lambda c: StratifiedView(c).by_token(c.keys[:, :, 1:]), "T = 11"),
        (lambda c: StratifiedView(c).mean_by_layer(c.patterns), "means are of"),
        (lambda c: find_extreme_heads(np.zeros((2, 3)), layers=(1,)), "names 1 layers"),
        (lambda c: find_extreme_heads(np.zeros(3)), "one number a head"),
        (lambda c: InterventionMetrics.delta_entropy_at_head(c, c, 0, 9), "0 to 3"),
        (lambda c: InterventionMetrics.effect_size(np.zeros((2, 3)), np.zeros((3, 3))), "but for the last axis"),
        (lambda c: InterventionMetrics.effect_size(np.zeros(3), np.zeros(4), paired=True), "must be the same, which"),
        (lambda c: InterventionMetrics.head_importance(c, c), "one number intact"),
        (lambda c: InterventionMetrics.accuracy_delta([], []), "at least one"),
        (lambda c: InterventionMetrics.best_alpha([1.0], [math.nan]), "no score"),
        (lambda c: InterventionMetrics.best_alpha([1.0], [1.0, 2.0]), "must be"),
    ],
)  # fmt: skip
def test_errors_are_sentences(plain: AttentionCapture, call: Any, says: str) -> None:
    with pytest.raises((ValueError, TypeError), match=says):
        call(plain)


@pytest.mark.torch
def test_entropy_is_torchs_entropy_of_hugging_faces_patterns(trained: LlamaAttentionAdapter, hf_trained: Any) -> None:
    import torch

    from ..prompts import FRANCE
    from ..reference import reference_sites

    ids = trained.tokenizer.encode(FRANCE)
    pattern = torch.tensor(reference_sites(hf_trained, ids)["pattern"]).double()
    entropy = torch.special.entr(pattern).sum(-1)
    got = EntropyAnalysis.token_entropy(trained.capture(FRANCE))
    near(got, entropy, ROUTES)
    assert_leads(-entropy.mean(-1).flatten(), 5)
    lowest = find_extreme_heads(got.mean(axis=-1), 5, largest=False)
    assert [x["layer"] * 6 + x["head"] for x in lowest] == entropy.mean(-1).flatten().argsort()[:5].tolist()
