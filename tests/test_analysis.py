"""Entropy, norms, attention, correlation, strata and effects: against loops, scipy and closed forms, and what changes nothing."""

from __future__ import annotations

import dataclasses
import math
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from oculi_jax import AttentionCapture, CaptureConfig, forward
from oculi_jax.analysis.attention import AttentionAnalysis
from oculi_jax.analysis.correlation import CorrelationAnalysis
from oculi_jax.analysis.effects import InterventionMetrics, best_index
from oculi_jax.analysis.entropy import EntropyAnalysis
from oculi_jax.analysis.norms import NormAnalysis
from oculi_jax.analysis.stratified import StratifiedView, extreme_heads, find_extreme_heads
from oculi_jax.intervention import SpectraScaler
from oculi_jax.models.llama import LlamaAttentionAdapter

from .margins import assert_apart, assert_clear, assert_leads
from .tiny import prompt, tiny_llama
from .tolerances import GRADIENT, MARGIN, ROUNDING, ROUTES

N, PAD = 11, 3
TOKENS = prompt(N, seed=53)  # without ties: no id repeats, and steps are clear (below)
LAYERS = [2, 0]

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


def other(capture: AttentionCapture) -> AttentionCapture:
    """Another capture of the same shape: flatter patterns over the same keys."""
    flat = jnp.sqrt(capture.patterns)
    total = flat.sum(-1, keepdims=True)
    return dataclasses.replace(capture, patterns=flat / jnp.where(total == 0, 1.0, total))


@jax.jit
def everything(capture: AttentionCapture) -> dict[str, jax.Array]:
    return {name: analysis(capture) for name, analysis in ALL.items()}


def near(a: Any, b: Any, tolerance: float = ROUNDING, name: str = "") -> None:
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=tolerance, rtol=tolerance, err_msg=name)


def assert_steps_are_clear(capture: AttentionCapture, of_norms: float = 2 * MARGIN) -> None:
    """Of `ALL` two are steps: ranks of norms and of entropies after the first token, and effective spans.

    `near` at ROUTES lets norms, which go up to 7, be 8e-4 apart, and the others less than half of that.
    """
    real = np.asarray(capture.mask)
    norms, entropy = NormAnalysis.q_norms(capture), EntropyAnalysis.token_entropy(capture)
    assert_apart(np.asarray(norms)[..., real][..., 1:], of_norms)
    assert_apart(np.asarray(entropy)[..., real][..., 1:])
    weights = -np.sort(-np.asarray(capture.patterns, np.float64)[:, :, real], axis=-1)
    assert_clear(np.cumsum(weights, axis=-1) / weights.sum(-1, keepdims=True), 0.9)


@pytest.fixture(scope="module")
def tiny() -> LlamaAttentionAdapter:
    return LlamaAttentionAdapter(tiny_llama())


@pytest.fixture(scope="module")
def plain(tiny: LlamaAttentionAdapter) -> AttentionCapture:
    capture = tiny.capture(TOKENS)
    assert_steps_are_clear(capture)
    return capture


@pytest.fixture(scope="module", params=["left", "right"])
def padded(tiny: LlamaAttentionAdapter, request: pytest.FixtureRequest) -> AttentionCapture:
    real = np.arange(N + PAD) >= PAD if request.param == "left" else np.arange(N + PAD) < N
    ids = np.full(N + PAD, 5, np.int32)
    ids[real] = TOKENS
    capture = tiny.capture(ids, attention_mask=real)
    assert_steps_are_clear(capture)
    return capture


def made(patterns: Any, **fields: Any) -> AttentionCapture:
    """A capture of given patterns `[L, H, T, S]`, in which every token is real."""
    patterns = jnp.asarray(patterns, jnp.float32)
    n_layers, n_heads, n_tokens, _ = patterns.shape
    given = dict(tokens=jnp.arange(n_tokens), mask=jnp.ones(n_tokens, bool), captured_layers=tuple(range(n_layers)),
                 n_heads=n_heads, n_kv_heads=n_heads, head_dim=2, patterns=patterns)  # fmt: skip
    return AttentionCapture(**{**given, **fields})


def uniform(n_tokens: int) -> AttentionCapture:
    return made((np.tril(np.ones((n_tokens, n_tokens))) / np.arange(1, n_tokens + 1)[:, None])[None, None])


# Definitions, written out.


