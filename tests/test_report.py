"""The page that `oculi report` writes: its numbers are those of single runs, and a browser shows them, loads nothing, runs no text."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from oculi_jax import embedded_model, forward, lens
from oculi_jax.cli import report as command
from oculi_jax.diagnostics import head_scores
from oculi_jax.intervention import HeadAblation, InterventionContext
from oculi_jax.models.llama import LlamaAttentionAdapter
from oculi_jax.pages import measure, measured, report
from oculi_jax.pages.visible import visible_prompt, visible_token

from .browser import open_browser, ways
from .margins import assert_leads
from .tolerances import ROUTES

PROMPT = "The capital of France is"
HOSTILE = "The capital </script><script>window.ran=1</script> <img src=x onerror=window.ran=1> \"of\" 'it' &amp; 🦙\n\u2028\u202e \\n is"
SHOWN = 6e-4  # a number of three decimals, and the rounding of what it was stored as


class Elements(HTMLParser):
    """What a page is made of: (tag, attributes), and the text of each script and style."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inline: list[tuple[str, dict[str, str | None], str]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        tag, attributes = self.tags[-1] if self.tags else ("", {})
        if tag in ("script", "style") and data.strip():
            self.inline.append((tag, attributes, data))


def content(html: str) -> dict[str, Any]:
    """The data of a page."""
    found = [text for tag, attributes, text in Elements(html).inline if attributes.get("id") == "data"]
    assert len(found) == 1
    return json.loads(found[0])


def triangles(data: dict[str, Any]) -> list[list[np.ndarray]]:
    """Rows of each head's pattern as the page stores them, decoded in a loop."""
    n_tokens, numbers = (
        len(data["tokens"]),
        np.frombuffer(base64.b64decode(data["attention"]["weights"]), "<u2") / 65535,
    )
    heads, at = [], 0
    for _ in data["attention"]["heads"]:
        rows = []
        for t in range(n_tokens):
            rows.append(numbers[at : at + t + 1])
            at += t + 1
        heads.append(rows)
    assert at == len(numbers)
    return heads


@pytest.fixture(scope="module")
def facts() -> LlamaAttentionAdapter:
    return LlamaAttentionAdapter(*embedded_model())


@pytest.fixture(scope="module")
def html(facts: LlamaAttentionAdapter) -> str:
    return report(facts, PROMPT)


@pytest.fixture(scope="module")
def data(html: str) -> dict[str, Any]:
    return content(html)


@pytest.fixture(scope="module")
def ids(facts: LlamaAttentionAdapter) -> np.ndarray:
    return np.array(facts.tokenizer.encode(PROMPT), np.int32)


def softmax(logits: Any) -> np.ndarray:
    return np.asarray(jax.nn.softmax(logits, axis=-1))


def test_the_answer_and_the_lens_are_those_of_the_model(facts, data, ids) -> None:
    out = forward(facts.model, ids, capture="resid_post")
    p = softmax(out.logits[-1])
    best = int(p.argmax())
    words = data["words"]
    assert facts.tokenizer.decode([best]) == words[data["target"]["word"]] == "Paris"
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
        assert said == visible_token(facts.tokenizer.decode([int(top[layer, t])]))
    assert [words[i] for i in data["tokens"]] == [visible_token(facts.tokenizer.decode([int(i)])) for i in ids]


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
    assert plain_logits.argmax() == target and data["words"][data["rival"]["word"]] == facts.tokenizer.decode([rival])
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


@pytest.fixture(scope="module")
def hostile(facts) -> str:
    return report(facts, HOSTILE, heads=[(0, 0)])


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
    with pytest.raises(TypeError, match="of one text, and a list was given"):
        report(facts, [PROMPT])  # type: ignore[arg-type]


# ---------------------------------------------------------------- the command


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch, facts: LlamaAttentionAdapter) -> None:
    monkeypatch.setattr(command, "open_adapter", lambda *arguments: facts)


def test_oculi_report_writes_the_page(loaded, html, tmp_path: Path, oculi_here) -> None:
    code, out, err = oculi_here("report", PROMPT, "-o", str(tmp_path / "x.html"))
    assert code == 0 and err == "", err
    assert (tmp_path / "x.html").read_text(encoding="utf-8") == html
    assert f"Wrote {tmp_path / 'x.html'} (0.1 MB)" in out
    chosen = ("--heads", "L3H1, l0h5", "--target", "Berlin")
    code, out, err = oculi_here("report", PROMPT, *chosen, "-o", str(tmp_path / "x.html"))
    data = content((tmp_path / "x.html").read_text(encoding="utf-8"))
    assert data["attention"]["heads"] == [[0, 5], [3, 1]] and data["words"][data["target"]["word"]] == "Berlin"


