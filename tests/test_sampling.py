"""Sampling: the filters against their papers and Hugging Face, the draws against the softmax."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oculi_jax import forward, generate
from oculi_jax.decoding.sampling import sampler
from oculi_jax.intervention import (
    SpectraScaler,
)

from .margins import assert_apart, assert_clear
from .test_generate import IDS, MODEL, PLAIN, N, V, assert_drawn

FILTERED = 1e-4  # sums of chances in float32 err by 1e-6


def some_logits(seed: int) -> np.ndarray:
    """Logits of which no two are within rounding of one another."""
    logits = np.random.default_rng(seed).normal(size=V).astype(np.float32) * 3
    assert_apart(logits)
    return logits


def left_over(chances: np.ndarray, top_k: int | None, top_p: float | None, min_p: float | None) -> np.ndarray:
    """Which tokens the papers keep of float64 `chances`, none of which is within rounding of a filter's threshold."""
    keep = np.ones(V, bool)
    if top_k:
        keep &= chances >= np.sort(chances)[-top_k]
    if top_p:
        p = np.where(keep, chances, 0) / chances[keep].sum()
        order = np.argsort(-p)
        held = np.cumsum(p[order])
        assert_clear(held[: keep.sum() - 1], top_p, FILTERED)
        n = int(np.searchsorted(held, top_p)) + 1
        keep &= np.isin(np.arange(V), order[:n])
    if min_p:
        others = np.delete(chances, chances.argmax())  # the likeliest stays whatever the threshold
        assert_clear(np.log(others), np.log(min_p * chances.max()))
        keep &= chances >= min_p * chances.max() * (1 - 1e-6)
    return keep


@pytest.mark.numerical
def test_filters_leave_the_tokens_that_their_papers_say() -> None:
    logits = some_logits(0)
    for temperature, top_k, top_p, min_p in ((0.7, 5, None, None), (1.0, None, 0.8, None), (2.0, None, None, 0.2),
                                             (1.3, 20, 0.9, 0.05), (1.0, None, 1e-6, None), (1.0, 1, None, 1.0)):  # fmt: skip
        chances = np.exp(logits.astype(np.float64) / temperature)
        options = sampler(temperature, top_k, top_p, min_p, V)
        keep = left_over(chances, top_k, top_p, min_p)
        np.testing.assert_array_equal(np.isfinite(options.filter(jnp.asarray(logits))), keep)


@pytest.mark.numerical
@pytest.mark.torch
def test_filters_agree_with_hugging_face() -> None:
    import torch
    from transformers.generation import logits_process as hf

    logits = some_logits(1)
    for temperature, top_k, top_p, min_p in ((0.7, 5, 0.6, 0.1), (1.6, 30, 0.95, 0.02), (1.0, 61, 0.5, 0.3)):
        left_over(np.exp(logits.astype(np.float64) / temperature), top_k, top_p, min_p)
        # In float64, since near 0 the difference from the largest would be no more than the rounding of the two.
        scores = torch.tensor(logits, dtype=torch.float64)[None]
        for step in (hf.TemperatureLogitsWarper(temperature), hf.TopKLogitsWarper(top_k), hf.TopPLogitsWarper(top_p), hf.MinPLogitsWarper(min_p)):  # fmt: skip
            scores = step(None, scores)
        ours = sampler(temperature, top_k, top_p, min_p, V).filter(jnp.asarray(logits))
        np.testing.assert_allclose(ours, scores[0].numpy() - scores.max().item(), rtol=1e-5)  # ours begin at 0


@pytest.mark.numerical
def test_draws_follow_the_softmax_and_their_key() -> None:
    chances = np.asarray(jax.nn.softmax(forward(MODEL, IDS, logits="last").logits / 2.0))
    options = {"temperature": 2.0, "stop_tokens": ()}
    draws = np.asarray(jax.jit(jax.vmap(lambda key: generate(MODEL, IDS, 1, key=key, **options)))(jax.random.split(jax.random.key(0), 3000)))[:, 0]  # fmt: skip
    seen = np.bincount(draws, minlength=V) / 3000
    assert (np.abs(seen - chances) < 4.5 * np.sqrt(chances * (1 - chances) / 3000) + 1e-3).all()
    one, same = (generate(MODEL, IDS, N, key=jax.random.key(4), **options) for _ in range(2))
    assert_drawn(one, jax.random.key(4), 2.0)
    np.testing.assert_array_equal(one, same)
    assert (one != generate(MODEL, IDS, N, key=jax.random.key(5), **options)).any()
    np.testing.assert_array_equal(one, generate(MODEL, IDS, N, key=jax.random.PRNGKey(4), **options))
    rows = generate(MODEL, IDS, N, SpectraScaler(0, 0, np.ones(2)), key=jax.random.key(4), **options)
    np.testing.assert_array_equal(rows, np.stack([one, one]))  # variants differ by the intervention alone
    heat = jax.jit(lambda t: generate(MODEL, IDS, N, temperature=t, key=jax.random.key(4), stop_tokens=()))
    np.testing.assert_array_equal(heat(2.0), one)
    np.testing.assert_array_equal(heat(0.0), PLAIN)
