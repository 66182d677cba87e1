"""Edges and circuits of families that normalise what they add, or queries and keys, or look through windows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from oculi_jax import forward
from oculi_jax.circuits import Graph, edge_attribution, run_circuit
from oculi_jax.metrics import logit_difference

from .test_edges import CLEAN, CORRUPTED, near, score
from .test_families import make

pytestmark = pytest.mark.torch

# Post-norms with soft caps; with queries normalised by head, in two kinds of layers, seven of them; over all heads of a token.
KINDS = ("gemma2", "gemma3", "olmo2")


@pytest.mark.parametrize("kind", KINDS)
def test_edges_and_masks_are_hugging_faces_modules_split_by_hand(kind: str, tmp_path: Path) -> None:
    from .split import edge_scores, masked_logits, ours, run_split

    hf, model = ours(make(kind), tmp_path)
    near(run_split(hf, CLEAN)[1].detach(), forward(model, CLEAN).logits)
    graph = Graph.of(model.config)
    found = edge_attribution(model, CLEAN, CORRUPTED, logit_difference(3, 17))
    near(found.values, edge_scores(hf, CLEAN, CORRUPTED, score), 3e-4)
    share = np.random.default_rng(0).uniform(size=graph.edges.shape).astype(np.float32)
    mixed = run_circuit(model, CLEAN, CORRUPTED, edges=share).logits
    near(mixed, masked_logits(hf, CLEAN, CORRUPTED, share.astype(np.float64)))


def test_where_what_attention_adds_is_normalised_a_mean_is_that_of_writes(tmp_path: Path) -> None:
    """Everything replaced by means: the stream is the embeddings' mean and what each sublayer adds on average."""
    from .split import ours

    _, model = ours(make("gemma2"), tmp_path)
    out = forward(model, CORRUPTED, capture=("embed", "attn_out", "mlp_out"))
    resid = np.asarray(out["embed"]).mean(0) + np.asarray(out["attn_out"] + out["mlp_out"]).mean(1).sum(0)
    normal = resid / np.sqrt((resid**2).mean() + model.config.rms_norm_eps) * np.asarray(model.final_weight)
    wanted = np.asarray(model.logits(normal[None].astype(np.float32)))
    nothing = np.zeros(Graph.of(model.config).edges.shape)
    found = run_circuit(model, CLEAN, CORRUPTED, edges=nothing, ablation="mean").logits
    near(found, np.broadcast_to(wanted, found.shape))
