"""Edge attribution: equal to torch's autograd on Hugging Face's modules, to its own sums, and to the difference that it explains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from oculi_jax import forward, padded
from oculi_jax.causal import attribution_patching
from oculi_jax.circuits import Circuit, Graph, Scores, edge_attribution
from oculi_jax.metrics import logit_difference, rank
from oculi_jax.rules import Rules

from .tiny import prompt, tiny_llama
from .tolerances import ROUNDING, ROUTES

METRIC = logit_difference(3, 17)
MODEL = tiny_llama()
GRAPH, GROUPED = Graph.of(MODEL.config), Graph.of(MODEL.config, grouped=True)


def pair(seed: int = 0, length: int = 9) -> tuple[np.ndarray, np.ndarray]:
    """Two prompts that differ at their third token and the one after it."""
    clean = prompt(length, seed)
    corrupted = clean.copy()
    corrupted[2:4] = (clean[2:4] + np.array([7, 30], np.int32)) % 61
    return clean, corrupted


CLEAN, CORRUPTED = pair()


def near(found: Any, wanted: Any, tolerance: float = ROUTES) -> None:
    """To a share of the largest."""
    wanted = np.asarray(wanted)
    assert np.abs(np.asarray(found) - wanted).max() <= tolerance * np.abs(wanted).max()


@pytest.fixture(scope="module")
def scores() -> Scores:
    return edge_attribution(MODEL, CLEAN, CORRUPTED, METRIC)


def score(logits: Any) -> Any:
    """The metric, of torch's logits."""
    return logits[-1, 3] - logits[-1, 17]


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from .split import theirs

    return theirs(MODEL, tmp_path_factory.mktemp("theirs"))


@pytest.mark.torch
def test_edges_are_autograds_on_hugging_faces_llama(modules: Any, scores: Scores) -> None:
    from .split import edge_scores, names_of, run_split

    near(run_split(modules, CLEAN)[1].detach(), forward(MODEL, CLEAN).logits)
    assert names_of(modules) == (list(GRAPH.writers), list(GRAPH.readers))
    wanted = edge_scores(modules, CLEAN, CORRUPTED, score)
    near(scores.values, wanted)
    # TransformerLens's: the two exchanged, and the sign.
    at = edge_attribution(MODEL, CLEAN, CORRUPTED, METRIC, at="corrupted").values
    near(at, -edge_scores(modules, CORRUPTED, CLEAN, score))
    owners = np.array([[name == group_of(own) for name in GROUPED.readers] for own in GRAPH.readers])
    near(edge_attribution(MODEL, CLEAN, CORRUPTED, METRIC, graph=GROUPED).values, wanted @ owners)


@pytest.mark.torch
def test_steps_are_autograds_too(modules: Any) -> None:
    """Of embeddings between the two runs, and of what each layer's writers write."""
    import torch

    from .split import edge_scores, run_split

    with torch.no_grad():
        own, other = (run_split(modules, tokens)[0] for tokens in (CLEAN, CORRUPTED))

    def gradient(names: list[str], share: float) -> np.ndarray:
        rows = [(name, GRAPH.node(name)) for name in names]
        between = {name: other[i] + share * (own[i] - other[i]) for name, i in rows}
        return edge_scores(modules, CLEAN, CORRUPTED, score, between)

    wanted = np.mean([gradient(["input"], k / 3) for k in range(3)], axis=0)
    near(edge_attribution(MODEL, CLEAN, CORRUPTED, METRIC, steps=3).values, wanted)
    found = np.asarray(edge_attribution(MODEL, CLEAN, CORRUPTED, METRIC, steps=2, path="activations").values)
    for names in (["input"], [f"a1.h{h}" for h in range(4)], ["m0"], ["m2"]):
        rows = [GRAPH.node(name) for name in names]
        near(found[rows], np.mean([gradient(names, share) for share in (0.5, 1.0)], axis=0)[rows])


def group_of(name: str) -> str:
    """The reader of a group that a query head's own is a part of, two heads to a group."""
    if name[-2:] not in ("k>", "v>"):
        return name
    layer, _, head = name.partition(".h")
    return f"{layer}.g{int(head[0]) // 2}{head[1:]}"


