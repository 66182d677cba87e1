"""Correlations and ranks: against scipy, ties and constants."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from oculi_jax import AttentionCapture
from oculi_jax.analysis.correlation import CorrelationAnalysis
from oculi_jax.analysis.entropy import EntropyAnalysis
from oculi_jax.analysis.norms import NormAnalysis

from .captures import made, near


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