def loops(capture: AttentionCapture) -> dict[str, np.ndarray]:
    """Every analysis of one unpadded capture, one number at a time, in float64."""
    p = np.asarray(capture.patterns, np.float64)
    n_layers, n_heads, n_tokens, _ = p.shape
    names = ("token_entropy", "effective_rank", "q_norms", "q_norms_normalized", "max_weight", "effective_span", "to_first",
             "to_third_from_last", "attention_entropy_ratio")  # fmt: skip
    out = {name: np.zeros((n_layers, n_heads, n_tokens)) for name in names}
    for i in np.ndindex(n_layers, n_heads, n_tokens):
        row, t = list(p[i]), i[2]
        h = sum(-w * math.log(w) for w in row if w > 0)
        out["token_entropy"][i] = h
        out["effective_rank"][i] = math.exp(h)
        q = [float(x) for x in capture.queries[i]]
        out["q_norms"][i] = math.hypot(*q)
        out["q_norms_normalized"][i] = math.sqrt(statistics.mean(x * x for x in q))
        out["max_weight"][i] = max(row)
        out["effective_span"][i] = next(
            k for k in range(1, n_tokens + 1) if sum(sorted(row, reverse=True)[:k]) >= 0.9 * sum(row)
        )
        out["to_first"][i], out["to_third_from_last"][i] = row[0], row[n_tokens - 3]
        out["attention_entropy_ratio"][i] = h / math.log(t + 1) if t else 0.0
    for name, field in (("k_norms", capture.keys), ("v_norms", capture.values)):
        out[name] = np.array([[[math.hypot(*map(float, x)) for x in head] for head in layer] for layer in field])
    heads = list(np.ndindex(n_layers, n_heads))

    def each(f: Any) -> np.ndarray:
        return np.array([f(i) for i in heads]).reshape(n_layers, n_heads)

    h, q = out["token_entropy"], out["q_norms"]
    out["mean_entropy"] = each(lambda i: statistics.mean(h[i]))
    out["mean_entropy_less_2"] = each(lambda i: statistics.mean(h[i][2:]))
    out["entropy_std"] = each(lambda i: statistics.pstdev(h[i]))
    out["norm_entropy"] = each(lambda i: scipy.stats.pearsonr(q[i], h[i]).statistic)
    out["norm_entropy_ranks"] = each(lambda i: scipy.stats.spearmanr(q[i][1:], h[i][1:]).statistic)
    return out


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
    near(EntropyAnalysis.effective_rank(capture)[0, 0], keys, ROUNDING)
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


# Correlation.


