"""The views of a notebook: their numbers, texts as data, what they refuse. tests/test_notebooks.py points at them."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from oculi_jax import CaptureConfig, forward
from oculi_jax.analysis import LogitLensAnalysis
from oculi_jax.circuits import Circuit, Graph, Scores
from oculi_jax.models.llama import LlamaAttentionAdapter
from oculi_jax.visualize import attention_view, circuit_view, lens_view, token_view

from .report.pages import HOSTILE, Elements, content, softmax, triangles
from .tiny import prompt, tiny_llama

MODEL = tiny_llama()  # L=3, H=4
IDS = prompt(6)
GRAPH = Graph.of(MODEL.config)
SCORES = np.where(GRAPH.edges, np.random.default_rng(0).normal(size=GRAPH.edges.shape) ** 3, 0.0).astype(np.float32)
NAMES = ("input->m0", "m0->a1.h2<q>", "m0->a1.h2<v>", "a1.h2->a2.h0<k>", "a2.h0->logits", "m0->logits")
CIRCUIT = Circuit(GRAPH, edges=NAMES, scores=SCORES)
PATTERN = np.asarray(forward(MODEL, IDS, capture="pattern", logits="none")["pattern"])


@pytest.fixture(scope="module")
def adapter() -> LlamaAttentionAdapter:
    return LlamaAttentionAdapter(MODEL)


def test_attention_holds_every_head_of_a_capture_and_its_true_layers(adapter: LlamaAttentionAdapter) -> None:
    view = attention_view(adapter.capture(IDS, CaptureConfig(layers=[2, 0])), layer=0, head=3)
    data = content(view)
    assert data["layers"] == [2, 0] and data["attention"]["heads"][data["attention"]["first"]] == [0, 3]
    assert [data["words"][i] for i in data["tokens"]] == [str(i) for i in IDS]
    kept = triangles(data)
    assert len(kept) == 8
    for (layer, head), rows in zip(data["attention"]["heads"], kept, strict=True):
        for t, row in enumerate(rows):
            np.testing.assert_allclose(row, PATTERN[layer, head, t, : t + 1], atol=1e-5)
    other = content(attention_view(PATTERN, list("abcdef"), layers=[4, 5, 9]))
    assert other["layers"] == [4, 5, 9] and other["words"] == list("abcdef")
    assert other["attention"]["heads"][9] == [9, 1]


def test_padding_is_left_out(adapter: LlamaAttentionAdapter) -> None:
    batch = np.array([[0, 0, *IDS], [*IDS, 5, 7]])
    mask = np.array([[False] * 2 + [True] * 6, [True] * 8])
    capture = adapter.capture(batch, attention_mask=mask)
    data = content(attention_view(capture[0]))
    assert [data["words"][i] for i in data["tokens"]] == [str(i) for i in IDS]
    named = content(attention_view(capture[0], list("##abcdef"), head=np.int64(1)))  # texts of all tokens, padding too
    assert [named["words"][i] for i in named["tokens"]] == list("abcdef") and named["attention"]["first"] == 1
    for rows, pattern in zip(triangles(data), PATTERN.reshape(-1, 6, 6), strict=True):
        np.testing.assert_allclose(np.concatenate(rows), pattern[np.tril_indices(6)], atol=1e-4)
    with pytest.raises(ValueError, match=r"A batch is shown one prompt at a time: capture\[0\]"):
        attention_view(capture)


def test_the_lens_holds_what_the_analysis_said(trained: LlamaAttentionAdapter) -> None:
    text = "The capital of France is"
    ids = trained.tokenizer.encode(text)
    capture = trained.capture_logits(text)
    analysis = LogitLensAnalysis(trained.tokenizer)
    view = lens_view(
        [analysis.layer_predictions(capture, t, top_k=2) for t in (-1, 1)], [" is", " The"], positions=[5, 1]
    )
    data = content(view)
    p = softmax(forward(trained.model, ids).logits)[5]
    assert data["lens"]["positions"] == [5, 1] and data["layers"] == [0, 1, 2, 3]
    best = data["lens"]["words"][3][0]
    assert [data["words"][i] for i in best] == ["␣" + trained.tokenizer.decode([i]).strip() for i in np.argsort(-p)[:2]]
    np.testing.assert_allclose(data["lens"]["probabilities"][3][0], np.sort(p)[::-1][:2], rtol=1e-4, atol=1e-6)


def test_a_network_holds_each_edge_and_its_score() -> None:
    found = content(circuit_view(CIRCUIT))["network"]
    nodes = [name for name, *_ in found["nodes"]]
    assert sorted(nodes) == sorted(["input", "m0", "a1.h2", "a2.h0", "logits"]) and found["caption"] == "6 of 262 edges"
    assert {name for name, *_ in found["edges"]} == set(NAMES)
    heights = {name: y for name, _, y, _ in found["nodes"]}
    for name, begin, end, port, score, points in found["edges"]:
        writer, reader = name.split("->")
        assert nodes[begin] == writer and nodes[end] == reader.split("<")[0] and f"<{port}>" in (reader[-3:], "<>")
        assert score == pytest.approx(SCORES[GRAPH.edge(name)], rel=1e-4)
        assert [y for _, y in points] == sorted(
            (y for _, y in points), reverse=True
        )  # a page's places are from the top
        assert heights[nodes[begin]] > points[0][1] > points[-1][1] > heights[nodes[end]]
    assert CIRCUIT._repr_html_() == circuit_view(CIRCUIT)._repr_html_()  # type: ignore[operator]
    some = content(circuit_view(CIRCUIT, n=2))["network"]
    strongest = sorted(NAMES, key=lambda name: -abs(SCORES[GRAPH.edge(name)]))[:2]
    assert {name for name, *_ in some["edges"]} == set(strongest) and some["caption"].endswith(
        "; drawn are the 2 largest"
    )
    neurons = np.zeros((3, MODEL.config.intermediate_size), bool)
    neurons[1, 5] = True
    one = content(circuit_view(Circuit(GRAPH, neurons=neurons, scores=np.full(neurons.shape, np.nan))))["network"]
    assert [(name, score) for name, _, _, score in one["nodes"]] == [("m1.n5", None)] and one["largest"] is None


@pytest.mark.browser
def test_a_network_answers_to_the_pointer(chromium: Any, tmp_path: Path) -> None:
    """Hovering a node tells its edges' scores; a click keeps it, Escape lets it go; arrow keys lead from node to node."""
    circuit_view(CIRCUIT).save(tmp_path / "circuit.html")
    page = chromium.new_page(viewport={"width": 1100, "height": 800})
    page.set_default_timeout(20_000)
    troubles: list[str] = []
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("console", lambda message: troubles.append(message.text))
    page.on(
        "request", lambda request: None if request.url.startswith(("file:", "data:")) else troubles.append(request.url)
    )
    page.goto((tmp_path / "circuit.html").as_uri())

    def told() -> dict[str, float]:
        rows = page.locator("#network-details tr").evaluate_all(
            "rows => rows.map((r) => [r.querySelector('th').innerText, r.querySelector('.number').innerText])"
        )
        return {" ".join(name.split()): float(number.replace("−", "-")) for name, number in rows}

    def score(name: str) -> float:
        return pytest.approx(float(SCORES[GRAPH.edge(name)]), rel=6e-3)

    assert told() == {name: score(name) for name in NAMES}
    head = {
        "m0 queries": score("m0->a1.h2<q>"),
        "m0 values": score("m0->a1.h2<v>"),
        "a2.h0 keys": score("a1.h2->a2.h0<k>"),
    }
    page.hover("[data-node='a1.h2']")
    assert told() == head
    away = page.locator(".line.away").evaluate_all("lines => lines.map((line) => line.dataset.edge)")
    assert set(away) == {name for name in NAMES if "a1.h2" not in name}
    page.hover("#network-heading")
    assert len(told()) == 6 and page.locator(".away").count() == 0
    page.click("[data-node='a1.h2']")
    page.hover("[data-node='input']")
    assert told() == {"m0": score("input->m0")}
    page.hover("#network-heading")
    assert told() == head  # kept
    page.keyboard.press("ArrowDown")
    assert page.inner_text("#network-details b") == "m0" and len(told()) == 4
    page.keyboard.press("Escape")
    assert len(told()) == 6
    widths = dict(
        page.locator(".line").evaluate_all(
            "lines => lines.filter((l) => l.dataset.edge).map((l) => [l.dataset.edge, Number(l.getAttribute('stroke-width'))])"
        )
    )
    by_score = sorted(NAMES, key=lambda name: abs(SCORES[GRAPH.edge(name)]))
    assert sorted(NAMES, key=widths.__getitem__) == by_score
    # On a box of the largest score the name is legible, in either theme.
    nodes = np.linspace(-1, 1, len(GRAPH.writers))
    circuit_view(Circuit(GRAPH, nodes=["input", "m2"], scores=nodes)).save(tmp_path / "nodes.html")
    other = chromium.new_page(color_scheme="dark")
    for scheme, ink in (("dark", "rgb(0, 0, 0)"), ("light", "rgb(255, 255, 255)")):
        other.emulate_media(color_scheme=scheme)
        other.goto((tmp_path / "nodes.html").as_uri())
        assert other.locator("[data-node='input'] text").evaluate("(text) => getComputedStyle(text).fill") == ink
    other.close()
    page.set_viewport_size({"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.close()
    assert not troubles


@pytest.mark.parametrize("name", ["attention", "circuit", "lens", "tokens"])
def test_texts_are_data(name: str, tmp_path: Path) -> None:
    """No view lets a token's text be markup; those in frames run their own script alone."""
    words = [HOSTILE, "</script>", "<b>", "a", "\u202e", " "]
    rows = [{"layer": 0, "predictions": [(word, 0.5)]} for word in words[:1]]
    made: dict[str, Any] = {
        "attention": lambda: attention_view(PATTERN, words),
        "circuit": lambda: circuit_view(CIRCUIT),
        "lens": lambda: lens_view([rows] * 6, words),
        "tokens": lambda: token_view(words, range(6), "<b>"),
    }
    view = made[name]()
    if name == "tokens":
        tags = [tag for tag, _ in Elements(view).tags]
        assert set(tags) <= {"div", "span", "br"} and "\u202e" not in view
        return
    frame = re.fullmatch(
        r'<iframe srcdoc="([^"]*)" title="(?:Attention|Circuit|Logit lens)" sandbox="allow-scripts"[^>]*></iframe>',
        view._repr_html_(),
    )
    assert frame and html.unescape(frame[1]) == view
    assert view.count("<script") == 2 and "window.ran=1</script>" not in view and "default-src 'none'" in view
    assert not re.search(r"https?://", view)  # nothing to load
    assert len(repr(view)) < 80
    view.save(tmp_path / "view.html")
    assert (tmp_path / "view.html").read_text(encoding="utf-8") == view


def test_colours_follow_the_numbers() -> None:
    view = token_view(["a", "b", "c\n", "d"], [2.0, -1.0, 0.0, np.nan], "logit")
    found = re.findall(r'title="([^"]*)" style="background:rgba\((\d+),(\d+),(\d+),([\d.]+)\)', view)
    assert [(title, float(share)) for title, *_, share in found] == [("2", 1.0), ("-1", 0.5), ("0", 0.0), ("nan", 0.3)]
    assert int(found[0][1]) > int(found[0][3]) and int(found[1][1]) < int(found[1][3])  # orange above zero, blue below
    assert "logit: -1 to 2" in view and view.count("<br>") == 1


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: attention_view(PATTERN[0]), ValueError, r"patterns has shape \[4, 6, 6\], and \[L, H, T, T\]"),
        (lambda: attention_view(PATTERN[..., :4]), ValueError, "as many queries as keys"),
        (lambda: attention_view(PATTERN.swapaxes(2, 3)), ValueError, "attention to later tokens"),
        (lambda: attention_view(PATTERN, ["a"]), ValueError, "tokens has 1 texts, and 6 are needed"),
        (lambda: attention_view(PATTERN, layer=3), ValueError, "layer is 3, and there are 0, 1, 2"),
        (lambda: attention_view(PATTERN, head=4), ValueError, "head is 4, and must be 0 to 3"),
        (lambda: attention_view(PATTERN, layers=[1]), ValueError, "layers has 1 numbers"),
        (lambda: attention_view(PATTERN, layers=[1, 1, 2]), ValueError, "names one of them twice"),
        (lambda: attention_view(PATTERN, head=1.5), TypeError, "head is 1.5, and an integer is needed"),
        (lambda: attention_view(-PATTERN), ValueError, "values from -1 to -?0, and weights of attention are 0 to 1"),
        (lambda: attention_view(PATTERN * np.nan), ValueError, "values from nan to nan"),
        (lambda: lens_view([[{"layer": 0, "predictions": [("a", np.nan)]}]]), ValueError, "not finite"),
        (lambda: attention_view(np.zeros((30, 30, 140, 140), np.float32)), ValueError, r"MB of patterns.*layers=\[…\]"),
        (lambda: lens_view([{"layer": 0, "predictions": [("a", 1.0)]}]), TypeError, "one entry for each position"),
        (lambda: circuit_view(CIRCUIT, 0), ValueError, "n is 0, and must be at least 1"),
        (lambda: circuit_view(Scores(SCORES, GRAPH)), TypeError, r"circuit is a Scores.*scores\.top\(40\)"),
        (lambda: lens_view([]), TypeError, "one entry for each position"),
        (lambda: token_view(["a"], [1.0, 2.0]), ValueError, "tokens has 1 texts, and 2 are needed"),
        (lambda: token_view("ab", [1.0, 2.0]), TypeError, "a list of 2 texts"),
    ],
)
def test_what_cannot_be_shown_is_refused(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_a_capture_without_patterns_says_how_to_get_them(adapter: LlamaAttentionAdapter) -> None:
    with pytest.raises(ValueError, match="capture_patterns=True"):
        attention_view(adapter.capture(IDS, CaptureConfig(capture_patterns=False)))
    with pytest.raises(ValueError, match="a capture knows its own"):
        attention_view(adapter.capture(IDS), layers=[0, 1, 2])
