"""What is wrong in a line is said at once: no library is imported for it, and no model loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SLOW = ("numpy", "jax", "flax", "transformers", "tokenizers", "safetensors", "matplotlib", "torch", "scipy")
# Every module costs time, which differs from run to run; their number does not.
REPORT = f"""
import atexit, sys
atexit.register(lambda: print("imported:", *sorted(set({SLOW!r}) & set(sys.modules))))
atexit.register(lambda: print("modules:", len(sys.modules)))
"""
HEAVY = f"""{REPORT}
from oculi_jax import cli
sys.argv[0] = "oculi"
cli.main()
"""
# A command of a line, which refuses an option: what typer and rich take.
PAID = f"""{REPORT}
import typer
def command(number: int = 0) -> None: ...
sys.argv = ["command", "--nope"]
typer.run(command)
"""

LINES = {
    "an option": (["lens", "x", "--nope"], "--nope"),
    "a command": (["lense", "x"], "lense"),
    "a number": (["lens", "x", "--top-k", "0"], "--top-k"),
    "no prompt": (
        ["sweep", "--target", "a"],
        "There is no prompt: give TEXT, or a file of prompts with --prompts FILE.",
    ),
    "no target": (["sweep", "x"], "--target is missing: the answer, one token"),
    "a directory": (["lens", "x", "-o", "{tmp}/no/x.png"], "there is no directory"),
    "a kind of picture": (["sweep", "x", "--target", "a", "-o", "{tmp}/x.xyz"], "must end in .png, .svg, .pdf"),
    "a page": (["report", "x", "-o", "{tmp}/x.pdf"], "must end in .html"),
    "heads of a page": (["report", "x", "-o", "{tmp}/x.html", "--heads", "3"], "--heads is '3'"),
    "a file of prompts": (["patch", "--prompts", "{tmp}/no.txt"], "and there is no such file"),
    "a direction": (["generate", "x", "-i", "steer:file={tmp}/no.npy,layer=1"], "there is no file"),
    "prompts to steer by": (
        ["steer", "--positive", "{tmp}/no.txt", "--negative", "{tmp}/no.txt"],
        "no.txt', and there is no such file",
    ),
    "a token to steer at": (
        ["steer", "--positive", "a", "--negative", "b", "--position", "last"],
        "--position is 'last', and an integer or mean is needed",
    ),
    "an intervention": (["generate", "x", "-i", "spectre:layer=1"], "Did you mean 'spectra'?"),
    "a model": (["attribute", "x", "--target", "a", "--model", "{tmp}/no/such"], "There is no directory"),
    "a file for a model": (["heads", "--model", "{tmp}/file"], "is a file; give the directory"),
    "a model to compare": (["doctor", "--model", "{tmp}/no/such"], "There is no directory"),
    "a site": (["capture", "x", "--sites", "patern", "-o", "{tmp}/x"], "did you mean 'pattern'"),
    "axes": (["patch", "a", "b", "--target", "a", "--by", "head"], "--by is 'head'"),
    "an ablation": (["circuit", "a", "b", "--target", "a", "--ablation", "means"], "Did you mean 'mean'?"),
    "a job": (["job", "{tmp}/no.toml"], "There is no file"),
    "a job's file": (["job", "{tmp}/file"], "is not TOML"),
    "a dtype": (["lens", "x", "--dtype", "float33"], "--dtype"),
    "a message": (["heads", "--chat"], "there is no --text"),
}


def ran(code: str, *arguments: str) -> tuple[int, set[str], subprocess.CompletedProcess]:
    """How many modules were imported, which slow ones, and what was said."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    done.stdout, found, counts = done.stdout.rpartition("modules: ")
    assert found, done.stderr
    count, imported = counts.split("imported:")
    return int(count), set(imported.split()), done


@pytest.fixture(scope="module")
def most() -> int:
    """Half as many modules again as a command of a line takes."""
    return ran(PAID)[0] * 3 // 2


@pytest.mark.parametrize("mistake", LINES)
def test_a_mistake_is_told_at_once(mistake: str, tmp_path: Path, most: int) -> None:
    (tmp_path / "file").write_text("x")
    arguments, message = LINES[mistake]
    modules, slow, done = ran(HEAVY, *(part.replace("{tmp}", str(tmp_path)) for part in arguments))
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert not done.stdout and not slow and modules <= most, (done.stdout, slow, modules, most)


@pytest.mark.parametrize("command", ["lens", "generate", "patch", "report"])
def test_help_and_completion_import_no_library(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERMINAL_WIDTH", "200")
    _, slow, done = ran(HEAVY, command, "--help")
    assert done.returncode == 0 and "--chat" in done.stdout and "--allow-longer" in done.stdout
    assert not slow
    monkeypatch.setenv("_OCULI_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", f"oculi {command} --ch")
    monkeypatch.setenv("COMP_CWORD", "2")
    monkeypatch.setenv("_TYPER_COMPLETE_ARGS", f"oculi {command} --ch")
    _, slow, done = ran(HEAVY)
    assert done.stdout.split() == ["--chat"] and not slow, os.linesep.join((done.stdout, done.stderr))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "x", "-i", "head:layer=9,head=2"], "there are 4 layers"),
        (["generate", "x", "-i", "spectra:layer=1,head=2,alpha=-1"], "alpha"),
        (["generate", "x", "--temperature", "1", "--top-p", "3"], "top_p is 3.0, and must be"),
        (["generate", "x", "--top-k", "5"], "temperature is 0, which is greedy"),
        (
            ["report", "x", "-o", "{tmp}/x.html", "--heads", "L99H0"],
            "There is no head L99H0: this model has layers 0 to 3",
        ),
        (["capture", "x", "--sites", "q", "--layers", "9", "-o", "{tmp}/x"], "this model has 4 layers"),
        (
            ["steer", "--positive", "{tmp}/four", "--negative", "{tmp}/four", "--layer", "4"],
            "--layer is 4, and this model has layers 0 to 3",
        ),
        (["circuit", "a", "b", "--target", "a", "--edges", "928"], "--edges is 928, and this model has 927"),
    ],
)
def test_what_a_model_cannot_have_is_told_before_it_is_loaded(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    """Which takes the library, and neither what reads weights nor what reads tokenizers."""
    (tmp_path / "four").write_text("a\nb\nc\nd")
    _, slow, done = ran(HEAVY, *(part.replace("{tmp}", str(tmp_path)) for part in arguments))
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert slow <= {"flax", "jax", "numpy"}, slow
