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
from oculi_jax.models.llama import LlamaAttentionAdapter
from oculi_jax.visualize import attention_view, lens_view, token_view

from .report.pages import HOSTILE, Elements, content, softmax, triangles
from .tiny import prompt, tiny_llama

MODEL = tiny_llama()  # L=3, H=4
IDS = prompt(6)
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


@pytest.mark.parametrize("name", ["attention", "lens", "tokens"])
def test_texts_are_data(name: str, tmp_path: Path) -> None:
    """No view lets a token's text be markup; those in frames run their own script alone."""
    words = [HOSTILE, "</script>", "<b>", "a", "\u202e", " "]
    rows = [{"layer": 0, "predictions": [(word, 0.5)]} for word in words[:1]]
    made: dict[str, Any] = {
        "attention": lambda: attention_view(PATTERN, words),
        "lens": lambda: lens_view([rows] * 6, words),
        "tokens": lambda: token_view(words, range(6), "<b>"),
    }
    view = made[name]()
    if name == "tokens":
        tags = [tag for tag, _ in Elements(view).tags]
        assert set(tags) <= {"div", "span", "br"} and "\u202e" not in view
        return
    frame = re.fullmatch(
        r'<iframe srcdoc="([^"]*)" title="(?:Attention|Logit lens)" sandbox="allow-scripts"[^>]*></iframe>',
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