def test_oculi_report_writes_whole_or_not_at_all(loaded, monkeypatch, tmp_path: Path, oculi_here) -> None:
    (tmp_path / "x.html").write_text("before")
    text = "x" * 100_000 + "\ud800"  # which is no UTF-8
    monkeypatch.setattr(command, "make_report", lambda *a, **k: text)
    code, _, _ = oculi_here("report", PROMPT, "-o", str(tmp_path / "x.html"))
    assert code == 2 and [path.name for path in tmp_path.iterdir()] == ["x.html"]
    assert (tmp_path / "x.html").read_text() == "before"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "{tmp}/x.pdf"], "its name must end in .html, .htm"),
        (["-o", "{tmp}/no/x.html"], "there is no directory"),
        (["-o", "{tmp}"], "it is a directory"),
        (["-o", "{tmp}/x.html", "--heads", "17.3"], "--heads is '17.3'; write a layer and a head of each"),
        (["-o", "{tmp}/x.html", "--heads", ""], "--heads is ''"),
        (["-o", "{tmp}/x.html", "--heads", "L9H0"], "There is no head L9H0"),
        (["-o", "{tmp}/x.html", "--target", "Parisien"], "Parisien"),
    ],
)
def test_mistakes_are_one_line_and_code_2(loaded, tmp_path: Path, oculi_here, arguments, message: str) -> None:
    code, out, err = oculi_here("report", PROMPT, *(a.replace("{tmp}", str(tmp_path)) for a in arguments))
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1, err
    assert not list(tmp_path.iterdir()) and out == ""


def test_a_prompt_that_is_too_long_is_refused_in_the_words_of_the_command(loaded, tmp_path: Path, oculi_here) -> None:
    command = ("report", "The " * 130, "-o", str(tmp_path / "x.html"))
    code, _, err = oculi_here(*command)
    assert code == 2 and "made for at most 128" in err and "or give --allow-longer" in err and "allow_longer" not in err
    code, _, err = oculi_here(*command, "--allow-longer")
    assert code == 0, err
    assert len(content((tmp_path / "x.html").read_text(encoding="utf-8"))["tokens"]) == 131


# ---------------------------------------------------------------- the browser


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    try:
        with open_browser() as browser:
            yield browser
    except FileNotFoundError as error:
        # .ci/run asks for every test; elsewhere a machine without a browser still has the rest of the suite.
        (pytest.fail if os.environ.get("OCULI_TESTS") == "all" else pytest.skip)(str(error))


def test_without_a_browser_the_sentence_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHROMIUM", "/nowhere/chromium")
    with (
        pytest.raises(
            FileNotFoundError, match=r"no Chromium, Chrome or Edge here: .*playwright install.*/nowhere/chromium"
        ),
        open_browser(),
    ):
        pass
    monkeypatch.delenv("CHROMIUM")
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}" if name == "google-chrome" else None)
    assert ways("nowhere")[0] == {"executable_path": "/bin/google-chrome"}
    assert ways(__file__)[1] == {"executable_path": __file__}  # Playwright's own, where that is a file
    assert ways(__file__)[-1] == {"channel": "msedge"}


@pytest.fixture(scope="module")
def files(facts, html, hostile, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    pages = {
        "plain": html,
        "hostile": hostile,
        "single": report(facts, ""),
        "sure": re.sub(r'"logProbability":[^,}]+', '"logProbability":-2.13e-05', html),
    }
    for name, text in pages.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in pages}