def test_there_is_no_score_where_there_is_no_edge(scores: Scores) -> None:
    values = np.asarray(scores.values)
    assert values.dtype == np.float32 and (values[~GRAPH.edges] == 0).all() and (values[GRAPH.edges] != 0).mean() > 0.9


def test_edges_of_a_writer_add_up_to_what_a_change_of_it_does(scores: Scores) -> None:
    """The sum over readers is the gradient at the writer, by attribution patching at the clean run."""
    found = attribution_patching(MODEL, CORRUPTED, CLEAN, METRIC, ("z", "mlp_out", "embed")).values
    z, mlp = -np.asarray(found["z"]).sum(-1), -np.asarray(found["mlp_out"]).sum(-1)
    wanted = [-np.asarray(found["embed"]).sum(), *np.concatenate([z, mlp[:, None]], axis=1).reshape(-1)]
    near(scores.nodes, wanted, ROUNDING)


def test_steps_explain_the_whole_difference() -> None:
    """What the input has in all edges, as steps grow: a sum by left ends, whose error falls as one over their number."""
    whole = float(METRIC(forward(MODEL, CLEAN)) - METRIC(forward(MODEL, CORRUPTED)))
    found = [float(edge_attribution(MODEL, CLEAN, CORRUPTED, METRIC, steps=m).values[0].sum()) for m in (20, 200)]
    errors = [abs(value - whole) for value in found]
    assert errors[1] < 0.05 * abs(whole) and errors[1] < errors[0] / 5


def test_pairs_of_a_set_are_averaged_whatever_their_lengths(scores: Scores) -> None:
    rows = [(CLEAN, CORRUPTED), pair(1), pair(2, 6)]
    clean, mask = padded([row for row, _ in rows])
    corrupted, _ = padded([row for _, row in rows])
    targets = logit_difference([3, 5, 9], 17)
    alone = [
        edge_attribution(MODEL, *row, logit_difference(target, 17)).values
        for row, target in zip(rows, (3, 5, 9), strict=True)
    ]
    near(edge_attribution(MODEL, clean, corrupted, targets, mask=mask).values, np.mean(alone, axis=0))


def test_a_file_brings_scores_and_circuits_back(tmp_path: Path, scores: Scores) -> None:
    """The fields of MIB's own format, as EAP-IG's `Graph.to_json` writes them."""
    scores.save(tmp_path / "importances.json")
    whole = json.loads((tmp_path / "importances.json").read_text())
    assert whole["cfg"] == {"n_layers": 3, "n_heads": 4, "parallel_attn_mlp": False, "d_model": 24}
    assert set(whole["nodes"]) == {*GRAPH.writers, "logits"} and len(whole["edges"]) == GRAPH.n_edges
    assert set(whole["edges"]["a0.h1->a2.h3<k>"]) == {"score", "in_graph"}
    back = Scores.load(tmp_path / "importances.json")
    np.testing.assert_array_equal(back.values, scores.values)
    assert back.graph == GRAPH
    circuit = scores.top(40)
    circuit.save(tmp_path / "circuit.json")
    again = Circuit.load(tmp_path / "circuit.json")
    np.testing.assert_array_equal(again.edges, circuit.edges)
    np.testing.assert_array_equal(again.scores, scores.values)
    nodes = Circuit(GRAPH, nodes=["input", "a0.h1", "m2"], scores=np.arange(16.0))
    nodes.save(tmp_path / "nodes.json")
    again = Circuit.load(tmp_path / "nodes.json")
    assert again.kind == "nodes" and again.nodes.tolist() == nodes.nodes.tolist()
    whole["nodes"]["m0"]["neurons"] = [True] * 24
    (tmp_path / "neurons.json").write_text(json.dumps(whole))
    with pytest.raises(ValueError, match="coordinates of what nodes write"):
        Circuit.load(tmp_path / "neurons.json")
    with pytest.raises(ValueError, match="this graph is grouped"):
        Scores(np.zeros(GROUPED.edges.shape, np.float32), GROUPED).save(tmp_path / "x.json")


