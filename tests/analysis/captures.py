"""Captures that analyses are tried on, and how they are compared."""

from __future__ import annotations

import dataclasses
import math
import statistics
from typing import Any

import jax.numpy as jnp
import numpy as np
import scipy.stats

from oculi_jax import AttentionCapture
from oculi_jax.analysis.entropy import EntropyAnalysis
from oculi_jax.analysis.norms import NormAnalysis

from ..margins import assert_apart, assert_clear
from ..tiny import prompt
from ..tolerances import MARGIN, ROUNDING

N, PAD = 11, 3
TOKENS = prompt(N, seed=53)  # without ties: no id repeats, and steps are clear (below)
LAYERS = [2, 0]


def other(capture: AttentionCapture) -> AttentionCapture:
    """Another capture of the same shape: flatter patterns over the same keys."""
    flat = jnp.sqrt(capture.patterns)
    total = flat.sum(-1, keepdims=True)
    return dataclasses.replace(capture, patterns=flat / jnp.where(total == 0, 1.0, total))


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


def made(patterns: Any, **fields: Any) -> AttentionCapture:
    """A capture of given patterns `[L, H, T, S]`, in which every token is real."""
    patterns = jnp.asarray(patterns, jnp.float32)
    n_layers, n_heads, n_tokens, _ = patterns.shape
    given = dict(tokens=jnp.arange(n_tokens), mask=jnp.ones(n_tokens, bool), captured_layers=tuple(range(n_layers)),
                 n_heads=n_heads, n_kv_heads=n_heads, head_dim=2, patterns=patterns)  # fmt: skip
    return AttentionCapture(**{**given, **fields})


def uniform(n_tokens: int) -> AttentionCapture:
    return made((np.tril(np.ones((n_tokens, n_tokens))) / np.arange(1, n_tokens + 1)[:, None])[None, None])


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
