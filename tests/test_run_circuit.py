"""Circuits run: between the clean and the corrupted run, and equal to Hugging Face's modules with inputs mixed by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oculi_jax import forward, mean_activations
from oculi_jax.circuits import Circuit, edge_attribution, run_circuit
from oculi_jax.metrics import logit_difference

from .compilations import compilations
from .test_edges import CLEAN, CORRUPTED, GRAPH, GROUPED, METRIC, MODEL, group_of, near
from .tiny import tiny_llama
from .tolerances import GRADIENT

RNG = np.random.default_rng(3)
SHARE = RNG.uniform(size=GRAPH.edges.shape).astype(np.float32)


def logits(edges: Any, **options: Any) -> Any:
    return run_circuit(MODEL, CLEAN, CORRUPTED, edges=edges, **options).logits


@pytest.fixture(scope="module")
def ends() -> tuple[Any, Any]:
    return forward(MODEL, CLEAN).logits, forward(MODEL, CORRUPTED).logits


def test_a_mask_of_ones_is_the_clean_run_and_one_of_zeros_the_corrupted_one(ends: Any) -> None:
    for graph in (GRAPH, GROUPED):
        for share, wanted in zip((1.0, 0.0), ends, strict=True):
            near(logits(np.full(graph.edges.shape, share)), wanted)
    for kind, n in (("nodes", (len(GRAPH.writers),)), ("neurons", (3, 40))):
        near(run_circuit(MODEL, CLEAN, CORRUPTED, **{kind: np.ones(n)}).logits, ends[0])
    near(run_circuit(MODEL, CLEAN, CORRUPTED, nodes=np.zeros(len(GRAPH.writers))).logits, ends[1])


def test_another_mask_compiles_nothing_and_what_there_is_no_edge_for_is_not_read() -> None:
    first = logits(SHARE)
    with compilations() as found:
        second = logits(SHARE * GRAPH.edges)
        logits(np.zeros(GRAPH.edges.shape, bool))
    assert not found
    np.testing.assert_array_equal(first, second)


@pytest.mark.torch
def test_random_masks_are_hugging_faces_modules_mixed_by_hand(tmp_path: Path) -> None:
    from .split import masked_logits, theirs

    hf = theirs(MODEL, tmp_path)
    for share in (SHARE, SHARE > 0.5):
        near(logits(share), masked_logits(hf, CLEAN, CORRUPTED, np.asarray(share, np.float64)))
    # Heads of a group that keep the same edges are one.
    coarse = RNG.uniform(size=GROUPED.edges.shape).astype(np.float32)
    fine = coarse[:, [GROUPED.readers.index(group_of(name)) for name in GRAPH.readers]]
    near(logits(coarse), masked_logits(hf, CLEAN, CORRUPTED, fine.astype(np.float64)))


def test_nodes_are_rows_of_edges() -> None:
    nodes = RNG.uniform(size=len(GRAPH.writers))
    rows = np.broadcast_to(nodes[:, None], GRAPH.edges.shape)
    for ablation in ("corrupted", "mean", "zero"):
        given = dict(ablation=ablation)
        near(run_circuit(MODEL, CLEAN, CORRUPTED, nodes=nodes, **given).logits, logits(rows, **given))


def test_ablations_are_what_they_say(ends: Any) -> None:
    """Everything replaced: by the corrupted run's means, by their values, by values for each token, by zeros."""
    nothing = np.zeros(GRAPH.edges.shape)
    sites = ("embed", "z", "mlp_out")
    means = mean_activations(MODEL, CORRUPTED, sites)
    whole = forward(MODEL, CORRUPTED, capture=sites)
    near(logits(nothing, ablation={site: whole[site] for site in sites}), ends[1])
    wanted = _read_out(means["embed"] + _written(means).sum(axis=0))
    for ablation in ("mean", dict(means)):
        near(logits(nothing, ablation=ablation), np.broadcast_to(wanted, (9, 61)))
    np.testing.assert_array_equal(logits(nothing, ablation="zero"), 0)
    # Of one prompt the mean at each position is what stands there.
    near(logits(nothing, ablation="mean-positional"), ends[1])


