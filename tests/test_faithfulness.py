"""Curves of faithfulness: MIB's numbers by its formulas, of runs that `run_circuit` makes one by one."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from oculi_jax import forward, padded, plan
from oculi_jax.circuits import MIB_SIZES, Circuit, Curve, Scores, edge_attribution, faithfulness, run_circuit

from .compilations import compilations
from .test_edges import GRAPH, METRIC, MODEL, near, pair

# Of two lengths that share no bucket.
ROWS = [pair(seed, length) for seed, length in ((0, 9), (1, 9), (2, 6))]
CLEAN, MASK = padded([clean for clean, _ in ROWS])
CORRUPTED, _ = padded([corrupted for _, corrupted in ROWS])
PAIRS = (CLEAN, CORRUPTED)


def scores(seed: int = 0) -> Scores:
    values = np.random.default_rng(seed).normal(size=GRAPH.edges.shape).astype(np.float32)
    return Scores(values * GRAPH.edges, GRAPH)


@pytest.fixture(scope="module")
def curve() -> Curve:
    return faithfulness(MODEL, scores(), *PAIRS, METRIC, mask=MASK, nulls=1)


def test_each_circuit_is_run_circuits(curve: Curve) -> None:
    assert curve.by_prompt.shape == (3, 10) and curve.sizes.tolist() == list(MIB_SIZES)
    near(curve.whole, [METRIC(forward(MODEL, row)) for row, _ in ROWS])
    near(curve.empty, [METRIC(forward(MODEL, row)) for _, row in ROWS])
    for place, size in ((7, 0.2), (8, 0.5), (9, 1.0)):
        circuit = scores().top(fraction=size)
        assert curve.counts[place].tolist() == [int(size * GRAPH.n_edges), circuit.edges.sum()]
        wanted = [METRIC(run_circuit(MODEL, *row, edges=circuit.edges)) for row in ROWS[:2]]
        near(curve.by_prompt[:2, place], wanted)
    # What is chosen by magnitude is another circuit, and runs the same program.
    with compilations() as found:
        other = faithfulness(
            MODEL, scores(), *PAIRS, METRIC, mask=MASK, nulls=1, absolute=True, sizes=np.array(MIB_SIZES) / 2
        )
    assert not found
    assert other.counts[-1, 0] == GRAPH.n_edges // 2


def test_the_numbers_are_mibs(curve: Curve) -> None:
    """The loop of MIB's own evaluation, in NumPy."""
    whole, empty = curve.whole.mean(), curve.empty.mean()
    f = [(m - empty) / (whole - empty) for m in curve.by_prompt.mean(axis=0)]
    above, below, accuracy = 0.0, 0.0, 0.0
    right = (curve.by_prompt > 0).mean(axis=0)
    for i in range(len(f) - 1):
        step = MIB_SIZES[i + 1] - MIB_SIZES[i]
        below += step * (f[i] + f[i + 1]) / 2
        above += step * (abs(1 - f[i]) + abs(1 - f[i + 1])) / 2
        accuracy += (np.log(MIB_SIZES[i + 1]) - np.log(MIB_SIZES[i])) * (right[i] + right[i + 1]) / 2
    np.testing.assert_allclose(curve.faithfulness, f, rtol=1e-5)
    np.testing.assert_allclose((curve.cpr, curve.cmd), (below, above), rtol=1e-5)
    np.testing.assert_allclose(curve.acc_auc, accuracy / np.log(1000), rtol=1e-5)
    np.testing.assert_allclose(curve.faithfulness[-1], 1, atol=1e-3)


def test_intervals_are_the_bootstraps_of_each_number(curve: Curve) -> None:
    """scipy's own percentile bootstrap of the ratio of means, prompts drawn together."""
    several = Curve(
        curve.sizes, *(np.tile(x, (5, *[1] * (x.ndim - 1))) + np.random.default_rng(0).normal(size=(15, *x.shape[1:]))
                       for x in (curve.by_prompt, curve.empty, curve.whole)),
        curve.counts, np.zeros((15, 0, 10)), np.zeros((0, 10, 2), int),
    )  # fmt: skip
    spread = several.interval()
    assert (np.asarray(spread.low) <= np.asarray(spread.mean) + 1e-6).all() and spread.high.shape == (10,)

    def cpr(rows: np.ndarray) -> float:
        circuit, empty, whole = (x[rows].mean(axis=0) for x in (several.by_prompt, several.empty, several.whole))
        return float(scipy.integrate.trapezoid((circuit - empty) / (whole - empty), several.sizes))

    wanted = scipy.stats.bootstrap(
        (np.arange(15),), cpr, vectorized=False, n_resamples=2000, method="percentile", rng=1
    ).confidence_interval
    found = several.interval("cpr")
    assert abs(found.mean - several.cpr) < 1e-5
    width = wanted.high - wanted.low  # two draws of 2000 agree to a part of it
    assert abs(found.low - wanted.low) < 0.1 * width and abs(found.high - wanted.high) < 0.1 * width
    with pytest.raises(ValueError, match="of is 'mean', and must be one of"):
        several.interval("mean")
    with pytest.raises(ValueError, match="at least two"):
        faithfulness(MODEL, scores(), *ROWS[0], METRIC, sizes=(0.5,)).interval()