@pytest.mark.numerical
@pytest.mark.parametrize(
    "kind, axis", [("normal", 0), ("normal", 1), ("ties", -1), ("offset", -1), ("tiny", -1), ("two", -1)]
)
def test_correlations_are_scipys(kind: str, axis: int) -> None:
    rng = np.random.default_rng(3)
    shape = np.array([3, 4, 5])
    shape[axis] = 2 if kind == "two" else 23
    x = np.round(rng.normal(size=shape), 3)
    y = np.round(x + rng.normal(size=shape), 3)
    if kind == "ties":
        x, y = np.round(x), np.round(y)
    if kind == "offset":
        x = (np.round(x, 1) + 1000.0).astype(np.float32)
    if kind == "tiny":
        x, y = (x * 1e-30).astype(np.float32), y * 1e-25
    lines = zip(*(np.moveaxis(side, axis, -1).reshape(-1, shape[axis]) for side in (x, y)), strict=True)
    lines = [line for line in lines if np.ptp(line[0]) > 0 and np.ptp(line[1]) > 0]
    assert len(lines) == x.size // shape[axis]
    for side in (x, y):  # scipy's ties are equal values; here what is not equal is apart by far more than rounding
        gaps = np.diff(np.sort(np.float64(side), axis), axis=axis) / np.abs(side).max()
        assert gaps[gaps > 0].min() > 5e-5
    pearson = [scipy.stats.pearsonr(a, b) for a, b in lines]
    spearman = [scipy.stats.spearmanr(a, b) for a, b in lines]
    for found, array, host in (
        (pearson, CorrelationAnalysis.pearson, CorrelationAnalysis.pearson_with_pvalue),
        (spearman, CorrelationAnalysis.spearman, CorrelationAnalysis.spearman_with_pvalue),
    ):
        r = np.array([one.statistic for one in found])
        p = np.array([one.pvalue for one in found])
        near(np.ravel(jax.jit(array, static_argnums=2)(x.astype(np.float32), y.astype(np.float32), axis)), r)
        got_r, got_p = host(x, y, axis)
        assert got_r.shape == tuple(np.delete(shape, axis)) and got_r.dtype == got_p.dtype == np.float64
        np.testing.assert_allclose(got_r.ravel(), r, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(got_p.ravel(), p, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["pearson", "spearman"])
def test_correlation_with_a_constant_is_undefined(name: str) -> None:
    x, level = np.arange(7.0), np.full(7, 0.1)  # whose mean does not round to 0.1
    array, host = (getattr(CorrelationAnalysis, name + suffix) for suffix in ("", "_with_pvalue"))
    for a, b in ((x, level), (level, x), (level, level), (np.where(x == 3, np.nan, x), x)):
        assert np.isnan(array(a, b))
    r, p = host(x, level)
    assert np.isnan(r) and np.isnan(p)
    both = array(np.stack([x, level]), np.stack([2 * x, x]))
    near(both, [1, np.nan])
    slope = jax.grad(lambda x: jnp.nansum(array(x, jnp.asarray(np.stack([x0**2, x0]), jnp.float32))))
    x0 = np.arange(7.0)
    assert np.isfinite(slope(jnp.asarray(np.stack([x, level]), jnp.float32))).all()


@pytest.mark.parametrize("method", ["pearson", "spearman"])
def test_norm_entropy_correlation_is_of_real_tokens(padded: AttentionCapture, method: str) -> None:
    real = np.flatnonzero(np.asarray(padded.mask))[1:]
    norms, entropy = np.asarray(NormAnalysis.q_norms(padded)), np.asarray(EntropyAnalysis.token_entropy(padded))
    got = CorrelationAnalysis.norm_entropy_correlation(padded, method, ignore_first=1)
    r, p = CorrelationAnalysis.norm_entropy_correlation_with_pvalue(padded, method, ignore_first=1)
    test = scipy.stats.pearsonr if method == "pearson" else scipy.stats.spearmanr  # no ties: `padded` is clear
    for i in np.ndindex(got.shape):
        want = test(norms[i][real].astype(np.float64), entropy[i][real].astype(np.float64))
        near([got[i], r[i], p[i]], [want.statistic, want.statistic, want.pvalue])


@pytest.mark.parametrize("spearman", [
    CorrelationAnalysis.spearman,
    jax.jit(CorrelationAnalysis.spearman),
    lambda x, y: CorrelationAnalysis.spearman_with_pvalue(x, y)[0],
], ids=["plain", "jit", "host"])  # fmt: skip
def test_values_that_rounding_sets_apart_are_ties(spearman: Any) -> None:
    x, y = np.array([2, 2, -1, -1, 5, 1e-20], np.float32), np.array([3, 1, 4, -1.5, 9, 2.6], np.float32)
    x[[1, 3]] = np.nextafter(x[[1, 3]], np.float32(9))
    assert len(np.unique(x)) == 6
    level = [4.5, 4.5, 1.5, 1.5, 6, 3]  # by hand: 2, 2 and −1, −1
    want = scipy.stats.spearmanr(level, y).statistic
    for a, b in ((x, y), (-x, -y), (1e-25 * x, 1e-25 * y), (1e30 * x, y)):
        near(spearman(a.astype(np.float32), b.astype(np.float32)), want)
    near(spearman(-x, y), -want)
    # 8 roundings are level and more are not, however many levels that makes: 0 = 8, 8 = 16, and 0 below 16.
    for steps, level in (([0, 8], [1.5, 1.5]), ([0, 9], [1, 2]), ([0, 8, 16], [1.5, 2, 2.5])):
        x = np.append(1 + np.array(steps) * np.finfo(np.float32).eps, 3).astype(np.float32)
        level = [*level, len(x)]
        near(spearman(x, y[: len(x)]), np.corrcoef(level, scipy.stats.rankdata(y[: len(x)]))[0, 1])
    assert np.isnan(spearman(np.float32(1) + np.arange(6, dtype=np.float32) * np.float32(2**-23), y))


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, bool, jnp.bfloat16, np.float32])
def test_values_that_a_type_tells_apart_keep_their_ranks(dtype: Any) -> None:
    """Integers are exact, and neighbours in narrow floats are far apart; infinities are the largest of all."""
    rng = np.random.default_rng(0)
    values = {
        np.int32: 2**23 + np.arange(30), np.uint8: np.arange(30), bool: np.arange(30) < 12,
        jnp.bfloat16: 1 + np.arange(30) / 128,
        np.float32: np.append(10.0 ** np.arange(-10, 18), [np.inf, -np.inf]),
    }[dtype]  # fmt: skip
    x, y = rng.permutation(values).astype(dtype), rng.normal(size=30).astype(np.float32)
    want = scipy.stats.spearmanr(x.astype(np.float64), y)
    near(CorrelationAnalysis.spearman(x, y), want.statistic)
    near(jax.jit(CorrelationAnalysis.spearman)(x, y), want.statistic)
    near(CorrelationAnalysis.spearman_with_pvalue(x, y), want)
    near(CorrelationAnalysis.spearman_with_pvalue(y, x), want)


