"""The page of a report: its numbers beside other computations of them, its text as data, what it refuses."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from oculi_jax import forward, lens
from oculi_jax.diagnostics import head_scores
from oculi_jax.intervention import HeadAblation, InterventionContext
from oculi_jax.pages import measure, measured, report
from oculi_jax.webpage.visible import visible_prompt, visible_token

from ..margins import assert_leads
from ..token_texts import token_text
from ..tolerances import ROUTES
from .pages import HOSTILE, PROMPT, Elements, content, softmax, triangles


def test_the_answer_and_the_lens_are_those_of_the_model(facts, data, ids) -> None:
    out = forward(facts.model, ids, capture="resid_post")
    p = softmax(out.logits[-1])
    best = int(p.argmax())
    words = data["words"]
    assert visible_token(token_text(facts.tokenizer, best)) == words[data["target"]["word"]] == "␣Paris"
    assert abs(data["target"]["logProbability"] - np.log(p[best])) < ROUTES
    assert abs(data["target"]["logit"] - float(out.logits[-1, best])) < ROUTES * abs(float(out.logits[-1, best]))
    np.testing.assert_allclose(data["next"]["probabilities"], np.sort(p)[::-1][:5], atol=ROUTES)

    everywhere = lens(facts.model, out.activations["resid_post"])
    assert_leads(everywhere)  # so the likeliest tokens below are in no doubt
    everywhere = softmax(everywhere)
    n_layers, n_tokens, _ = everywhere.shape
    assert np.shape(data["lens"]["words"]) == (n_layers, n_tokens, 5) and n_tokens == len(data["tokens"])
    np.testing.assert_allclose(
        data["lens"]["probabilities"], np.sort(everywhere, axis=-1)[..., ::-1][..., :5], atol=ROUTES
    )
    np.testing.assert_allclose(data["lens"]["target"], everywhere[..., best], atol=ROUTES)
    top = everywhere.argmax(axis=-1)
    for layer, t in np.ndindex(n_layers, n_tokens):
        said = words[data["lens"]["words"][layer][t][0]]
        assert said == visible_token(token_text(facts.tokenizer, top[layer, t]))
    assert [words[i] for i in data["tokens"]] == [visible_token(token_text(facts.tokenizer, i)) for i in ids]


@pytest.mark.torch
def test_patterns_are_hugging_faces(data, ids) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from oculi_jax.embedded import embedded_directory

    hf = AutoModelForCausalLM.from_pretrained(
        embedded_directory(), dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        theirs = hf(torch.tensor(ids[None].astype(np.int64)), output_attentions=True).attentions
    stored = triangles(data)
    assert data["attention"]["selection"] == "all"
    assert len(stored) == len(theirs) * theirs[0].shape[1]
    for (layer, head), rows in zip(data["attention"]["heads"], stored, strict=True):
        want = theirs[layer][0, head].numpy()
        for t, row in enumerate(rows):
            np.testing.assert_allclose(row, want[t, : t + 1], atol=1 / 65535 + 3e-5)


def test_effects_are_those_of_single_ablated_runs(facts, data, ids) -> None:
    def answer(*interventions: Any) -> float:
        logits = np.asarray(forward(facts.model, ids, list(interventions)).logits[-1], np.float64)
        return float(logits[target] - logits[rival])

    target = facts.tokenizer.convert_tokens_to_ids("▁Paris")
    plain_logits = np.asarray(forward(facts.model, ids).logits[-1])
    assert_leads(plain_logits, 2)
    rival = int(np.argsort(plain_logits)[-2])  # the target is the likeliest
    assert plain_logits.argmax() == target and data["words"][data["rival"]["word"]] == visible_token(
        token_text(facts.tokenizer, rival)
    )
    assert abs(data["rival"]["logit"] - plain_logits[rival]) < 1e-3
    plain, effects = answer(), np.array(data["ablation"])
    assert np.abs(effects).max() > 0.1  # some head matters, so a page of zeros would not pass
    for layer, head in np.ndindex(effects.shape):
        assert abs(answer(HeadAblation(layer, head)) - plain - effects[layer, head]) < ROUTES * 10


def test_shares_sum_to_the_logit_and_heads_to_attention(facts, data, ids) -> None:
    parts = data["attribution"]
    logit = float(forward(facts.model, ids).logits[-1].max())
    total = parts["embedding"] + sum(parts["attention"]) + sum(parts["mlp"]) + parts["other"]
    assert abs(total - logit) < 1e-3 and abs(parts["error"]) < 1e-3 and abs(parts["other"]) < 1e-3
    np.testing.assert_allclose(np.sum(parts["heads"], axis=1), parts["attention"], atol=1e-3)
    assert np.ptp(parts["mlp"]) > 0.1  # layers differ, so an order that is wrong would show
    # The last MLP's share by hand: its output, through the final norm with this run's scale, to one row of the unembedding.
    out = forward(facts.model, ids, capture=("mlp_out", "final_scale")).activations
    model = facts.model
    gain = np.asarray(model.norm.weight[...]) * np.asarray(out["final_scale"])[-1]
    row = np.asarray(model.lm_head.weight)[facts.tokenizer.convert_tokens_to_ids("▁Paris")]
    for layer, value in enumerate(parts["mlp"]):
        assert abs(float(np.asarray(out["mlp_out"])[layer, -1] * gain @ row) - value) < 1e-3


def test_scores_are_named_as_they_are(facts, data) -> None:
    found = head_scores(facts.model, n_sequences=8, length=50)
    assert (data["scores"]["sequences"], data["scores"]["repeat"]) == (8, 50)
    kinds = {kind["name"]: kind for kind in data["scores"]["kinds"]}
    assert set(kinds) == set(found.standard_error) and len({str(kind["values"]) for kind in kinds.values()}) == 7
    for name, kind in kinds.items():
        np.testing.assert_allclose(kind["values"], getattr(found, name), atol=ROUTES)
        np.testing.assert_allclose(kind["errors"], found.standard_error[name], atol=ROUTES)


def test_the_page_is_one_file_that_runs_its_own_script_alone(html) -> None:
    found = Elements(html)
    assert not [tag for tag, _ in found.tags if tag in ("iframe", "object", "embed", "img", "base", "form")]
    for tag, attributes in found.tags:
        assert "src" not in attributes and "srcset" not in attributes, tag
        assert (attributes.get("href") or "#").startswith(("#", "data:")), attributes
        assert not [name for name in attributes if name.startswith("on")] and "style" not in attributes
    assert not re.search(r"https?://|@import|url\(|fetch\(|XMLHttpRequest|innerHTML|eval\(", html)
    policy = next(a["content"] for t, a in found.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy and policy.startswith("default-src 'none'; ") and "unsafe" not in policy
    inline = [(tag, text) for tag, attributes, text in found.inline if "type" not in attributes]
    assert [tag for tag, _ in inline] == ["style", "script"]
    for tag, text in inline:
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_text_is_data(hostile) -> None:
    assert content(hostile)["prompt"] == visible_prompt(HOSTILE)
    assert "<img" not in hostile and hostile.count("<script") == 2
    raw = hostile[hostile.index('id="data">') + 10 :]
    assert "<" not in raw[: raw.index("</script>")] and "\u2028" not in hostile and "\u202e" not in hostile


@pytest.mark.parametrize(
    ("text", "token", "prompt"),
    [
        (" Paris", "␣Paris", " Paris"),
        ("\n\t", "\\n\\t", "\\n\n\\t"),
        ("\\n", "\\\\n", "\\\\n"),
        ("a b  ", "a␣b␣␣", "a b  "),
        ("", "''", ""),
        ("\u2028\u202e\x00", "\\u2028\\u202e\\x00", "\\u2028\\u202e\\x00"),
        ("\u0301", "◌\u0301", "\u0301"),
        ("␣", "\\u2423", "\\u2423"),
        ("🦙é", "🦙é", "🦙é"),
    ],
)
def test_what_is_invisible_is_written_out(text: str, token: str, prompt: str) -> None:
    assert visible_token(text) == token and visible_prompt(text) == prompt


def test_a_page_holds_the_heads_asked_for_or_the_strongest_that_fit(facts, ids, monkeypatch) -> None:
    given = measure(facts, PROMPT, heads=[(3, 1), (0, 5), (3, 1)], target="Berlin")
    assert given.heads == [(0, 5), (3, 1)] and given.selection == "given"
    assert given.chosen and facts.tokenizer.decode([given.target]) == "Berlin"
    patterns = np.asarray(forward(facts.model, ids, capture="pattern").activations["pattern"])
    np.testing.assert_allclose(given.patterns, patterns[[0, 3], [5, 1]], atol=ROUTES)

    monkeypatch.setattr(measured, "PATTERN_BYTES", 4 * len(ids) * (len(ids) + 1))
    some = measure(facts, PROMPT)
    best = [np.abs(some.effects), *(some.scores[name] for name in ("induction", "previous_token", "duplicate_token"))]
    tops = [tuple(map(int, np.unravel_index(value.argmax(), value.shape))) for value in best]
    assert some.selection == "strongest" and len(some.heads) == 4 and set(tops) <= set(some.heads)
    for (layer, head), pattern in zip(some.heads, some.patterns, strict=True):
        np.testing.assert_allclose(pattern, patterns[layer, head], atol=ROUTES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(heads=[(4, 0)]), "There is no head L4H0: this model has layers 0 to 3, each with heads 0 to 5."),
        (dict(heads=[(0, -1)]), "There is no head L0H-1"),
        (dict(heads=[]), "heads is empty"),
        (dict(text="The " * 200), "made for at most 128"),
        (dict(target="Paris is"), "is not one token"),
    ],
)
def test_what_cannot_be_shown_is_refused_before_anything_runs(facts, monkeypatch, changes, message: str) -> None:
    monkeypatch.setattr(measured, "forward", None)
    arguments = {"text": PROMPT, **changes}
    with pytest.raises(ValueError, match=re.escape(message)):
        report(facts, arguments.pop("text"), **arguments)


def test_prompts_too_long_for_a_page_and_contexts_are_refused(facts, monkeypatch) -> None:
    monkeypatch.setattr(measured, "MOST_CELLS", 20)
    with pytest.raises(ValueError, match=r"has 6 tokens, and a page of a model of 4 layers takes at most 5"):
        report(facts, PROMPT)
    with (
        InterventionContext(facts, HeadAblation(0, 0)),
        pytest.raises(ValueError, match="inside an InterventionContext"),
    ):
        report(facts, PROMPT)
    with pytest.raises(TypeError, match="a list was given"):
        report(facts, [PROMPT])  # type: ignore[arg-type]


# ---------------------------------------------------------------- the command


def test_a_page_shows_itself_and_saves_itself(trained, tmp_path: Path) -> None:
    """In a notebook it is a frame of its own, in which the whole page is data."""
    import html

    import oculi_jax

    adapter = trained
    found = oculi_jax.report(adapter.model, PROMPT, tokenizer=adapter.tokenizer)
    frame = re.fullmatch(r'<iframe srcdoc="([^"]*)"[^>]*></iframe>', found._repr_html_())
    assert frame and html.unescape(frame[1]) == found == oculi_jax.report(adapter, PROMPT)
    found.save(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == found
    with pytest.raises(TypeError, match="needs a tokenizer"):
        oculi_jax.report(adapter.model, PROMPT)
