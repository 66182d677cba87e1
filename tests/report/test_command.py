"""`oculi report`."""

from __future__ import annotations

from pathlib import Path

import pytest

import oculi_jax
from oculi_jax.cli import report as command
from oculi_jax.models.llama import LlamaAttentionAdapter
from oculi_jax.webpage.page import Page

from .pages import PROMPT, content


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch, facts: LlamaAttentionAdapter) -> None:
    monkeypatch.setattr(command, "open_adapter", lambda *arguments, chat: facts)


def test_oculi_report_writes_the_page(loaded, html, tmp_path: Path, oculi_here) -> None:
    code, out, err = oculi_here("report", PROMPT, "-o", str(tmp_path / "x.html"))
    assert code == 0 and err == "", err
    assert (tmp_path / "x.html").read_text(encoding="utf-8") == html
    assert f"Wrote {tmp_path / 'x.html'} (0.1 MB)" in out
    chosen = ("--heads", "L3H1, l0h5", "--target", "Berlin")
    code, out, err = oculi_here("report", PROMPT, *chosen, "-o", str(tmp_path / "x.html"))
    data = content((tmp_path / "x.html").read_text(encoding="utf-8"))
    assert data["attention"]["heads"] == [[0, 5], [3, 1]] and data["words"][data["target"]["word"]] == "␣Berlin"


def test_oculi_report_writes_whole_or_not_at_all(loaded, monkeypatch, tmp_path: Path, oculi_here) -> None:
    (tmp_path / "x.html").write_text("before")
    text = Page("x" * 100_000 + "\ud800")  # which is no UTF-8
    monkeypatch.setattr(oculi_jax, "report", lambda *a, **k: text)
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
