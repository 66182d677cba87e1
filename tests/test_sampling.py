"""Sampling: the filters against their papers and Hugging Face, the draws against the softmax."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oculi_jax import forward, generate
from oculi_jax.intervention import (
    SpectraScaler,
)
from oculi_jax.sampling import sampler

from .test_generate import IDS, MODEL, PLAIN, N, V

RNG = np.random.default_rng(0)


def test_filters_leave_the_tokens_that_their_papers_say() -> None:
    logits = RNG.normal(size=V).astype(np.float32) * 3
    for temperature, top_k, top_p, min_p in ((0.7, 5, None, None), (1.0, None, 0.8, None), (2.0, None, None, 0.2),
                                             (1.3, 20, 0.9, 0.05), (1.0, None, 1e-6, None), (1.0, 1, None, 1.0)):  # fmt: skip
        chances = np.exp(logits.astype(np.float64) / temperature)
        keep = np.ones(V, bool)
        if top_k:
            keep &= chances >= np.sort(chances)[-top_k]
        if top_p:
            p = np.where(keep, chances, 0) / chances[keep].sum()
            order = np.argsort(-p)
            n = int(np.searchsorted(np.cumsum(p[order]), top_p)) + 1
            keep &= np.isin(np.arange(V), order[:n])
        if min_p:
            keep &= chances >= min_p * chances.max() * (1 - 1e-6)
        options = sampler(temperature, top_k, top_p, min_p, V)
        np.testing.assert_array_equal(np.isfinite(options.filter(jnp.asarray(logits))), keep)


@pytest.mark.torch
def test_filters_agree_with_hugging_face() -> None:
    import torch
    from transformers.generation import logits_process as hf

    logits = RNG.normal(size=V).astype(np.float32) * 3
    for temperature, top_k, top_p, min_p in ((0.7, 5, 0.6, 0.1), (1.6, 30, 0.95, 0.02), (1.0, 61, 0.5, 0.3)):
        scores = torch.tensor(logits)[None]
        for step in (hf.TemperatureLogitsWarper(temperature), hf.TopKLogitsWarper(top_k), hf.TopPLogitsWarper(top_p), hf.MinPLogitsWarper(min_p)):  # fmt: skip
            scores = step(None, scores)
        ours = sampler(temperature, top_k, top_p, min_p, V).filter(jnp.asarray(logits))
        np.testing.assert_allclose(ours, scores[0].numpy() - scores.max().item(), rtol=1e-5)  # ours begin at 0


def test_draws_follow_the_softmax_and_their_key() -> None:
    chances = np.asarray(jax.nn.softmax(forward(MODEL, IDS, logits="last").logits / 2.0))
    options = {"temperature": 2.0, "stop_tokens": ()}
    draws = np.asarray(jax.jit(jax.vmap(lambda key: generate(MODEL, IDS, 1, key=key, **options)))(jax.random.split(jax.random.key(0), 3000)))[:, 0]  # fmt: skip
    seen = np.bincount(draws, minlength=V) / 3000
    assert (np.abs(seen - chances) < 4.5 * np.sqrt(chances * (1 - chances) / 3000) + 1e-3).all()
    one, same = (generate(MODEL, IDS, N, key=jax.random.key(4), **options) for _ in range(2))
    np.testing.assert_array_equal(one, same)
    assert (one != generate(MODEL, IDS, N, key=jax.random.key(5), **options)).any()
    np.testing.assert_array_equal(one, generate(MODEL, IDS, N, key=jax.random.PRNGKey(4), **options))
    rows = generate(MODEL, IDS, N, SpectraScaler(0, 0, np.ones(2)), key=jax.random.key(4), **options)
    np.testing.assert_array_equal(rows, np.stack([one, one]))  # variants differ by the intervention alone
    heat = jax.jit(lambda t: generate(MODEL, IDS, N, temperature=t, key=jax.random.key(4), stop_tokens=()))
    np.testing.assert_array_equal(heat(2.0), one)
    np.testing.assert_array_equal(heat(0.0), PLAIN)