def test_circuits_are_the_largest_and_pruned() -> None:
    values = np.zeros(GRAPH.edges.shape, np.float32)
    order = ("input->a0.h1<q>", "a0.h1->m2", "m2->logits", "a1.h0->logits", "input->m0", "input->logits")
    for name, score in zip(order, (5.0, 4.0, 3.0, 2.0, 1.5, -9.0), strict=True):
        values[GRAPH.edge(name)] = score
    found = Scores(values, GRAPH)
    # Nothing leads into a1.h0, and nothing out of m0.
    assert found.top(5).names == ("input->a0.h1<q>", "a0.h1->m2", "m2->logits")
    assert found.top(5, absolute=True).names == ("input->a0.h1<q>", "input->logits", "a0.h1->m2", "m2->logits")
    assert found.top(2).names == () and found.top(fraction=1.0).edges.sum() == GRAPH.n_edges
    for given in ({}, {"n": 3, "fraction": 0.1}, {"n": 263}, {"fraction": 2.0}):
        with pytest.raises(ValueError):
            found.top(**given)
    with pytest.raises(ValueError, match="There is no edge 'm1->a1.h0<q>'"):
        Circuit(GRAPH, edges=["m1->a1.h0<q>"])
    with pytest.raises(ValueError, match=r"There is no edge a0\.h0->a0\.h0<q>"):
        Circuit(GRAPH, edges=np.ones(GRAPH.edges.shape, bool))


def test_what_cannot_be_attributed_is_refused() -> None:
    for given, words in (
        (dict(corrupted=CORRUPTED[1:]), "as many tokens"),
        (dict(at="corrupted", steps=3), "at says where"),
        (dict(path="outputs"), "'inputs' or 'activations'"),
        (dict(graph=Graph(2, 4, 4, 24)), "2 layers of 4 heads"),
        (dict(steps=0), "steps is 0"),
    ):
        with pytest.raises(ValueError, match=words):
            edge_attribution(MODEL, **{"clean": CLEAN, "corrupted": CORRUPTED, "metric": METRIC, **given})
    with pytest.raises(TypeError, match="no gradient"):
        edge_attribution(MODEL, CLEAN, CORRUPTED, rank(3))


def test_edges_under_rules_sum_to_nodes_under_them() -> None:
    """What attribution finds under the same rules, which is held to torch's autograd of them elsewhere."""
    stop = {
        "attn_scale": 0.9,
        "mlp_scale": 0.3,
        "final_scale": 0.7,
        "pattern": 0.4,
        "q_pre_rope": 0.3,
        "k_pre_rope": 0.6,
    }
    stop |= {"v": 0.2, "attn_in": 0.1, "mlp_in": 0.5, "final_norm": 0.15, "gate": np.array([0.1, 0.8, 0.3])}
    rules = Rules(stop, {"z": 0.5, "scores": 0.4, "act": 0.2}, secant=0.7, temperature=1.7)
    scores = edge_attribution(MODEL, CLEAN, CORRUPTED, METRIC, rules=rules)
    wanted = attribution_patching(
        MODEL, CLEAN, CORRUPTED, METRIC, ("embed", "z", "mlp_out"), rules=rules, at="clean"
    ).values
    layers = [
        [*np.asarray(wanted["z"][i]).sum(-1), np.asarray(wanted["mlp_out"][i]).sum()] for i in range(GRAPH.n_layers)
    ]
    nodes = np.array([np.asarray(wanted["embed"]).sum(), *np.ravel(layers)])
    near(scores.nodes, nodes)
    plain = edge_attribution(MODEL, CLEAN, CORRUPTED, METRIC)
    assert np.abs(scores.nodes - plain.nodes).max() > 0.05 * np.abs(nodes).max()
    # Rules that stop nothing are none.
    near(edge_attribution(MODEL, CLEAN, CORRUPTED, METRIC, rules=Rules(dict.fromkeys(stop, 0.0))).values, plain.values)
