"""`oculi circuit`: the indirect-object circuit of the embedded model, as the functions that it calls find it; what it writes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from oculi_jax import forward, padded
from oculi_jax.circuits import Circuit, Graph, Scores, edge_attribution, run_circuit
from oculi_jax.cli import circuit as command
from oculi_jax.cli import report as report_command
from oculi_jax.metrics import logit_difference
from oculi_jax.models.llama import LlamaAttentionAdapter

from .prompts import IOI
from .report.pages import content
from .tolerances import ROUTES

TEXTS = (IOI.format("John"), IOI.format("Mary"))
GIVEN = (*TEXTS, "--target", "Mary", "--against", "John", "--nulls", "3")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, oculi_here, trained: LlamaAttentionAdapter) -> Callable[..., str]:
    """Runs a command on the embedded model: its arguments → what it prints."""
    for module in (command, report_command):
        monkeypatch.setattr(module, "open_adapter", lambda *given, chat: trained)

    def run(*arguments: str) -> str:
        code, out, err = oculi_here(*arguments)
        assert code == 0, err
        return out

    return run


@pytest.fixture(scope="module")
def scores(trained: LlamaAttentionAdapter) -> Scores:
    clean, corrupted = (np.array(trained.tokenizer.encode(text)) for text in TEXTS)
    metric = logit_difference(*(trained.to_single_token(name) for name in ("Mary", "John")))
    return edge_attribution(trained.model, clean, corrupted, metric, steps=5)


def lead(trained: LlamaAttentionAdapter, logits) -> float:
    """Of the indirect object over the subject, in float64."""
    last = np.asarray(logits, np.float64)[-1]
    return float(last[trained.to_single_token("Mary")] - last[trained.to_single_token("John")])


def test_the_indirect_object_circuit_is_found_judged_and_written(run, trained, scores, tmp_path: Path) -> None:
    """Its faithfulness is the ratio of differences of logits of single runs, and its edges those of the largest scores."""
    file = tmp_path / "circuit.json"
    found = json.loads(run("circuit", *GIVEN, "--json", "-o", str(file)))
    values = np.asarray(scores.values)
    order = np.sort(values[scores.graph.edges])[::-1]
    assert order[59] - order[60] > 10 * ROUTES * order[60]  # so the sixty are in no doubt
    wanted = Circuit(scores.graph, edges=values >= order[59])
    assert set(found["edges"]) == set(wanted.names) and found["every_edge"] == 927
    u, v = scores.graph.edge("m3->logits")
    assert next(iter(found["edges"])) == "m3->logits"
    assert found["edges"]["m3->logits"] == pytest.approx(values[u, v], rel=1e-3)

    clean, corrupted = (np.array(trained.tokenizer.encode(text)) for text in TEXTS)
    whole, empty = (lead(trained, forward(trained.model, ids).logits) for ids in (clean, corrupted))
    assert found["whole"] == pytest.approx(whole, abs=1e-3) and found["ablated"] == pytest.approx(empty, abs=1e-3)
    for said, part in ((found, wanted), (found["rest"], wanted.complement)):
        alone = lead(trained, run_circuit(trained.model, clean, corrupted, edges=part.edges).logits)
        assert said["faithfulness"] == pytest.approx((alone - empty) / (whole - empty), abs=1e-3)
    # A sixteenth of the edges is nearly the whole of it, and the rest of the model nearly nothing.
    assert found["faithfulness"] > 0.85 and abs(found["rest"]["faithfulness"]) < 0.1
    assert len(found["nulls"]) == 3 and max(map(abs, found["nulls"])) < 0.1
    assert found["rest"]["edges"] == int(wanted.complement.mask.sum())
    (checked,) = (entry for entry in found["verification"]["entries"] if entry["edge"] == "m3->logits")
    without = scores.graph.edges.copy()
    without[u, v] = False
    alone = lead(trained, run_circuit(trained.model, clean, corrupted, edges=without).logits)
    assert checked["top"] and checked["exact"] == pytest.approx(whole - alone, abs=1e-3)

    written = json.loads(file.read_text(encoding="utf-8"))
    assert set(written) == {"cfg", "nodes", "edges"} and len(written["edges"]) == 927
    kept = {name for name, edge in written["edges"].items() if edge["in_graph"]}
    assert kept == set(wanted.names) and written["cfg"]["n_layers"] == 4
    page = tmp_path / "report.html"
    run("report", TEXTS[0], "-o", str(page), "--circuit", str(file))
    text = page.read_text(encoding="utf-8")
    assert {edge[0] for edge in content(text)["network"]["edges"]} == kept and '<section id="circuit"' in text


def test_it_says_what_it_did_and_draws_it(run, tmp_path: Path) -> None:
    lines = run("circuit", *GIVEN, "--fraction", "0.03", "--absolute", "--top", "4", "-o", str(tmp_path / "c.png"))
    assert "of 927 edges: the largest by magnitude, EAP-IG in 5 steps" in " ".join(lines.split())
    rows = dict(
        re.findall(r"^(circuit|the rest) +(\d+ +[+-]\d\.\d{3} +[+-]\d\.\d{3} to [+-]\d\.\d{3} +\d+)$", lines, re.M)
    )
    assert set(rows) == {"circuit", "the rest"} and "-0.000" not in lines
    edges = re.findall(r"^(\S+->\S+) +([+-]\d+\.\d{3}) +[█░]*", lines, re.M)
    sizes = [abs(float(score)) for _, score in edges]
    assert len(edges) == 4 and sizes == sorted(sizes, reverse=True) and edges[0][0] == "m3->logits"
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    out = run("circuit", *GIVEN[:-2], "--nulls", "0", "--ablation", "zero", "-o", str(tmp_path / "c.html"))
    assert "everything replaced" in out and "random circuits" not in out
    assert content((tmp_path / "c.html").read_text(encoding="utf-8"))["network"]["kind"] == "edges"


def test_a_set_of_pairs(run, trained: LlamaAttentionAdapter, tmp_path: Path) -> None:
    """Means over pairs of two lengths: the ratio of the means of single runs."""
    rows = [
        {"clean": TEXTS[0], "corrupted": TEXTS[1], "target": "Mary", "against": "John"},
        {
            "clean": "The capital of France is",
            "corrupted": "The capital of Italy is",
            "target": "Paris",
            "against": "Rome",
        },
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    given = ("circuit", "--prompts", str(file), "--nulls", "0", "--edges", "120")
    found = json.loads(run(*given, "--json"))
    graph = Graph.of(trained.model.config)
    chosen = Circuit(graph, edges=list(found["edges"]))
    leads = []
    for row in rows:
        (ids, _), (other, _) = (padded([trained.tokenizer.encode(row[kind])]) for kind in ("clean", "corrupted"))
        part = run_circuit(trained.model, ids[0], other[0], edges=chosen.edges).logits
        runs = (forward(trained.model, ids[0]).logits, forward(trained.model, other[0]).logits, part)
        places = [trained.to_single_token(row[kind]) for kind in ("target", "against")]
        leads.append([float(np.subtract(*np.asarray(logits, np.float64)[-1, places])) for logits in runs])
    whole, empty, part = np.mean(leads, axis=0)
    np.testing.assert_allclose(found["by_prompt"], np.array(leads)[:, 2], atol=1e-3)
    assert found["faithfulness"] == pytest.approx((part - empty) / (whole - empty), abs=1e-3)
    assert found["whole"]["mean"] == pytest.approx(whole, abs=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--edges", "20", "--fraction", "0.1"], "--edges and --fraction are both given: give one of them."),
        (["--fraction", "1.5"], "--fraction is 1.5, and must be above 0 and at most 1."),
        (["--edges", "928"], "--edges is 928, and this model has 927."),
        (["--ablation", "means"], "corrupted, mean, mean-positional, zero. Did you mean 'mean'?"),
        (["-o", "{tmp}/c.txt"], "its name must end in .json, .html, .png, .svg, .pdf"),
        (["-o", "{tmp}/no/c.json"], "there is no directory"),
    ],
)
def test_mistakes_are_one_line_and_code_2(monkeypatch, tmp_path: Path, oculi_here, arguments, message: str) -> None:
    monkeypatch.setattr(command, "open_adapter", lambda *given, chat: pytest.fail("a model was loaded"))
    given = [part.replace("{tmp}", str(tmp_path)) for part in arguments]
    code, out, err = oculi_here("circuit", "a b", "a c", "--target", " x", *given)
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1 and out == "", err


def test_a_circuit_for_a_report_is_one_of_its_model(monkeypatch, tmp_path: Path, oculi_here) -> None:
    monkeypatch.setattr(report_command, "open_adapter", lambda *given, chat: pytest.fail("a model was loaded"))
    other = tmp_path / "other.json"
    Circuit(Graph(2, 3, 3, 12), edges=["input->logits"]).save(other)
    for name, message in (
        ("none.json", "there is no such file"),
        ("other.json", "a model of 2 layers with 3 heads each"),
    ):
        given = ("report", "x", "-o", str(tmp_path / "x.html"), "--circuit", str(tmp_path / name))
        code, out, err = oculi_here(*given)
        assert code == 2 and message in err and len(err.strip().splitlines()) == 1 and out == "", err