def test_on_the_host_float64_is_judged_at_its_own_rounding() -> None:
    x, y = 1 + 1e-12 * np.array([3.0, 1, 4, 2, 5]), np.array([1.0, 2, 4, 3, 5])
    near(CorrelationAnalysis.spearman_with_pvalue(x, y), scipy.stats.spearmanr(x, y))
    x[1:3] = 1, np.nextafter(1, 2)
    near(CorrelationAnalysis.spearman_with_pvalue(x, y)[0], scipy.stats.spearmanr([4, 1, 1, 3, 5], y).statistic)
    assert np.isnan(CorrelationAnalysis.spearman(x, y))  # which reads both in float32
    near(CorrelationAnalysis.spearman([2**30, 2**40, 1], [1.0, 2, 0]), 1)


@pytest.mark.numerical
def test_ranks_do_not_hang_on_rounding() -> None:
    """Ties of several computations of a few numbers: the three functions agree, and ranks sum as without ties."""
    rng = np.random.default_rng(0)
    x, y = rng.choice([-3, -0.7, 0.1, 1, 2.5], (40, 20)), rng.choice([0.3, 1, 4, 8], (40, 20))
    want = [scipy.stats.spearmanr(*row) for row in zip(x, y, strict=True)]
    noise = rng.integers(-3, 4, (2, 40, 20)) * 2.0**-23
    x, y = (x * (1 + noise[0])).astype(np.float32), (y * (1 + noise[1])).astype(np.float32)
    statistic = [one.statistic for one in want]
    near(CorrelationAnalysis.spearman(x, y), statistic)
    near(jax.jit(CorrelationAnalysis.spearman)(x, y), statistic)
    near(CorrelationAnalysis.spearman_with_pvalue(x, y), [statistic, [one.pvalue for one in want]])


def test_tokens_of_one_norm_and_rows_of_no_entropy_are_ties() -> None:
    """One id again has one norm in layer 0 but for the rotation's rounding; nor is an entropy of 1e-7 one."""
    q = np.array([[2, 1], [3, 0], [1, 2], [0, 1], [1.2, 1.6]])
    turns = np.arange(5) / 3
    cos, sin = np.cos(turns), np.sin(turns)
    q = np.stack([q[:, 0] * cos - q[:, 1] * sin, q[:, 0] * sin + q[:, 1] * cos], axis=-1)
    focused = np.eye(5) + 2e-9 * np.tril(np.ones((5, 5)), -1)
    some = np.eye(5) * 0.5 + 0.5 * np.eye(5)[[0, 0, 1, 1, 2]]
    spread = np.tril(np.ones((5, 5))) / np.arange(1, 6)[:, None]
    spread[3:] = spread[2]
    capture = made(np.stack([focused, some, spread])[None], queries=jnp.asarray(np.tile(q, (1, 3, 1, 1)), jnp.float32))
    norms = [4, 5, 4, 1, 2]  # ranks but for the ties of √5, √5
    entropies = [[1, 2, 2, 2, 2], [1, 2, 3, 3, 3]]
    want = scipy.stats.spearmanr
    for found in (
        CorrelationAnalysis.norm_entropy_correlation(capture, "spearman"),
        jax.jit(lambda c: CorrelationAnalysis.norm_entropy_correlation(c, "spearman"))(capture),
        CorrelationAnalysis.norm_entropy_correlation_with_pvalue(capture, "spearman")[0],
    ):
        assert np.isnan(found[0, 0])
        near(found[0, 1:], [want(norms, h).statistic for h in entropies])


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

    from .prompts import FRANCE
    from .reference import reference_sites

    ids = trained.tokenizer.encode(FRANCE)
    pattern = torch.tensor(reference_sites(hf_trained, ids)["pattern"]).double()
    entropy = torch.special.entr(pattern).sum(-1)
    got = EntropyAnalysis.token_entropy(trained.capture(FRANCE))
    near(got, entropy, ROUTES)
    assert_leads(-entropy.mean(-1).flatten(), 5)
    lowest = find_extreme_heads(got.mean(axis=-1), 5, largest=False)
    assert [x["layer"] * 6 + x["head"] for x in lowest] == entropy.mean(-1).flatten().argsort()[:5].tolist()
