"""Searches for circuits: equal to loops of a few lines over Hugging Face's modules, and to themselves however many run at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from oculi_jax import plan
from oculi_jax.circuits import Circuit, Graph, acdc, edge_attribution, faithfulness, minimal
from oculi_jax.circuits.searching import thinned
from oculi_jax.metrics import kl_divergence, logit_difference

from .compilations import compilations
from .test_edges import CLEAN, CORRUPTED, GRAPH, GROUPED, METRIC, MODEL
from .test_faithfulness import CLEAN as ROWS
from .test_faithfulness import CORRUPTED as OTHERS
from .test_faithfulness import MASK
from .tiny import tiny_llama

WHOLE = Circuit(GRAPH, edges=GRAPH.edges)
PART = Circuit(GRAPH, edges=[name for name in GRAPH.names if "h2" not in name and "m0" not in name])
PAIRS = (ROWS, OTHERS, METRIC)


def towards(logits: Any, whole: Any) -> float:
    """The distance that `METRIC` makes."""
    return abs((logits[-1, 3] - logits[-1, 17]) - (whole[-1, 3] - whole[-1, 17]))


def divergence(logits: Any, whole: Any) -> float:
    """KL(whole ‖ this), of the last token."""
    p, q = (x[-1] - np.log(np.exp(x[-1]).sum()) for x in (whole, logits))
    return (np.exp(p) * (p - q)).sum()


@pytest.mark.torch
@pytest.mark.parametrize(("far", "threshold", "start"), [(towards, 0.02, WHOLE), (divergence, 0.006, PART)])
def test_it_is_the_papers_loop(far: Any, threshold: float, start: Circuit, tmp_path: Path) -> None:
    """Algorithm 1, edge by edge, on Hugging Face's modules in float64; nothing is pruned before its end."""
    from .split import masked_logits, run_split, theirs

    hf = theirs(MODEL, tmp_path)
    other = [write.detach() for write in run_split(hf, CORRUPTED)[0]]
    whole = run_split(hf, CLEAN)[1].detach().numpy()
    kept, gaps, grew = start.edges.copy(), [], np.zeros(GRAPH.edges.shape)
    now = far(masked_logits(hf, CLEAN, CORRUPTED, kept.astype(np.float64), other), whole)
    for column in reversed(range(len(GRAPH.readers))):
        for row in np.flatnonzero(start.edges[:, column]):
            without = kept.copy()
            without[row, column] = False
            then = far(masked_logits(hf, CLEAN, CORRUPTED, without.astype(np.float64), other), whole)
            gaps.append(abs(then - now - threshold))
            grew[row, column] = then - now
            if then - now < threshold:
                kept, now = without, then
    assert min(gaps) > 1e-4  # no rounding decides
    metric = METRIC if far is towards else kl_divergence(whole[-1].astype(np.float32))
    n = start.edges.sum()
    told: list[tuple[int, int]] = []
    found = acdc(MODEL, CLEAN, CORRUPTED, metric, threshold, within=start, progress=lambda *at: told.append(at))
    assert told[-1] == (n, n) and len(told) < n / 2
    np.testing.assert_array_equal(found.edges, GRAPH.pruned(kept))
    assert 5 < found.edges.sum() < 0.8 * n
    np.testing.assert_allclose(found.scores[found.edges], grew[found.edges], atol=1e-4)


@pytest.mark.quick
@pytest.mark.parametrize("foreseen", [True, False])
def test_foresight_changes_nothing(foreseen: bool) -> None:
    """Whatever is tried at once and foreseen: what one by one leaves, by a distance that random weights of edges make."""
    sizes = []
    for seed in range(2):
        rng = np.random.default_rng(seed)
        weights = rng.normal(0.3, 0.5, GRAPH.edges.shape) * (rng.uniform(size=GRAPH.edges.shape) < 0.5)

        def distances(masks: Any, weights: Any = weights) -> np.ndarray:
            return np.array([abs((weights * (GRAPH.edges & ~mask)).sum()) for mask in masks])

        for goes in (lambda new, old: new - old < 0.3, lambda new, old: new <= 2.0):
            order = np.argwhere(GRAPH.edges)[::-1].tolist()
            kept, now = GRAPH.edges, 0.0
            for row, column in order:
                if kept[row, column]:
                    without = kept.copy()
                    without[row, column] = False
                    without = GRAPH.pruned(without)
                    (then,) = distances([without])
                    kept, now = (without, then) if goes(then, now) else (kept, now)
            sizes.append(kept.sum())
            for n in (1, 7, 32):
                told: list[int] = []
                found, _ = thinned(WHOLE, order, distances, goes, n, foreseen, told.append)
                np.testing.assert_array_equal(found, kept)
                assert sum(told) == len(order)
    assert sum(10 < size < GRAPH.n_edges - 10 for size in sizes) > 2


def test_thresholds_and_where_it_begins_compile_nothing_and_the_largest_leaves_nothing() -> None:
    begun = acdc(MODEL, CLEAN, CORRUPTED, METRIC, 0.3)
    with compilations() as compiled:
        nothing = acdc(MODEL, CLEAN, CORRUPTED, logit_difference(5, 7), np.inf)
        again = acdc(MODEL, CLEAN, CORRUPTED, METRIC, 0.005, within=PART)
    assert not compiled and not nothing.edges.any() and begun.edges.any()
    assert (again.edges <= PART.edges).all() and again.edges.any()