def _written(values: Any) -> np.ndarray:
    """What layers add, of `z` and `mlp_out`."""
    weight = np.asarray(MODEL.layers.attn.o.weight[...])
    return np.einsum("lhd,lehd->le", values["z"], weight) + np.asarray(values["mlp_out"])


def _read_out(resid: Any) -> np.ndarray:
    resid = np.asarray(resid, np.float64)
    normal = resid / np.sqrt((resid**2).mean() + 1e-5) * np.asarray(MODEL.final_weight)
    return np.asarray(MODEL.lm_head.weight) @ normal


def test_a_set_is_its_pairs_whatever_the_padding() -> None:
    tokens, other = (np.stack([row, np.roll(row, 1)]) for row in (CLEAN, CORRUPTED))
    mask = np.ones(tokens.shape, bool)
    mask[1, 6:] = False
    both = run_circuit(MODEL, tokens, other, edges=SHARE, mask=mask)
    near(both.logits[0], logits(SHARE))
    short = run_circuit(MODEL, tokens[1, :6], other[1, :6], edges=SHARE)
    near(both.logits[1, :6], short.logits)


def test_masks_map_and_have_gradients() -> None:
    metric = logit_difference(3, 17)
    rows = jnp.stack([jnp.asarray(SHARE), jnp.asarray(1 - SHARE)])
    mapped = jax.vmap(logits)(rows)
    near(mapped[0], logits(SHARE))

    def score(share: Any) -> Any:
        return metric(run_circuit(MODEL, CLEAN, CORRUPTED, edges=share))

    slope = np.asarray(jax.grad(score)(jnp.asarray(SHARE)))
    assert (slope[~GRAPH.edges] == 0).all()
    towards = RNG.normal(size=SHARE.shape).astype(np.float32)
    ends = [float(score(SHARE + sign * 1e-2 * towards)) for sign in (1, -1)]
    np.testing.assert_allclose(
        (ends[0] - ends[1]) / 2e-2, (slope * towards).sum(), rtol=5 * GRADIENT, atol=5 * GRADIENT
    )


def test_half_precision_is_near_and_scores_are_summed_in_float32() -> None:
    half = tiny_llama(dtype=jnp.bfloat16)
    near(
        edge_attribution(half, CLEAN, CORRUPTED, METRIC).values,
        edge_attribution(MODEL, CLEAN, CORRUPTED, METRIC).values,
        0.1,
    )
    for ablation in ("corrupted", "mean"):
        wanted = logits(SHARE, ablation=ablation)
        near(run_circuit(half, CLEAN, CORRUPTED, edges=SHARE, ablation=ablation).logits, wanted, 0.1)


def test_what_cannot_be_run_is_refused() -> None:
    for given, words in (
        ({}, "edges, nodes or neurons"),
        (dict(edges=SHARE, nodes=SHARE), "one of them"),
        (dict(edges=SHARE[1:]), r"edges has shape \[15, 40\]"),
        (dict(nodes=np.ones(15)), r"\[16\] is needed"),
        (dict(nodes=np.full(16, np.nan)), "not finite"),
        (dict(nodes=np.ones(16), ablation="means"), "ablation is 'means'"),
        (dict(nodes=np.ones(16), ablation={"z": 0}), "needs embed, z, mlp_out"),
    ):
        with pytest.raises(ValueError, match=words):
            run_circuit(MODEL, CLEAN, CORRUPTED, **given)
    with pytest.raises(TypeError, match="a mask is needed"):
        run_circuit(MODEL, CLEAN, CORRUPTED, edges=Circuit(GRAPH, edges=GRAPH.edges))