@pytest.fixture
def visit(chromium, files) -> Iterator[Callable[..., Any]]:
    """Opens a page; in the end nothing may have gone wrong in it, and nothing been asked for but the file."""
    contexts, troubles = [], []

    def go(name: str = "plain", width: int = 1280, **options: Any) -> Any:
        context = chromium.new_context(viewport={"width": width, "height": 844}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(5000)
        url = files[name].as_uri()
        page.on("console", lambda message: troubles.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("dialog", lambda dialog: (troubles.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: None if request.url in (url, "data:,") else troubles.append(request.url))
        page.goto(url)
        return page

    yield go
    for context in contexts:
        context.close()
    assert not troubles


def weights(page: Any) -> list[str]:
    """What stands below each token of the prompt."""
    return page.locator("#chips li small").all_inner_texts()


def picture(page: Any) -> str:
    return page.evaluate("document.querySelector('#matrix').toDataURL()")


def focused(page: Any) -> str:
    """Which widget has the focus: the id of the element, or of the nearest ancestor that has one."""
    return page.evaluate(
        "(document.activeElement.id.startsWith('token-') ? document.activeElement.parentElement : document.activeElement).closest('[id]')?.id ?? ''"
    )


def chosen(page: Any) -> str:
    return page.locator("#head-card dd").first.inner_text()


def rows_of(data: dict[str, Any], name: str) -> list[np.ndarray]:
    heads = [f"L{layer}H{head}" for layer, head in data["attention"]["heads"]]
    return triangles(data)[heads.index(name)]


def assert_row(page: Any, rows: list[np.ndarray], t: int) -> None:
    shown = weights(page)
    assert shown[t + 1 :] == ["later"] * (len(rows) - 1 - t)
    np.testing.assert_allclose([float(text) for text in shown[: t + 1]], rows[t], atol=SHOWN)


@pytest.mark.browser
def test_pointing_at_a_token_shows_its_row(visit, facts, ids) -> None:
    page = visit()
    pattern = np.asarray(forward(facts.model, ids, capture="pattern").activations["pattern"])
    page.select_option("#head-select", "L2H5")
    for t in (3, 0, 5):
        page.hover(f"#token-{t}")
        assert_row(page, [row[: i + 1] for i, row in enumerate(pattern[2, 5])], t)
        ranking = page.locator("#row-details td.number").all_inner_texts()
        np.testing.assert_allclose([float(x) for x in ranking], np.sort(pattern[2, 5, t, : t + 1])[::-1], atol=SHOWN)
        assert page.locator("#row-details p").first.inner_text().endswith(f"(position {t}) in L2H5 attends to:")
    page.click("#token-4")
    page.hover("#token-1")
    page.hover("h1")  # the row that was clicked comes back
    assert_row(page, [row[: i + 1] for i, row in enumerate(pattern[2, 5])], 4)

    # The picture: the colour in the middle of each cell is as far from --low to --high as the root of the weight.
    low, high = page.evaluate("[colour('--low'), colour('--high')]")
    cells = [(5, 0), (5, 3), (2, 1), (4, 4)]
    pixels = page.evaluate(
        """(cells) => { const canvas = document.querySelector('#matrix'), at = (start, i) => Math.round((start + (i + 0.5) * matrix.size) * devicePixelRatio);
        const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
        return cells.map(([t, s]) => 4 * (at(matrix.top, t) * canvas.width + at(matrix.left, s))).map((i) => [...data.slice(i, i + 3)]); }""",
        cells,
    )
    for (t, s), pixel in zip(cells, pixels, strict=True):
        want = np.array(low) + (np.array(high) - low) * np.sqrt(pattern[2, 5, t, s])
        np.testing.assert_allclose(pixel, want, atol=1.6)
    page.locator("#matrix").scroll_into_view_if_needed()
    box = page.evaluate("(({x, y}) => [x, y])(document.querySelector('#matrix').getBoundingClientRect())")
    left, top, size = page.evaluate("[matrix.left, matrix.top, matrix.size]")
    page.mouse.move(box[0] + left + 1.5 * size, box[1] + top + 3.5 * size)
    assert_row(page, [row[: i + 1] for i, row in enumerate(pattern[2, 5])], 3)
    said = re.search(r": (\d\.\d{3})$", page.locator("#row-details p").nth(1).inner_text())
    assert said and abs(float(said[1]) - pattern[2, 5, 3, 1]) < SHOWN


@pytest.mark.browser
def test_a_head_is_chosen_by_mouse_select_and_keyboard(visit, data) -> None:
    page = visit()
    effects = np.abs(data["ablation"])
    best = "L{}H{}".format(*np.unravel_index(effects.argmax(), effects.shape))
    assert chosen(page) == best and page.input_value("#head-select") == best
    seen = {picture(page)}

    def now(name: str) -> None:
        page.mouse.move(1, 1)  # a grid that was scrolled under the pointer tells of what is there
        assert chosen(page) == page.input_value("#head-select") == name
        assert_row(page, rows_of(data, name), 5)
        marked = page.locator(f"#picker [aria-label^='{name}:'], #ablation-grid [aria-label^='{name}:']")
        assert marked.evaluate_all("cells => cells.map((cell) => cell.ariaSelected)") == ["true", "true"]
        assert page.locator("#scores-grid [aria-selected=true]").count() == 1
        for told in ("scores", "ablation", "shares"):
            assert page.inner_text(f"#{told}-details").startswith(f"{name}: ")
        image = picture(page)
        assert image not in seen
        seen.add(image)

    page.click("#picker [aria-label^='L2H4:']")
    now("L2H4")
    page.keyboard.press("ArrowRight")
    now("L2H5")
    page.keyboard.press("ArrowUp")
    now("L1H5")
    page.select_option("#head-select", "L3H4")
    now("L3H4")
    page.click("#head-after")
    now("L3H5")
    page.click("#ablation-grid [aria-label^='L2H0:']")
    now("L2H0")
    page.focus("#shares-grid [tabindex='0']")
    page.keyboard.press("Home")
    page.keyboard.press("Control+Home")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    now("L1H0")


@pytest.mark.browser
def test_cells_say_their_numbers(visit, facts, data, ids) -> None:
    page = visit()
    resid = forward(facts.model, ids, capture="resid_post").activations["resid_post"]
    by_lens = lens(facts.model, resid)
    p = softmax(by_lens)
    page.hover("#lens-grid tbody tr:nth-child(2) td:nth-of-type(4)")  # layer 1, position 3
    shown = page.locator("#lens-details td.number").all_inner_texts()
    np.testing.assert_allclose([float(x) for x in shown], np.sort(p[1, 3])[::-1][:5], atol=SHOWN)
    assert_leads(by_lens[1, 3])
    first = page.locator("#lens-details th").first.inner_text()
    assert first == visible_token(facts.tokenizer.decode([int(p[1, 3].argmax())]))
    assert "(position 3), at layer 1" in page.inner_text("#lens-details")

    page.hover("#ablation-grid [aria-label^='L1H4:']")
    effect = data["ablation"][1][4]
    assert page.inner_text("#ablation-details").startswith(f"L1H4: without it {effect:+.3f}".replace("-", "−"))
    page.select_option("#score-select", "induction")
    kind = next(kind for kind in data["scores"]["kinds"] if kind["name"] == "induction")
    page.hover("#scores-grid [aria-label^='L3H2:']")
    assert f"induction {kind['values'][3][2]:.3f} ± {kind['errors'][3][2]:.3f}" in page.inner_text("#scores-details")
    np.testing.assert_allclose(
        [float(x) for x in page.locator("#scores-grid tbody td").all_inner_texts()], np.ravel(kind["values"]), atol=6e-3
    )
    parts = data["attribution"]
    numbers = [x.replace("−", "-") for x in page.locator("#parts td span").all_inner_texts()]
    want = [parts["embedding"], *np.stack([parts["attention"], parts["mlp"]], axis=1).ravel()]
    np.testing.assert_allclose([float(x) for x in numbers], want, atol=SHOWN)
    assert f"miss the logit {data['target']['logit']:+.3f}" in page.inner_text("#parts-sum")


@pytest.mark.browser
def test_a_log_probability_of_almost_nothing_is_not_shown_as_nothing(visit, data) -> None:
    assert "(log-probability −0.00002 nats)" in visit("sure").inner_text("#target-line")
    value = data["target"]["logProbability"]
    assert value < -5e-4 and f"(log-probability −{-value:.3f} nats)" in visit().inner_text("#target-line")


STOPS = ["theme", "lens-grid", "head-before", "head-select", "head-after", "picker", "chips", "score-select", "scores-grid",
         "ablation-grid", "shares-grid"]  # fmt: skip


@pytest.mark.browser
def test_everything_is_reached_by_keyboard(visit, data) -> None:
    page = visit()
    stops = []
    for _ in range(30):
        page.keyboard.press("Tab")
        if (name := focused(page)) not in stops:
            stops.append(name)
        visible = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert visible == "solid" or name not in STOPS, name
        if name == STOPS[-1]:
            break
    assert [name for name in stops if name in STOPS] == STOPS
    page.keyboard.press("Shift+Tab")
    assert focused(page) == "ablation-grid"  # a grid is one stop

    page.focus("#lens-grid [tabindex='0']")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowLeft")
    assert "(position 4), at layer 2" in page.inner_text("#lens-details")
    page.focus("#chips [tabindex='0']")
    for key, t in (("ArrowLeft", 4), ("Home", 0), ("ArrowLeft", 0), ("ArrowRight", 1), ("End", 5)):
        page.keyboard.press(key)
        assert_row(page, rows_of(data, chosen(page)), t)
    assert page.locator("[aria-live=polite]").count() >= 6


def luminance(colour: str) -> float:
    """WCAG 2.2's relative luminance of a computed colour."""
    numbers = [float(x) for x in re.findall(r"[\d.]+", colour)[:3]]
    values = np.array(numbers) if colour.startswith("color(") else np.array(numbers) / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrasts(page: Any, selector: str) -> list[float]:
    pairs = page.evaluate(
        """(selector) => [...document.querySelectorAll(selector)].map((cell) => {
        const style = getComputedStyle(cell);
        const paper = style.backgroundColor === 'rgba(0, 0, 0, 0)' ? document.body : cell;
        return [style.color, getComputedStyle(paper).backgroundColor]; })""",
        selector,
    )
    lights = [sorted((luminance(ink), luminance(paper))) for ink, paper in pairs]
    return [(high + 0.05) / (low + 0.05) for low, high in lights]


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_themes_are_legible_and_the_button_changes_them(visit, scheme: str) -> None:
    page = visit(color_scheme=scheme, reduced_motion="reduce")
    other = "light" if scheme == "dark" else "dark"

    def is_now(theme: str) -> None:
        paper = luminance(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert (paper > 0.5) == (theme == "light")
        assert page.get_attribute("#theme", "aria-pressed") == str(theme == "dark").lower()
        for selector in (".shade", ".soft", "th", ".lead", ".readout"):
            found = contrasts(page, selector)
            assert found and min(found) >= 4.5, selector

    is_now(scheme)
    image = picture(page)
    page.click("#theme")
    is_now(other)
    assert picture(page) != image  # the canvas follows
    page.click("#theme")
    is_now(scheme)
    assert picture(page) == image
    assert page.evaluate("getComputedStyle(document.documentElement).scrollBehavior") == "auto"
    page.emulate_media(reduced_motion="no-preference")
    assert page.evaluate("getComputedStyle(document.documentElement).scrollBehavior") == "smooth"


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", ["plain", "hostile", "single"])
def test_the_page_never_scrolls_sideways(visit, name: str, width: int) -> None:
    page = visit(name, width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    inside = page.evaluate(
        "[...document.querySelectorAll('section, aside, .scroll, canvas, #prompt')].filter((e) => !e.closest('.scroll') || e.matches('.scroll')).map((e) => e.getBoundingClientRect().right)"
    )
    assert max(inside) <= width
    if name == "hostile":  # and what is wider scrolls in its box
        assert page.evaluate(
            "(({scrollWidth, clientWidth}) => scrollWidth > clientWidth)(document.querySelector('#lens-box'))"
        )


@pytest.mark.browser
def test_a_hostile_prompt_is_text(visit) -> None:
    page = visit("hostile")
    assert page.locator("#prompt").evaluate("(e) => e.textContent") == visible_prompt(HOSTILE)
    assert page.evaluate("window.ran") is None and page.locator("img").count() == 0
    assert page.locator("script").count() == 2
    assert "This page holds the one head that was asked for, and fades the others." in page.inner_text("#attention")
    # A head whose pattern is not here cannot be chosen, and that is said.
    page.click("#ablation-grid [aria-label^='L3H3:']")
    assert chosen(page) == "L0H0" and "Its pattern is not in this page." in page.inner_text("#ablation-details")


@pytest.mark.browser
def test_the_policy_holds_against_what_gets_in(chromium, files) -> None:
    """Were there a way for markup to get in, the page would neither run it nor ask for anything."""
    page = chromium.new_page()
    refused: list[tuple[str, str | None]] = []
    page.on("requestfailed", lambda request: refused.append((request.url, request.failure)))
    page.goto(files["plain"].as_uri())
    page.evaluate(
        """() => { const script = document.createElement('script');
        script.textContent = 'window.ran = 1';
        document.body.append(script);
        document.body.insertAdjacentHTML('beforeend', '<img src="http://127.0.0.1:9/x.png" onerror="window.ran = 2"><p id="styled" style="color: red">x</p>'); }"""
    )
    page.wait_for_timeout(100)
    assert page.evaluate("fetch('http://127.0.0.1:9/').then(() => 'sent', () => 'refused')") == "refused"
    assert page.evaluate("window.ran") is None
    assert page.evaluate("getComputedStyle(document.querySelector('#styled')).color") != "rgb(255, 0, 0)"
    assert refused == [("http://127.0.0.1:9/x.png", "csp")]  # by the policy, before anything was sent
    page.close()


@pytest.mark.browser
def test_paper_is_white_and_the_screen_comes_back(visit) -> None:
    page = visit(color_scheme="dark")
    image = picture(page)
    page.evaluate(
        "addEventListener('beforeprint', () => { window.printed = getComputedStyle(document.body).backgroundColor; })"
    )
    assert page.pdf().startswith(b"%PDF")
    assert page.evaluate("window.printed") == "rgb(255, 255, 255)"
    assert page.get_attribute("html", "data-theme") is None and picture(page) == image