@pytest.mark.parametrize(("graph", "ablation"), [(GRAPH, "corrupted"), (GROUPED, "mean")])
def test_no_edge_of_a_minimal_circuit_can_go(graph: Graph, ablation: str) -> None:
    """Of a set of two lengths: each circuit without one edge more is judged by `faithfulness`."""
    rng = np.random.default_rng(1)
    edges = graph.edges & (rng.uniform(size=graph.edges.shape) < 0.3)
    start = Circuit(graph, edges=edges, scores=rng.normal(size=edges.shape))
    found = minimal(MODEL, start, *PAIRS, tolerance=0.1, mask=MASK, ablation=ablation)
    assert (found.edges <= start.edges).all() and 0 < found.edges.sum() < start.edges.sum()
    np.testing.assert_array_equal(found.scores, start.scores)
    f = faithfulness(MODEL, [start, found, *without_one(found)], *PAIRS, mask=MASK, ablation=ablation).faithfulness
    assert abs(f[1] - f[0]) < 0.1 + 1e-4 and np.abs(f[2:] - f[0]).min() > 0.1 - 1e-4


def without_one(circuit: Circuit) -> list[Circuit]:
    """The circuits of one edge less."""
    fewer = np.repeat(circuit.edges[None], circuit.edges.sum(), axis=0)
    fewer[(np.arange(len(fewer)), *np.nonzero(circuit.edges))] = False
    return [Circuit(circuit.graph, edges=edges) for edges in fewer]


def test_the_indirect_object_circuit_of_tiny_facts_is_found_and_no_edge_of_it_can_go(embedded: Any) -> None:
    """Of 927 edges some fifty do nine tenths of it; what they leave out, and as many random edges, do nothing."""
    model, tokenizer = embedded
    names = [("Mary", "John"), ("Tom", "Anna"), ("Paul", "Sarah"), ("Lucy", "Mark")]
    text = "When {} and {} went to the store, {} gave a ring to"
    ids = np.array([tokenizer.encode(text.format(a, b, giver)) for a, b in names for giver in (b, a)])
    answers = [tokenizer.encode(name)[-1] for pair in names for name in pair]
    places = np.arange(8)
    given = ids, ids[places ^ 1], logit_difference(answers, np.array(answers)[places ^ 1])
    most = edge_attribution(model, *given, steps=5).top(60)
    found = minimal(model, most, *given)
    curve = faithfulness(model, [most, found, found.complement, *without_one(found)], *given, nulls=1)
    f = curve.faithfulness
    assert f[0] > 0.85 and abs(f[1] - f[0]) < 0.0201 and found.edges.sum() < most.edges.sum()
    assert np.abs(f[3:] - f[0]).min() > 0.0199  # whichever goes
    assert abs(f[2]) < 0.05 and abs(curve.nulls[0, 1]) < 0.1


def test_plans_count_the_trials() -> None:
    search, small = plan(acdc, MODEL, *PAIRS, 0.1, mask=MASK), plan(acdc, MODEL, *PAIRS, 0.1, within=PART, mask=MASK)
    assert search.n_runs / small.n_runs == pytest.approx(GRAPH.n_edges / PART.edges.sum(), rel=0.4)
    assert search.flops > small.flops and f"each of {GRAPH.n_edges} edges" in repr(search)
    assert plan(minimal, MODEL, PART, *PAIRS, mask=MASK).n_runs > 1.5 * small.n_runs


REFUSED: dict[str, tuple[Any, str]] = {
    "below 0": (lambda: acdc(MODEL, *PAIRS, -1.0), "threshold is -1.0, and a number from 0"),
    "a word": (lambda: minimal(MODEL, PART, *PAIRS, tolerance="2 %"), "tolerance is '2 %'"),  # type: ignore[arg-type]
    "nodes": (lambda: acdc(MODEL, *PAIRS, 0.1, within=Circuit(GRAPH, nodes=["m0"])), "of nodes, and one of edges"),
    "a mask": (lambda: minimal(MODEL, GRAPH.edges, *PAIRS), "a ndarray, and one of edges"),  # type: ignore[arg-type]
    "another model's": (lambda: acdc(tiny_llama(num_hidden_layers=2), *PAIRS, 0.1, within=PART), r"edges has shape \[16, 40\]"),
    "progress": (lambda: acdc(MODEL, *PAIRS, 0.1, progress=3), "progress is 3"),  # type: ignore[arg-type]
    "a trace": (lambda: jax.jit(lambda x: acdc(MODEL, x, OTHERS, METRIC, 0.1).edges)(ROWS), "acdc runs on the host"),
    "one run": (lambda: minimal(MODEL, PART, CLEAN, CLEAN, METRIC), "the same in the model and with everything ablated"),
}  # fmt: skip


@pytest.mark.quick
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_in_a_sentence(name: str) -> None:
    call, sentence = REFUSED[name]
    with pytest.raises((ValueError, TypeError), match=sentence):
        call()
