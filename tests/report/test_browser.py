"""The page of a report in a browser: pointing, keyboard, themes, widths, policy, paper."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from oculi_jax import forward, lens
from oculi_jax.pages import report
from oculi_jax.webpage.visible import visible_prompt, visible_token

from ..browser import open_browser, ways
from ..margins import assert_leads
from ..token_texts import token_text
from .pages import HOSTILE, SHOWN, softmax, triangles


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
    assert first == visible_token(token_text(facts.tokenizer, p[1, 3].argmax()))
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
