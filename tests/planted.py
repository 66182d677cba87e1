"""Pairs of prompts for the hand-built induction model, of which the circuit is known to the last edge."""

from __future__ import annotations

from functools import cache

import numpy as np

from oculi_jax.circuits import Graph
from oculi_jax.metrics import LogitDifference, logit_difference

from .induction import induction_llama, repeated

MODEL = induction_llama()
GRAPH = Graph.of(MODEL.config)
# What came before a token is read by the previous-token head, written, found by the induction head's keys, and told.
EDGES = ("input->a0.h2<v>", "a0.h2->a1.h1<k>", "a1.h1->logits")
NODES = ("input", "a0.h2", "a1.h1")


@cache
def pairs(n: int = 16) -> tuple[np.ndarray, np.ndarray, LogitDifference]:
    """Clean and corrupted ids `[n, 26]`, and the metric.

    The last token stood once before. In the corrupted prompt another token stands there, and this one where that was: so both runs
    have the same answers in the same places, and differ in what came before each.
    """
    clean, corrupted, answers, others = [], [], [], []
    for seed in range(n):
        ids = repeated(seed)
        clean.append(ids[:26])  # BOS, 20 tokens, and five of them again
        spoilt = ids[:26].copy()
        spoilt[[5, 12]] = ids[[12, 5]]
        corrupted.append(spoilt)
        answers.append(ids[6])
        others.append(ids[13])
    return np.stack(clean), np.stack(corrupted), logit_difference(np.array(answers), np.array(others))