def test_nulls_are_random_circuits_of_as_many_edges(curve: Curve) -> None:
    assert curve.nulls.shape == (1, 10) and (curve.null_counts[0, :, 0] == curve.counts[:, 0]).all()
    assert (curve.null_counts[..., 1] <= curve.null_counts[..., 0]).all()
    near(curve.null_by_prompt[:, 0, -1], curve.by_prompt[:, -1])  # all edges are all edges
    assert np.abs(curve.null_by_prompt[:, 0, 7:9] - curve.by_prompt[:, 7:9]).max() > 1e-2


def test_circuits_of_nodes_and_of_neurons_are_judged_likewise() -> None:
    rng = np.random.default_rng(0)
    nodes = [Circuit(GRAPH, nodes=rng.uniform(size=16) < share) for share in (0.7, 0.9)]
    found = faithfulness(MODEL, nodes, *ROWS[0], METRIC, ablation="mean")
    wanted = [METRIC(run_circuit(MODEL, *ROWS[0], nodes=x.nodes, ablation="mean")) for x in nodes]
    near(found.by_prompt[0], wanted)
    assert found.sizes.tolist() == [x.nodes.mean() for x in nodes]
    neurons = Circuit(GRAPH, neurons=rng.uniform(size=(3, 40)) < 0.5)
    found = faithfulness(MODEL, neurons, *ROWS[0], METRIC, ablation="zero", nulls=1, key=3)
    near(found.by_prompt[0], [METRIC(run_circuit(MODEL, *ROWS[0], neurons=neurons.neurons, ablation="zero"))])


def test_scores_of_nodes_and_of_neurons_make_circuits_of_the_largest(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    for kind, shape in (("nodes", (16,)), ("neurons", (3, 40))):
        values = rng.normal(size=shape).astype(np.float32)
        found = Scores(values, GRAPH)
        assert (found.kind, found.n) == (kind, values.size) and repr(found) == f"Scores({values.size} {kind})"
        for absolute in (False, True):
            own = np.abs(values) if absolute else values
            chosen = [
                Circuit(GRAPH, **{kind: own >= np.sort(own, axis=None)[-n]}) for n in (values.size // 2, values.size)
            ]
            curve = faithfulness(MODEL, found, *ROWS[0], METRIC, sizes=(0.5, 1.0), absolute=absolute)
            wanted = faithfulness(MODEL, chosen, *ROWS[0], METRIC)
            np.testing.assert_array_equal(curve.by_prompt, wanted.by_prompt)
            assert curve.counts[:, 0].tolist() == [values.size // 2, values.size]
    nodes = Scores(rng.normal(size=16).astype(np.float32), GRAPH)
    nodes.save(tmp_path / "nodes.json")
    np.testing.assert_array_equal(Scores.load(tmp_path / "nodes.json").values, nodes.values)
    np.testing.assert_array_equal(nodes.nodes, nodes.values)
    with pytest.raises(ValueError, match="no place for neurons"):
        found.save(tmp_path / "neurons.json")
    with pytest.raises(ValueError, match="say nothing of nodes"):
        _ = found.nodes
    with pytest.raises(
        ValueError, match=r"values has shape \[15\], and \[16, 40\] is needed of edges, \[16\] of nodes"
    ):
        _ = Scores(np.ones(15), GRAPH).kind


def test_what_cannot_be_judged_is_refused() -> None:
    for given, words in (
        (dict(circuits_or_scores=[Circuit(GRAPH, nodes=["input", "m0"]), scores().top(3)]), "of one kind"),
        (dict(circuits_or_scores=scores(), sizes=(0.0, 0.5)), "above 0"),
    ):
        with pytest.raises(ValueError, match=words):
            faithfulness(MODEL, clean=CLEAN, corrupted=CORRUPTED, metric=METRIC, **given)
    with pytest.raises(TypeError, match="neither Scores nor a Circuit"):
        faithfulness(MODEL, np.ones(3), *PAIRS, METRIC)


def test_plans_tell_the_calls_and_grow_with_what_is_asked() -> None:
    edges = partial(plan, edge_attribution, MODEL, *PAIRS, METRIC, mask=MASK)
    few, many = edges(), edges(steps=8)
    assert few.n_runs == 2 * 3 and many.n_runs == 10 * 3 and 4 < many.flops / few.flops < 8
    assert sorted(int(i) for part in few.parts for i in part.prompts) == [0, 1, 2]
    curves = partial(plan, faithfulness, MODEL, scores(), *PAIRS, METRIC, mask=MASK)
    assert curves().n_runs == 13 * 3 and curves(nulls=2).n_runs == 33 * 3
    assert "11 circuits" in repr(curves()) and few.seconds > 0
