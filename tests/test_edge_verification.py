"""Scores of edges beside exact effects: of Hugging Face's modules with one edge corrupted by hand, and of path patching."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from oculi_jax import causal, padded
from oculi_jax.causal import Verification, attribution_patching
from oculi_jax.circuits import Scores, edge_attribution, path_patching, run_circuit, verify
from oculi_jax.rules import relp

from .compilations import compilations
from .test_edges import CLEAN, CORRUPTED, GRAPH, GROUPED, METRIC, MODEL, near, pair, score
from .tiny import tiny_llama

GIVEN: Any = (MODEL, CLEAN, CORRUPTED, METRIC)
WRITERS, READERS = GRAPH.writers, GRAPH.readers


@pytest.fixture(scope="module")
def scores() -> Scores:
    return edge_attribution(*GIVEN)


@pytest.fixture(scope="module")
def checked(scores: Scores) -> Verification:
    return verify(scores, *GIVEN, top=8, sample=16)


def without(edge: str) -> np.ndarray:
    mask = np.ones(GRAPH.edges.shape)
    mask[GRAPH.edge(edge)] = 0
    return mask


def exact(checked: Verification) -> list[float]:
    return [entry["exact"] for entry in checked.entries]


@pytest.mark.torch
def test_each_exact_effect_is_hugging_faces_without_that_edge(checked: Verification, tmp_path: Path) -> None:
    from .split import masked_logits, theirs

    hf = theirs(MODEL, tmp_path)
    whole = score(masked_logits(hf, CLEAN, CORRUPTED, np.ones(GRAPH.edges.shape)))
    edges = [entry["edge"] for entry in checked.entries]
    assert len(set(edges)) == 24 and {edge[-2:] for edge in edges} >= {"q>", "k>", "v>"}
    near(exact(checked), [whole - score(masked_logits(hf, CLEAN, CORRUPTED, without(edge))) for edge in edges])


def test_entries_are_the_largest_and_others_with_their_scores(checked: Verification, scores: Scores) -> None:
    values = np.asarray(scores.values)
    assert [entry["top"] for entry in checked.entries] == [True] * 8 + [False] * 16
    assert all(entry["estimate"] == values[GRAPH.edge(entry["edge"])] for entry in checked.entries)
    order = np.argsort(-np.abs(values), axis=None)[:8]
    assert [GRAPH.edge(entry["edge"]) for entry in checked.entries[:8]] == [divmod(int(i), len(READERS)) for i in order]
    # They are what the scores estimate: of one sign with them, and in much their order.
    assert checked.rank_correlation > 0.5 and len(checked.sign_errors) < 8
    assert checked.sign_errors == [
        e for e in checked.entries if e["estimate"] * e["exact"] < 0 and abs(e["exact"]) > 1e-4
    ]


@pytest.mark.parametrize("edge", ["input->m1", "a0.h1->a1.h2<q>", "m0->a2.h3<v>", "a1.h0->logits"])
def test_an_edge_is_the_path_past_frozen_mlps(edge: str) -> None:
    alone = Scores(1 - np.float32(without(edge)), GRAPH)
    (entry,) = verify(alone, *GIVEN, top=1, sample=0).entries
    sender, receiver = edge.split("->")
    assert entry["edge"] == edge and entry["top"]
    near([entry["exact"]], [-path_patching(*GIVEN, sender, receiver, mlps="frozen").values])


def test_of_a_set_it_is_the_mean_and_other_scores_run_the_same_program(scores: Scores) -> None:
    rows = [(CLEAN, CORRUPTED), pair(1), pair(2, 6)]
    clean, mask = padded([row for row, _ in rows])
    corrupted, _ = padded([row for _, row in rows])
    checked = verify(scores, MODEL, clean, corrupted, METRIC, mask=mask, top=2, sample=2)
    for entry in checked.entries:
        ends = [[METRIC(run_circuit(MODEL, *row, edges=edges)) for row in rows] for edges in (np.ones(GRAPH.edges.shape), without(entry["edge"]))]  # fmt: skip
        near([entry["exact"]], [np.mean(ends[0]) - np.mean(ends[1])], 1e-3)
    others = Scores(-np.asarray(scores.values), GRAPH)
    with compilations() as found:
        again = verify(others, MODEL, clean, corrupted, METRIC, mask=mask, top=2, sample=2, seed=3)
    assert not found and [e["edge"] for e in again.entries[:2]] == [e["edge"] for e in checked.entries[:2]]


def test_other_gradients_have_the_same_effects(checked: Verification) -> None:
    for way in (dict(steps=3), dict(rules=relp(MODEL.config)), dict(at="corrupted")):
        some = verify(edge_attribution(*GIVEN, **way), *GIVEN, top=8, sample=16)
        known = {entry["edge"]: entry["exact"] for entry in checked.entries}
        both = [(entry["exact"], known[entry["edge"]]) for entry in some.entries if entry["edge"] in known]
        assert both, way
        near(*zip(*both, strict=True))


def test_an_edge_of_a_group_is_all_its_heads_edges() -> None:
    grouped = verify(edge_attribution(*GIVEN, graph=GROUPED), *GIVEN, top=200, sample=0)
    entry = next(entry for entry in grouped.entries if entry["edge"].endswith(".g1<v>"))
    writer = entry["edge"].split("->")[0]
    mask = np.ones(GRAPH.edges.shape)
    for head in (2, 3):
        mask[GRAPH.edge(entry["edge"].replace("g1", f"h{head}"))] = 0
    whole, less = (METRIC(run_circuit(*GIVEN[:3], edges=edges)) for edges in (np.ones(mask.shape), mask))
    assert writer in WRITERS
    near([entry["exact"]], [whole - less], 1e-3)


def test_what_cannot_be_verified_is_refused(scores: Scores) -> None:
    found = attribution_patching(*GIVEN)
    with pytest.raises(
        TypeError, match="is a AttributionResult, and Scores are needed.*verified by oculi_jax.causal.verify"
    ):
        verify(found, *GIVEN)
    with pytest.raises(TypeError, match="is a Scores.*Scores of edges are verified by oculi_jax.circuits.verify"):
        causal.verify(scores, *GIVEN)
    with pytest.raises(ValueError, match="nothing to verify"):
        verify(scores, *GIVEN, top=0, sample=0)
    with pytest.raises(ValueError, match=r"edges has shape \[16, 40\], and \[.*\] is needed for this model"):
        verify(scores, tiny_llama(num_hidden_layers=2), *GIVEN[1:])
