"""The notebooks: each runs and prints what is committed, and what it shows answers to the pointer in a browser, offline."""

from __future__ import annotations

import functools
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import jax
import nbformat
import numpy as np
import pytest

from oculi_jax import forward

from .test_guide import difference

BOOKS = Path(__file__).parents[1] / "docs" / "notebooks"
NAMES = sorted(path.stem for path in BOOKS.glob("*.ipynb"))


def printed(notebook: Any) -> list[str]:
    """What the cells of a notebook print, but for warnings."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output["text"] for output in outputs if output.get("name") == "stdout").splitlines()


@functools.cache
def executed(name: str) -> Any:
    """A notebook, run from its first cell to its last in a kernel of its own, in an empty folder."""
    from nbclient import NotebookClient

    notebook = nbformat.read(BOOKS / f"{name}.ipynb", as_version=4)
    env = {**os.environ, "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir or ""}
    with tempfile.TemporaryDirectory() as folder:
        here = {"metadata": {"path": folder}}
        NotebookClient(notebook, timeout=600, kernel_name="python3", resources=here).execute(env=env)
    return notebook


def test_the_notebooks_are_there() -> None:
    assert NAMES == ["a-circuit", "first-look"]


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_prints_what_is_committed(name: str) -> None:
    committed = nbformat.read(BOOKS / f"{name}.ipynb", as_version=4)
    code = [cell for cell in committed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))  # from the first to the last, once
    assert (BOOKS / f"{name}.ipynb").stat().st_size < 600_000
    ours, theirs = printed(executed(name)), printed(committed)
    assert len(ours) == len(theirs)
    assert not [said for pair in zip(ours, theirs, strict=True) if (said := difference(*pair))]
    # The same cells show the same kinds of things: pictures for those who see it on a code host, frames for the others.
    kinds = [
        [[sorted(o.get("data", {})) for o in c.get("outputs", [])] for c in book.cells]
        for book in (executed(name), committed)
    ]
    shown = [[[kind for kind in cell if kind] for cell in book] for book in kinds]
    assert shown[0] == shown[1]
    assert {"image/png", "text/html"} <= {k for cell in shown[1] for kind in cell for k in kind}
    # The frames that are committed run the scripts of now.
    frames = [[o["data"]["text/html"] for c in book.cells for o in c.get("outputs", []) if "<iframe" in str(o.get("data", {}).get("text/html"))] for book in (executed(name), committed)]  # fmt: skip
    scripts = [[re.findall(r"sha256-[\w+/=]+", frame)[:2] for frame in book] for book in frames]
    assert scripts[0] == scripts[1] and scripts[0]


@pytest.mark.browser
def test_a_notebook_answers_to_the_pointer(trained: Any, chromium: Any, tmp_path: Path) -> None:
    """Converted by nbconvert and opened as a file: every frame draws itself, and hovering a token shows its row."""
    from nbconvert import HTMLExporter

    # Jupyter's own page asks for MathJax and RequireJS; without them whatever is asked for is ours.
    exporter = HTMLExporter(mathjax_url="", require_js_url="", jquery_url="", mermaid_js_url="")
    file = tmp_path / "first-look.html"
    file.write_text(exporter.from_notebook_node(executed("first-look"))[0], encoding="utf-8")
    page = chromium.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(10_000)
    troubles: list[str] = []
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on(
        "request",
        lambda request: None if request.url.startswith(("file:", "data:", "about:")) else troubles.append(request.url),
    )
    page.goto(file.as_uri())

    text = "The capital of France is"
    ids = trained.tokenizer.encode(text)
    pattern = np.asarray(forward(trained.model, ids, capture="pattern")["pattern"])
    frames = page.locator("iframe")
    assert frames.count() == 3  # lens, attention, report
    attention = page.frame_locator("iframe >> nth=1")
    assert attention.locator("#picker canvas").count() == 24
    attention.locator("#picker [aria-label^='L2H5:']").click()
    for t in (3, 5, 1):
        attention.locator(f"#token-{t}").hover()
        shown = attention.locator("#chips li small").all_inner_texts()
        assert shown[t + 1 :] == ["later"] * (len(ids) - 1 - t)
        np.testing.assert_allclose([float(x) for x in shown[: t + 1]], pattern[2, 5, t, : t + 1], atol=6e-4)
        assert attention.locator("#row-details p").first.inner_text().endswith(f"(position {t}) in L2H5 attends to:")
    attention.locator("#head-select").select_option("L0H1")
    assert "in L0H1" in attention.locator("#row-details p").first.inner_text()

    lens = page.frame_locator("iframe >> nth=0")
    lens.locator("#lens-grid tbody tr").nth(3).locator("td").nth(5).hover()
    assert "(position 5), at layer 3" in lens.locator("#lens-details").inner_text()
    assert lens.locator("#lens-details th").first.inner_text() == "␣Paris"
    last = np.asarray(jax.nn.softmax(forward(trained.model, ids, logits="last").logits))
    chance = float(lens.locator("#lens-details td.number").first.inner_text())
    assert abs(chance - last.max()) < 6e-4

    report = page.frame_locator("iframe >> nth=2")
    assert report.locator("h1").inner_text().startswith("Inside")
    report.locator("#token-4").hover()
    assert "(position 4)" in report.locator("#row-details p").first.inner_text()
    assert page.locator("span[title]").count() >= 15  # the coloured text says its numbers
    page.close()
    assert not troubles
